"""What a program asked of the emulated device, with the place in the program that asked.

    with counted() as tally:
        trainer.update(1.0)
    tally.total("wait"), tally.by_function("launch")
    with counted(work=True) as tally:  # bytes and FLOPs, too, which takes time
        trainer.update(1.0)
    tally.bytes, tally.flops

Kinds of events, each of which costs the host something:

    launch         an operation that computes; a replay of a graph is one, a _foreach_ or fused
                   optimizer as many as its tensors need
    collective     between ranks
    wait           the host stands until the device is done: item, nonzero, synchronize, ...
    h2d blocking   a copy from the host that waits, too: of memory that is not pinned, or without
                   non_blocking
    h2d async      one that does not
    d2h blocking, d2h async   the same to the host
"""

import contextlib
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = str(Path(__file__).resolve().parent)
STOPS = ("wait", "h2d blocking", "d2h blocking")  # the host waits for the device
MARKS = (
    f"{HERE}/",
    "/torch/",
    "/contextlib.py",
    "<frozen",
    "<string>",
)  # of files that only pass on


class Event(NamedTuple):
    """What happened, and where: the function and the line of the program's innermost frame."""

    kind: str
    what: str
    function: str
    line: str


class Work:
    """Of the operations of one name in one function: how many, bytes read and written, FLOPs."""

    def __init__(self) -> None:
        self.kernels = 0
        self.bytes = 0
        self.flops = 0

    def add(self, kernels: int, size: int, flops: int) -> None:
        self.kernels += kernels
        self.bytes += size
        self.flops += flops


class Tally:
    """Events and work of a stretch of the program."""

    def __init__(self, asks: bool = False) -> None:
        self.asks = asks  # for work
        self.events: Counter[Event] = Counter()
        self.work: defaultdict[tuple[str, str], Work] = defaultdict(Work)

    def total(self, *kinds: str) -> int:
        return sum(times for event, times in self.events.items() if event.kind in kinds)

    def kinds(self) -> dict[str, int]:
        """kind -> times"""
        return dict(self.count(lambda event: event.kind))

    def by_function(self, *kinds: str) -> dict[str, int]:
        """'kind what function' -> times"""
        found = self.count(lambda event: " ".join(event[:3]) if event.kind in kinds else "")
        return {name: times for name, times in found.items() if name}

    def count(self, name) -> Counter:
        found: Counter = Counter()
        for event, times in self.events.items():
            found[name(event)] += times
        return found

    @property
    def kernels(self) -> int:
        """That ran on the device, those of a replayed graph included."""
        return sum(work.kernels for work in self.work.values())

    @property
    def bytes(self) -> int:
        """Read and written by them."""
        return sum(work.bytes for work in self.work.values())

    @property
    def flops(self) -> int:
        """Of their matrix products and attention."""
        return sum(work.flops for work in self.work.values())


TOTAL = Tally()  # since the process began
OPEN = [TOTAL]


def works() -> bool:
    """Whether somebody asks for bytes and FLOPs."""
    return any(tally.asks for tally in OPEN)


@contextlib.contextmanager
def counted(work: bool = False) -> Iterator[Tally]:
    """-> a Tally of what happens in the block, in any thread. work: a graph that is replayed in the
    block must have been captured in one like it"""
    tally = Tally(work)
    OPEN.append(tally)
    try:
        yield tally
    finally:
        OPEN.remove(tally)


def note(kind: str, what: str, times: int = 1) -> None:
    event = Event(kind, what, *place())
    for tally in OPEN:
        tally.events[event] += times


def add_work(name: str, function: str, kernels: int, size: int, flops: int) -> None:
    for tally in OPEN:
        tally.work[name, function].add(kernels, size, flops)


PASSED: dict[str, bool] = {}  # file name -> whether it only passes on


def place() -> tuple[str, str]:
    """(function, file:line) of the innermost frame that is neither torch's nor ours; "backward"
    in a thread of autograd."""
    frame = sys._getframe(1)
    while frame:
        code = frame.f_code
        name = code.co_filename
        if name not in PASSED:
            PASSED[name] = any(mark in name for mark in MARKS)
        if not PASSED[name]:
            return code.co_qualname, f"{name.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward", ""
