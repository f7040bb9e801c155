"""Which files of a folder are taken. What is not, is counted by reason, the first of it named:

selection = Selection(globs=["*.md"], excludes=["node_modules"])
files = files_in(Path("notes"), Path("out"), selection, lambda: None)
selection.report()
"""

import fnmatch
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import endings

FIRST_NAMES = 4  # of what is left out for a reason


@dataclass
class Selection:
    """Which files are to be taken, how many were, and what was left out: how many files and
    folders, and the first of them, by reason."""

    globs: Sequence[str] = ()  # none: all files
    excludes: Sequence[str] = ()
    taken: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, name: str | Path) -> None:
        self.left_out[reason] += 1
        names = self.first.setdefault(reason, [])
        if self.left_out[reason] <= FIRST_NAMES:
            names.append(str(name) if str(name).isprintable() else ascii(str(name)))
        elif len(names) == FIRST_NAMES:
            names.append("...")

    def reasons(self) -> list[str]:
        """What was left out, a text a reason, the most frequent first."""
        counts = self.left_out.most_common()
        return [f"{reason}: {n:,} ({', '.join(self.first[reason])})" for reason, n in counts]

    def report(self) -> None:
        """Say what was left out, if anything."""
        if self.left_out:
            found = (
                f"{self.taken:,} files taken, {self.left_out.total():,} files or folders left out"
            )
            first = f"note: {found}; --input with one itself says more:"
            endings.say("\n  ".join([first, *self.reasons()]), sys.stderr)

    def unwanted(self, path: Path, top: Path, is_folder: bool) -> str:
        """The option by which a file or folder is left out, "" for none."""
        if any(matches(path, top, pattern) for pattern in self.excludes):
            return "--exclude"
        if is_folder or not self.globs or any(matches(path, top, glob) for glob in self.globs):
            return ""
        return "not --glob"


def files_in(
    top: Path, out: Path, selection: Selection, each_folder: Callable[[], None]
) -> list[Path]:
    """The files of a folder that are to be taken, sorted; what lies in `out` goes unmentioned."""
    files = []
    out = Path(os.path.realpath(out))

    def unreadable(error: OSError) -> None:
        selection.leave_out(f"cannot be read ({error.strerror})", f"{error.filename}/")

    for place, folders, names in os.walk(top, onerror=unreadable):
        each_folder()
        known, deeper = {*folders}, []
        for name in sorted(folders + names):
            path, is_folder = Path(place, name), name in known
            real = Path(os.path.realpath(path))
            if out == real or out in real.parents:
                continue
            if reason := selection.unwanted(path, top, is_folder) or unfit(path, is_folder):
                selection.leave_out(reason, f"{path}{'/' * is_folder}")
            elif is_folder:
                deeper.append(name)
            else:
                files.append(path)
        folders[:] = deeper
    return sorted(files, key=Path.as_posix)


def matches(path: Path, top: Path, pattern: str) -> bool:
    """Whether a pattern is for this name or, with a / in it, for this path: as it stands, or from
    the folder `top` on, where **/ may be no folder."""
    pattern = pattern.removeprefix("./").rstrip("/")
    if "/" not in pattern:
        return fnmatch.fnmatchcase(path.name, pattern)
    within = path.relative_to(top).as_posix()
    names = path.as_posix(), within, f"/{within}"
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def unfit(path: Path, is_folder: bool) -> str:
    """Why what lies in a folder is not opened, "" where it is. A link to a folder may be a loop."""
    if path.name.startswith("."):
        return "hidden"
    if is_folder:
        return "link to a folder" if path.is_symlink() else ""
    if os.path.isfile(path):
        return ""
    if os.path.islink(path) and not os.path.exists(path):
        return "broken link"
    return "no regular file" if os.path.exists(path) else "cannot be read"
