"""Fetch the published FineWeb export of the Parameter Golf challenge from the Hugging Face hub.

    python data/download_fineweb.py                       sp1024: validation and 80 train shards
    python data/download_fineweb.py --variant sp4096 10   another tokenizer, 10 train shards
    python data/download_fineweb.py --train-shards 0      validation only

Into the data folder (--out, by default this file's, where train_gpt.py looks) go manifest.json,
datasets/fineweb10B_<variant>/fineweb_{train,val}_<6 digits>.bin and tokenizers/. A copy of the
tokenizer, tokenizer.model, lies beside the shards, so DATA_PATH alone selects a variant; it is
written last. byte260 is published without a SentencePiece model; one that spells bytes is written.

A file gets its name only after its size, the hub's sha256 (or git id) and a shard's header are
found right. The same command again goes on where it was cut, in the middle of a file too, and
skips what is whole; more shards may be asked for later. Everything is stored once: the hub's cache
is not used. MATCHED_FINEWEB_REPO_ID, MATCHED_FINEWEB_REMOTE_ROOT_PREFIX and the hub's own variables
(HF_ENDPOINT, HF_TOKEN) are read. Exit status: 0, 2 after an error, 130 after Ctrl-C.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from tqdm import tqdm

try:
    from httpx2 import (
        HTTPError,
        InvalidURL,
        UnsupportedProtocol,
    )  # what huggingface_hub is built on
    from huggingface_hub import HfApi, get_session, hf_hub_url
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status
except ModuleNotFoundError as missing:
    print(
        f"error: {missing.name}: not installed; fix: pip install -r requirements.txt",
        file=sys.stderr,
    )
    sys.exit(2)

HERE = Path(__file__).resolve().parent
REPO, PREFIX = "willdepueoai/parameter-golf", "datasets"
DEFAULT_VARIANT, DEFAULT_TRAIN_SHARDS = "sp1024", 80
DATASET = "fineweb10B_"  # and the variant
SHARD_HEADER_BYTES, SHARD_MAGIC, SHARD_VERSION = 1024, 20240520, 1
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")  # ids 0 to 3 of every variant; byte b is 4 + b
CONNECTIONS = 4  # files side by side; one connection rarely fills a line
PATHS_A_REQUEST = 100
TIMEOUT_SECONDS = 30  # without a byte
PAUSE_SECONDS = (1, 2, 4, 8, 16)  # between attempts that bring nothing new
TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
AGAIN = "the same command again goes on from here"


class DownloadError(Exception):
    """What keeps the data from coming: file or variable, value, fix."""


class Stopped(Exception):
    """Another file failed, or the user pressed Ctrl-C."""


# -----------------------------------------------------------------------------
# The hub: what is there, and its bytes


@dataclass(frozen=True)
class RemoteFile:
    """A file at a commit of the repository and where it belongs here."""

    path: str  # in the repository
    target: Path
    size: int  # bytes
    digest: str  # sha256 of a file in LFS, else git's id of the blob
    in_lfs: bool

    @property
    def part(self) -> Path:
        """Where it grows; another version of the file grows elsewhere, and no glob for .bin
        fits."""
        return self.target.with_name(f".{self.target.name}.{self.digest[:12]}.partial")

    def missing_bytes(self) -> int:
        return self.size - (self.part.stat().st_size if self.part.exists() else 0)


@dataclass
class Hub:
    """One dataset repository at one commit, so that files of two versions never mix."""

    repo: str
    revision: str = "main"
    endpoint: str | None = field(default_factory=lambda: os.environ.get("HF_ENDPOINT"))
    stop: threading.Event = field(default_factory=threading.Event)
    say: Callable[[str], None] = print

    def __post_init__(self):
        self.api = HfApi(endpoint=self.endpoint)
        get_session().timeout = TIMEOUT_SECONDS  # without it an unplugged cable would wait forever
        options = dict(revision=self.revision, timeout=TIMEOUT_SECONDS)
        info = self.patiently(lambda: self.api.dataset_info(self.repo, **options), self.repo)
        self.revision = info.sha

    def patiently(self, request: Callable[[], Any], what: str) -> Any:
        """The answer to a request, asked again while the connection or the server fails."""
        for pause in (*PAUSE_SECONDS, None):
            try:
                return request()
            except (HTTPError, InvalidURL, HFValidationError, OfflineModeIsEnabled) as error:
                self.rest(pause, error, what)
            except (
                ValueError,
                KeyError,
                TypeError,
            ) as error:  # a web page, say, where JSON should be
                found = f"no answer of a hub ({type(error).__name__})"
                fix = "check HF_ENDPOINT and the proxy"
                raise DownloadError(f"{self.api.endpoint}: {found}; fix: {fix}") from None

    def rest(self, pause: float | None, error: Exception, what: str) -> None:
        """Wait after a failure; DownloadError where waiting cannot help (None: waited enough)."""
        if pause is None or not passes(error):
            raise DownloadError(self.explain(error, what)) from None
        self.say(f"note: {what}: {reason(error)}; again in {pause} s")
        if self.stop.wait(pause):
            raise Stopped

    def explain(self, error: Exception, what: str) -> str:
        """One line: what failed and what to do about it."""
        where = f"{self.api.endpoint}/datasets/{self.repo}"
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, OfflineModeIsEnabled):
            return f"HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE')}: no download; fix: unset it"
        if isinstance(error, HFValidationError):
            return f"--repo {self.repo}: no name of a repository; fix: give owner/name"
        if isinstance(error, RevisionNotFoundError):
            return f"--revision {self.revision}: not in {where}; fix: a branch, tag or commit of it"
        if isinstance(error, GatedRepoError) or status == 403:
            return f"{where}: access refused (403); fix: ask for access there, and set HF_TOKEN"
        if isinstance(error, RepositoryNotFoundError) or status == 401:
            fix = "check --repo (MATCHED_FINEWEB_REPO_ID); if it is private, set HF_TOKEN"
            return f"{where}: no such dataset repository, or not for you ({status}); fix: {fix}"
        if status == 404:
            return (
                f"{what}: not in {where} at {self.revision[:12]} (404); fix: check --repo, --prefix"
            )
        if status is not None:
            return f"{what}: {where} answers {status}; fix: try later, {AGAIN}"
        fix = f"check the network, the proxy and HF_ENDPOINT; {AGAIN}"
        return f"{what}: no connection to {self.api.endpoint} ({reason(error)}); fix: {fix}"

    def look_up(self, targets: dict[str, Path]) -> list[RemoteFile]:
        """Sizes and digests of {path in the repository: path here}; DownloadError if one lacks."""
        paths, found = list(targets), {}
        for start in range(0, len(paths), PATHS_A_REQUEST):
            some = paths[start : start + PATHS_A_REQUEST]
            ask = self.api.get_paths_info
            options = dict(revision=self.revision, repo_type="dataset")
            answer = self.patiently(lambda: ask(self.repo, some, **options), some[0])  # noqa: B023
            found |= {info.path: info for info in answer if isinstance(info, RepoFile)}
        if missing := [path for path in paths if path not in found]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            where = f"{self.api.endpoint}/datasets/{self.repo} at {self.revision[:12]}"
            fix = "check --repo, --prefix and --revision, or ask for fewer --train-shards"
            raise DownloadError(f"{missing[0]}{more}: not in {where}; fix: {fix}")
        return [remote_file(found[path], target) for path, target in targets.items()]

    @contextlib.contextmanager
    def stream(self, path: str, start: int) -> Iterator[Any]:
        """The response that carries a file's bytes from `start` on (or all of them)."""
        options = dict(repo_type="dataset", revision=self.revision, endpoint=self.endpoint)
        headers = build_hf_headers() | {
            "Accept-Encoding": "identity"
        }  # lengths are the file's then
        if start:
            headers["Range"] = f"bytes={start}-"
        with get_session().stream(
            "GET", hf_hub_url(self.repo, path, **options), headers=headers
        ) as r:
            if r.status_code >= 400:
                r.read()  # the hub says there what is wrong
            hf_raise_for_status(r)
            yield r


def remote_file(info: RepoFile, target: Path) -> RemoteFile:
    """From the hub's listing."""
    size = info.lfs.size if info.lfs else info.size
    digest = info.lfs.sha256 if info.lfs else info.blob_id
    return RemoteFile(info.path, target, size, digest, bool(info.lfs))


def passes(error: Exception) -> bool:
    """Whether the same request may succeed in a while."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT_STATUS
    return isinstance(error, HTTPError) and not isinstance(error, UnsupportedProtocol)


def reason(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError):
        return f"status {error.response.status_code}"
    return " ".join(str(error).split()) or type(error).__name__


# -----------------------------------------------------------------------------
# The manifest: variant -> files


def plan(manifest: Any, variant: str, train_shards: int, prefix: str) -> dict[str, str]:
    """{path in the repository: path in the data folder}: tokenizer, validation, train shards."""
    with reading_manifest():
        datasets = {entry["name"]: entry for entry in manifest["datasets"]}
        tokenizers = {entry["name"]: entry for entry in manifest["tokenizers"]}
    if DATASET + variant not in datasets:
        known = sorted(name.removeprefix(DATASET) for name in datasets if name.startswith(DATASET))
        known = ", ".join(known) or "none"
        raise DownloadError(
            f"--variant {variant}: not in manifest.json; fix: one of those: {known}"
        )
    with reading_manifest():
        entry = datasets[DATASET + variant]
        published, val_shards = (int(entry["stats"][f"files_{side}"]) for side in ("train", "val"))
        tokenizer = tokenizers[entry["tokenizer_name"]]
        if not 1 <= val_shards < 10**6:
            raise ValueError(f"files_val is {val_shards}")
        if "model_path" not in tokenizer and variant != "byte260":
            raise ValueError(f"no model_path of {entry['tokenizer_name']}")
    if train_shards > published:
        fix = f"--train-shards {published} or fewer"
        raise DownloadError(f"--train-shards {train_shards}: {variant} has {published}; fix: {fix}")
    files = tokenizer_files(tokenizer, prefix)
    for split, count in (("val", val_shards), ("train", train_shards)):
        for number in range(count):
            path = f"datasets/{DATASET}{variant}/fineweb_{split}_{number:06d}.bin"
            files[join(prefix, path)] = path
    return files


@contextlib.contextmanager
def reading_manifest() -> Iterator[None]:
    """What may be wrong with another's JSON, as one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        fix = "check --repo and --prefix; it must be an export of the challenge"
        raise DownloadError(f"manifest.json: not as published ({what}); fix: {fix}") from None


def tokenizer_files(tokenizer: dict, prefix: str) -> dict[str, str]:
    """The tokenizer's files always go to tokenizers/, so that no manifest can replace a program."""
    files = {}
    for key in ("model_path", "vocab_path", "path"):
        if path := tokenizer.get(key):
            path = inside(path, f"manifest.json, {key}")
            files[join(prefix, path)] = f"tokenizers/{PurePosixPath(path).name}"
    return files


def inside(path: Any, what: str) -> str:
    """A relative path that stays below its folder, or DownloadError."""
    parts = path.split("/") if isinstance(path, str) else [""]
    if set(parts) & {"", ".", ".."} or re.search(r"[\\:\0-\x1f]", path):
        fix = "do not trust this repository; check --repo and --prefix"
        raise DownloadError(f"{what}: {path!r} is no plain path inside the export; fix: {fix}")
    return path


def join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


# -----------------------------------------------------------------------------
# Files: hub -> part -> checked -> final name


class Progress:
    """A bar on a terminal, else a line a file; from several threads."""

    def __init__(self, what: str, files: list[RemoteFile], size: int):
        self.bar = tqdm(total=size, desc=what, unit="B", unit_scale=True, disable=None, leave=False)
        self.lock, self.files, self.count = threading.Lock(), len(files), 0

    def advance(self, count: int) -> None:
        with self.lock:
            self.bar.update(count)

    def say(self, line: str) -> None:
        """Plain lines appear at once in a log file too."""
        tqdm.write(line)
        sys.stdout.flush()

    def done(self, file: RemoteFile) -> None:
        with self.lock:
            self.count += 1
        if self.bar.disable:
            self.say(
                f"{file.target.name}: {file.size:,} bytes, verified ({self.count}/{self.files})"
            )

    def close(self) -> None:
        self.bar.close()


def problem(path: Path, file: RemoteFile, read: Callable[[int], None] = lambda count: None) -> str:
    """What is wrong with a copy of the file, "" for nothing; `read` hears of the bytes read."""
    if (size := path.stat().st_size) != file.size:
        return f"size {size:,} instead of {file.size:,}"
    name = "sha256" if file.in_lfs else "git id"
    digest = hashlib.sha256() if file.in_lfs else hashlib.sha1(b"blob %d\0" % size)
    with open(path, "rb") as bytes_of:
        while block := bytes_of.read(1 << 20):
            digest.update(block)
            read(len(block))
    if digest.hexdigest() != file.digest:
        return f"{name} {digest.hexdigest()[:12]}... instead of {file.digest[:12]}..."
    return shard_problem(path) if file.target.suffix == ".bin" else ""


def shard_problem(path: Path) -> str:
    """What train_gpt.read_shard would refuse."""
    size = path.stat().st_size
    with open(path, "rb") as shard:
        header = shard.read(SHARD_HEADER_BYTES)
    magic, version, count = struct.unpack("<3i", header[:12]) if len(header) > 11 else (0, 0, 0)
    if (magic, version, size) == (SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES + 2 * count):
        return "" if count > 0 else "no tokens"
    return f"no token shard (magic {magic}, version {version}, {count} tokens in {size:,} bytes)"


def fetch(hub: Hub, file: RemoteFile, progress: Progress) -> None:
    """Bring one file under its final name; what came before a cut or Ctrl-C is kept beside it."""
    file.target.parent.mkdir(parents=True, exist_ok=True)
    with open(file.part, "a+b") as part:
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fix = "wait for it, or end it"
            raise DownloadError(f"{file.target}: another download is at it; fix: {fix}") from None
        kept = part.tell()
        transfer(hub, file, part, progress)
        wrong = problem(file.part, file)
        if wrong and kept:  # what a crash left may be damaged
            hub.say(
                f"note: {file.target.name}: {wrong} after going on at {kept:,}; from the start"
                " again"
            )
            rewind(part, progress)
            transfer(hub, file, part, progress)
            wrong = problem(file.part, file)
        if wrong:
            file.part.unlink()
            fix = f"again later; if it stays, the copy in {hub.repo} is wrong"
            raise DownloadError(f"{file.path} of {hub.repo}: {wrong}; fix: {fix}")
        os.fsync(part.fileno())
        os.replace(file.part, file.target)
    for older in file.target.parent.glob(f".{file.target.name}.*.partial"):
        older.unlink()  # of a version that is no longer published
    progress.done(file)


def transfer(hub: Hub, file: RemoteFile, part: BinaryIO, progress: Progress) -> None:
    """Append what is missing, over as many connections as it takes while each brings something."""
    failures = 0
    while (start := part.tell()) < file.size:
        error: Exception = HTTPError("the connection ended early")
        try:
            append(hub, file, part, progress)
        except HTTPError as cut:
            error = cut
        if part.tell() < file.size:
            failures = 1 if part.tell() > start else failures + 1
            hub.rest((*PAUSE_SECONDS, None)[failures - 1], error, file.path)
    if part.tell() > file.size:  # a part that somebody lengthened
        rewind(part, progress)
        transfer(hub, file, part, progress)


def append(hub: Hub, file: RemoteFile, part: BinaryIO, progress: Progress) -> None:
    """One connection's bytes to the end of `part`."""
    with hub.stream(file.path, part.tell()) as response:
        if response.status_code != 206:  # all of it, although only the rest was asked for
            rewind(part, progress)
        for block in checked(response, file, part.tell()):
            if hub.stop.is_set():
                raise Stopped
            part.write(block)
            part.flush()
            progress.advance(len(block))


def checked(response: Any, file: RemoteFile, start: int) -> Iterator[bytes]:
    """The response's bytes; DownloadError as soon as the file there has another length."""
    length = response.headers.get("Content-Length")
    if "Content-Encoding" in response.headers:  # a proxy's; its length is not the file's
        length = None
    come = end = start + int(length) if length is not None else file.size
    if end == file.size:
        come = start
        for block in response.iter_bytes():
            come += len(block)
            if come > file.size:
                break
            yield block
    if come > file.size or end != file.size:
        fix = "try later, the hub may be changing it"
        found = f"{max(come, end):,} bytes instead of {file.size:,}"
        raise DownloadError(f"{file.path} ({response.url.host}): wrong size, {found}; fix: {fix}")


def rewind(part: BinaryIO, progress: Progress) -> None:
    progress.advance(-part.tell())
    part.seek(0)
    part.truncate()


def side_by_side(hub: Hub, work: Callable[[RemoteFile], Any], files: list[RemoteFile]) -> list:
    """The results for all files; the first failure or Ctrl-C ends the others at their next
    block."""
    pool = ThreadPoolExecutor(CONNECTIONS)
    try:
        futures = [pool.submit(work, file) for file in files]
        wait(futures, return_when=FIRST_EXCEPTION)
        if any(future.done() and future.exception() for future in futures):
            hub.stop.set()
        pool.shutdown(cancel_futures=hub.stop.is_set())
    except KeyboardInterrupt:
        hub.stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    errors = [error for f in futures if not f.cancelled() and (error := f.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
        raise error  # the cause, not those it stopped
    return [future.result() for future in futures]


# -----------------------------------------------------------------------------
# Tokenizers


def byte_model() -> bytes:
    """A SentencePiece model of byte260: 4 specials, then byte b as id 4 + b, and no other piece.

    Written as the protocol buffer's fields (sentencepiece_model.proto), since the trainer insists
    on pieces of its own. Spaces stay spaces: as U+2581 they would cost three bytes.
    """
    kinds = (3, 3, 3, 2)  # control, control, control, unknown
    pieces = [*zip(SPECIALS, kinds, strict=True), *((f"<0x{byte:02X}>", 6) for byte in range(256))]
    body = b"".join(field_of(1, field_of(1, text) + field_of(3, kind)) for text, kind in pieces)
    bpe, count, byte_fallback = field_of(3, 2), field_of(4, len(pieces)), field_of(35, 1)
    ids = {40: 3, 41: 1, 42: 2, 43: 0}  # unknown, BOS, EOS, padding
    trainer = bpe + count + byte_fallback + b"".join(field_of(*pair) for pair in ids.items())
    plain = {3: 0, 4: 0, 5: 0}  # no dummy prefix, no spaces removed, none escaped
    normalizer = field_of(1, "identity") + b"".join(field_of(*pair) for pair in plain.items())
    return body + field_of(2, trainer) + field_of(3, normalizer)


def field_of(number: int, value: int | str | bytes) -> bytes:
    """One field in the protocol buffers' wire format."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    if number < 128:
        return bytes([number])
    return bytes([number & 127 | 128]) + varint(number >> 7)


def check_byte_layout(description: Path) -> None:
    """DownloadError if the published byte260 has other ids than byte_model()."""
    wanted = dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3, byte_offset=4, byte_count=256)
    try:
        config = json.loads(description.read_bytes())["config"]
        other = {name: value for name, value in config.items() if wanted.get(name, value) != value}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        other = f"{type(error).__name__}: {error}"
    if other:
        fix = "another --repo; these ids would be counted wrongly"
        raise DownloadError(f"{description}: not the known byte260 ({other}); fix: {fix}")


def place_tokenizer(files: list[RemoteFile], folder: Path) -> None:
    """tokenizer.model beside the shards, where train_gpt.py looks first."""
    tokenizers = [file.target for file in files if file.target.parent.name == "tokenizers"]
    models = [path for path in tokenizers if path.suffix == ".model"]
    for path in [] if models else tokenizers:
        check_byte_layout(path)
    data = models[0].read_bytes() if models else byte_model()
    part, model = folder / ".tokenizer.model.partial", folder / "tokenizer.model"
    part.write_bytes(data)
    os.replace(part, model)


# -----------------------------------------------------------------------------
# Command line


class OneLineParser(argparse.ArgumentParser):
    """Reports a bad argument the way every other error is reported."""

    def error(self, message):
        raise DownloadError(f"command line: {message}; fix: see --help")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The checked command line."""
    summary, _, details = __doc__.partition("\n")
    layout = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=summary, epilog=details, formatter_class=layout)
    add, env = parser.add_argument, os.environ.get
    add("shards", nargs="?", type=int, metavar="N", help="the same as --train-shards N")
    add("--variant", default=DEFAULT_VARIANT, help="spN or byte260; default sp1024")
    add("--train-shards", type=int, metavar="N", help="of 100,000,000 tokens each; default 80")
    add("--out", type=Path, default=HERE, help="data folder; default: the repository's data/")
    add("--repo", default=env("MATCHED_FINEWEB_REPO_ID") or REPO, help=f"default {REPO}")
    prefix = env("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", PREFIX)
    add("--prefix", default=prefix, help=f"the export's folder in it; default {PREFIX}")
    add("--revision", default="main", help="branch, tag or commit; default main")
    options = parser.parse_args(arguments)
    if options.shards is not None and options.train_shards not in (None, options.shards):
        parser.error(f"{options.shards} and --train-shards {options.train_shards}")
    given = [n for n in (options.shards, options.train_shards) if n is not None]
    options.train_shards = given[0] if given else DEFAULT_TRAIN_SHARDS
    if not 0 <= options.train_shards < 10**6:
        raise DownloadError(
            f"--train-shards {options.train_shards}: too few or many; fix: 0 or more"
        )
    if not re.fullmatch(r"sp\d+|byte260", options.variant):
        raise DownloadError(
            f"--variant {options.variant}: unknown; fix: sp1024, another spN, or byte260"
        )
    options.prefix = options.prefix.strip("/")
    if options.prefix:
        inside(options.prefix, "--prefix")
    return options


def check_space(files: list[RemoteFile], out: Path) -> None:
    """DownloadError before the first byte if the disk cannot hold what is still missing."""
    out = out.absolute()
    nearest = next(path for path in [out, *out.parents] if path.exists())
    needed, free = sum(file.missing_bytes() for file in files), shutil.disk_usage(nearest).free
    if needed > free:
        fix = "free some, fewer --train-shards, or --out on another disk"
        raise DownloadError(f"--out {out}: {needed:,} bytes needed, {free:,} free; fix: {fix}")


def find_missing(hub: Hub, files: list[RemoteFile]) -> list[RemoteFile]:
    """Those that are not here as the hub has them; a damaged one loses its name at once."""
    here = [file for file in files if file.target.exists()]
    progress = Progress("checking", here, sum(file.size for file in here))

    def check(file: RemoteFile) -> bool:
        def read(count: int) -> None:
            progress.advance(count)
            if hub.stop.is_set():
                raise Stopped

        if wrong := problem(file.target, file, read):
            hub.say(f"note: {file.target.name}: {wrong}; fetched again")
            file.target.unlink()
        return not wrong

    with contextlib.closing(progress):
        whole = dict(zip(here, side_by_side(hub, check, here), strict=True))
    return [file for file in files if not whole.get(file)]


def fetch_all(hub: Hub, files: list[RemoteFile], out: Path) -> list[RemoteFile]:
    """Bring every file to its place -> those that had to be fetched."""
    missing = find_missing(hub, files)
    check_space(missing, out)
    progress = Progress("downloading", missing, sum(file.size for file in missing))
    progress.advance(sum(file.size - file.missing_bytes() for file in missing))
    with contextlib.closing(progress):
        hub.say = progress.say
        side_by_side(hub, lambda file: fetch(hub, file, progress), missing)
    return missing


def download(options: argparse.Namespace) -> None:
    """Manifest, files, tokenizer.model."""
    out, variant = options.out, options.variant
    hub = Hub(options.repo, options.revision)
    manifest = hub.look_up({join(options.prefix, "manifest.json"): out / "manifest.json"})
    fetch_all(hub, manifest, out)
    with reading_manifest():
        published = json.loads((out / "manifest.json").read_bytes())
    planned = plan(published, variant, options.train_shards, options.prefix)
    files = hub.look_up({path: out / target for path, target in planned.items()})
    size = sum(file.size for file in files)
    print(f"{hub.repo} at {hub.revision[:12]}: {variant}, {len(files)} files, {size:,} bytes")
    fetched = fetch_all(hub, files, out)
    folder = out / "datasets" / f"{DATASET}{variant}"
    place_tokenizer(files, folder)
    print(f"{len(fetched)} files fetched, {len(files) - len(fetched)} were here and whole")
    report(folder)


def report(folder: Path) -> None:
    """What lies there, and how train_gpt.py is told."""
    for split in ("train", "val"):
        shards = list(folder.glob(f"fineweb_{split}_*.bin"))
        tokens = sum((path.stat().st_size - SHARD_HEADER_BYTES) // 2 for path in shards)
        print(f"{split} shards:{len(shards)} tokens:{tokens}")
    if folder.resolve() == HERE / "datasets" / f"{DATASET}{DEFAULT_VARIANT}":
        print(f"wrote {folder}; train_gpt.py looks there by itself")
    else:
        print(f"wrote {folder}; to use it: DATA_PATH={folder} python train_gpt.py")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0; 2 after one line on what is wrong; 130 after Ctrl-C."""
    try:
        download(parse_arguments(arguments))
    except KeyboardInterrupt:
        print(f"interrupted; {AGAIN}", file=sys.stderr)
        return 130
    except DownloadError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        fix = f"make room or choose another --out; {AGAIN}"
        print(f"error: {error.filename or 'disk'}: {error.strerror}; fix: {fix}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if status == 130:
        os._exit(
            status
        )  # without waiting for a connection that says nothing; parts stay as they are
    sys.exit(status)
