"""Python imports this first where the folder is on PYTHONPATH: the process, and every one that it
starts, has the emulated device."""

import emulated_cuda

emulated_cuda.install()
