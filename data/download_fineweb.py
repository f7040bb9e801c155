"""Fetch the published FineWeb export of the Parameter Golf challenge from the Hugging Face hub.

    python data/download_fineweb.py                       sp1024: validation and 80 train shards
    python data/download_fineweb.py --variant sp4096 10   another tokenizer, 10 train shards
    python data/download_fineweb.py --train-shards 0      validation only

Into the data folder (--out, by default this file's, where train_gpt.py looks) go manifest.json,
datasets/fineweb10B_<variant>/fineweb_{train,val}_<6 digits>.bin and tokenizers/. A copy of the
tokenizer, tokenizer.model, lies beside the shards, so DATA_PATH alone selects a variant; it is
written last. byte260 is published without a SentencePiece model; one that spells bytes is made.

dataset.json beside the shards says what came: sha256 of tokenizer.model and of the validation
tokens (uint16, without the headers of shards), whether the tokenizer alters text, and each file's
sha256 (git id of a small one) as the hub gives it. Nobody publishes these: they are learnt at the
first download and kept, and a later one refuses a file that has changed since.

A file gets its name only after its size and the hub's sha256 (or git id) are found right. The same
command again goes on where it was cut, in the middle of a file too, and skips what is whole; more
shards may be asked for later. Everything is stored once: the hub's cache is not used.
MATCHED_FINEWEB_REPO_ID, MATCHED_FINEWEB_REMOTE_ROOT_PREFIX and the hub's own variables
(HF_ENDPOINT, HF_TOKEN) are read. Exit status: 0, 2 after an error, 130 after Ctrl-C, 143 after
SIGTERM.
"""

import argparse
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import endings

if __name__ == "__main__":
    endings.begin()

try:
    import numpy as np
    import sentencepiece
    from httpx2 import HTTPError, InvalidURL, NetworkError, RemoteProtocolError, TimeoutException
    from huggingface_hub import HfApi, errors, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, logging
    from huggingface_hub.utils.sha import git_hash
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    fix = "pip install -r requirements.txt"
    print(f"error: {missing.name}: not installed; fix: {fix}", file=sys.stderr)
    sys.exit(2)

HERE = Path(__file__).resolve().parent
REPO = "willdepueoai/parameter-golf"
DATASET = "fineweb10B_"  # and the variant
CONNECTIONS = 4  # files side by side; one connection rarely fills a line
TIMEOUT_SECONDS = 30  # for the list of files; the hub's HF_HUB_DOWNLOAD_TIMEOUT holds for a file
PAUSE_SECONDS = (1, 4, 16)  # between attempts, each of which is several of the library's
TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
TRANSIENT = (NetworkError, RemoteProtocolError, TimeoutException)
DATASET_FILE = "dataset.json"  # prepare_text.py's, too; train_gpt.py reads it
HEADER_BYTES = 1024  # of a shard
BOS = 1  # begins a document
PROBES = [  # what tokenizers are known to alter
    "two  spaces",
    " a space before and after ",
    "a tab\tand\r\nlines\n\n",
    "\uff46\uff55\uff4c\uff4c \u3000 width",
    "\u00bd \ufb01 \u338f \ufdfa \u33ff \u2460",
    "e\u0301 \u00e9 \u00ad \u200b \ufeff \u00a0 \u2028",
    "\u6f22\u5b57 \u0939\u093f \U0001f600 \u0000 \u001f \ufffd",
]
AGAIN = "the same command again goes on from here"
ACCESS = "check --repo (MATCHED_FINEWEB_REPO_ID); if it is private or gated, set HF_TOKEN"
FIXES = [  # of what the library raises; the first that fits
    (errors.OfflineModeIsEnabled, "unset HF_HUB_OFFLINE"),
    (errors.HFValidationError, "give --repo as owner/name"),
    (errors.RevisionNotFoundError, "give --revision a branch, tag or commit"),
    (errors.RepositoryNotFoundError, ACCESS),
    (errors.HfHubHTTPError, f"set HF_TOKEN if access is refused (401, 403), else later; {AGAIN}"),
    (HTTPError, f"check the network, the proxy and HF_ENDPOINT; {AGAIN}"),
    (Exception, "check HF_ENDPOINT and the proxy, this is no answer of a hub"),
]


class DownloadError(Exception):
    """What keeps the data from coming: file or variable, value, fix."""


# -----------------------------------------------------------------------------
# The hub: what is there, and its bytes


@dataclass(frozen=True)
class RemoteFile:
    """A file at a commit of the repository and where it belongs here."""

    url: str
    target: Path
    size: int  # bytes
    sha256: str | None  # of a file in LFS
    git_id: str  # of any other

    @property
    def digest(self) -> str:
        """By which the hub tells its content."""
        return self.sha256 or self.git_id

    @property
    def part(self) -> Path:
        """Where it grows; another version grows elsewhere. train_gpt.has_fineweb knows the name."""
        return self.target.with_name(f".{self.target.name}.{self.digest[:12]}.partial")

    def problem(self, path: Path) -> str:
        """What is wrong with a copy of it, "" for nothing."""
        if (size := path.stat().st_size) != self.size:
            return f"{size:,} bytes instead of {self.size:,}"
        if not self.sha256:
            return "" if git_hash(path.read_bytes()) == self.git_id else "another git id"
        with open(path, "rb") as copy:
            found = hashlib.file_digest(copy, "sha256").hexdigest()
        return "" if found == self.sha256 else f"sha256 {found[:12]}..., not {self.sha256[:12]}..."


class Hub:
    """One dataset repository at one commit, so that files of two versions never mix."""

    def __init__(self, repo: str, revision: str):
        self.api = HfApi(endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None)
        self.repo = repo
        self.where = f"{self.api.endpoint}/datasets/{repo} at {revision}"
        options = dict(revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
        info = self.patiently("list of files", lambda: self.api.dataset_info(repo, **options))
        self.commit = info.sha
        self.listing = {entry.rfilename: entry for entry in info.siblings or []}

    def file(self, path: str, target: Path) -> RemoteFile:
        """DownloadError if the repository lacks it."""
        if path not in self.listing:
            fix = "check --repo, --prefix and --revision, or ask for fewer --train-shards"
            raise DownloadError(f"{path}: not in {self.where}; fix: {fix}")
        entry = self.listing[path]
        places = dict(repo_type="dataset", revision=self.commit, endpoint=self.api.endpoint)
        url = hf_hub_url(self.repo, path, **places)
        sha256 = entry.lfs.sha256 if entry.lfs else None
        return RemoteFile(url, target, (entry.lfs or entry).size, sha256, entry.blob_id)

    def patiently(self, what: str, request: Callable[[], Any]) -> Any:
        """The library's answer to a request, made again where that may help; DownloadError."""
        library_errors = (HTTPError, InvalidURL, errors.OfflineModeIsEnabled)
        page_errors = (ValueError, KeyError, TypeError)  # a web page where JSON should be
        for pause in (*PAUSE_SECONDS, None):
            try:
                return request()
            except (*library_errors, *page_errors) as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                why = f"{type(error).__name__}, {f'status {status}' if status else error}"
                may_pass = isinstance(error, TRANSIENT) or status in TRANSIENT_STATUS
                if pause is None or not may_pass:
                    fix = next(fix for kind, fix in FIXES if isinstance(error, kind))
                    raise DownloadError(f"{what} of {self.where}: {why}; fix: {fix}") from None
                say(f"note: {what}: {why}; again in {pause} s")
                time.sleep(pause)


def say(line: str) -> None:
    """Above the progress bars; at once in a log file, too; nowhere if nobody reads any more."""
    with endings.forgiving(sys.stdout):
        tqdm.write(line)
        sys.stdout.flush()


# -----------------------------------------------------------------------------
# The manifest: variant -> files


def plan(manifest: bytes, variant: str, train_shards: int, prefix: str) -> dict[str, str]:
    """{path in the repository: path in the data folder}: tokenizer, validation, train shards."""
    try:
        content = json.loads(manifest)
        datasets = {entry["name"]: entry for entry in content["datasets"]}
        tokenizers = {entry["name"]: entry for entry in content["tokenizers"]}
        if DATASET + variant not in datasets:
            known = ", ".join(sorted(datasets)).replace(DATASET, "")
            fix = f"one of those: {known or 'none'}"
            raise DownloadError(f"--variant {variant}: not in manifest.json; fix: {fix}")
        dataset = datasets[DATASET + variant]
        counts = {split: int(dataset["stats"][f"files_{split}"]) for split in ("val", "train")}
        tokenizer = tokenizers[dataset["tokenizer_name"]]
        key = "path" if variant == "byte260" else "model_path"
        paths = [PurePosixPath(tokenizer[key])]
        if tokenizer.get("vocab_path"):
            paths.append(PurePosixPath(tokenizer["vocab_path"]))
        if not 1 <= counts["val"] < 10**6:
            raise ValueError(f"files_val is {counts['val']}")
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        what = f"{type(error).__name__}: {error}"
        fix = "check --repo and --prefix; it must be an export of the challenge"
        raise DownloadError(f"manifest.json: not as published ({what}); fix: {fix}") from None
    if train_shards > counts["train"]:
        found = f"{variant} has {counts['train']}"
        fix = f"--train-shards {counts['train']} or fewer"
        raise DownloadError(f"--train-shards {train_shards}: {found}; fix: {fix}")
    # Always to tokenizers/, so that no manifest can replace a program in data/.
    files = {str(PurePosixPath(prefix, path)): f"tokenizers/{path.name}" for path in paths}
    for split, count in (counts | dict(train=train_shards)).items():
        for number in range(count):
            path = f"datasets/{DATASET}{variant}/fineweb_{split}_{number:06d}.bin"
            files[str(PurePosixPath(prefix, path))] = path
    return files


# -----------------------------------------------------------------------------
# Files: hub -> part -> checked -> final name


def bring(hub: Hub, file: RemoteFile) -> bool:
    """Have one file whole under its final name -> whether it had to be fetched."""
    if file.target.exists():
        wrong = file.problem(file.target)
        if not wrong:
            return False
        say(f"note: {file.target.name}: {wrong}; fetched again")
        file.target.unlink()
    file.target.parent.mkdir(parents=True, exist_ok=True)
    with open(file.part, "ab") as part:
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fix = "wait for it, or end it"
            raise DownloadError(f"{file.target}: another download is at it; fix: {fix}") from None
        fill(hub, file, part)
        os.fsync(part.fileno())
        os.replace(file.part, file.target)
    for older in file.target.parent.glob(f".{file.target.name}.*.partial"):
        older.unlink()  # of a version that is no longer published
    return True


def fill(hub: Hub, file: RemoteFile, part: io.BufferedWriter) -> None:
    """Append to the part what is missing until the whole is right; DownloadError.

    hf_hub_download would throw a cut file away (huggingface_hub 2.4.0 gives each process a
    temporary file of its own); the function below it goes on where the part ends.
    """
    name = file.target.name

    def transfer() -> None:
        if (size := part.tell()) < file.size:
            headers = build_hf_headers()
            http_get(file.url, part, resume_size=size, headers=headers, displayed_filename=name)

    while True:
        kept = part.tell()
        hub.patiently(name, transfer)
        part.flush()
        wrong = file.problem(file.part)
        if not wrong:
            return
        part.seek(0)
        part.truncate()
        if not kept:
            fix = f"again later; if it stays, the copy in {hub.repo} is wrong"
            raise DownloadError(f"{file.url}: {wrong}; fix: {fix}")
        # What a crash left may be damaged.
        say(f"note: {name}: {wrong} after going on at {kept:,}; from the start again")


def bring_all(hub: Hub, files: list[RemoteFile], out: Path) -> int:
    """Bring every file to its place, if the disk can hold them -> how many had to be fetched."""
    here = [path for file in files for path in (file.target, file.part) if path.exists()]
    needed = sum(file.size for file in files) - sum(path.stat().st_size for path in here)
    if needed > (free := shutil.disk_usage(out).free):
        fix = "free some, fewer --train-shards, or --out on another disk"
        raise DownloadError(f"--out {out}: {needed:,} bytes needed, {free:,} free; fix: {fix}")
    fetched = 0
    pool = ThreadPoolExecutor(CONNECTIONS)
    try:
        results = pool.map(lambda file: bring(hub, file), files)
        for count, (file, was_missing) in enumerate(zip(files, results, strict=True), 1):
            fetched += was_missing
            say(f"{file.target.name}: {file.size:,} bytes, verified ({count}/{len(files)})")
    finally:  # files on their way are finished, but not after Ctrl-C
        interrupted = isinstance(sys.exception(), KeyboardInterrupt)
        pool.shutdown(wait=not interrupted, cancel_futures=True)
    return fetched


# -----------------------------------------------------------------------------
# dataset.json: what came, and whether it is what came before


def known_files(path: Path) -> dict[str, str]:
    """{file: digest} as learnt before, from a dataset.json; {} without one; DownloadError."""
    if not path.exists():
        return {}
    try:
        files = json.loads(path.read_bytes()).get("files", {})
        if not all(isinstance(text, str) for text in [*files, *files.values()]):
            raise ValueError("files are no texts")
        return dict(files)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        fix = "remove it; the files are compared with the hub's in any case"
        raise DownloadError(f"{path}: no dataset.json ({error}); fix: {fix}") from None


def refuse_changed(files: dict[str, RemoteFile], known: dict[str, str], path: Path) -> None:
    """DownloadError for a file whose content is not what it was at the first download."""
    for name, file in files.items():
        if (before := known.get(name, file.digest)) != file.digest:
            fix = f"--revision of then, another --out, or remove {path} to take the new ones"
            changed = f"{file.digest[:12]}... at the hub, {before[:12]}... at the first download"
            raise DownloadError(f"{name}: has changed, {changed}; fix: {fix}")


def dataset_facts(folder: Path, model: bytes) -> dict[str, Any]:
    """Of the validation shards in a folder, and of its tokenizer."""
    tokens = hashlib.sha256()
    documents = 0
    for path in sorted(folder.glob("*_val_*.bin")):  # numbers of six digits
        shard = np.fromfile(path, "<u2", offset=HEADER_BYTES)
        tokens.update(shard)
        documents += int((shard == BOS).sum())
    return dict(
        tokenizer_sha256=hashlib.sha256(model).hexdigest(),
        val_tokens_sha256=tokens.hexdigest(),
        lossy=alters_text(model),
        val_documents=documents,
    )


def alters_text(model: bytes) -> bool:
    """Whether any of PROBES is another text after encoding and decoding."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    return any(tokenizer.decode(tokenizer.encode(text)) != text for text in PROBES)


def put(path: Path, content: bytes) -> None:
    """A file, whole or not at all."""
    part = path.with_name(f".{path.name}.partial")
    part.unlink(missing_ok=True)  # whatever it is: nothing is written through a link
    with open(part, "xb") as file:
        file.write(content)
    os.replace(part, path)


# -----------------------------------------------------------------------------
# Tokenizers


def byte_model(description: Path) -> bytes:
    """A SentencePiece model of byte260: 4 specials, then byte b as id 4 + b, and no other piece.

    The trainer leaves no room for a piece beside those. It insists on writing spaces as U+2581,
    which would cost three bytes; a normalizer's part says otherwise. Concatenated protocol buffers
    are merged by whoever reads them, and the later value of a field holds.
    """
    ids = dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3)
    fix = "another --repo; its ids would be counted wrongly"
    try:
        config = dict(json.loads(description.read_bytes())["config"])
    except (KeyError, TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
        raise DownloadError(f"{description}: not the known byte260 ({found}); fix: {fix}") from None
    for name, value in (ids | dict(byte_offset=4, byte_count=256)).items():
        if (found := config.get(name, value)) != value:
            raise DownloadError(f"{description}: {name} is {found}, not {value}; fix: {fix}")
    kind = dict(model_type="char", vocab_size=4 + 256, byte_fallback=True)
    plain = dict(add_dummy_prefix=False, remove_extra_whitespaces=False)
    options = ids | kind | plain | dict(normalization_rule_name="identity", minloglevel=2)
    model = io.BytesIO()
    text = iter(["a"])  # it wants some
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=text, model_writer=model, **options)
    data = model.getvalue()
    spaces = sentencepiece.SentencePieceNormalizer(model_proto=data, escape_whitespaces=False)
    return data + spaces.serialized_model_proto()


# -----------------------------------------------------------------------------
# Command line


class OneLineParser(argparse.ArgumentParser):
    """Reports a bad argument the way every other error is reported."""

    def error(self, message: str) -> NoReturn:
        raise DownloadError(f"command line: {message}; fix: see --help")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The checked command line."""
    summary, _, details = (__doc__ or "\n").partition("\n")
    layout = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=summary, epilog=details, formatter_class=layout)
    add = parser.add_argument
    env = os.environ.get
    add("shards", nargs="?", type=int, metavar="N", help="the same as --train-shards N")
    add("--variant", default="sp1024", help="spN or byte260; default sp1024")
    add("--train-shards", type=int, metavar="N", help="of 100,000,000 tokens each; default 80")
    add("--out", type=Path, default=HERE, help="data folder; default: the repository's data/")
    add("--repo", default=env("MATCHED_FINEWEB_REPO_ID") or REPO, help=f"default {REPO}")
    prefix = env("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets")
    add("--prefix", default=prefix, help="the export's folder in it; default datasets")
    add("--revision", default="main", help="branch, tag or commit; default main")
    options = parser.parse_args(arguments)
    given = {options.shards, options.train_shards} - {None}
    if len(given) > 1:
        parser.error(f"{options.shards} and --train-shards {options.train_shards}")
    options.train_shards = given.pop() if given else 80
    if options.train_shards < 0:
        parser.error(f"--train-shards {options.train_shards} is below 0")
    if not re.fullmatch(r"sp\d+|byte260", options.variant):
        parser.error(f"--variant {options.variant} is neither sp1024, another spN nor byte260")
    options.prefix = options.prefix.strip("/")
    return options


def download(options: argparse.Namespace) -> None:
    """Manifest, files and, last, tokenizer.model beside the shards, where train_gpt.py looks."""
    out = options.out
    variant = options.variant
    hub = Hub(options.repo, options.revision)
    path = str(PurePosixPath(options.prefix, "manifest.json"))
    manifest = hub.file(path, out / "manifest.json")
    bring(hub, manifest)
    paths = plan(manifest.target.read_bytes(), variant, options.train_shards, options.prefix)
    named = {target: hub.file(path, out / target) for path, target in paths.items()}
    files = [*named.values()]
    folder = out / "datasets" / f"{DATASET}{variant}"
    known = known_files(folder / DATASET_FILE)
    refuse_changed(named, known, folder / DATASET_FILE)
    size = sum(file.size for file in files)
    say(f"{hub.repo} at {hub.commit[:12]}: {variant}, {len(files)} files, {size:,} bytes")
    fetched = bring_all(hub, files, out)
    tokenizer = files[0].target  # plan's first
    model = byte_model(tokenizer) if variant == "byte260" else tokenizer.read_bytes()
    digests = known | {name: file.digest for name, file in named.items()}
    facts = dataset_facts(folder, model) | dict(files=digests)
    with endings.held():
        put(folder / DATASET_FILE, json.dumps(facts, indent=1).encode() + b"\n")
        put(folder / "tokenizer.model", model)
    say(f"{fetched} files fetched, {len(files) - fetched} were here and whole")
    say(f"wrote {folder}; to use it: DATA_PATH={folder} python train_gpt.py")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line on what is wrong."""
    logging.set_verbosity_error()  # its warnings are several lines each, with signed addresses
    try:
        download(parse_arguments(arguments))
    except DownloadError as error:
        endings.say(f"error: {' '.join(str(error).split())}", sys.stderr)
        return 2
    except OSError as error:
        fix = f"make room or choose another --out; {AGAIN}"
        what = f"{error.filename or 'disk'}: {error.strerror or error}"
        endings.say(f"error: {what}; fix: {fix}", sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(endings.run(main, AGAIN))  # parts stay as they are
