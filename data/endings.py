"""How a program ends when it is told to: one line, no traceback, nothing half-written.

    import endings
    if __name__ == "__main__":
        endings.begin()  # before imports that take seconds
    ...
    if __name__ == "__main__":
        sys.exit(endings.run(main))

Ctrl-C, SIGTERM and SIGHUP become an exception in `main`, so that its `with` and `finally` blocks
clean up; the status is 130, 143 or 129. What the caller ignores (nohup) stays ignored. A reader of
the output that ends early, such as head, is no error.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NoReturn, TextIO

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


class Stopped(KeyboardInterrupt):
    """One of SIGNALS, its number the argument."""


def begin() -> None:
    """Until `run` is called a signal ends the process at once: there is nothing to clean up."""
    listen(stop_at_once)
    open_closed()


def open_closed() -> None:
    """Give standard streams that the caller closed a place to go; else a file opened next would
    have their number, and what is said would be written into it."""
    for number, name in ((0, ""), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # has the lowest free number
        if name and not getattr(sys, name):
            setattr(sys, name, open(os.devnull, "w"))


def listen(handler: Callable[[int, Any], None]) -> None:
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def stop_at_once(number: int, _: Any) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(128 + number)


def stop(number: int, _: Any) -> NoReturn:
    for each in SIGNALS:  # a second one does not disturb the cleaning up
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)


def run(main: Callable[[], int], after: str = "nothing half-written is left") -> int | str | None:
    """The exit status of main(); a signal ends the process here, `after` in its line."""
    try:
        listen(stop)
        open_closed()
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # names in no encoding of theirs
        try:
            status = main()
        except SystemExit as leaving:  # argparse's
            status = leaving.code
        with forgiving(sys.stdout):
            sys.stdout.flush()
        listen(stop_at_once)
    except Stopped as stopped:
        say(f"interrupted; {after}", sys.stderr)
        os._exit(128 + stopped.args[0])  # without waiting for threads
    return status


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A signal that comes within waits for the end of the block: for a few renames, no more."""
    came: list[int] = []
    mine = [number for number in SIGNALS if signal.getsignal(number) is stop]
    for number in mine:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, stop)
        if came:
            stop(came[0], None)


def in_thread(work: Callable[[], Any], each_second: Callable[[], Any] = lambda: None) -> Any:
    """work(), long and without Python in it: meanwhile this thread can hear a signal, and calls
    `each_second`."""
    pool = ThreadPoolExecutor(1)
    try:
        running = pool.submit(work)
        while wait([running], timeout=1).not_done:
            each_second()
        return running.result()
    finally:
        pool.shutdown(wait=False)


def say(line: str, stream: TextIO | None = None) -> None:
    """Print a line at once, on standard output where no stream is given."""
    with forgiving(stream or sys.stdout):
        print(line, file=stream, flush=True)


@contextlib.contextmanager
def forgiving(stream: TextIO) -> Iterator[None]:
    """Where nobody reads a stream any more, the rest of it goes nowhere."""
    try:
        yield
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
