"""Python imports this first where the folder is on PYTHONPATH: the process, and every one that it
starts with this Python, has the emulated device."""

from importlib.util import find_spec

if find_spec("torch"):
    import emulated_cuda

    emulated_cuda.install()
