"""Turn the embedded text, data/sample, into the dataset of the first run.

    python data/sample/prepare.py             # writes data/datasets/sample_en, in seconds
    python data/sample/prepare.py --out DIR   # elsewhere; then DATA_PATH=DIR python train_gpt.py

Long addresses are cut at sentence ends and the factbook's articles at blank lines into documents
of 1 to 4 KB. A cut drops the white space it falls on and nothing else. The documents are shuffled
with a fixed seed and every 40th is validation.

What the figures and notes say goes to standard error: whoever starts this for its data has an
output of their own. The sha256 of the tokenizer and of the validation tokens are known, and it is
said where another version of SentencePiece makes others.
"""

import argparse
import contextlib
import json
import lzma
import random
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

DATA = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(DATA))
import endings  # noqa: E402

if __name__ == "__main__":
    endings.begin()

import sentencepiece  # noqa: E402

from prepare_text import DATASET_FILE, DataError, write_dataset  # noqa: E402

SAMPLE = DATA / "sample" / "sample_en.jsonl.xz"
SEED = 1337
VAL_EVERY = 40
VOCAB_SIZE = 1024
MADE_WITH = "0.2.3"  # SentencePiece's version
LARGE_UNIT_BYTES = 1_000
MEAN_BYTES = 2_400
JITTER = 0.2  # of a document
SENTENCE_END = r"(?<=[.!?])[\"')\]\u2019\u201d]*\s+"
BLANK_LINE = r"\n\s*\n"
TOKENIZER_SHA256 = "d999de7f2984f9c0d51acbe2ac4ee81f151e3bb9f81e07efbdbb89e90f3e8601"
VAL_TOKENS_SHA256 = "450e7891c41369678be3af7621442ffefd72962f7064ec0bb422231c547f9772"
TRAIN_TOKENS_SHA256 = "ca3c61f76bd3aa9218e597c49f9299a22beba09b1b3c7212929b1c567e035591"


def units(text: str, boundary: str) -> list[str]:
    """Cut text after every match of `boundary`; the units put together are the text."""
    ends = [match.end() for match in re.finditer(boundary, text)]
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


def small_units(text: str, boundary: str) -> Iterator[str]:
    """Units at `boundary`, the large ones cut further, at sentence ends."""
    for unit in units(text, boundary):
        if len(unit.encode()) > LARGE_UNIT_BYTES:
            yield from units(unit, SENTENCE_END)
        else:
            yield unit


def cut_documents(text: str, boundary: str, random_source: random.Random) -> list[str]:
    """Documents of 1 to 4 KB: cut at the boundaries nearest to even parts, a little jittered."""
    pieces = list(small_units(text, boundary))
    ends = list(accumulate(len(piece.encode()) for piece in pieces))
    count = max(1, round(ends[-1] / MEAN_BYTES))
    wanted = [ends[-1] * (n + random_source.uniform(-JITTER, JITTER)) / count for n in range(count)]
    cuts = {nearest(ends, position) for position in wanted[1:]}
    documents = [""]
    for piece, end in zip(pieces, ends, strict=True):
        documents[-1] += piece
        if end in cuts:
            documents.append("")
    return [document.strip() for document in documents if document.strip()]


def nearest(numbers: Sequence[int], wanted: float) -> int:
    """The one of `numbers` that is closest to `wanted`."""
    return min(numbers, key=lambda number: abs(number - wanted))


def sample_documents(path: Path = SAMPLE, seed: int = SEED) -> tuple[list[str], list[str]]:
    """The sample's text as (train, validation) lists of documents."""
    random_source, documents = random.Random(seed), []
    with lzma.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        for line in lines:
            record = json.loads(line)
            boundary = SENTENCE_END if record["source"] == "sotu" else BLANK_LINE
            documents += cut_documents(record["text"], boundary, random_source)
    random_source.shuffle(documents)
    val = documents[::VAL_EVERY]
    train = [document for index, document in enumerate(documents) if index % VAL_EVERY]
    return train, val


def differences(facts: dict[str, object]) -> list[str]:
    """What of a dataset.json is not as published."""
    known = dict(tokenizer_sha256=TOKENIZER_SHA256, val_tokens_sha256=VAL_TOKENS_SHA256)
    return [name for name, digest in known.items() if facts.get(name) != digest]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line on what is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "\n").partition("\n")[0])
    parser.add_argument("--out", default=DATA / "datasets" / "sample_en", help="dataset folder")
    options = parser.parse_args(arguments)
    try:
        train, val = sample_documents()
        with contextlib.redirect_stdout(sys.stderr):
            write_dataset(train, val, options.out, "sample_en", VOCAB_SIZE)
        facts = json.loads(Path(options.out, DATASET_FILE).read_bytes())
    except (DataError, OSError, MemoryError, EOFError, lzma.LZMAError) as error:
        what = " ".join((str(error) or "not enough memory").split())
        endings.say(f"prepare.py: {what}; fix: --out DIR, then DATA_PATH=DIR", sys.stderr)
        return 2
    if other := differences(facts):
        what = f"{' and '.join(other)} not as published; scores are of another text or tokenizer"
        version = f"sentencepiece {sentencepiece.__version__} is installed, {MADE_WITH} made those"
        endings.say(f"note: {options.out}: {what} ({version})", sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(endings.run(main))
