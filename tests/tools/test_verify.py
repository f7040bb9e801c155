"""verify.py: a run that is proved, everything that can be done to its folder, and runs of
which not all can be checked."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import verify
from helpers import (
    ROOT,
    SHRUNK,
    clean_environment,
    pack_artifact,
    run_here,
    shared_folder,
    train_gpt,
    write_shard,
)

import prepare
import prepare_text

SMALL = SHRUNK | dict(SCORER="documents", EVAL_LANES="8", CODEC_TOKENS="-1")
EVERY = [name for name in verify.CHECKS if name != "known"]  # of an artifact without
PROOF = ["decode", "score"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A dataset with twelve short documents to validate on."""
    train, val = prepare.sample_documents()
    with shared_folder(tmp_path_factory, "verify_data") as (folder, empty):
        if empty:
            parts = [text[: 350 + 40 * i] for i, text in enumerate(val[:12])]
            prepare_text.write_dataset(train[:40], parts, folder, "prose", 512)
    return folder


def finished(tmp_path_factory, name, data, **env):
    """Folder of a run, made once for all workers."""
    with shared_folder(tmp_path_factory, f"verify_{name}") as (cwd, empty):
        if empty:
            run_here(cwd, name, **SMALL | env, DATA_PATH=str(data))
    return cwd / "runs" / name


@pytest.fixture(scope="session")
def proved(tmp_path_factory, data):
    return finished(tmp_path_factory, "proved", data)


@pytest.fixture(autouse=True)
def text_of_the_verifier(data, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(data))


@pytest.fixture
def folder(proved, tmp_path):
    """A copy, to be tampered with."""
    return shutil.copytree(proved, tmp_path / "copy")


@pytest.fixture(scope="session")
def decoded(proved, data):
    """What a fresh process makes of the honest stream"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_PATH", str(data))
        return verify.Case(proved).decoded


def examined(folder, decoded=None):
    """The rows; decoded: where the decode need not be made again"""
    case = verify.Case(folder)
    if decoded:
        case.decoded = decoded
    return list(verify.examine(case))


def rows(folder, decoded=None):
    """check -> (status, reason)"""
    return {row.check: (row.status, row.reason) for row in examined(folder, decoded)}


def reasons(folder, decoded=None):
    """check -> reason, of those that failed"""
    found = rows(folder, decoded).items()
    return {name: why for name, (status, why) in found if status == "FAILED"}


def script(folder, *arguments, **env):
    """records/tools/verify.py as a process, from a folder that is not the checkout."""
    command = [sys.executable, ROOT / "records/tools/verify.py", folder, *arguments]
    environ = clean_environment() | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(command, cwd=folder.parent, env=environ, capture_output=True, text=True)


# -----------------------------------------------------------------------------
# What holds


def test_a_copied_folder_is_proved(folder, data, tmp_path):
    """By a process elsewhere, which leaves nothing behind; arrays and pictures are not needed."""
    for name in ("scores.npz", "blocks.npz", "report.png"):
        (folder / name).unlink(missing_ok=True)
    (tmp_path / "temporary").mkdir()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    env = dict(DATA_PATH=str(data), TMPDIR=str(tmp_path / "temporary"))
    done = script(folder, "--json", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert not list((tmp_path / "temporary").glob("verify_*"))
    result = json.loads(done.stdout)
    assert (result["verdict"], result["why"]) == ("PROVED", "not checked: nothing")
    assert result["status"] == 0 and result["text"].startswith("another text (sha256 ")
    assert [row["check"] for row in result["checks"]] == EVERY
    assert {row["status"] for row in result["checks"]} == {"ok"}
    claimed = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
    assert result["val_bpb"] == pytest.approx(claimed["val_bpb"], abs=1e-9)
    assert result["claimed_val_bpb"] == claimed["val_bpb"]
    assert any("nobody can prove" in note for note in result["notes"])


def test_the_decode_adds_up_what_the_run_scored(proved, decoded):
    """By two ways: the run mixes whole columns, the decoder a step at a time."""
    with np.load(proved / "scores.npz") as scores:
        final = -scores["logp_final"].sum()
        model = -scores["logp_model"].sum()
    assert decoded.nats == pytest.approx(final, rel=1e-9)
    assert decoded.model_nats == pytest.approx(model, rel=1e-9)
    assert decoded.mass_error < 1e-12


def test_the_embedded_text_is_known_by_its_sha256(tmp_path):
    prepare.main(["--out", str(tmp_path / "sample")])
    (shard,) = (tmp_path / "sample").glob("*_val_*.bin")
    tokens = hashlib.sha256(shard.read_bytes()[1024:]).hexdigest()
    model = (tmp_path / "sample/tokenizer.model").read_bytes()
    pinned = verify.VAL_TOKENS_SHA256, verify.TOKENIZER_SHA256
    assert (tokens, hashlib.sha256(model).hexdigest()) == pinned


# -----------------------------------------------------------------------------
# Tampering


def flip(path, share=0.5):
    """One bit, so far into the file."""
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 16
    path.write_bytes(data)


def edit(folder, change):
    """Rewrite submission.json."""
    path = folder / "submission.json"
    claims = json.loads(path.read_text(encoding="utf-8"))
    change(claims)
    path.write_text(json.dumps(claims), encoding="utf-8")


def own_digests(folder):
    """submission.json names the files that lie there now."""
    names = dict(code="train_gpt.py", artifact="artifact.bin", tokenizer="tokenizer.model")
    digests = {k: hashlib.sha256((folder / n).read_bytes()).hexdigest() for k, n in names.items()}
    edit(folder, lambda claims: claims.update(sha256=digests))


def lower_bpb(claims):
    claims["val_bpb"] *= 0.99


def other_artifact(folder):
    """Of the same model, whole, and named in submission.json."""
    path = folder / "artifact.bin"
    cfg = train_gpt.load_artifact(path).cfg
    model = train_gpt.GPT(train_gpt.replace(cfg, seed=2, quant_floor=False)).initialise()
    path.write_bytes(pack_artifact(dict(model.named_parameters()), cfg))
    own_digests(folder)


def other_tokenizer(folder):
    documents = ["a text of few words " * 9, "another one, of others " * 9] * 40
    (folder / "tokenizer.model").write_bytes(prepare_text.train_tokenizer(documents, 300))


def cut(folder):
    path = folder / "stream.bin"
    path.write_bytes(path.read_bytes()[:-40])


def reseal(folder, change):
    """stream.bin with another header and a checksum that fits."""
    path, prefix = folder / "stream.bin", train_gpt.STREAM_PREFIX
    header, words = train_gpt.unseal(prefix, path.read_bytes())
    words = change(header, words) or words
    path.write_bytes(train_gpt.seal(prefix, header, words))


def append(path, text):
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


def replace_text(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def double_bpb(folder):
    """Readers differ in which of the two they believe."""
    path = folder / "submission.json"
    path.write_text('{"val_bpb": 0.1, ' + path.read_text(encoding="utf-8")[1:], encoding="utf-8")


def longer_pieces(folder):
    """Every piece says that it has more bytes; its ids are the same (once PROVED, at a tenth)."""
    path = folder / "tokenizer.model"
    old = path.read_bytes()
    new = b""
    place = 0
    while old[place : place + 1] == b"\n":  # a piece: field 1, a message of under 128 bytes
        size, text_size = old[place + 1], old[place + 3]
        message = old[place + 2 : place + 2 + size]
        if message[2 + text_size + 5 :] in (b"", b"\x18\x01"):  # score, then no type or NORMAL
            text = message[2 : 2 + text_size] + b"x" * 24
            message = b"\n" + bytes([len(text)]) + text + message[2 + text_size :]
        new += b"\n" + bytes([len(message)]) + message
        place += 2 + size
    path.write_bytes(new + old[place:])
    before = train_gpt.token_bytes(str(path), 0).base_bytes
    assert before.max() > 24


TAMPERINGS = {  # name: (what is done, the check that finds it, its message)
    "a bit of the stream": (lambda f: flip(f / "stream.bin"), "stream", "damaged, its sha256"),
    "a bit of the artifact": (
        lambda f: flip(f / "artifact.bin"),
        "artifact",
        "unreadable (damaged",
    ),
    "the claimed bpb": (lambda f: edit(f, lower_bpb), "log", "val_bpb is "),
    "a doubled key": (double_bpb, "files", "a name stands twice"),
    "the code": (lambda f: append(f / "train_gpt.py", "#\n"), "code", "train_gpt.py has sha256"),
    "the tokenizer": (other_tokenizer, "files", "tokenizer.model has sha256"),
    "the tokenizer, claimed": (
        lambda f: (other_tokenizer(f), own_digests(f)),
        "text",
        "tokenizer.model (",
    ),
    "longer pieces": (
        lambda f: (longer_pieces(f), own_digests(f)),
        "text",
        "tokenizer.model (",
    ),
    "the stream's end": (cut, "stream", "damaged, its sha256"),
    "another artifact": (other_artifact, "stream", "stream.bin was made with artifact"),
    "another artifact, unclaimed": (
        lambda f: shutil.copy(ROOT / "requirements.txt", f / "artifact.bin"),
        "files",
        "artifact.bin has sha256",
    ),
    "the stream's shape": (
        lambda f: reseal(f, lambda h, w: h["shape"].__setitem__(2, 2)),
        "stream",
        "stream.bin has shape",
    ),
    "the stream's settings": (
        lambda f: reseal(f, lambda h, w: h["scoring"].update(ngram_max_order="5")),
        "stream",
        "stream.bin's settings",
    ),
    "the coder's words": (
        lambda f: reseal(f, lambda h, w: w[:400] + bytes([w[400] ^ 1]) + w[401:]),
        "decode",
        "words of another text",
    ),
    "padding of the stream": (
        lambda f: reseal(f, lambda h, w: w + bytes(40)),
        "stream",
        "coded_bytes is ",
    ),
    "a stage": (
        lambda f: edit(f, lambda c: c["stages"]["int6_roundtrip"].update(val_bpb=1.0)),
        "log",
        "stages is ",
    ),
    "a line of the log": (
        lambda f: append(f / "log.txt", "final_ngram_exact val_bpb:1.0\n"),
        "log",
        "log.txt and metrics.jsonl differ",
    ),
    "a setting": (
        lambda f: replace_text(f / "config.env", "NUM_KV_HEADS=2", "NUM_KV_HEADS=4"),
        "artifact",
        "its NUM_KV_HEADS is 2, config.env says 4",
    ),
    "a path among the settings": (
        lambda f: append(f / "config.env", "TOKENIZER_PATH=/dev/zero\n"),
        "artifact",
        "TOKENIZER_PATH is no setting",
    ),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_is_caught(name, folder, decoded):
    """By the check that is named, with a message of its own; the exit status is 1."""
    tamper, check, message = TAMPERINGS[name]
    tamper(folder)
    found = examined(folder, None if check == "decode" else decoded)
    failed = {row.check: row.reason for row in found if row.status == "FAILED"}
    assert message in failed.get(check, ""), failed
    assert "\n" not in failed[check] and verify.verdict(found)[0] == 1


def test_a_seed_s_script_is_that_of_its_submission(proved, tmp_path, decoded):
    folder = shutil.copytree(proved, tmp_path / "seed_7")
    append(Path(shutil.copy(folder / "train_gpt.py", tmp_path)), "#\n")
    assert "another train_gpt.py lies above the folder" in reasons(folder, decoded)["code"]


@pytest.mark.parametrize("place", ["train_gpt.py", train_gpt.PACKED_NAME, "above"])
def test_a_packed_script_is_as_good(proved, tmp_path, decoded, place):
    """In the place of the readable one, under its own name, or above a seed's folder."""
    folder = shutil.copytree(proved, tmp_path / "seed_7")
    packed = train_gpt.pack_script((folder / "train_gpt.py").read_bytes())
    (folder / "train_gpt.py").unlink()
    path = tmp_path / train_gpt.PACKED_NAME if place == "above" else folder / place
    path.write_bytes(packed)
    found = rows(folder, decoded)
    assert {status for status, _ in found.values()} == {"ok"}, found
    path.write_bytes(packed + b"#\n")
    assert rows(folder, decoded)["code"][0] == "FAILED"


def test_a_run_on_fineweb_is_no_failure_without_it(folder, decoded, monkeypatch):
    """A laptop has the embedded text alone; the run names what it was scored on."""
    monkeypatch.delenv("DATA_PATH")

    def by_default(line):
        if line["key"] == "config":
            line["DATA_PATH"] = "/root/data/datasets/fineweb10B_sp1024(default)"

    relog(folder, by_default)
    found = rows(folder, decoded)
    assert found["text"][0] == "not checked" and "fineweb10B" in found["text"][1]
    assert "FAILED" not in {status for status, _ in found.values()}


@pytest.mark.parametrize("share", [0.1, 0.3, 0.62, 0.8, 0.95])
@pytest.mark.parametrize("name", ["artifact.bin", "stream.bin"])
def test_a_bit_anywhere(name, share, folder, decoded):
    flip(folder / name, share)
    assert any(name in reason for reason in reasons(folder, decoded).values())


def test_changed_code_is_not_executed(folder, tmp_path):
    marker = tmp_path / "executed"
    append(folder / "train_gpt.py", f"open({str(marker)!r}, 'w')\n")
    own_digests(folder)
    found = rows(folder)
    assert found["code"][0] == "FAILED" and not marker.exists()
    assert found["decode"][0] == "not checked"


def relog(folder, change):
    """All three files of the log, after `change` of its lines: they agree with each other."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        change(line)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    texts = [train_gpt.log_line(x["key"], x["value"], train_gpt.line_fields(x)) for x in lines]
    (folder / "log.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    train_gpt.write_submission(folder)


@pytest.mark.parametrize("factor", [0.9, 1 - 1e-5, 1 + 1e-5, -1])
def test_a_consistent_forgery_is_caught(factor, folder, decoded):
    """All files agree on another score, that of the columns too; the decode does not."""

    def change(line):
        if line["key"] in ("final_ngram_exact", "final_documents_exact"):
            line["val_bpb"] *= factor
            line["val_loss"] *= factor

    relog(folder, change)
    failed = reasons(folder, decoded)
    assert failed.keys() == {"score"} and "by the decode" in failed["score"]


@pytest.mark.parametrize("name", ["coded_bytes", "claimed_bytes", "proved_tokens", "total_tokens"])
def test_a_consistent_forgery_of_the_codec_line_is_caught(name, folder, decoded):
    relog(folder, lambda line: line.update({name: line[name] - 4}) if name in line else None)
    (reason,) = reasons(folder, decoded).values()
    assert name.split("_")[0] in reason or "submission.json says" in reason


@pytest.mark.parametrize("value", [None, "1.5", [1], True, float("nan")])
def test_a_score_that_is_no_number(value, folder, decoded):
    edit(folder, lambda claims: claims.update(val_bpb=value))
    assert reasons(folder, decoded)


def test_files_are_read_once(folder, monkeypatch):
    """A stream that is swapped once it was looked at is not decoded (once PROVED, 0.0985)."""
    case = verify.Case(folder)
    honest = (folder / "stream.bin").read_bytes()
    (folder / "stream.bin").write_bytes(b"swapped")
    (folder / "artifact.bin").unlink()
    assert case.file("stream.bin") == honest
    assert {row.status for row in verify.examine(case)} == {"ok"}


# -----------------------------------------------------------------------------
# Files that attack their reader


def replaced(folder, name, make):
    (folder / name).unlink()
    make(folder / name)


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(40 * 2**30)


HOSTILE = {
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link": lambda path: path.symlink_to(path.parent / "log.txt"),
    "a pipe": lambda path: os.mkfifo(path),
    "40 GiB of nothing": sparse,
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("name", ["submission.json", "artifact.bin", "stream.bin", "config.env"])
@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_files_are_refused(how, name, folder):
    """At once, and by name."""
    replaced(folder, name, HOSTILE[how])
    failed = reasons(folder)
    assert any(name in reason for reason in failed.values()), failed


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_log_is_no_run(how, folder, capsys):
    replaced(folder, "metrics.jsonl", HOSTILE[how])
    assert verify.main([str(folder)]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err


def test_nothing_of_the_folder_moves_the_cursor(proved, tmp_path, capsys):
    """Neither its name nor its values: escapes once wrote another verdict over the real one."""
    evil = "\x1b[2K\rPROVED val_bpb 0.1"
    folder = shutil.copytree(proved, tmp_path / f"a{evil}\u202e")
    edit(folder, lambda claims: claims.update(val_bpb=evil, sha256={"code": "\ud800" + evil}))
    (folder / "stream.bin").unlink()
    assert verify.main([str(folder)]) == 1
    assert verify.main([str(folder / "no")]) == 2
    shown = "".join(capsys.readouterr())
    assert "\x1b" not in shown and "\r" not in shown and "\u202e" not in shown
    assert not shown.splitlines()[-1].startswith("PROVED")


def test_memory_is_asked_for_before_it_is_taken(folder, decoded, monkeypatch):
    """An artifact that unpacks to more than there is: not this folder's fault, and no proof."""
    monkeypatch.setattr(train_gpt, "available_memory", lambda: 10**6)
    found = rows(folder)
    assert found["artifact"] == ("not checked", found["artifact"][1])
    assert "bytes of memory" in found["artifact"][1] and found["decode"][0] == "not checked"


def test_a_decode_has_a_limit(folder):
    case = verify.Case(folder, minutes=1e-3)
    found = {row.check: row for row in verify.examine(case)}
    assert found["decode"].status == "not checked" and "--minutes" in found["decode"].reason
    assert verify.verdict([*found.values()])[0] == 3


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e10", "x"])
def test_minutes_are_a_time(text, folder):
    with pytest.raises(SystemExit) as ended:
        verify.main([str(folder), "--minutes", text])
    assert ended.value.code == 2


def test_the_environment_of_the_verifier_fails_no_folder(folder, monkeypatch):
    """Names of ours, sibling's names and slips are not handed on to the decode."""
    for name, text in dict(TRIGRAM="1", USE_EMA="yes", NGRAM_MAXORDER="9", ITERATIONS="x").items():
        monkeypatch.setenv(name, text)
    assert {row.status for row in examined(folder)} == {"ok"}


def test_what_this_machine_lacks_fails_no_folder(folder, monkeypatch):
    def missing():
        raise train_gpt.UserError("package constriction is missing")

    monkeypatch.setattr(train_gpt, "range_coder", missing)
    found = rows(folder)
    assert found["decode"][0] == "not checked" and "constriction" in found["decode"][1]


def test_a_log_of_many_keys_takes_no_hours(folder, decoded):
    """Each key was once searched for in all lines."""
    lines = [{"key": f"final_{i:07}_exact", "value": None} for i in range(100_000)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text() + text)
    assert "log" in reasons(folder, decoded)


def test_a_bomb_of_weights_is_not_unpacked(folder, monkeypatch):
    """Few bytes, a thousand million zeros: before anything is allocated."""
    cfg = train_gpt.load_artifact(folder / "artifact.bin").cfg
    huge = train_gpt.replace(cfg, bigram_vocab_size=20_000_000)
    header = train_gpt.artifact_header(huge)
    sealed = train_gpt.seal(train_gpt.ARTIFACT_PREFIX, header, b"zeros")
    (folder / "artifact.bin").write_bytes(sealed)
    size = f"BIGRAM_VOCAB_SIZE={cfg.bigram_vocab_size}"
    replace_text(folder / "config.env", size, "BIGRAM_VOCAB_SIZE=20000000")
    own_digests(folder)
    found = rows(folder)
    assert found["artifact"][0] == "not checked" and "not unpacked" in found["artifact"][1]


def test_a_header_without_end_is_not_parsed(folder):
    reseal(folder, lambda header, words: header.update(x=[{}] * 500_000))
    assert "a header of " in reasons(folder)["stream"]


@pytest.mark.parametrize("seed", ["-1", "x"])
def test_arguments_are_checked(seed, folder, capsys):
    with pytest.raises(SystemExit) as ended:
        verify.main([str(folder), "--positions-seed", seed])
    assert ended.value.code == 2


# -----------------------------------------------------------------------------
# Scorers that are none


def coded_by(case, mixture, monkeypatch):
    """What the range coder makes of the text with another mixture"""
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "Mixture", mixture)
        plan = case.stream[0].plan
        return train_gpt.encode(case.model, case.rt, case.cfg, case.text.stream, plan)[0]


def test_a_leaky_mixture_fails_the_decode(folder, monkeypatch):
    """It raises the next token's probability: short, and no decoder can follow."""
    case = verify.Case(folder)
    plan = case.stream[0].plan
    order = train_gpt.LaneSchedule(case.text.stream, plan).order(case.text.stream)
    upcoming = case.text.stream[order.targets + 1].tolist()

    class Leaky(train_gpt.Mixture):
        def distributions(self, outputs, lanes):
            p = super().distributions(outputs, lanes)
            future = np.zeros_like(p)
            future[range(len(p)), [upcoming.pop(0) for _ in lanes]] = 1
            return (p + future) / 2

    leaky = coded_by(case, Leaky, monkeypatch)
    assert not upcoming and len(leaky) < 0.5 * len(case.stream[1])
    reseal(folder, lambda header, words: leaky)
    relog(folder, lambda x: x.update(coded_bytes=len(leaky)) if "coded_bytes" in x else None)
    failed = reasons(folder)
    assert failed.keys() == {"decode"} and "words of another text" in failed["decode"]


def test_an_unnormalised_mixture_fails(folder, decoded):
    failed = reasons(folder, decoded._replace(mass_error=1e-8))
    assert "masses are up to 1e-08 off 1" in failed["score"]


# -----------------------------------------------------------------------------
# What cannot be checked is named


def statuses(found):
    return {name for name, (status, _) in found.items() if status == "not checked"}


def test_sliding_windows_have_no_proof(tmp_path_factory, data):
    """With the published backoff and a pre-enriched model; the artifact is scored again."""
    env = dict(SCORER="sliding", NGRAM_MIXER="cascade", PRE_ENRICH_DIM="64", BIGRAM_KIND="linear")
    folder = finished(tmp_path_factory, "sliding", data, **env)
    case = verify.Case(folder)
    found = list(verify.examine(case))
    assert [row.check for row in found if row.status != "ok"] == ["stream", *PROOF]
    assert "no stream.bin (SCORER=sliding, CODEC" in found[EVERY.index("stream")].reason
    words = "CONSISTENT, NOT PROVED", "not checked: stream, decode, score"
    assert verify.verdict(found) == (3, *words) and found[-1].check == "rescored"
    assert case.rescored_bpb == pytest.approx(case.claim("val_bpb"), abs=1e-9)
    assert "scored again here" in verify.last_line(case, 3)


def test_a_claim_that_cannot_be_decoded_is_scored_again(folder):
    """And does not hold, though all of the folder's files say it."""
    (folder / "stream.bin").unlink()
    relog(folder, lambda x: x.update(val_loss=1.0) if x["key"] == "final_ngram_exact" else None)
    failed = reasons(folder)
    assert failed.keys() == {"rescored"} and "by this checkout" in failed["rescored"]


def test_a_stretch_is_not_the_whole(tmp_path_factory, data):
    folder = finished(tmp_path_factory, "stretch", data, CODEC_TOKENS="2100")
    found = rows(folder)
    assert statuses(found) == {"decode", "score"}
    assert "2,1" in found["decode"][1] and "no others are in stream.bin" in found["decode"][1]
    assert not [s for s, _ in found.values() if s == "FAILED"] and found["rescored"][0] == "ok"


def test_the_longest_first_are_paid_for(tmp_path_factory, data):
    """Of twelve documents in three lanes two are ahead: a byte each, in every figure."""
    env = dict(EVAL_LANES="3", EVAL_LONGEST_FIRST="2")
    folder = finished(tmp_path_factory, "ahead", data, **env)
    case = verify.Case(folder)
    found = list(verify.examine(case))
    assert verify.verdict(found)[1] == "PROVED", [row for row in found if row.status != "ok"]
    plan = case.stream[0].plan
    assert len(plan.ahead) == 2 and len(plan.side_bytes()) == 2
    with np.load(folder / "scores.npz") as scores:
        nats = -scores["logp_final"].sum()
    paid = 2 * math.log(256)
    assert case.decoded.nats == pytest.approx(nats + paid, rel=1e-9)
    assert case.claim("val_loss") * case.decoded.targets == pytest.approx(nats + paid, rel=1e-9)
    assert case.claim("codec", "claimed_bytes") == math.ceil((nats + paid) / math.log(256))


def test_other_documents_ahead_fail(tmp_path_factory, data):
    """Of a stretch, too: which documents it holds follows from the text."""
    env = dict(EVAL_LANES="3", EVAL_LONGEST_FIRST="2", CODEC_TOKENS="2100")
    folder = finished(tmp_path_factory, "ahead_stretch", data, **env)
    found = rows(folder)
    assert statuses(found) == {"decode", "score"} and found["rescored"][0] == "ok"
    reseal(folder, lambda header, body: b"\1\1" + body[2:])  # 0 and 1
    assert "has shape" in reasons(folder)["stream"]


FALSE_LINES = {
    "config": ("log", lambda line: line.update(EVAL_LANES="7(default)")),
    "setting": ("log", lambda line: line.update(value="EVAL_LANES=7")),
    "final_ngram_exact": ("score", lambda line: line.update(orders="1-2")),
    "final_ngram_exact ": ("score", lambda line: line.update(mass_error=0.0)),
}


@pytest.mark.parametrize("key", FALSE_LINES)
def test_a_log_of_other_settings_fails(folder, decoded, key):
    """Though every file repeats it."""
    name, change = FALSE_LINES[key]
    path = folder / "metrics.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    for line in lines:
        if line["key"] == key.strip():
            change(line)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    texts = [train_gpt.log_line(x["key"], x["value"], train_gpt.line_fields(x)) for x in lines]
    (folder / "log.txt").write_text("".join(f"{text}\n" for text in texts))
    train_gpt.write_submission(folder)
    found = rows(folder, decoded)
    assert [name for name, (status, _) in found.items() if status == "FAILED"] == [name]


def test_pieces_of_documents_are_proved(tmp_path_factory, data):
    """Cut where the plan says: their bytes are paid for; a stretch is checked, too."""
    env = dict(EVAL_LANES="3", EVAL_PIECE_TOKENS="97")
    folder = finished(tmp_path_factory, "pieces", data, **env)
    case = verify.Case(folder)
    found = list(verify.examine(case))
    assert verify.verdict(found)[1] == "PROVED", [row for row in found if row.status != "ok"]
    plan = case.stream[0].plan
    assert plan.cuts and plan.length == 97 and not plan.ahead
    with np.load(folder / "scores.npz") as scores:
        nats = -scores["logp_final"].sum()
    paid = len(plan.side_bytes()) * math.log(256)
    assert case.decoded.nats == pytest.approx(nats + paid, rel=1e-9)
    stretch = finished(tmp_path_factory, "pieces_stretch", data, **env, CODEC_TOKENS="2100")
    found = rows(stretch)
    assert statuses(found) == {"decode", "score"} and found["rescored"][0] == "ok"
    reseal(stretch, lambda header, body: header.update(cuts=[96, header["cuts"][1]]))
    assert "has shape" in reasons(stretch)["stream"]


def test_a_run_that_learnt_otherwise_fails(tmp_path_factory, data):
    """The claim of learning in lanes with the stream of a run without, and the other way round."""
    folders = [finished(tmp_path_factory, f"learnt_{on}", data, LANE_TTT=on) for on in ("0", "1")]
    found = [verify.Case(folder).claim("val_bpb") for folder in folders]
    assert found[0] != found[1]
    for folder in folders:
        assert verify.verdict(list(verify.examine(verify.Case(folder))))[1] == "PROVED"
    header, words = train_gpt.read_stream(folders[1] / "stream.bin")
    assert header.scoring["lane_ttt"] and not verify.Case(folders[0]).stream[0].scoring["lane_ttt"]
    shutil.copy(folders[0] / "stream.bin", folders[1] / "stream.bin")
    assert "settings are not those" in reasons(folders[1])["stream"]
    sealed = train_gpt.seal(train_gpt.STREAM_PREFIX, header.pack(), words)
    (folders[1] / "stream.bin").write_bytes(sealed)
    reseal(folders[1], lambda header, body: header["scoring"].update(lane_ttt="0"))
    assert "settings are not those" in reasons(folders[1])["stream"]


def test_a_known_text_is_named(tmp_path_factory, data):
    folder = finished(tmp_path_factory, "known", data, KNOWN_TOKENS="-1")
    case = verify.Case(folder)
    found = [*verify.examine(case)]
    assert {row.status for row in found} == {"ok"}
    (train,) = train_gpt.find_shards(data, "train")
    count = len(train_gpt.map_shard(train))
    (reason,) = [row.reason for row in found if row.check == "known"]
    assert reason.startswith(f"{count:,} training tokens in the artifact, the end of those here")
    assert f"{case.shared:.1%} of the" in reason and 0 <= case.shared < 0.3


def test_a_known_text_of_others_is_no_proof(tmp_path_factory, data, tmp_path, monkeypatch):
    """Whose training text is another one, or has none, cannot say what the artifact holds: it may
    be the scored text in disguise."""
    folder = finished(tmp_path_factory, "theirs", data, KNOWN_TOKENS="2000")
    copy = shutil.copytree(data, tmp_path / "other")
    (train,) = train_gpt.find_shards(copy, "train")
    tokens = train_gpt.map_shard(train).copy()
    monkeypatch.setenv("DATA_PATH", str(copy))
    assert rows(folder)["known"][0] == "ok"
    tokens[-1000] ^= 1
    write_shard(train, tokens)
    found = [*verify.examine(verify.Case(folder))]
    assert verify.verdict(found)[1] == "CONSISTENT, NOT PROVED"
    (reason,) = [row.reason for row in found if row.status != "ok"]
    assert reason.startswith("the artifact's 2,000 training tokens are not the end of those here")
    for shard in (tokens[-1999:], None):
        write_shard(train, shard) if shard is not None else train.unlink()
        assert rows(folder)["known"][0] == "not checked"


def test_a_text_that_repeats_itself_is_its_own(tmp_path_factory, data, tmp_path, monkeypatch):
    """Half of it stands in the training text, which is the verifier's, too."""
    for path in data.iterdir():
        shutil.copy(path, tmp_path)
    (train,) = train_gpt.find_shards(tmp_path, "train")
    (val,) = train_gpt.find_shards(tmp_path, "val")
    write_shard(train, np.concatenate([train_gpt.map_shard(path) for path in (train, val)]))
    folder = finished(tmp_path_factory, "repeats", tmp_path, KNOWN_TOKENS="-1")
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    status, reason = rows(folder)["known"]
    assert status == "ok" and "100.0% of the scored text's stretches" in reason


def test_the_embedded_training_text_is_known_by_its_sha256(folder, monkeypatch):
    """Where the verifier's is another one, it says nothing."""
    case = verify.Case(folder)
    case.model.known = train_gpt.KnownText(np.zeros(9, np.uint16))
    monkeypatch.setattr(verify.Case, "text_name", verify.EMBEDDED)
    with pytest.raises(verify.NotChecked, match="has not the embedded training text; fix: move"):
        verify.known(case)
    monkeypatch.setattr(verify, "TRAIN_TOKENS_SHA256", verify.tokens_sha256(case.training))
    with pytest.raises(verify.Failed, match="9 training tokens are not the end of those here"):
        verify.known(case)


def test_no_training_text_is_the_verifier_s_lack(folder, data, tmp_path, monkeypatch):
    """Of the embedded text, too: nothing of the folder's fault."""
    copy = shutil.copytree(data, tmp_path / "other")
    for path in train_gpt.find_shards(copy, "train"):
        path.unlink()
    monkeypatch.setenv("DATA_PATH", str(copy))
    monkeypatch.setattr(verify.Case, "text_name", verify.EMBEDDED)
    case = verify.Case(folder)
    case.model.known = train_gpt.KnownText(np.zeros(9, np.uint16))
    status, reason = verify.outcome(verify.known, case)
    assert status == "not checked" and "no training text for the known text" in reason


def test_an_artifact_that_holds_the_text_fails(tmp_path_factory, data, tmp_path):
    """Its score is a code length all the same, of a text that the artifact has."""
    for path in data.iterdir():
        shutil.copy(path, tmp_path)
    (train,) = train_gpt.find_shards(tmp_path, "train")
    (val,) = train_gpt.find_shards(tmp_path, "val")
    both = [train_gpt.map_shard(path) for path in (train, val)]
    write_shard(train, np.concatenate(both))
    folder = finished(tmp_path_factory, "holds", tmp_path, KNOWN_TOKENS="-1")
    found = rows(folder)
    status, reason = found["known"]
    assert status == "FAILED" and "tokens are not the end of those here; 100.0% of the" in reason


@pytest.mark.parametrize("length", [1, 2, 16])
def test_shared_stretches_are_counted(length):
    rng = np.random.default_rng(length)
    text, known = (rng.integers(0, 9, 400).astype(np.uint16) for _ in range(2))
    known[50:150] = text[200:300]
    pieces = [tuple(x[i : i + length]) for x in (known,) for i in range(401 - length)]
    wanted = [tuple(text[i : i + length]) in {*pieces} for i in range(401 - length)]
    assert verify.shared_stretches(text, known, length) == pytest.approx(np.mean(wanted))
    assert verify.shared_stretches(text, text, length) == 1
    assert verify.shared_stretches(text, known[:0], length) == 0
    assert verify.shared_stretches(text[:0], known, length) == 0


def test_without_the_text(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "nowhere"))
    found = examined(folder)
    by = {row.check: row for row in found}
    assert "set DATA_PATH" in by["text"].reason and by["decode"].status == "not checked"
    assert verify.verdict(found)[0] == 3


def test_another_text(folder, tmp_path, data, decoded, monkeypatch):
    copy = shutil.copytree(data, tmp_path / "other")
    for path in copy.glob("*_val.jsonl"):
        path.unlink()
    (copy / "dataset.json").unlink(missing_ok=True)
    (path,) = copy.glob("*_val_*.bin")
    tokens = np.fromfile(path, "<u2", offset=1024)
    monkeypatch.setenv("DATA_PATH", str(copy))
    assert not reasons(folder, decoded)
    tokens[50:52] = tokens[51:49:-1]
    assert tokens[50] != tokens[51]
    path.write_bytes(path.read_bytes()[:1024] + tokens.tobytes())
    assert "is not the text's" in reasons(folder, decoded)["decode"]


def test_another_machine(folder, monkeypatch):
    reseal(folder, lambda header, words: header["made"].update(torch="1.0"))
    found = rows(folder)
    assert statuses(found) == {"decode", "score"} and "made with torch 1.0" in found["decode"][1]
    assert found["rescored"][0] == "ok"
    reseal(folder, lambda header, words: header["made"].update(device="cuda NVIDIA H100"))
    monkeypatch.setattr(train_gpt.torch.cuda, "is_available", lambda: False)
    found = rows(folder)
    assert "cuda NVIDIA H100, which is not here" in found["decode"][1]
    assert "limit 0.02" in found["rescored"][1]


def test_a_claim_of_this_kind_of_device_has_little_room(folder):
    """What the hardware line says does not widen it: the stream's own header counts."""
    reseal(folder, lambda header, words: header["made"].update(torch="1.0"))

    def other(line):
        if line["key"] == "hardware":
            line["value"] = "8 x NVIDIA H100"
        if line["key"] == "final_ngram_exact":
            line["val_loss"] += 0.005

    relog(folder, other)
    failed = reasons(folder)
    assert failed.keys() == {"rescored"} and "submission.json says" in failed["rescored"]


def test_the_log_chooses_neither_text_nor_tokenizer(folder, data, tmp_path, monkeypatch):
    """With longer pieces every byte counts for less: such a run was once PROVED, at a tenth."""
    monkeypatch.delenv("DATA_PATH")
    texts = shutil.copytree(data, tmp_path / "elsewhere/text"), folder / "tokenizer.model"

    def given(line):
        if line["key"] == "config":
            line |= dict(DATA_PATH=f"{texts[0]}(env)", TOKENIZER_PATH=f"{texts[1]}(env)")

    relog(folder, given)
    case = verify.Case(folder)
    assert case.cfg.data_path == str(train_gpt.SAMPLE_DATA)
    assert str(folder) not in case.cfg.tokenizer_path
    found = rows(folder)
    assert found["text"][0] == "not checked" and "DATA_PATH=the text" in found["text"][1]
    assert str(texts[0]) in found["text"][1] and found["decode"][0] == "not checked"
    monkeypatch.setenv("DATA_PATH", str(texts[0]))  # whoever checks may name it
    assert verify.Case(folder).cfg.data_path == str(texts[0])


def test_errors_of_this_machine_are_no_failures(folder, decoded, monkeypatch):
    def broken(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setitem(verify.CHECKS, "files", (broken, ()))
    found = examined(folder, decoded)
    assert verify.verdict(found)[0] == 3


def test_no_run_folder(tmp_path):
    done = script(tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and not done.stdout
    assert len(done.stderr.splitlines()) == 1


def test_the_table(folder, capsys):
    """A row a check, the verdict last; here after a tampering."""
    append(folder / "train_gpt.py", "#\n")
    assert verify.main([str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split()[0] for line in lines if not line.startswith("note: ")]
    assert shown[:-1] == EVERY
    assert "FAILED" in lines[0] and "needs code, above" in lines[EVERY.index("stream")]
    score = json.loads((folder / "submission.json").read_text(encoding="utf-8"))["val_bpb"]
    wrong = "failed: code, files, log; not checked: stream, "
    assert lines[-1].startswith(f"FAILED val_bpb {score} claimed; {wrong}")


@pytest.mark.slow
@pytest.mark.parametrize("record", ["pr864", "pr810", "pr1026", "pr993", "pr808", "own"])
def test_every_record(record, tmp_path_factory, data):
    """Their systems, shrunk; #808's also learns at test time."""
    env = dict(RECORD=record, MAX_WALLCLOCK_SECONDS="0", WARMUP_STEPS="0", NGRAM_BUCKETS="4096")
    env |= dict(NUM_HEADS="4", NUM_KV_HEADS="2", VE_DIM="32", BIGRAM_DIM="32", SAVE_SCORES="1")
    env |= dict(NUM_LAYERS="11", EVAL_SEQ_LEN="64", TTT_CHUNK_TOKENS="2048")
    env |= {} if record == "own" else dict(SCORER="sliding")
    env |= dict(PRE_ENRICH_DIM="32") if record == "pr810" else {}
    env |= dict(TTT_ENABLED="1") if record == "pr808" else {}
    folder = finished(tmp_path_factory, record, data, **env)
    found = rows(folder)
    assert not {name: why for name, (status, why) in found.items() if status == "FAILED"}
    assert statuses(found) == (set() if record == "own" else {"stream", *PROOF})
    assert record == "own" or found["rescored"][0] == "ok"


def test_more_tokens_than_there_are_mean_all(data, tmp_path, monkeypatch):
    """CODEC_TOKENS beyond the text, as its default on a short one."""
    monkeypatch.setattr(train_gpt, "WITNESSES", 1)
    env = SMALL | dict(CODEC_TOKENS="1000000", ITERATIONS="1", WARMDOWN_ITERS="1")
    done = run_here(tmp_path, "beyond", **env, DATA_PATH=str(data)).submission()
    codec = done["codec"]
    assert codec["proved_tokens"] == codec["total_tokens"] == done["tokens"]
    assert codec["decoded"] == "ok"
