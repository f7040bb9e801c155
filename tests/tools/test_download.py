"""data/download_fineweb.py against a server on this machine that plays the hub: the answers that
huggingface_hub asks for, files in LFS behind a redirect, and every way in which it can go wrong."""

import contextlib
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

import huggingface_hub
import numpy as np
import pytest
import sentencepiece
from helpers import ROOT, model_of, train_gpt, write_shard

import download_fineweb

REPO, COMMIT = "someone/export", "c0ffee" * 6 + "c0de"
TEXT = "the quick brown fox jumps over the lazy dog and runs away from it all again " * 30
MODEL = model_of(TEXT, 300, byte_fallback=True)
SHARD_TOKENS = 40_000
KEPT = 10 << 20  # bytes: huggingface_hub writes so many at a time
FOLDER = "datasets/fineweb10B_sp1024"


# -----------------------------------------------------------------------------
# The hub


class Handler(BaseHTTPRequestHandler):
    """One request of huggingface_hub 2.4.0."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, text in (dict(Content_Length=len(body)) | headers).items():
            self.send_header(name.replace("_", "-"), str(text))
        self.end_headers()
        self.wfile.write(body)

    def answer_json(self, data):
        self.reply(200, json.dumps(data).encode(), Content_Type="application/json")

    def refuse(self, status, code):
        self.reply(status, X_Error_Code=code, X_Error_Message=code)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.hub.requests.append(("POST", self.path, None))
        if self.path != f"/api/datasets/{REPO}/paths-info/{COMMIT}":
            return self.refuse(404, "RevisionNotFound")
        paths = parse_qs(body)["paths"]
        self.answer_json([self.hub.entry(path) for path in paths if path in self.hub.files])

    def do_HEAD(self):
        """What huggingface_hub asks before a file: where it lies, its digest and size."""
        self.hub.tokens[self.path] = self.headers["Authorization"]
        name = unquote(self.path).removeprefix(f"/datasets/{REPO}/resolve/{COMMIT}/")
        self.hub.requests.append(("HEAD", self.path, None))
        if name not in self.hub.files or name in self.hub.gone:
            return self.refuse(404, "EntryNotFound")
        entry = self.hub.entry(name)
        told = dict(X_Repo_Commit=COMMIT, ETag=f'"{entry["oid"]}"')
        if not self.hub.in_lfs(name):
            return self.reply(200, Content_Length=entry["size"], **told)
        told |= dict(X_Linked_ETag=f'"{entry["lfs"]["oid"]}"', X_Linked_Size=entry["size"])
        self.reply(302, Location=f"{self.hub.cdn}/cdn/{name}", **told)

    def do_GET(self):
        self.hub.requests.append(("GET", self.path, self.headers["Range"]))
        self.hub.tokens[self.path] = self.headers["Authorization"]
        if self.hub.is_web_page:
            return self.reply(200, b"<html>log in</html>")
        path = unquote(self.path)
        if self.hub.statuses and "/api/datasets/" in path:
            return self.refuse(*self.hub.statuses.pop(0))
        if path.startswith(f"/api/datasets/{REPO}/revision/"):
            if path.rpartition("/")[2] not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            return self.answer_json(dict(id=REPO, sha=COMMIT, siblings=[]))
        resolve = f"/datasets/{REPO}/resolve/{COMMIT}/"
        name = path.removeprefix("/cdn/").removeprefix(resolve)
        if name == path or path.startswith("/api/"):
            return self.refuse(401, "RepoNotFound")  # what the hub tells strangers of any such name
        if name not in self.hub.files or name in self.hub.gone:
            return self.refuse(404, "EntryNotFound")
        if path.startswith(resolve) and self.hub.in_lfs(name):
            return self.reply(302, Location=f"{self.hub.cdn}/cdn/{name}", X_Repo_Commit=COMMIT)
        self.send_file(name, self.hub.served.get(name, self.hub.files[name]))

    def send_file(self, name, data):
        """From the asked byte on; only part of it where the connection shall break."""
        found = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        start = int(found[1]) if found and self.hub.ranges else 0
        body = data[start:]
        if start and not body:
            return self.reply(416)
        self.send_response(206 if start else 200)
        if self.hub.encoding == "gzip":
            body = gzip.compress(body)
            self.send_header("Content-Encoding", "gzip")
        if self.hub.encoding == "until the end":
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        cuts = self.hub.cuts.get(name)
        count = cuts.pop(0) if cuts else len(body)
        self.wfile.write(body[:count])
        if count < len(body):
            self.wfile.flush()
            self.hub.go_on.wait(20)
            self.close_connection = True


class FakeHub(ThreadingHTTPServer):
    """A dataset repository and what shall go wrong with it."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), type("Bound", (Handler,), dict(hub=self)))
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.cdn = f"http://localhost:{self.server_port}"  # another host, as the hub's storage is
        self.files, self.requests = {}, []  # path: bytes; (method, path, Range)
        self.tokens, self.is_web_page = {}, False  # path: Authorization
        self.cuts = {}  # path: [bytes sent before each cut]
        self.served, self.gone = {}, set()  # path: other bytes; listed but not there
        self.statuses = []  # of the next answers of the API: (status, code)
        self.ranges, self.encoding = True, ""
        self.go_on = threading.Event()  # whether a cut connection is closed at once
        self.go_on.set()

    def handle_error(self, request, client_address):
        """A client that hangs up is part of the play."""

    def in_lfs(self, name):
        return name.endswith((".bin", ".model"))

    def entry(self, name):
        data = self.files[name]
        info = dict(type="file", path=name, size=len(data))
        if self.in_lfs(name):
            sha = hashlib.sha256(data).hexdigest()
            return info | dict(oid="0" * 40, lfs=dict(oid=sha, size=len(data), pointerSize=130))
        return info | dict(oid=hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())

    def add(self, name, data):
        self.files[f"datasets/{name}"] = (
            data if isinstance(data, bytes) else json.dumps(data).encode()
        )

    def fetched(self):
        """How often each file was asked for, by its name."""
        places = "/resolve/", "/cdn/"
        asked = [
            path for how, path, _ in self.requests if how == "GET" if any(p in path for p in places)
        ]
        paths = [path.rpartition("/")[2] for path in asked]
        return {name: paths.count(name) for name in paths}

    def ranges_of(self, name):
        """What was asked of the storage: None for all of it"""
        return [r for how, path, r in self.requests if how == "GET" and path.endswith(name)]


def shard(number, path, vocab_size=300):
    rng = np.random.default_rng(number)
    tokens = rng.integers(4, vocab_size, SHARD_TOKENS)
    tokens[0] = 1
    return write_shard(path, tokens).read_bytes()


def manifest(variants=("sp1024", "sp4096", "byte260"), train=3):
    datasets = [
        dict(
            name=f"fineweb10B_{v}",
            tokenizer_name=f"tok_{v}",
            stats=dict(files_train=train, files_val=1),
        )
        for v in variants
    ]
    tokenizers = [
        dict(name="tok_byte260", path="tokenizers/fineweb_pure_byte_260.json"),
        *(
            dict(
                name=f"tok_sp{n}",
                model_path=f"tokenizers/fineweb_{n}_bpe.model",
                vocab_path=f"tokenizers/fineweb_{n}_bpe.vocab",
            )
            for n in (1024, 4096)
        ),
    ]
    return dict(datasets=datasets, tokenizers=tokenizers)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Path below datasets/ -> bytes of a small export."""
    work = tmp_path_factory.mktemp("export") / "shard.bin"
    files = {"manifest.json": manifest()}
    for variant, size in (("sp1024", 300), ("sp4096", 300)):
        for i, name in enumerate(["val_000000", *(f"train_{n:06d}" for n in range(3))]):
            files[f"datasets/fineweb10B_{variant}/fineweb_{name}.bin"] = shard(i, work, size)
    for vocab in (1024, 4096):
        files[f"tokenizers/fineweb_{vocab}_bpe.model"] = MODEL
        files[f"tokenizers/fineweb_{vocab}_bpe.vocab"] = b"<pad>\t0\n<s>\t0\n"
    return files


@pytest.fixture
def hub(published, monkeypatch):
    server = FakeHub()
    for name, data in published.items():
        server.add(name, data)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    for name, text in environment(server).items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(download_fineweb, "PAUSE_SECONDS", (0, 0, 0, 0, 0))
    fast = types.SimpleNamespace(**vars(time) | dict(sleep=lambda seconds: None))
    monkeypatch.setattr(huggingface_hub.file_download, "time", fast)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # kept at a cut
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()


def environment(hub):
    return dict(
        HF_ENDPOINT=hub.url,
        NO_PROXY="127.0.0.1,localhost",
        MATCHED_FINEWEB_REPO_ID=REPO,
        MATCHED_FINEWEB_REMOTE_ROOT_PREFIX="datasets",
    )


@pytest.fixture
def get(tmp_path, capsys):
    """Run the program here -> its exit status, its output, the data folder."""

    def run(*arguments):
        out = tmp_path / "data"
        status = download_fineweb.main([*arguments, "--out", str(out)])
        text = capsys.readouterr()
        return types.SimpleNamespace(status=status, out=out, stdout=text.out, stderr=text.err)

    return run


def refusal(done):
    """The one line of a refused download, which names a fix; nothing under a shard's name."""
    assert done.status == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "; fix: " in line
    return line


def final_names(out):
    return sorted(
        path.relative_to(out).as_posix()
        for path in out.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(out).parts)
    )


def assert_complete(out, hub, variant="sp1024", train=3):
    """Every file as published, a tokenizer beside the shards, and nothing else."""
    folder = f"datasets/fineweb10B_{variant}"
    (tokenizer,) = [t for t in manifest()["tokenizers"] if t["name"] == f"tok_{variant}"]
    wanted = {"manifest.json"} | {path for key, path in tokenizer.items() if key != "name"}
    shards = ["val_000000", *(f"train_{number:06d}" for number in range(train))]
    wanted |= {f"{folder}/fineweb_{name}.bin" for name in shards}
    for name in wanted:
        assert (out / name).read_bytes() == hub.files[f"datasets/{name}"], name
    assert set(final_names(out)) == wanted | {f"{folder}/tokenizer.model"}
    assert not list(out.glob(".download*"))


# -----------------------------------------------------------------------------
# What a user gets


def test_program_fills_the_folder_train_gpt_looks_in(hub, tmp_path, monkeypatch):
    """As a process, from another folder; then with the script's own readers at its defaults."""
    out = tmp_path / "repository" / "data"
    done = process(hub, out, "--train-shards", "2").communicate(timeout=60)
    assert_complete(out, hub, train=2)
    assert "fineweb_train_000001.bin: 81,024 bytes, verified" in done[0] and done[1] == ""
    assert f"train shards:2 tokens:{2 * SHARD_TOKENS}" in done[0]
    for name in ("SAMPLE_DATA", "FINEWEB_DATA", "FINEWEB_TOKENIZER"):
        inside = getattr(train_gpt, name).relative_to(ROOT / "data")
        monkeypatch.setitem(vars(train_gpt), name, out / inside)
    paths = train_gpt.default_paths({}, "own")
    assert len(train_gpt.find_shards(paths["DATA_PATH"], "train")) == 2
    (val,) = train_gpt.find_shards(paths["DATA_PATH"], "val")
    tokens = train_gpt.read_shard(val, 300)
    assert len(tokens) == SHARD_TOKENS
    tables = train_gpt.token_bytes(paths["TOKENIZER_PATH"], 0)
    assert (
        len(tables.base_bytes)
        == sentencepiece.SentencePieceProcessor(model_proto=MODEL).vocab_size()
    )
    assert train_gpt.FINEWEB_TOKENIZER.name in {
        path.name for path in (out / "tokenizers").iterdir()
    }


def process(hub, out, *arguments, **env):
    script = ROOT / "data" / "download_fineweb.py"
    return subprocess.Popen(
        [sys.executable, script, "--out", out, *arguments],
        cwd=out.parents[1],
        env=os.environ | environment(hub) | dict(PYTHONDONTWRITEBYTECODE="1") | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_second_run_fetches_nothing_and_a_larger_one_the_rest(hub, get):
    assert get("1").status == 0
    hub.requests.clear()
    done = get("1")
    assert done.status == 0 and hub.fetched() == {}
    assert "0 files fetched, 4 were here and whole" in done.stdout
    assert len(hub.requests) == 3  # commit, manifest's digest, digests of the others
    assert get("--train-shards", "3").status == 0
    assert hub.fetched() == {"fineweb_train_000001.bin": 1, "fineweb_train_000002.bin": 1}
    assert_complete(get("0").out, hub)


def test_validation_only(hub, get):
    done = get("--train-shards", "0")
    assert done.status == 0
    assert_complete(done.out, hub, train=0)


def test_another_variant_brings_its_tokenizer(hub, get):
    """DATA_PATH, which the last line gives, is all that train_gpt.py needs."""
    variant = "sp4096"
    done = get("--variant", variant, "1")
    assert_complete(done.out, hub, variant, train=1)
    folder = done.out / f"datasets/fineweb10B_{variant}"
    assert f"DATA_PATH={folder} python train_gpt.py" in done.stdout.splitlines()[-1]
    cfg = train_gpt.Config.from_env(dict(DATA_PATH=str(folder), DEVICE="cpu"))
    assert Path(cfg.tokenizer_path) == folder / "tokenizer.model"
    vocab = len(train_gpt.token_bytes(cfg.tokenizer_path, 0).base_bytes)
    assert train_gpt.read_shard(folder / "fineweb_train_000000.bin", vocab)[0] == 1


def test_byte260_is_not_offered(hub, get):
    """It is published without a SentencePiece model."""
    line = refusal(get("--variant", "byte260", "0"))
    assert "--variant byte260: published without a SentencePiece model" in line
    assert hub.requests == []


# -----------------------------------------------------------------------------
# Connections


def test_cut_connections_go_on_where_they_stopped(hub, get):
    name = f"datasets/{FOLDER}/fineweb_train_000000.bin"
    hub.cuts[name] = [30_000, 1, 0, 0, 20_000, 0, 0, 0, 0]
    done = get("1")
    assert_complete(done.out, hub, train=1)
    asked = hub.ranges_of("fineweb_train_000000.bin")
    starts = [0, *[30_000] * 4, *[50_000] * 5]
    assert asked == [f"bytes={start}-" if start else None for start in starts]


def test_connections_that_bring_nothing_end_and_a_later_run_fetches_that_file(hub, get):
    name = f"datasets/{FOLDER}/fineweb_train_000000.bin"
    hub.cuts[name] = [50_000, *[0] * 99]
    done = get("1")
    assert "fineweb_train_000000.bin: no connection" in refusal(done)
    hub.cuts.clear()
    assert FOLDER + "/fineweb_train_000000.bin" not in final_names(done.out)
    assert not list(done.out.rglob("tokenizer.model"))
    hub.requests.clear()
    assert get("1").status == 0
    assert hub.fetched() == {"fineweb_train_000000.bin": 1}
    assert_complete(done.out, hub, train=1)


def test_a_server_without_ranges_starts_again(hub, get):
    hub.ranges = False
    hub.cuts[f"datasets/{FOLDER}/fineweb_val_000000.bin"] = [50_000, 60_000]
    assert_complete(get("0").out, hub, train=0)


def test_what_a_kill_left_is_not_taken_for_a_file(hub, get):
    """huggingface_hub would take a whole file in its folder as it is."""
    out = get("0").out
    name = f"datasets/{FOLDER}/fineweb_train_000000.bin"
    left = out / ".download" / name
    left.parent.mkdir(parents=True)
    left.write_bytes(b"\0" * len(hub.files[name]))
    assert_complete(get("1").out, hub, train=1)


def test_server_errors_pass(hub, get):
    hub.statuses = [(503, "Busy"), (429, "TooMany"), (500, "Oops")]
    done = get("0")
    assert_complete(done.out, hub, train=0)
    assert [line.split("; ")[0][-3:] for line in done.stdout.splitlines()[:3]] == [
        "503",
        "429",
        "500",
    ]


def test_the_token_goes_to_the_hub_alone(hub, get, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert get("0").status == 0
    seen = {path: token for path, token in hub.tokens.items() if path.endswith("val_000000.bin")}
    assert sorted(map(str, seen.values())) == ["Bearer hf_secret", "None"]
    assert all((token is None) == path.startswith("/cdn/") for path, token in seen.items())


def test_an_endpoint_that_is_no_hub(hub, get):
    hub.is_web_page = True
    assert "no answer of a hub" in refusal(get("0"))


def test_no_network(hub, get, monkeypatch):
    hub.shutdown()
    hub.server_close()
    done = get("0")
    line = refusal(done)
    assert hub.url in line and "check the network" in line
    assert done.stdout.count("again in") == 5 and not done.out.exists()


def test_ctrl_c_keeps_what_came_and_names_nothing(hub, tmp_path):
    """While one connection is silent and another file is whole."""
    name = f"datasets/{FOLDER}/fineweb_train_000000.bin"
    hub.add(name.removeprefix("datasets/"), large_shard(tmp_path / "large.bin"))
    hub.cuts[name] = [KEPT + 50_000]
    hub.go_on.clear()
    out = tmp_path / "some" / "data"
    out.parent.mkdir()
    running = process(hub, out, "1")
    until(lambda: [p for p in out.rglob("*.incomplete") if p.stat().st_size == KEPT])
    until(lambda: len(final_names(out)) == 4)  # manifest, tokenizer, its list, validation
    running.send_signal(signal.SIGINT)
    stdout, stderr = running.communicate(timeout=10)  # not the 20 s that the server waits
    assert running.returncode == 130
    assert stderr.splitlines() == ["interrupted; the same command again goes on from here"]
    assert [n for n in final_names(out) if n.endswith(".bin")] == [
        f"{FOLDER}/fineweb_val_000000.bin"
    ]
    assert not (out / FOLDER / "tokenizer.model").exists()
    hub.go_on.set()
    hub.requests.clear()
    assert process(hub, out, "1").communicate(timeout=60)[1] == ""
    assert hub.fetched() == {"fineweb_train_000000.bin": 1}
    assert_complete(out, hub, train=1)


def large_shard(path):
    return write_shard(path, np.full(KEPT, 5)).read_bytes()


def until(condition, seconds=20):
    """The first true answer."""
    for _ in range(seconds * 50):
        with contextlib.suppress(FileNotFoundError):
            if answer := condition():
                return answer
        time.sleep(0.02)
    raise AssertionError("never happened")


def test_two_downloads_do_not_write_one_file(hub, get, tmp_path):
    name = f"datasets/{FOLDER}/fineweb_val_000000.bin"
    hub.add(name.removeprefix("datasets/"), large_shard(tmp_path / "large.bin"))
    hub.cuts[name] = [KEPT + 1]
    hub.go_on.clear()
    (tmp_path / "x").mkdir()
    first = process(hub, tmp_path / "x" / ".." / "data", "0")
    until(lambda: [p for p in (tmp_path / "data").rglob("*.incomplete") if p.stat().st_size])
    assert "another download" in refusal(get("0"))
    hub.go_on.set()
    assert "another" not in first.communicate(timeout=60)[1] and first.returncode == 0
    assert_complete(tmp_path / "data", hub, train=0)


# -----------------------------------------------------------------------------
# Wrong files


def test_wrong_bytes_are_refused(hub, get):
    name = f"{FOLDER}/fineweb_train_000001.bin"
    data = bytearray(hub.files[f"datasets/{name}"])
    data[70_000] ^= 1
    hub.served[f"datasets/{name}"] = bytes(data)
    done = get("2")
    line = refusal(done)
    assert name in line and "sha256" in line and REPO in line
    assert name not in final_names(done.out) and not list(done.out.rglob("tokenizer.model"))
    assert not list(done.out.rglob("*.incomplete"))  # the next run begins anew
    hub.served.clear()
    assert_complete(get("2").out, hub, train=2)


@pytest.mark.parametrize("change", [-2, 2])
def test_wrong_size_is_refused(hub, get, change):
    name = f"{FOLDER}/fineweb_val_000000.bin"
    data = hub.files[f"datasets/{name}"]
    hub.served[f"datasets/{name}"] = data[:change] if change < 0 else data + b"\0\0"
    done = get("0")
    line = refusal(done)
    assert name in line and f"of size {len(data)} but has size {len(data) + change};" in line
    assert name not in final_names(done.out)


def test_too_many_bytes_of_a_length_not_told_are_refused(hub, get):
    name = f"datasets/{FOLDER}/fineweb_val_000000.bin"
    hub.encoding = "until the end"
    hub.served[name] = hub.files[name] + b"x" * 100_000
    assert "of size 81024 but has size 181024;" in refusal(get("0"))
    del hub.served[name]
    assert_complete(get("0").out, hub, train=0)


def test_a_proxy_that_compresses(hub, get):
    hub.encoding = "gzip"
    assert_complete(get("0").out, hub, train=0)


def test_wrong_git_file_is_refused(hub, get):
    name = "tokenizers/fineweb_1024_bpe.vocab"
    hub.served[f"datasets/{name}"] = hub.files[f"datasets/{name}"].swapcase()
    done = get("0")
    assert name in (line := refusal(done)) and "git id" in line
    assert name not in final_names(done.out)


@pytest.mark.parametrize("broken", ["magic", "version", "count", "tiny"])
def test_a_published_file_that_is_no_shard_is_refused(hub, get, tmp_path, broken):
    changes = {"magic": dict(magic=1), "version": dict(version=2), "count": dict(count=9)}
    path = write_shard(tmp_path / "x.bin", [1, 5], **changes.get(broken, {}))
    hub.add(f"{FOLDER}/fineweb_val_000000.bin", b"abc" if broken == "tiny" else path.read_bytes())
    done = get("0")
    assert "no token shard" in refusal(done)
    assert not [name for name in final_names(done.out) if name.endswith(".bin")]


def test_damaged_and_old_files_here_are_replaced(hub, get):
    out = get("1").out
    val, train = (out / FOLDER / f"fineweb_{name}_000000.bin" for name in ("val", "train"))
    data = bytearray(val.read_bytes())
    data[-1] ^= 1
    val.write_bytes(data)
    train.write_bytes(train.read_bytes()[:-7])
    (out / FOLDER / "tokenizer.model").write_bytes(b"another")
    hub.requests.clear()
    done = get("1")
    assert hub.fetched() == {val.name: 1, train.name: 1}
    assert "fineweb_val_000000.bin: sha256" in done.stdout
    assert "fineweb_train_000000.bin: size 81,017 instead of 81,024" in done.stdout
    assert_complete(out, hub, train=1)
    assert (out / FOLDER / "tokenizer.model").read_bytes() == MODEL


# -----------------------------------------------------------------------------
# Wrong repositories, manifests, arguments


def test_missing_shard(hub, get):
    del hub.files[f"datasets/{FOLDER}/fineweb_train_000001.bin"]
    done = get("3")
    assert "fineweb_train_000001.bin: not in" in refusal(done)
    assert not hub.fetched().keys() - {"manifest.json"}
    assert get("1").status == 0


def test_listed_but_missing_file(hub, get):
    hub.gone.add(f"datasets/{FOLDER}/fineweb_train_000001.bin")
    assert "(404)" in refusal(get("2"))


def test_missing_manifest(hub, get):
    done = get("--prefix", "elsewhere")
    line = refusal(done)
    assert "elsewhere/manifest.json: not in" in line and "--prefix" in line


def test_empty_prefix_is_the_repository_itself(hub, get):
    hub.files = {name.removeprefix("datasets/"): data for name, data in hub.files.items()}
    assert get("0", "--prefix", "").status == 0
    assert hub.fetched()["manifest.json"] == 1


@pytest.mark.parametrize(
    ("statuses", "wanted"),
    [
        ([(401, "RepoNotFound")], ["no such dataset repository", "HF_TOKEN", "--repo"]),
        ([(404, "RepoNotFound")], ["no such dataset repository", "--repo"]),
        ([(403, "GatedRepo")], ["access refused (403)", "HF_TOKEN"]),
        ([(403, "Forbidden")], ["access refused (403)"]),
        ([(500, "Oops")] * 6, ["answers 500", "later"]),
    ],
)
def test_refused_by_the_hub(hub, get, statuses, wanted):
    hub.statuses = statuses
    line = refusal(get("0"))
    assert all(part in line for part in [*wanted, REPO]), line


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--repo", "someone/else"], ["someone/else", "no such dataset repository"]),
        (["--repo", "a/b/c"], ["a/b/c", "owner/name"]),
        (["--revision", "nowhere"], ["--revision nowhere"]),
        (["--variant", "sp2048"], ["--variant sp2048", "those: sp1024, sp4096"]),
        (["--variant", "../x"], ["--variant ../x"]),
        (["--train-shards", "4"], ["--train-shards 4", "has 3", "--train-shards 3"]),
        (["--train-shards", "-1"], ["--train-shards -1"]),
        (["2", "--train-shards", "1"], ["2 and --train-shards 1"]),
        (["--train-shards", "x"], ["--train-shards"]),
        (["--prefix", "../up"], ["--prefix", "../up"]),
    ],
)
def test_wrong_arguments(hub, get, arguments, wanted):
    done = get(*arguments)
    line = refusal(done)
    assert all(part in line for part in wanted), line
    assert [name for name in final_names(done.out) if name != "manifest.json"] == []


def test_default_is_eighty_shards_of_sp1024(hub, get):
    assert "--train-shards 80: sp1024 has 3" in refusal(get())


@pytest.mark.parametrize(
    "path", ["../evil.model", "/tmp/evil.model", "a/../../evil.model", "a\\..\\evil", "C:evil", 7]
)
def test_a_manifest_cannot_write_elsewhere(hub, get, path):
    lying = manifest()
    lying["tokenizers"][1]["model_path"] = path
    hub.add("manifest.json", lying)
    hub.files[f"datasets/{path}"] = MODEL
    done = get("0")
    assert "model_path" in refusal(done)
    assert final_names(done.out.parent) == ["data/manifest.json"]


def test_a_manifest_cannot_replace_a_program(hub, get):
    """--out is data/ by default, with programs in it."""
    lying = manifest()
    lying["tokenizers"][1]["vocab_path"] = "prepare_text.py"
    hub.add("manifest.json", lying)
    hub.add("prepare_text.py", b"evil")
    out = get("0").out
    assert "prepare_text.py" not in final_names(out)
    assert (out / "tokenizers/prepare_text.py").read_bytes() == b"evil"


@pytest.mark.parametrize(
    "change",
    [
        dict(datasets=None),
        dict(tokenizers=[]),
        dict(datasets=[dict(name="fineweb10B_sp1024")]),
        dict(
            datasets=[dict(manifest()["datasets"][0], stats=dict(files_train=1, files_val=10**9))]
        ),
        dict(datasets=[dict(manifest()["datasets"][0], stats=dict(files_train=1, files_val=0))]),
        dict(tokenizers=[dict(name="tok_sp1024", path="tokenizers/x.json")]),
    ],
)
def test_other_manifests_are_refused(hub, get, change):
    hub.add("manifest.json", manifest() | change)
    assert "manifest.json: not as published" in refusal(get("0"))


def test_manifest_that_is_no_json(hub, get):
    hub.add("manifest.json", b"<html>")
    assert "manifest.json: not as published" in refusal(get("0"))


# -----------------------------------------------------------------------------
# The disk


def test_no_space_is_said_before_the_first_shard(hub, get, monkeypatch):
    usage = types.SimpleNamespace(free=100_000 + len(MODEL))
    monkeypatch.setattr(download_fineweb.shutil, "disk_usage", lambda path: usage)
    assert get("0").status == 0  # one shard and the tokenizer fit
    usage.free = 100_000
    hub.requests.clear()
    done = get("3")
    assert f"{3 * 81_024:,} bytes needed, 100,000 free" in refusal(done)
    assert hub.fetched() == {}
    assert get("1").status == 0  # what is here needs no more space


def test_a_full_disk_is_one_line(hub, get, monkeypatch):
    def full(*paths):
        raise OSError(28, "No space left on device", "some/file")

    monkeypatch.setattr(download_fineweb.os, "replace", full)
    assert "some/file: No space left on device" in refusal(get("0"))


def test_out_that_is_a_file(hub, get, tmp_path):
    (tmp_path / "data").write_bytes(b"")
    assert str(tmp_path / "data") in refusal(get("0"))


def test_without_huggingface_hub(tmp_path):
    (tmp_path / "huggingface_hub.py").write_text(
        "raise ModuleNotFoundError('x', name='huggingface_hub')"
    )
    done = subprocess.run(
        [sys.executable, ROOT / "data/download_fineweb.py"],
        env=os.environ | dict(PYTHONPATH=str(tmp_path), PYTHONDONTWRITEBYTECODE="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: huggingface_hub: not installed; fix: pip install -r requirements.txt"
    ]
