"""Fetch the published FineWeb export of the Parameter Golf challenge from the Hugging Face hub.

    python data/download_fineweb.py                       sp1024: validation and 80 train shards
    python data/download_fineweb.py --variant sp4096 10   another tokenizer, 10 train shards
    python data/download_fineweb.py --train-shards 0      validation only

Into the data folder (--out, by default this file's, where train_gpt.py looks) go manifest.json,
datasets/fineweb10B_<variant>/fineweb_{train,val}_<6 digits>.bin and tokenizers/. A copy of the
tokenizer, tokenizer.model, lies beside the shards, so DATA_PATH alone selects a variant; it is
written last. byte260 is not offered: it is published without a SentencePiece model.

huggingface_hub fetches into .download/ in the data folder, and goes on in the middle of a file when
a connection breaks. A file leaves that folder, under its name, once its size, the hub's sha256 (or
git id) and a shard's header are found right. After an error or a kill the same command fetches what
is missing, a file at least (200 MB); more shards may be asked for later. MATCHED_FINEWEB_REPO_ID,
MATCHED_FINEWEB_REMOTE_ROOT_PREFIX and the hub's own variables (HF_ENDPOINT, HF_TOKEN) are read.
Exit status: 0, 2 after an error, 130 after Ctrl-C.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

try:
    from httpx2 import (
        HTTPError,
        InvalidURL,
        UnsupportedProtocol,
    )  # what huggingface_hub is built on
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.hf_api import RepoFile
except ModuleNotFoundError as missing:
    fix = "pip install -r requirements.txt"
    print(f"error: {missing.name}: not installed; fix: {fix}", file=sys.stderr)
    sys.exit(2)

HERE = Path(__file__).resolve().parent
REPO, PREFIX = "willdepueoai/parameter-golf", "datasets"
DEFAULT_VARIANT, DEFAULT_TRAIN_SHARDS = "sp1024", 80
DATASET, VARIANT = "fineweb10B_", r"sp\d+"
SHARD_HEADER_BYTES, SHARD_MAGIC, SHARD_VERSION = 1024, 20240520, 1
STAGING = ".download"  # in the data folder: what is not yet checked
CONNECTIONS = 4  # files side by side; one connection rarely fills a line
PATHS_A_REQUEST = 100
PAUSE_SECONDS = (1, 2, 4, 8, 16)  # between attempts
TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
AGAIN = "the same command again goes on from here"


class DownloadError(Exception):
    """What keeps the data from coming: file or variable, value, fix."""


# -----------------------------------------------------------------------------
# The hub: what is there, and its bytes


class RemoteFile(NamedTuple):
    """A file at a commit of the repository and where it belongs here."""

    path: str  # in the repository
    target: Path
    size: int  # bytes
    digest: str  # sha256 of a file in LFS, else git's id of the blob
    in_lfs: bool

    @classmethod
    def of(cls, info: RepoFile, target: Path) -> "RemoteFile":
        """From the hub's listing"""
        if info.lfs:
            return cls(info.path, target, info.lfs.size, info.lfs.sha256, True)
        return cls(info.path, target, info.size, info.blob_id, False)


class Hub:
    """One dataset repository at one commit, so that files of two versions never mix."""

    def __init__(self, repo: str, revision: str = "main") -> None:
        self.repo = repo
        self.revision = revision
        self.api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        self.revision = self.patiently(
            lambda: self.api.dataset_info(repo, revision=revision), repo
        ).sha

    def patiently(self, request: Callable[[], Any], what: str) -> Any:
        """The answer to a request, asked again while the connection or the server fails."""
        for pause in (*PAUSE_SECONDS, None):
            try:
                return request()
            except (HTTPError, InvalidURL, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
                if pause is None or not passes(error):
                    raise DownloadError(self.explain(error, what)) from None
                print(f"note: {what}: {reason(error)}; again in {pause} s", flush=True)
                time.sleep(pause)
            except HFValidationError:
                fix = "give owner/name"
                raise DownloadError(
                    f"--repo {self.repo}: no repository's name; fix: {fix}"
                ) from None
            except (ValueError, KeyError, TypeError) as error:  # a web page where JSON should be
                found = f"no answer of a hub ({type(error).__name__})"
                fix = "check HF_ENDPOINT and the proxy"
                raise DownloadError(f"{self.api.endpoint}: {found}; fix: {fix}") from None

    def explain(self, error: Exception, what: str) -> str:
        """One line: what failed and what to do about it."""
        error = cause(error)
        where = f"{self.api.endpoint}/datasets/{self.repo}"
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, OfflineModeIsEnabled):
            return f"HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE')}: no download; fix: unset it"
        if isinstance(error, RevisionNotFoundError):
            return f"--revision {self.revision}: not in {where}; fix: a branch, tag or commit of it"
        if isinstance(error, GatedRepoError) or status == 403:
            return f"{where}: access refused (403); fix: ask for access there, and set HF_TOKEN"
        if isinstance(error, RepositoryNotFoundError) or status == 401:
            fix = "check --repo (MATCHED_FINEWEB_REPO_ID); if it is private, set HF_TOKEN"
            return f"{where}: no such dataset repository, or not for you ({status}); fix: {fix}"
        if status == 404:
            found = f"{what}: not in {where} at {self.revision[:12]} (404)"
            return f"{found}; fix: check --repo, --prefix"
        if status is not None:
            return f"{what}: {where} answers {status}; fix: try later, {AGAIN}"
        fix = f"check the network, the proxy and HF_ENDPOINT; {AGAIN}"
        return f"{what}: no connection to {self.api.endpoint} ({reason(error)}); fix: {fix}"

    def look_up(self, targets: dict[str, Path]) -> list[RemoteFile]:
        """Sizes and digests of {path in the repository: path here}; DownloadError if one lacks."""
        paths = list(targets)
        found = {}
        for start in range(0, len(paths), PATHS_A_REQUEST):
            some = paths[start : start + PATHS_A_REQUEST]
            options = dict(paths=some, revision=self.revision, repo_type="dataset")
            ask = functools.partial(self.api.get_paths_info, self.repo, **options)
            answer = self.patiently(ask, some[0])
            found |= {info.path: info for info in answer if isinstance(info, RepoFile)}
        if missing := [path for path in paths if path not in found]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            where = f"{self.api.endpoint}/datasets/{self.repo} at {self.revision[:12]}"
            fix = "check --repo, --prefix and --revision, or ask for fewer --train-shards"
            raise DownloadError(f"{missing[0]}{more}: not in {where}; fix: {fix}")
        return [RemoteFile.of(found[path], target) for path, target in targets.items()]

    def fetch(self, file: RemoteFile, staging: Path) -> None:
        """Bring one file under its final name: whole and as published, or DownloadError."""
        options = dict(repo_type="dataset", revision=self.revision, endpoint=self.api.endpoint)
        bring = functools.partial(hf_hub_download, self.repo, file.path, **options)
        try:
            path = Path(self.patiently(lambda: bring(local_dir=staging), file.path))
            wrong = problem(path, file)
        except OSError as error:
            if "Consistency check failed" not in str(error):  # huggingface_hub's, of the size
                raise
            wrong = " ".join(str(error).split()).partition(" (")[0]
        if wrong:
            fix = f"again later; if it stays, the copy in {self.repo} is wrong"
            raise DownloadError(f"{file.path} of {self.repo}: {wrong}; fix: {fix}")
        file.target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, file.target)


def cause(error: Exception) -> Exception:
    """What huggingface_hub wraps where it found neither the hub nor a file here"""
    inner = error.__cause__
    return inner if isinstance(error, LocalEntryNotFoundError) and inner else error


def passes(error: Exception) -> bool:
    """Whether the same request may succeed in a while."""
    error = cause(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT_STATUS
    return isinstance(error, HTTPError) and not isinstance(error, UnsupportedProtocol)


def reason(error: Exception) -> str:
    error = cause(error)
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
        known = (name.removeprefix(DATASET) for name in sorted(datasets))
        known = ", ".join(name for name in known if re.fullmatch(VARIANT, name)) or "none"
        raise DownloadError(
            f"--variant {variant}: not in manifest.json; fix: one of those: {known}"
        )
    with reading_manifest():
        entry = datasets[DATASET + variant]
        published, val_shards = (int(entry["stats"][f"files_{side}"]) for side in ("train", "val"))
        tokenizer = tokenizers[entry["tokenizer_name"]]
        if not 1 <= val_shards < 10**6:
            raise ValueError(f"files_val is {val_shards}")
        if not str(tokenizer["model_path"]).endswith(".model"):
            raise ValueError(f"model_path of {entry['tokenizer_name']} is no .model")
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
    for key in ("model_path", "vocab_path"):
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
# Files: hub -> .download/ -> checked -> final name


def problem(path: Path, file: RemoteFile) -> str:
    """What is wrong with a copy of the file, "" for nothing"""
    size = path.stat().st_size
    if size != file.size:
        return f"size {size:,} instead of {file.size:,}"
    name = "sha256" if file.in_lfs else "git id"
    digest = hashlib.sha256() if file.in_lfs else hashlib.sha1(b"blob %d\0" % size)
    with open(path, "rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
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


def is_here(file: RemoteFile) -> bool:
    """As the hub has it; a damaged one loses its name at once."""
    if not file.target.exists():
        return False
    if wrong := problem(file.target, file):
        print(f"note: {file.target.name}: {wrong}; fetched again", flush=True)
        file.target.unlink()
    return not wrong


def side_by_side(work: Callable[[RemoteFile], Any], files: Sequence[RemoteFile]) -> Iterator:
    """(file, result) as they end; after the first failure or Ctrl-C no other begins."""
    pool = ThreadPoolExecutor(CONNECTIONS)
    try:
        futures = {pool.submit(work, file): file for file in files}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        pool.shutdown(wait=sys.exc_info()[0] is not KeyboardInterrupt, cancel_futures=True)


@contextlib.contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """.download/, of one process at a time; what a kill left there may be half a file and goes."""
    out.mkdir(parents=True, exist_ok=True)
    staging = out / STAGING
    with open(out / f"{STAGING}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fix = "wait for it, or end it"
            raise DownloadError(f"--out {out}: another download is at it; fix: {fix}") from None
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            Path(lock.name).unlink()


def check_space(files: Sequence[RemoteFile], out: Path) -> None:
    """DownloadError before the first byte if the disk cannot hold what is still missing."""
    needed = sum(file.size for file in files)
    free = shutil.disk_usage(out).free
    if needed > free:
        fix = "free some, fewer --train-shards, or --out on another disk"
        raise DownloadError(f"--out {out}: {needed:,} bytes needed, {free:,} free; fix: {fix}")


def fetch_all(hub: Hub, files: Sequence[RemoteFile], out: Path, staging: Path) -> int:
    """Bring every file to its place -> how many had to be fetched."""
    here = dict(side_by_side(is_here, files))
    missing = [file for file in files if not here[file]]
    check_space(missing, out)
    fetched = side_by_side(lambda file: hub.fetch(file, staging), missing)
    for count, (file, _) in enumerate(fetched, 1):
        line = f"{file.target.name}: {file.size:,} bytes, verified ({count}/{len(missing)})"
        print(line, flush=True)
    return len(missing)


def place_tokenizer(files: Sequence[RemoteFile], folder: Path) -> None:
    """tokenizer.model beside the shards, where train_gpt.py looks first."""
    (model,) = [file.target for file in files if file.target.suffix == ".model"]
    part = folder / ".tokenizer.model.partial"
    shutil.copyfile(model, part)
    os.replace(part, folder / "tokenizer.model")


# -----------------------------------------------------------------------------
# Command line


class OneLineParser(argparse.ArgumentParser):
    """Reports a bad argument the way every other error is reported."""

    def error(self, message: str) -> None:
        raise DownloadError(f"command line: {message}; fix: see --help")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The checked command line."""
    summary, _, details = __doc__.partition("\n")
    layout = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=summary, epilog=details, formatter_class=layout)
    add, env = parser.add_argument, os.environ.get
    add("shards", nargs="?", type=int, metavar="N", help="the same as --train-shards N")
    add("--variant", default=DEFAULT_VARIANT, help="spN; default sp1024")
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
    if not re.fullmatch(VARIANT, options.variant):
        why = "published without a SentencePiece model, which train_gpt.py needs"
        why = why if options.variant == "byte260" else "unknown"
        raise DownloadError(f"--variant {options.variant}: {why}; fix: sp1024 or another spN")
    options.prefix = options.prefix.strip("/")
    if options.prefix:
        inside(options.prefix, "--prefix")
    return options


def download(options: argparse.Namespace) -> None:
    """Manifest, files, tokenizer.model."""
    out = options.out
    hub = Hub(options.repo, options.revision)
    manifest = hub.look_up({join(options.prefix, "manifest.json"): out / "manifest.json"})
    with staging_folder(out) as staging:
        fetch_all(hub, manifest, out, staging)
        with reading_manifest():
            published = json.loads((out / "manifest.json").read_bytes())
        planned = plan(published, options.variant, options.train_shards, options.prefix)
        files = hub.look_up({path: out / target for path, target in planned.items()})
        size = sum(file.size for file in files)
        what = f"{options.variant}, {len(files)} files, {size:,} bytes"
        print(f"{hub.repo} at {hub.revision[:12]}: {what}", flush=True)
        fetched = fetch_all(hub, files, out, staging)
    folder = out / "datasets" / f"{DATASET}{options.variant}"
    place_tokenizer(files, folder)
    print(f"{fetched} files fetched, {len(files) - fetched} were here and whole")
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
