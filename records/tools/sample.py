"""Let a trained artifact write.

    python records/tools/sample.py runs/quick_seed1337
    python records/tools/sample.py runs/mine/artifact.bin --prompt "It was" --tokens 200 --seed 7
    python records/tools/sample.py runs/quick_seed1337 --from-bits

The model continues the prompt in the same lanes that score and decode documents, a token at a
time, drawn from the --top-k likeliest at a --temperature; no prompt is the start of a document.

--from-bits decodes random bits instead, as if they were somebody's stream.bin: the coder turns each
stretch of bits into the token that it would have been the code of, so the text is drawn from
exactly the distribution that val_bpb is the code length of, counts of the text so far included;
it has no temperature, and reads as surprising as real text is to the model.

The text goes to standard output; how fast it was written, and what it cost the model in bits a
token, to standard error. Exit status: 0; 2 after one line on what is wrong.
"""

import argparse
import contextlib
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import checkout  # noqa: F401  (puts train_gpt and data/ on the path)

import endings

if __name__ == "__main__":  # long spins of idle threads slow a shared CPU
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # libgomp reads it at load
    endings.begin()  # the imports take seconds

import numpy as np

import train_gpt
from prepare_text import DataError, load_tokenizer
from train_gpt import CodingPlan, Config, LaneStep, UserError, printable

MOST_TOKENS = 100_000  # of a text
MOST_TEXTS = 1_000


class Writer:
    """An artifact with its tokenizer."""

    def __init__(self, path: Path, tokenizer: Path | None, device: str):
        """path: a run folder, or an artifact. UserError, DataError, OSError"""
        self.folder = path if path.is_dir() else path.parent
        if not path.exists():
            there = ", ".join(sorted(map(str, Path("runs").glob("*/artifact.bin")))) or "none"
            raise UserError(f"{path}: no such run or artifact; fix: one of runs/ ({there})")
        artifact = path / "artifact.bin" if path.is_dir() else path
        content = train_gpt.read_regular(artifact, train_gpt.MOST_ARTIFACT_BYTES)
        self.rt = train_gpt.Runtime(Config(device=device))
        self.rt.start()
        self.model = train_gpt.load_artifact(artifact, self.rt.device, content)
        known = self.model.cfg.vocab_size
        spelling = tokenizer or self.folder / "tokenizer.model"
        content = train_gpt.read_regular(spelling)  # a pipe would never end
        self.tokenizer = load_tokenizer(spelling, known, content)

    def encode(self, prompt: str) -> list[int]:
        return self.tokenizer.encode(prompt)

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)

    def config(self) -> Config:
        """The model with the settings by which the run was scored, where its folder tells."""
        values = {name: getattr(self.model.cfg, name) for name in train_gpt.MODEL_FIELDS}
        settings = self.folder / "config.env"
        if settings.exists():
            pairs = train_gpt.read_pairs(settings)
            for name in train_gpt.SCORING:
                if name.upper() in pairs:
                    values[name] = train_gpt.parse(name.upper(), pairs[name.upper()])
        return Config(**values)

    def from_bits(self, prompt: list[int], tokens: int, seed: int) -> train_gpt.Continuation:
        """Decode random bits, after a prompt that takes none of them."""
        queue, family = train_gpt.range_coder()
        draw = np.random.default_rng(seed)
        cfg = self.config()
        size = len(prompt) + tokens

        def random_bits() -> Any:
            # A token takes 24 bits at most, the coder two words before the first.
            return queue.RangeDecoder(draw.integers(0, 2**32, tokens + 8, np.uint32))

        coder = random_bits()

        def pick_tokens(integers: np.ndarray, step: LaneStep) -> np.ndarray:
            nonlocal coder
            place = int(step.places[0])
            if place < len(prompt):
                return np.array([prompt[place]])
            while True:
                with contextlib.suppress(AssertionError):
                    return coder.decode(family, integers)
                # A coder's ranges are whole numbers: a gap at their end stands for no token, which
                # random bits hit about once in 5,000 tokens. Drawn again, all are as likely.
                coder = random_bits()

        plan = CodingPlan(1, size, 1, 1, size, cfg.window)
        coded = train_gpt.run_codec(self.model, self.rt, cfg, plan, pick_tokens)
        written = coded.text[1 + len(prompt) :]
        return train_gpt.Continuation(written, np.full(coded.targets, -coded.nats / coded.targets))


class Written(NamedTuple):
    """Some texts, and how they came about."""

    texts: list[str]
    tokens: int  # without the prompts'
    ended: int  # texts that ended before they had all the tokens
    bits: float  # a token
    seconds: float


def write(writer: Writer, options: argparse.Namespace) -> Written:
    """As the command line says."""
    prompt = writer.encode(options.prompt)
    began = time.perf_counter()
    if options.from_bits:
        seeds = range(options.seed, options.seed + options.count)
        found = [writer.from_bits(prompt, options.tokens, seed) for seed in seeds]
    else:
        how = dict(temperature=options.temperature, top_k=options.top_k, seed=options.seed)
        prompts = [prompt] * options.count
        how |= dict(lanes=min(32, options.count))
        found = train_gpt.generate(writer.model, prompts, options.tokens, **how)
    seconds = time.perf_counter() - began
    costs = np.concatenate([each.log_prob for each in found])
    texts = [writer.text([*prompt, *each.tokens.tolist()]) for each in found]
    bits = float(-costs.mean() / np.log(2)) if len(costs) else 0.0
    sizes = [len(each.tokens) for each in found]
    ended = sum(size < options.tokens for size in sizes)
    return Written(texts, sum(sizes), ended, bits, seconds)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 where it is wrong."""
    summary, _, details = (__doc__ or "\n").partition("\n")
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=layout)
    add = parser.add_argument
    add("path", type=Path, metavar="RUN_OR_ARTIFACT", help="a run folder, or an artifact.bin")
    add("--prompt", default="", help="how the document begins")
    add("--tokens", type=int, default=120, help="to write, at most; a document may end earlier")
    add("--temperature", type=float, default=0.8, help="below 1 likelier tokens; 0: the likeliest")
    add("--top-k", type=int, default=50, help="of so many likeliest tokens; 0: of all")
    add("--seed", type=int, default=0, help="the same seed writes the same text")
    add("--count", type=int, default=1, help="texts to write")
    add("--from-bits", action="store_true", help="decode random bits, see below")
    add("--tokenizer", type=Path, help="default: tokenizer.model beside the artifact")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    if not options.prompt.isascii() and re.search("[\ud800-\udfff]", options.prompt):
        parser.error("--prompt: is no UTF-8")
    for name, least, most in (
        ("tokens", 1, MOST_TOKENS),
        ("count", 1, MOST_TEXTS),
        ("top_k", 0, 2**31),
        ("temperature", 0, 100),
        ("seed", 0, 2**63 - MOST_TEXTS),
    ):
        value = getattr(options, name)
        if not least <= value <= most:
            parser.error(f"--{name.replace('_', '-')} {value}: give {least} to {most:,}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line on what is wrong."""
    options = parse_arguments(arguments)
    try:
        written = write(Writer(options.path, options.tokenizer, options.device), options)
    except (UserError, DataError, OSError, MemoryError) as error:
        endings.say(f"error: {printable(str(error) or 'not enough memory')}", sys.stderr)
        return 2
    for number, text in enumerate(written.texts):
        if number:
            endings.say("-" * 40)
        endings.say("\n".join(map(printable, text.split("\n"))))
    speed = written.tokens / max(written.seconds, 1e-9)
    how = "decoded from random bits" if options.from_bits else "written"
    line = f"{written.tokens:,} tokens {how} in {written.seconds:.1f} s, {speed:,.0f} tokens/s"
    endings.say(f"{line}; {written.bits:.2f} bits a token, the prompt's included", sys.stderr)
    if written.ended:
        ended = f"{written.ended} of {len(written.texts)} ended before"
        more = "the model wrote a document's end; another --seed or --prompt may go on"
        endings.say(f"{ended}: {more}", sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(endings.run(main))
