"""data/download_fineweb.py against a server on this machine that plays the hub: the answers that
huggingface_hub asks for, files in LFS behind a redirect, and every way in which it can go wrong."""

import contextlib
import gzip
import hashlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import numpy as np
import pytest
import sentencepiece
from helpers import ROOT, model_of, train_gpt, write_shard

import download_fineweb
import prepare_text

REPO, COMMIT = "someone/export", "c0ffee" * 6 + "c0de"
TEXT = "the quick brown fox jumps over the lazy dog and runs away from it all again " * 30
MODEL = model_of(TEXT, 300, byte_fallback=True)
SHARD_TOKENS = 40_000
CHUNK = 10_000  # the library's 10 MiB, in which a file grows, is more than these files have
TRIES = 6 * 4  # without a byte: the library's, for each of this program's
FOLDER = "datasets/fineweb10B_sp1024"
BYTE_JSON = dict(
    config=dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3, byte_offset=4, byte_count=256),
    tokenizer_type="pure_byte",
)


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

    def do_GET(self):
        self.hub.requests.append(("GET", self.path, self.headers["Range"]))
        self.hub.tokens[self.path] = self.headers["Authorization"]
        if self.hub.is_web_page:
            return self.reply(200, b"<html>log in</html>")
        path = unquote(self.path.partition("?")[0])
        if self.hub.statuses and "/api/datasets/" in path:
            return self.refuse(*self.hub.statuses.pop(0))
        if path.startswith(f"/api/datasets/{REPO}/revision/"):
            if path.rpartition("/")[2] not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            entries = [self.hub.entry(name) for name in self.hub.files]
            return self.answer_json(dict(id=REPO, sha=COMMIT, siblings=entries))
        resolve = f"/datasets/{REPO}/resolve/{COMMIT}/"
        name = path.removeprefix("/cdn/").removeprefix(resolve)
        if name == path or path.startswith("/api/"):
            return self.refuse(401, "RepoNotFound")  # what the hub tells strangers of any such name
        if name not in self.hub.files or name in self.hub.gone:
            return self.refuse(404, "EntryNotFound")
        if self.hub.busy.get(name):
            return self.reply(self.hub.busy[name].pop(0))
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
            if self.hub.resets:
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                os.close(self.connection.detach())


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
        self.busy = {}  # path: [status of each refusal before the file is sent]
        self.statuses = []  # of the next answers of the API: (status, code)
        self.ranges, self.encoding = True, ""
        self.resets = False  # whether a cut is a reset of the connection, not its orderly end
        self.go_on = threading.Event()  # whether a cut connection is closed at once
        self.go_on.set()

    def handle_error(self, request, client_address):
        """A client that hangs up is part of the play."""

    def in_lfs(self, name):
        return name.endswith((".bin", ".model"))

    def entry(self, name):
        """What the list of files says with blobs=True."""
        data = self.files[name]
        info = dict(rfilename=name, size=len(data))
        if self.in_lfs(name):
            sha = hashlib.sha256(data).hexdigest()
            return info | dict(
                blobId="0" * 40, lfs=dict(sha256=sha, size=len(data), pointerSize=130)
            )
        return info | dict(blobId=hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())

    def add(self, name, data):
        self.files[f"datasets/{name}"] = (
            data if isinstance(data, bytes) else json.dumps(data).encode()
        )

    def fetched(self):
        """How often each file was asked for, by its name."""
        paths = [path.rpartition("/")[2] for _, path, _ in self.requests if "/resolve/" in path]
        return {name: paths.count(name) for name in paths}

    def ranges_of(self, name):
        return [r for _, path, r in self.requests if "/resolve/" in path and path.endswith(name)]


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
    for variant, size in (("sp1024", 300), ("sp4096", 300), ("byte260", 260)):
        for i, name in enumerate(["val_000000", *(f"train_{n:06d}" for n in range(3))]):
            files[f"datasets/fineweb10B_{variant}/fineweb_{name}.bin"] = shard(i, work, size)
    for vocab in (1024, 4096):
        files[f"tokenizers/fineweb_{vocab}_bpe.model"] = MODEL
        files[f"tokenizers/fineweb_{vocab}_bpe.vocab"] = b"<pad>\t0\n<s>\t0\n"
    files["tokenizers/fineweb_pure_byte_260.json"] = BYTE_JSON
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
    monkeypatch.setattr(download_fineweb, "PAUSE_SECONDS", (0, 0, 0))
    clock = types.SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.file_download, "time", clock)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", clock)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
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
        if path.is_file() and not path.name.startswith(".")
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
    beside = {f"{folder}/tokenizer.model", f"{folder}/dataset.json"}
    assert set(final_names(out)) == wanted | beside
    assert not list(out.rglob("*.partial"))


# -----------------------------------------------------------------------------
# What a user gets


def test_program_fills_the_folder_train_gpt_looks_in(hub, tmp_path, monkeypatch):
    """As a process, from another folder; then with the script's own readers at its defaults."""
    out = tmp_path / "repository" / "data"
    done = process(hub, out, "--train-shards", "2").communicate(timeout=60)
    assert_complete(out, hub, train=2)
    assert "fineweb_train_000001.bin: 81,024 bytes, verified" in done[0] and done[1] == ""
    assert done[0].endswith(f"DATA_PATH={out / FOLDER} python train_gpt.py\n")
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
    assert len(hub.requests) == 1  # the list of files
    assert get("--train-shards", "3").status == 0
    assert hub.fetched() == {"fineweb_train_000001.bin": 1, "fineweb_train_000002.bin": 1}
    assert_complete(get("0").out, hub)


def test_validation_only(hub, get):
    done = get("--train-shards", "0")
    assert done.status == 0
    assert_complete(done.out, hub, train=0)


@pytest.mark.parametrize("variant", ["sp4096", "byte260"])
def test_other_variants_bring_their_tokenizer(hub, get, variant):
    """DATA_PATH, which the last line gives, is all that train_gpt.py needs."""
    done = get("--variant", variant, "1")
    assert_complete(done.out, hub, variant, train=1)
    folder = done.out / f"datasets/fineweb10B_{variant}"
    assert f"DATA_PATH={folder} python train_gpt.py" in done.stdout.splitlines()[-1]
    cfg = train_gpt.Config.from_env(dict(DATA_PATH=str(folder), DEVICE="cpu"))
    assert Path(cfg.tokenizer_path) == folder / "tokenizer.model"
    vocab = len(train_gpt.token_bytes(cfg.tokenizer_path, 0).base_bytes)
    assert train_gpt.read_shard(folder / "fineweb_train_000000.bin", vocab)[0] == 1
    assert vocab == 260 or variant != "byte260"


def test_byte260_counts_every_byte(tmp_path):
    """The ids of upstream (4 + byte), each one byte; specials none; spaces, U+2581 and all."""
    description = tmp_path / "description.json"
    description.write_text(json.dumps(BYTE_JSON))
    model = tmp_path / "tokenizer.model"
    model.write_bytes(download_fineweb.byte_model(description))
    text = " two  spaces \u2581 caf\xe9 \u6f22\u5b57 \U0001f600\r\n\t\0 a end "
    ids = np.array([4 + byte for byte in text.encode()])
    tables = train_gpt.token_bytes(model, 260)
    before = np.concatenate([[1], ids[:-1]])
    assert tables.count(ids, before).tolist() == [1] * len(text.encode())
    assert tables.base_bytes[:4].tolist() == [0, 0, 0, 0]
    assert tables.base_bytes[4:].tolist() == [1] * 256
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert tokenizer.encode(text) == ids.tolist() and tokenizer.decode(ids.tolist()) == text
    assert tokenizer.decode([*range(4, 132)]) == "".join(map(chr, range(128)))
    specials = tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()
    assert specials == (0, 1, 2, 3)


def test_byte260_of_another_layout_is_refused(hub, get):
    other = BYTE_JSON | dict(config=BYTE_JSON["config"] | dict(byte_offset=3))
    for description, wanted in ((other, "byte_offset is 3, not 4"), ([], "not the known byte260")):
        hub.add("tokenizers/fineweb_pure_byte_260.json", description)
        done = get("--variant", "byte260", "0")
        assert wanted in refusal(done)
        assert not list(done.out.rglob("tokenizer.model"))


# -----------------------------------------------------------------------------
# What came is remembered


def remembered(out, variant="sp1024"):
    return json.loads((out / f"datasets/fineweb10B_{variant}/dataset.json").read_text())


@pytest.mark.parametrize("variant", ["sp1024", "byte260"])
def test_dataset_json(hub, get, variant):
    folder = get("--variant", variant, "1").out / f"datasets/fineweb10B_{variant}"
    facts = remembered(folder.parents[1], variant)
    val = hub.files[f"datasets/datasets/fineweb10B_{variant}/fineweb_val_000000.bin"]
    assert facts["val_tokens_sha256"] == hashlib.sha256(val[1024:]).hexdigest()
    assert facts["val_documents"] == 1
    model = (folder / "tokenizer.model").read_bytes()
    assert facts["tokenizer_sha256"] == hashlib.sha256(model).hexdigest()
    assert facts["lossy"] == (variant == "sp1024")  # model_of's normalises
    names = [f"datasets/fineweb10B_{variant}/fineweb_{n}_000000.bin" for n in ("val", "train")]
    for name in names:
        digest = hashlib.sha256(hub.files[f"datasets/{name}"]).hexdigest()
        assert facts["files"][name] == digest
    get("--variant", variant, "0")
    assert remembered(folder.parents[1], variant) == facts  # the training shard's, too


def test_validation_tokens_are_hashed_over_all_shards(hub, get, tmp_path):
    more = manifest()
    more["datasets"][0]["stats"]["files_val"] = 12
    hub.add("manifest.json", more)
    parts = [shard(20 + n, tmp_path / "shard.bin") for n in range(12)]
    for number, data in enumerate(parts):
        hub.add(f"{FOLDER}/fineweb_val_{number:06d}.bin", data)
    tokens = b"".join(data[1024:] for data in parts)
    wanted = hashlib.sha256(tokens).hexdigest()
    assert remembered(get("0").out)["val_tokens_sha256"] == wanted


@pytest.mark.parametrize(
    "name", [f"{FOLDER}/fineweb_val_000000.bin", "tokenizers/fineweb_1024_bpe.vocab"]
)
def test_a_file_that_has_changed_at_the_hub_is_refused(hub, get, name):
    """One in LFS, one not; until dataset.json is removed."""
    out = get("1").out
    before = (out / name).read_bytes()
    hub.add(name, before[:-2] + b"xx")
    hub.requests.clear()
    line = refusal(get("2"))
    assert f"{name}: has changed" in line and "dataset.json" in line and hub.fetched() == {}
    assert (out / name).read_bytes() == before
    (out / FOLDER / "dataset.json").unlink()
    assert_complete(get("2").out, hub, train=2)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"files": [1]}', b'{"files": {"a": 1}}'])
def test_a_damaged_dataset_json_is_one_line(hub, get, text):
    out = get("0").out
    (out / FOLDER / "dataset.json").write_bytes(text)
    assert "dataset.json: no dataset.json" in refusal(get("0"))


def test_nothing_is_written_through_a_link(hub, get, tmp_path):
    out = get("0").out
    (tmp_path / "mine").write_bytes(b"mine")
    for name in ("dataset.json", "tokenizer.model"):
        (out / FOLDER / name).unlink()
        (out / FOLDER / f".{name}.partial").symlink_to(tmp_path / "mine")
        (out / FOLDER / name).symlink_to(tmp_path / "nowhere")
    assert_complete(get("0").out, hub, train=0)
    assert (tmp_path / "mine").read_bytes() == b"mine" and not (tmp_path / "nowhere").exists()


def test_lossy_is_found_by_trying(tmp_path):
    description = tmp_path / "description.json"
    description.write_text(json.dumps(BYTE_JSON))
    assert not download_fineweb.alters_text(download_fineweb.byte_model(description))
    assert not download_fineweb.alters_text(prepare_text.train_tokenizer([TEXT], 300))
    assert download_fineweb.alters_text(MODEL)
    keeps = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
    assert download_fineweb.alters_text(model_of(TEXT, 300, **keeps))  # no bytes: unknown pieces
    assert download_fineweb.alters_text(
        model_of(TEXT, 300, byte_fallback=True, remove_extra_whitespaces=False)
    )


# -----------------------------------------------------------------------------
# Connections


def test_cut_connections_go_on_where_they_stopped(hub, get):
    name = f"datasets/{FOLDER}/fineweb_train_000000.bin"
    hub.cuts[name] = [30_000, 1, 0, 0, 20_000, 0, 0]
    done = get("1")
    assert_complete(done.out, hub, train=1)
    asked = hub.ranges_of("fineweb_train_000000.bin")
    assert asked == [None, *["bytes=30000-"] * 4, *["bytes=50000-"] * 3]


def test_reset_connections(hub, get):
    """The library gives up at the first of those."""
    hub.cuts[f"datasets/{FOLDER}/fineweb_val_000000.bin"] = [30_000, 0, 0]
    hub.resets = True
    done = get("0")
    assert_complete(done.out, hub, train=0)
    assert done.stdout.count("ReadError") == 3


def test_connections_that_bring_nothing_end_and_a_later_run_goes_on(hub, get):
    name = f"datasets/{FOLDER}/fineweb_train_000000.bin"
    hub.cuts[name] = [50_000, *[0] * (TRIES - 1)]
    done = get("1")
    line = refusal(done)
    assert "fineweb_train_000000.bin" in line and "check the network" in line
    assert len(hub.ranges_of("fineweb_train_000000.bin")) == TRIES
    assert FOLDER + "/fineweb_train_000000.bin" not in final_names(done.out)
    assert not list(done.out.rglob("tokenizer.model"))
    hub.requests.clear()
    assert get("1").status == 0
    assert hub.fetched() == {"fineweb_train_000000.bin": 1}
    assert hub.ranges_of("fineweb_train_000000.bin") == ["bytes=50000-"]
    assert_complete(done.out, hub, train=1)


def test_a_server_without_ranges_starts_again(hub, get):
    hub.ranges = False
    hub.cuts[f"datasets/{FOLDER}/fineweb_val_000000.bin"] = [50_000, 60_000]
    assert_complete(get("0").out, hub, train=0)


def test_a_damaged_part_is_fetched_from_the_start(hub, get):
    name = f"datasets/{FOLDER}/fineweb_val_000000.bin"
    hub.cuts[name] = [50_000, *[0] * (TRIES - 1)]
    out = get("0").out
    (part,) = out.rglob("*val*.partial")
    part.write_bytes(b"\0" * part.stat().st_size)
    hub.requests.clear()
    done = get("0")
    assert_complete(out, hub, train=0)
    assert hub.ranges_of("fineweb_val_000000.bin") == ["bytes=50000-", None]
    assert "from the start again" in done.stdout


def test_a_part_of_another_version_is_not_continued(hub, get, tmp_path):
    name = f"{FOLDER}/fineweb_val_000000.bin"
    hub.cuts[f"datasets/{name}"] = [50_000, *[0] * (TRIES - 1)]
    get("0")
    hub.requests.clear()
    hub.add(name, shard(9, tmp_path / "shard.bin"))
    done = get("0")
    assert hub.ranges_of("fineweb_val_000000.bin") == [None]
    assert_complete(done.out, hub, train=0)


def test_server_errors_pass(hub, get):
    hub.statuses = [(503, "Busy"), (429, "TooMany"), (500, "Oops")]
    done = get("0")
    assert_complete(done.out, hub, train=0)
    notes = [line for line in done.stdout.splitlines() if line.startswith("note: ")]
    assert [line.split("; ")[0][-3:] for line in notes] == ["503", "429", "500"]


def test_server_errors_of_a_file_pass(hub, get):
    """The library asks again after 429 itself, not after 503."""
    name = f"datasets/{FOLDER}/fineweb_val_000000.bin"
    hub.busy[name] = [503, 429]
    assert_complete(get("0").out, hub, train=0)


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
    assert done.stdout.count("again in") == 3 and not done.out.exists()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "unset HF_HUB_OFFLINE" in refusal(get("0"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_keeps_what_came_and_names_nothing(hub, tmp_path, number):
    """While one connection is silent and another file is whole. The library as it is: 10 MiB."""
    name = f"datasets/{FOLDER}/fineweb_train_000000.bin"
    hub.files[name] = write_shard(tmp_path / "x.bin", [1] * 6_000_000).read_bytes()
    hub.cuts[name] = [11_000_000]
    hub.go_on.clear()
    out = tmp_path / "some" / "data"
    out.parent.mkdir()
    running = process(hub, out, "1")
    kept = 10 * 2**20
    part = until(lambda: [p for p in out.rglob("*train*.partial") if p.stat().st_size == kept])
    until(lambda: len(final_names(out)) == 4)  # manifest, tokenizer, its list, validation
    running.send_signal(number)
    stdout, stderr = running.communicate(timeout=10)  # not the 20 s that the server waits
    assert running.returncode == 128 + number
    assert stderr.splitlines() == ["interrupted; the same command again goes on from here"]
    assert part[0].stat().st_size == kept
    assert [n for n in final_names(out) if n.endswith(".bin")] == [
        f"{FOLDER}/fineweb_val_000000.bin"
    ]
    assert not (out / FOLDER / "tokenizer.model").exists()
    hub.go_on.set()
    hub.requests.clear()
    assert process(hub, out, "1").communicate(timeout=60)[1] == ""
    assert hub.fetched() == {"fineweb_train_000000.bin": 1}
    assert hub.ranges_of("fineweb_train_000000.bin") == [f"bytes={kept}-"]
    assert_complete(out, hub, train=1)


def test_a_reader_that_ends_early_ends_nothing(hub, tmp_path):
    out = tmp_path / "some" / "data"
    out.parent.mkdir()
    running = process(hub, out, "1")
    running.stdout.close()  # as head does
    running.stdout = None
    assert running.communicate(timeout=60)[1] == "" and running.returncode == 0
    assert_complete(out, hub, train=1)


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
    hub.cuts[name] = [50_000]
    hub.go_on.clear()
    (tmp_path / "x").mkdir()
    first = process(hub, tmp_path / "x" / ".." / "data", "0")
    until(lambda: hub.ranges_of("fineweb_val_000000.bin"))
    assert "another download" in refusal(get("0"))
    hub.go_on.set()
    assert first.communicate(timeout=60)[1] == "" and first.returncode == 0
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
    hub.requests.clear()
    hub.served.clear()
    assert_complete(get("2").out, hub, train=2)
    assert hub.ranges_of("fineweb_train_000001.bin") == [None]  # begun anew


@pytest.mark.parametrize("change", [-2, 2])
def test_wrong_size_is_refused(hub, get, change):
    name = f"{FOLDER}/fineweb_val_000000.bin"
    data = hub.files[f"datasets/{name}"]
    hub.served[f"datasets/{name}"] = data[:change] if change < 0 else data + b"\0\0"
    done = get("0")
    line = refusal(done)
    assert name in line and f"{len(data) + change:,} bytes instead of {len(data):,}" in line
    assert name not in final_names(done.out)


def test_a_proxy_that_tells_no_length(hub, get):
    name = f"datasets/{FOLDER}/fineweb_val_000000.bin"
    hub.encoding = "until the end"
    hub.served[name] = hub.files[name] + b"x" * 100_000
    assert "181,024 bytes instead of 81,024" in refusal(get("0"))
    del hub.served[name]
    hub.encoding = "gzip"
    assert_complete(get("0").out, hub, train=0)


def test_wrong_git_file_is_refused(hub, get):
    name = "tokenizers/fineweb_1024_bpe.vocab"
    hub.served[f"datasets/{name}"] = hub.files[f"datasets/{name}"].swapcase()
    done = get("0")
    assert name in (line := refusal(done)) and "git id" in line
    assert name not in final_names(done.out)


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
    assert "fineweb_train_000000.bin: 81,017 bytes instead of 81,024" in done.stdout
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
    assert "status 404" in refusal(get("2"))


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
        ([(401, "RepoNotFound")], ["RepositoryNotFoundError", "HF_TOKEN", "--repo"]),
        ([(404, "RepoNotFound")], ["RepositoryNotFoundError", "--repo"]),
        ([(403, "GatedRepo")], ["GatedRepoError, status 403", "gated", "HF_TOKEN"]),
        ([(403, "Forbidden")], ["status 403", "HF_TOKEN"]),
        ([(500, "Oops")] * 4, ["status 500", "later"]),
    ],
)
def test_refused_by_the_hub(hub, get, statuses, wanted):
    hub.statuses = statuses
    line = refusal(get("0"))
    assert all(part in line for part in [*wanted, REPO]), line


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--repo", "someone/else"], ["someone/else", "RepositoryNotFoundError"]),
        (["--repo", "a/b/c"], ["a/b/c", "owner/name"]),
        (["--revision", "nowhere"], ["at nowhere", "RevisionNotFoundError", "--revision"]),
        (["--variant", "sp2048"], ["--variant sp2048", "byte260, sp1024, sp4096"]),
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


@pytest.mark.parametrize("path", ["../evil.model", "/tmp/evil.model", "a/..", 7])
def test_a_manifest_cannot_write_elsewhere(hub, get, path):
    lying = manifest()
    lying["tokenizers"][1]["model_path"] = path
    hub.add("manifest.json", lying)
    hub.files[f"datasets/{path}"] = MODEL
    hub.files[str(path)] = MODEL
    done = get("0")
    written = [name for name in final_names(done.out.parent) if "evil" in name]
    assert written == (["data/tokenizers/evil.model"] if done.status == 0 else [])
    assert done.status == 0 or refusal(done)


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
        None,
        dict(datasets=None),
        dict(tokenizers=[]),
        dict(datasets=[dict(name="fineweb10B_sp1024")]),
        dict(
            datasets=[dict(manifest()["datasets"][0], stats=dict(files_train=1, files_val=10**9))]
        ),
        dict(datasets=[dict(manifest()["datasets"][0], stats=dict(files_train=1, files_val=0))]),
        dict(tokenizers=[dict(name="tok_sp1024", path="tokenizers/x.json")]),
        dict(
            datasets=[dict(manifest()["datasets"][0], stats=dict(files_train=1e999, files_val=1))]
        ),
        dict(datasets=[dict(name=5), dict(name="x")]),
    ],
)
def test_other_manifests_are_refused(hub, get, change):
    hub.add("manifest.json", manifest() | change if change else b"<html>")
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
    def full(number):
        raise OSError(28, "No space left on device", "some/file")

    monkeypatch.setattr(download_fineweb.os, "fsync", full)
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
