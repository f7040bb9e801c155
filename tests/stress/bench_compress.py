"""Set compress.py beside general compressors and beside PPMd that knows the training text.

    pip install pyppmd==1.3.1
    RECORD=tiny python train_gpt.py
    OMP_NUM_THREADS=1 python tests/stress/bench_compress.py --artifact runs/NAME/artifact.bin

Writes results.json and README.md into --out, which is this folder by default. The artifact must be
one of `tiny` on the embedded text, whose training side is the text that the others are primed with.
"Primed" size of a file: compressed size of training text and file together, minus that of the
training text. PPMd gets 1 GiB of memory, more than it can use, and of its orders the one that is
best for that file: a choice in its favour.
"""

import argparse
import datetime
import importlib.metadata
import json
import lzma
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # long spins of idle threads slow a shared CPU
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # libgomp reads it at load

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers import ROOT, train_gpt  # noqa: E402  (it puts the others' folders on the path)

# isort: split
import compress  # noqa: E402

from prepare import sample_documents  # noqa: E402

HERE = ROOT / "records/track_cpu/compress"

ORDERS, MEMORY = (6, 12, 16), 1 << 30
BETWEEN = "\n\n"  # two documents of a text
PROSE, DOCUMENT, README = "prose, 85 documents", "prose, one document", "README.md"
SCRIPT = "train_gpt.py, the first 30 KB"
LANES = {PROSE: (16, 32, 64), DOCUMENT: (1, 4, 8, 16), README: (1, 4, 8, 16)}
RATES = 0.0, 3e-4, 6e-4, 1e-3, 2e-3  # of learning; 0: none
COLUMNS = {  # of the table, and what results.json calls them
    "**pgz**": "pgz",
    "zstd -19": "zstd -19",
    "xz -9": "xz -9",
    "PPMd": "ppmd",
    "xz, primed": "xz primed",
    "PPMd, primed, order 6": "ppmd primed 6",
    "PPMd, primed": "ppmd primed",
    "PPMd, primed with as much as the artifact weighs": "ppmd budget",
}


def ppmd(data, order):
    """Bytes that PPMd (variant H) makes of data."""
    pyppmd = train_gpt.package("pyppmd")
    return len(pyppmd.compress(data, max_order=order, mem_size=MEMORY, variant="H"))


def xz(data):
    return len(lzma.compress(data, preset=9))


class Primers:
    """The training text, and of it as much as PPMd makes `budget` bytes of, for each order."""

    def __init__(self, text, budget):
        self.text, self.xz, self.budget = text, xz(text), budget
        self.sizes = {order: ppmd(text, order) for order in ORDERS}
        self.parts = {order: self.part(order) for order in ORDERS}
        self.part_sizes = {order: ppmd(part, order) for order, part in self.parts.items()}

    def part(self, order):
        """The longest beginning within the budget, to 50 KB."""
        low, high = 0, len(self.text)
        while high - low > 50_000:
            middle = (low + high) // 2
            fits = ppmd(self.text[:middle], order) <= self.budget
            low, high = (middle, high) if fits else (low, middle)
        return self.text[:low]

    def sizes_of(self, data):
        """Primed sizes of a file: by xz, by PPMd of order 6, of the best order, within the
        budget."""
        whole = {o: ppmd(self.text + data, o) - size for o, size in self.sizes.items()}
        parts = {o: ppmd(self.parts[o] + data, o) - size for o, size in self.part_sizes.items()}
        orders = dict(whole=min(whole, key=whole.get), budget=min(parts, key=parts.get))
        found = {"xz primed": xz(self.text + data) - self.xz, "ppmd primed 6": whole[6]}
        found |= {"ppmd primed": min(whole.values()), "ppmd budget": min(parts.values())}
        return found | {"best orders": orders}


def files():
    """Name -> bytes. The prose is the validation side of the embedded text, in no training."""
    _, val = sample_documents()
    return {
        PROSE: BETWEEN.join(val).encode(),
        "prose, 10 KB": BETWEEN.join(val).encode()[:10_000],
        DOCUMENT: val[0].encode(),
        README: (ROOT / "README.md").read_bytes(),
        SCRIPT: (ROOT / "train_gpt.py").read_bytes()[:30_000],
        "data/endings.py": (ROOT / "data/endings.py").read_bytes(),
        "random bytes": np.random.default_rng(0).bytes(5_000),
    }


def coded(compressor, data, lanes=0):
    """-> Packed, tokens a second, tokens a second of CPU time"""
    began = time.process_time()
    packed = compressor.compress(data, lanes)
    busy = time.process_time() - began
    return packed, packed.tokens / packed.seconds, packed.tokens / busy


def measure(compressor, primers, data):
    """One row: sizes by all, speed of coding and restoring (tokens a second)."""
    packed, speed, cpu_speed = coded(compressor, data)
    began = time.perf_counter()
    if compressor.restore(packed.data) != data:
        raise compress.UserError("a file does not come back")
    back, blocks = time.perf_counter() - began, packed.header.blocks
    row = dict(bytes=len(data), tokens=packed.tokens, pgz=len(packed.data))
    row["header"] = len(packed.data) - sum(size for _, size in blocks)
    row["lanes"] = max(lanes for lanes, _ in blocks)
    row |= dict(tokens_per_s=speed, cpu_tokens_per_s=cpu_speed)
    row["restored_per_s"] = packed.tokens / back
    row |= compress.others(data) | {"ppmd": min(ppmd(data, order) for order in ORDERS)}
    return row | primers.sizes_of(data)


def by_lanes(compressor, files):
    """Files by numbers of lanes: bytes, speeds."""
    rows = []
    for name, numbers in LANES.items():
        for lanes in numbers:
            packed, speed, cpu_speed = coded(compressor, files[name], lanes)
            row = dict(file=name, lanes=lanes, pgz=len(packed.data), tokens_per_s=speed)
            rows.append(row | dict(cpu_tokens_per_s=cpu_speed))
    return rows


def by_rate(compressor, files):
    """Bytes of files by rates of learning; all but the longest, which takes minutes."""
    known = compressor.cfg
    rows = []
    for name, data in files.items():
        sizes = {}
        for rate in RATES if name not in (PROSE, "random bytes") else ():
            changes = dict(lane_ttt_lr=rate) if rate else dict(lane_ttt=False)
            compressor.cfg = replace(known, **changes)
            sizes[f"{rate:g}"] = len(compressor.compress(data).data)
        rows += [dict(file=name) | sizes] if sizes else []
    compressor.cfg = known
    return rows


def commit():
    """What is checked out, and whether it was changed since."""
    git = ["git", "-C", str(ROOT)]
    how = dict(capture_output=True, text=True, check=True)
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], **how).stdout.strip()
    tracked = [
        *git,
        "status",
        "--porcelain",
        "--untracked-files=no",
        "train_gpt.py",
        "records/tools",
    ]
    return name + (" and changes" if subprocess.run(tracked, **how).stdout else "")


def table(names, rows):
    lines = ["| " + " | ".join(names) + " |", "| --- |" + " ---: |" * (len(names) - 1)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def sizes_table(rows, show):
    """Files by compressors; show(size, row) -> a cell."""
    cells = (
        [name, *(show(row[key], row) for key in COLUMNS.values())] for name, row in rows.items()
    )
    return table(["file", *COLUMNS], cells)


def speeds_table(rows):
    names = ["file", "bytes", "tokens", "lanes", "header", "coded, tokens/s", "of CPU time"]
    keys = ["bytes", "tokens", "lanes", "header", "tokens_per_s", "cpu_tokens_per_s"]
    names.append("restored, tokens/s")
    keys.append("restored_per_s")
    return table(names, ([n, *(f"{row[key]:,.0f}" for key in keys)] for n, row in rows.items()))


def cells(row):
    """Numbers as they are shown."""
    return [x if isinstance(x, str) else f"{x:,.0f}" for x in row.values()]


def verdict(row):
    """On each other compressor a line: who wins on this file, by how much."""
    for name, key in COLUMNS.items():
        if key != "pgz":
            side = "smaller" if row["pgz"] < row[key] else "larger"
            share = abs(row[key] - row["pgz"]) / row[key]
            yield f"- {share:.1%} {side} than {name} ({row[key]:,} bytes)"


def report(results):
    """The text of README.md."""
    rows, known = results["files"], results["known"]
    prose = rows[PROSE]
    saved = (prose["xz -9"] - prose["pgz"]) / prose["bytes"]  # for each byte of such prose
    lanes = ["file", "lanes", "pgz", "tokens/s", "of CPU time"]
    rates = ["file", "no learning", *(f"{rate:g}" for rate in RATES[1:])]
    return TEXT.format(
        **results | known,
        even=known["artifact_and_tokenizer"] / saved / 1e6,
        best=prose["best orders"],
        pgz=prose["pgz"],
        header=prose["header"],
        bits=8 * prose["pgz"] / prose["bytes"],
        verdict="\n".join(verdict(prose)),
        sizes=sizes_table(rows, lambda size, _: f"{size:,}"),
        rates=sizes_table(rows, lambda size, row: f"{8 * size / row['bytes']:.3f}"),
        speeds=speeds_table(rows),
        lanes_table=table(lanes, map(cells, results["by_lanes"])),
        rates_table=table(rates, map(cells, results["by_rate"])),
        rate=compress.LEARNING["lane_ttt_lr"],
        few=compress.FEW_LANES,
        few_tokens=compress.FEW_TOKENS,
        lane_tokens=compress.LANE_TOKENS,
        most=compress.LANES,
    )


TEXT = """# Files through the artifact

    pip install pyppmd==1.3.1
    RECORD=tiny python train_gpt.py
    {command}

{date}; threads: {cores}, load of the machine {load:.2f} before and {load_after:.2f} after;
{versions}.
Commit {commit}, train_gpt.py {code:.16}, artifact {artifact:.16} (sha256).

What both sides know beforehand is in no size below: for `.pgz` the artifact and its tokenizer,
{artifact_and_tokenizer:,} bytes; for the primed compressors the text that the artifact was trained
on, {training_text:,} bytes ({training_xz:,} by xz -9, {training_ppmd:,} by PPMd). The last column
is primed with as much of that text as PPMd makes {artifact_and_tokenizer:,} bytes of: as if it had
to be sent like the artifact. zstd, xz and PPMd without "primed" know nothing. Counting the artifact
too, `.pgz` would pay from {even:.1f} MB of such prose on, if it and xz -9 kept this file's rates;
that was not measured.

## Who wins on prose of the embedded kind

The validation side of the embedded text, which the artifact was not trained on: {pgz:,} bytes,
{bits:.3f} bits per byte, header included. That is

{verdict}

{header} bytes of the .pgz are its header, in which the file's sha256 and what it was made with take
32: the others have none of that, or less. PPMd is variant H with
1 GiB of memory and the best of the orders {orders} for each file (here {best[whole]}, and
{best[budget]} within the budget).

## Bytes

{sizes}

## Bits per byte

{rates}

What is unlike the training text gains less: there the counts and what is learnt on the way do the
work. Blocks that the model makes larger, such as the random bytes, are stored as they are: beyond
the file itself only the header is spent.

## Speed

{speeds}

Other programs shared the cores, as the load above says: tokens a second of CPU time are what a
quiet core gives, or less, for they share its caches. Lanes 0: stored, nothing to decode. A file
gets a lane for each {lane_tokens} tokens, {most} at most; a small one {few}, but not more than one
for each {few_tokens} tokens. Fewer are slower, and their pieces see more of what came before:

{lanes_table}

## Learning

Bytes by the rate at which the model learns from what was coded; compress.py takes {rate:g}:

{rates_table}
"""


def main(arguments=None):
    """Exit status: 0, or 2 after one line on what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args(arguments)
    try:
        train_gpt.package("pyppmd")
        compressor, load = compress.Compressor(options.artifact), os.getloadavg()[0]
        train, _ = sample_documents()
        primers = Primers("".join(text + BETWEEN for text in train).encode(), compressor.apart)
        rows = {}
        for name, data in files().items():
            rows[name] = measure(compressor, primers, data)
            print(name, rows[name], flush=True)
        lanes = by_lanes(compressor, files())
        rates = by_rate(compressor, files())
    except (train_gpt.UserError, OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    names = ("torch", "numpy", "constriction", "zstandard", "pyppmd")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    made = compressor.made()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    threads = threads and f"OMP_NUM_THREADS={threads} "
    results = dict(
        command=f"{threads}python tests/stress/bench_compress.py --artifact {options.artifact}",
        commit=commit(),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        cores=made["threads"],
        load=load,
        load_after=os.getloadavg()[0],
        versions=", ".join([f"Python {platform.python_version()}", *versions]),
        orders=list(ORDERS),
        artifact=made["artifact"],
        code=made["code"],
        known=dict(
            artifact_and_tokenizer=compressor.apart,
            training_text=len(primers.text),
            training_xz=primers.xz,
            training_ppmd=min(primers.sizes.values()),
            primed_within_budget={order: len(part) for order, part in primers.parts.items()},
        ),
        files=rows,
        by_lanes=lanes,
        by_rate=rates,
    )
    whole = json.dumps(results, indent=1) + "\n"
    (options.out / "results.json").write_text(whole, encoding="utf-8")
    (options.out / "README.md").write_text(report(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
