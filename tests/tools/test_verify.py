"""verify.py: a run that is proved, everything that can be done to its folder, and runs of
which not all can be checked."""

import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import verify
from helpers import ROOT, SHRUNK, clean_environment, run_here, shared_folder, train_gpt

import prepare
import prepare_text

SMALL = SHRUNK | dict(SCORER="documents", EVAL_LANES="8", CODEC_TOKENS="-1")
EVERY = list(verify.CHECKS)
PROOF = ["stream", "coded_size", "decode"]
FAST = [name for name in EVERY if name not in PROOF]
FILES = FAST[: FAST.index("rescored")]  # compared, not computed again


def some(*names):
    """Those and the checks of files, in their order."""
    return [name for name in EVERY if name in (*FILES, *names)]


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


@pytest.fixture
def folder(proved, tmp_path):
    """A copy, to be tampered with."""
    return shutil.copytree(proved, tmp_path / "copy")


def rows(folder, names=FAST, seed=5):
    """check -> (status, reason)"""
    found = list(verify.examine(verify.Case(folder, seed), names))
    return {row.check: (row.status, row.reason) for row in found}


def reasons(folder, names=FAST):
    """check -> reason, of those that failed"""
    return {name: why for name, (status, why) in rows(folder, names).items() if status == "FAILED"}


def script(folder, *arguments, **env):
    """records/tools/verify.py as a process, from a folder that is not the checkout."""
    command = [sys.executable, ROOT / "records/tools/verify.py", folder, *arguments]
    environ = clean_environment() | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(command, cwd=folder.parent, env=environ, capture_output=True, text=True)


# -----------------------------------------------------------------------------
# What holds


def test_a_copied_folder_is_proved(folder, data, tmp_path):
    """By a process elsewhere, which leaves nothing behind."""
    (tmp_path / "temporary").mkdir()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    env = dict(DATA_PATH=str(data), TMPDIR=str(tmp_path / "temporary"))
    done = script(folder, "--positions-seed", "3", "--json", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert not list((tmp_path / "temporary").glob("verify_*"))
    result = json.loads(done.stdout)
    assert (result["verdict"], result["why"]) == ("PROVED", "not checked: nothing")
    assert result["status"] == 0
    assert [row["check"] for row in result["checks"]] == EVERY
    assert {row["status"] for row in result["checks"]} == {"ok"}
    claimed = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
    assert result["val_bpb"] == claimed["val_bpb"] and result["positions_seed"] == 3
    assert f"{claimed['tokens']:,} tokens in" in result["checks"][-1]["reason"]


def test_seeds_draw_other_blocks_and_positions(proved):
    drawn = [verify.Case(proved, seed).picked[1].tolist() for seed in range(4)]
    assert len({tuple(places) for places in drawn}) == 4
    assert all(len(set(places)) == len(places) for places in drawn)


def test_the_order_is_that_of_the_scorer(proved):
    """coding_order goes through the schedule without a network; the scorer with one."""
    case = verify.Case(proved, 0)
    _, order = train_gpt.score_documents(case.model, case.rt, case.cfg, case.text.stream)
    assert np.array_equal(case.order.tokens, order.tokens)
    assert np.array_equal(case.order.targets, order.targets)
    assert np.array_equal(case.order.schedule, order.schedule)


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
    path.write_bytes(train_gpt.pack_artifact(dict(model.named_parameters()), cfg))
    own_digests(folder)


def other_tokenizer(folder):
    documents = ["a text of few words " * 9, "another one, of others " * 9] * 40
    (folder / "tokenizer.model").write_bytes(prepare_text.train_tokenizer(documents, 300))


def rewrite(folder, name, change):
    """A whole .npz with other values."""
    with np.load(folder / name) as file:
        columns = dict(file)
    change(columns)
    np.savez(folder / name, **columns)


def one_target(column, nats):
    def change(columns):
        columns[column][100] += nats

    return change


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


TAMPERINGS = {  # name: (what is done, the check that finds it, its message)
    "a bit of the stream": (lambda f: flip(f / "stream.bin"), "stream", "damaged, its sha256"),
    "a bit of the artifact": (
        lambda f: flip(f / "artifact.bin"),
        "artifact",
        "unreadable (damaged",
    ),
    "a bit of the scores": (
        lambda f: flip(f / "scores.npz"),
        "coverage",
        "scores.npz is unreadable",
    ),
    "a bit of the blocks": (
        lambda f: flip(f / "blocks.npz"),
        "coverage",
        "blocks.npz is unreadable",
    ),
    "the claimed bpb": (lambda f: edit(f, lower_bpb), "val_bpb", "val_bpb is "),
    "the code": (lambda f: append(f / "train_gpt.py", "#\n"), "code", "train_gpt.py has sha256"),
    "the tokenizer": (other_tokenizer, "files", "tokenizer.model has sha256"),
    "the tokenizer, claimed": (
        lambda f: (other_tokenizer(f), own_digests(f)),
        "text",
        "tokenizer.model (",
    ),
    "the stream's end": (cut, "stream", "it is cut off"),
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
        "could not decode",
    ),
    "padding of the stream": (
        lambda f: reseal(f, lambda h, w: w + bytes(40)),
        "coded_size",
        "apart",
    ),
    "a target of logp_final": (
        lambda f: rewrite(f, "scores.npz", one_target("logp_final", -2e-5)),
        "coverage",
        "logp_final is 2e-05 nats off scores.npz's",
    ),
    "a target that is certain": (
        lambda f: rewrite(f, "scores.npz", one_target("logp_final", 99)),
        "coverage",
        "not a log-probability",
    ),
    "the bytes of a target": (
        lambda f: rewrite(f, "scores.npz", one_target("bytes", 1)),
        "coverage",
        "scores.npz: bytes is not",
    ),
    "the bytes of a block": (
        lambda f: rewrite(f, "blocks.npz", lambda c: c["bytes"].__setitem__(0, 9999)),
        "coverage",
        "blocks.npz: bytes are not",
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
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_is_caught(name, folder):
    """By the check that is named, with a message of its own; the exit status is 1."""
    tamper, check, message = TAMPERINGS[name]
    tamper(folder)
    found = list(verify.examine(verify.Case(folder, 5), some(*PROOF[:2] * (check in PROOF), check)))
    failed = {row.check: row.reason for row in found if row.status == "FAILED"}
    assert message in failed.get(check, ""), failed
    assert "\n" not in failed[check] and verify.verdict(found)[0] == 1
    others = [m for n, (*_, m) in TAMPERINGS.items() if n != name and TAMPERINGS[n][1] == check]
    assert not [other for other in others if other in failed[check]]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.62, 0.8, 0.95])
@pytest.mark.parametrize("name", ["scores.npz", "blocks.npz", "artifact.bin", "stream.bin"])
def test_a_bit_anywhere(name, share, folder):
    flip(folder / name, share)
    failed = reasons(folder, ["artifact", "text", *PROOF[:1], "coverage"])
    assert any(name in reason for reason in failed.values())


def test_changed_code_is_not_executed(folder, tmp_path):
    marker = tmp_path / "executed"
    append(folder / "train_gpt.py", f"open({str(marker)!r}, 'w')\n")
    own_digests(folder)
    failed = reasons(folder, some(*PROOF))
    assert "code" in failed and not marker.exists()


def forge(folder, names, factor):
    """Better scores in every file that holds them: these columns times `factor`."""

    def scale(columns):
        for name in names:
            columns[name] *= factor

    for name in ("scores.npz", "blocks.npz"):
        rewrite(folder, name, scale)
    with np.load(folder / "blocks.npz") as file:
        blocks = dict(file)
    edges = {}
    for stage, name in dict(ngram="logp_final", documents="logp_model").items():
        nats = -blocks[name].sum()
        edges[stage] = dict(val_bpb=nats / np.log(2) / blocks["bytes"].sum())
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        stage = line["key"].removeprefix("final_").removesuffix("_exact")
        if stage in edges:
            with np.load(folder / "scores.npz") as file:
                column = file["logp_final" if stage == "ngram" else "logp_model"]
            line.update(edges[stage], val_loss=float(-column.mean()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    texts = [train_gpt.log_line(x["key"], x["value"], train_gpt.line_fields(x)) for x in lines]
    (folder / "log.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    verify.run_folder.write(verify.run_folder.RunFolder(folder))


def test_a_consistent_forgery_of_the_mixture_is_caught(folder):
    """All files agree on a better score: the mixture, the masses and the stream do not."""
    forge(folder, ["logp_final"], 0.9)
    failed = reasons(folder, some("stream", "mixture", "mass", "coded_size"))
    assert failed.keys() == {"mixture", "mass", "coded_size"}
    assert "nats off the blend mixture" in failed["mixture"]
    assert "nats off scores.npz's logp_final" in failed["mass"]
    assert "more than 16 apart" in failed["coded_size"]


def test_a_consistent_forgery_of_the_model_is_caught(folder):
    forge(folder, ["logp_model", "logp_final"], 0.9)
    assert "nats a target off the artifact's" in reasons(folder, some("rescored"))["rescored"]


# -----------------------------------------------------------------------------
# Scorers that are none


def test_a_leaky_mixture_fails_the_decode(folder, monkeypatch):
    """It raises the next token's probability: short, and no decoder can follow."""
    case = verify.Case(folder, 0)
    upcoming = case.text.stream[case.order.targets + 1].tolist()

    class Leaky(train_gpt.Mixture):
        def distributions(self, outputs, lanes):
            p = super().distributions(outputs, lanes)
            future = np.zeros_like(p)
            future[range(len(p)), [upcoming.pop(0) for _ in lanes]] = 1
            return (p + future) / 2

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "Mixture", Leaky)
        leaky = train_gpt.encode(case.model, case.rt, case.cfg, case.text.stream, case.plan)[0]
    assert not upcoming and len(leaky) < 0.5 * len(case.stream[1])
    reseal(folder, lambda header, words: leaky)
    failed = reasons(folder, some(*PROOF))
    assert failed.keys() == {"coded_size", "decode"}
    assert "a fresh process could not decode" in failed["decode"]


def scaled(patch, method, factor):
    """Blend.<method> times a constant."""
    original = getattr(train_gpt.Blend, method)
    patch.setattr(train_gpt.Blend, method, lambda *a: original(*a) * factor)


def test_an_unnormalised_mixture_fails_the_mass(folder, monkeypatch):
    scaled(monkeypatch, "weights", 1 + 1e-8)
    assert (
        "the probabilities of all tokens add up to 1 +- 1e-08"
        in reasons(folder, some("mass"))["mass"]
    )


def test_a_mixture_that_is_unnormalised_later_fails_the_mass(folder, monkeypatch):
    """Where only the drawn positions are looked at."""
    coded = train_gpt.Coded(None, 0, 0.0)
    monkeypatch.setattr(train_gpt, "encode", lambda *_: (b"", coded))
    scaled(monkeypatch, "weights", 1 + 1e-8)
    assert "all tokens add up to 1 +- 1e-08" in reasons(folder, some("mass"))["mass"]


def test_a_mixture_that_sees_the_future_fails_causality(folder, monkeypatch):
    original = train_gpt.Blend.inputs

    def rows_of_the_chunk(self, stats, entropy, change=None):
        return original(self, stats, entropy + 1e-3 * entropy[-1], change)

    monkeypatch.setattr(train_gpt.Blend, "inputs", rows_of_the_chunk)
    assert "the mixture uses later tokens" in reasons(folder, some("causality"))["causality"]


def test_a_network_that_sees_the_future_fails_causality(folder, monkeypatch):
    """Here by a peek of score_lanes, as a network's would show."""
    original = verify.score_lanes

    def peek(case, stream, *more):
        found = original(case, stream, *more)
        return found._replace(entropy=found.entropy + stream[-2] * 1e-9)

    monkeypatch.setattr(verify, "score_lanes", peek)
    assert (
        "the network's distributions change with later"
        in reasons(folder, some("causality"))["causality"]
    )


# -----------------------------------------------------------------------------
# What cannot be checked is named


def statuses(found):
    return {name for name, (status, _) in found.items() if status == "not checked"}


def test_sliding_windows_have_no_proof(tmp_path_factory, data):
    """With the published backoff and a pre-enriched model."""
    env = dict(SCORER="sliding", NGRAM_MIXER="cascade", PRE_ENRICH_DIM="64", BIGRAM_KIND="linear")
    folder = finished(tmp_path_factory, "sliding", data, **env)
    found = list(verify.examine(verify.Case(folder, 5)))
    assert [row.check for row in found if row.status != "ok"] == ["stream", "coded_size", "decode"]
    assert "no stream.bin (SCORER=sliding), so no proof" in found[EVERY.index("stream")].reason
    words = "CONSISTENT, NOT PROVED", "not checked: stream, coded_size, decode"
    assert verify.verdict(found) == (3, *words)


def test_a_stretch_is_not_the_whole(tmp_path_factory, data):
    """The columns are those of the whole text, the proof is not."""
    folder = finished(tmp_path_factory, "stretch", data, CODEC_TOKENS="2100")
    found = rows(folder, some(*PROOF))
    assert statuses(found) == {"decode"} and not [s for s, _ in found.values() if s == "FAILED"]
    assert "2,1" in found["decode"][1] and "no others are in stream.bin" in found["decode"][1]
    assert " of " in found["decode"][1] and "val_bpb" not in found["coded_size"][1]


def test_without_scores(folder):
    (folder / "scores.npz").unlink()
    found = rows(folder)
    assert statuses(found) == {"mixture", "causality"}
    assert {status for status, _ in found.values()} == {"ok", "not checked"}


def test_without_the_text(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "nowhere"))
    found = list(verify.examine(verify.Case(folder, 5)))
    by = {row.check: row for row in found}
    assert "set DATA_PATH" in by["text"].reason and by["decode"].status == "not checked"
    assert verify.verdict(found)[0] == 3


def test_another_text(folder, tmp_path, data, monkeypatch):
    copy = shutil.copytree(data, tmp_path / "other")
    (path,) = copy.glob("*_val_*.bin")
    tokens = np.fromfile(path, "<u2", offset=1024)
    path.write_bytes(path.read_bytes()[:1024] + np.roll(tokens, 0).tobytes())
    monkeypatch.setenv("DATA_PATH", str(copy))
    assert not reasons(folder, FILES)
    tokens[50:52] = tokens[51:49:-1]
    assert tokens[50] != tokens[51]
    path.write_bytes(path.read_bytes()[:1024] + tokens.tobytes())
    failed = reasons(folder, FILES)
    assert "spell another text" in failed["source"] and "token is not" in failed["coverage"]


def test_another_machine(folder, monkeypatch):
    reseal(folder, lambda header, words: header["made"].update(torch="1.0"))
    found = rows(folder, some(*PROOF))
    assert statuses(found) == {"decode"} and "made with torch 1.0" in found["decode"][1]
    reseal(folder, lambda header, words: header["made"].update(device="cuda NVIDIA H100"))
    monkeypatch.setattr(verify.torch.cuda, "is_available", lambda: False)
    reason = rows(folder, some(*PROOF))["decode"][1]
    assert "cuda NVIDIA H100, which is not here; CODEC_DEVICE=cpu" in reason


def test_no_run_folder(tmp_path):
    done = script(tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and not done.stdout
    assert len(done.stderr.splitlines()) == 1


def test_the_table(folder, capsys):
    """A row a check, the verdict last; here after a tampering."""
    append(folder / "train_gpt.py", "#\n")
    assert verify.main([str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line[2:].split()[0] for line in lines[:-1]] == EVERY
    essential = {line[2:].split()[0] for line in lines[:-1] if line.startswith("* ")}
    assert {"code", "text", "coverage", "val_bpb", *PROOF} <= essential
    assert "FAILED" in lines[0] and "needs code, above" in lines[EVERY.index("stream")]
    score = json.loads((folder / "submission.json").read_text(encoding="utf-8"))["val_bpb"]
    assert lines[-1].startswith(
        f"FAILED val_bpb {score}; failed: code, files, log; not checked: stream, "
    )


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
    found = rows(folder, EVERY)
    assert not {name: why for name, (status, why) in found.items() if status == "FAILED"}
    proof = set() if record == "own" else {"stream", "coded_size", "decode"}
    assert statuses(found) == proof


def test_more_tokens_than_there_are_mean_all(data, tmp_path, monkeypatch):
    """CODEC_TOKENS beyond the text, as its default on a short one."""
    monkeypatch.setattr(train_gpt, "WITNESSES", 1)
    env = SMALL | dict(CODEC_TOKENS="1000000", ITERATIONS="1", WARMDOWN_ITERS="1")
    done = run_here(tmp_path, "beyond", **env, DATA_PATH=str(data)).submission()
    codec = done["codec"]
    assert codec["proved_tokens"] == codec["total_tokens"] == done["tokens"]
    assert codec["decoded"] == "ok"


def logged(folder, **paths):
    """The log says that the run was given these"""
    log = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in log.splitlines()]
    for line in lines:
        if line["key"] == "config":
            line |= {name: f"{path}(env)" for name, path in paths.items()}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def test_the_log_does_not_choose_the_tokenizer(folder, data):
    """With longer pieces every byte counts for less: such a run was once PROVED."""
    other = shutil.copy(data / "tokenizer.model", folder.parent / "longer.model")
    logged(folder, TOKENIZER_PATH=other)
    assert verify.Case(folder, 0).cfg.tokenizer_path == str(data / "tokenizer.model")


def test_the_log_does_not_choose_a_text_that_comes_with_the_run(folder, data, monkeypatch):
    monkeypatch.delenv("DATA_PATH", raising=False)
    text = shutil.copytree(data, folder / "text")
    logged(folder, DATA_PATH=text)
    assert verify.Case(folder, 0).cfg.data_path != str(text)
    monkeypatch.setenv("DATA_PATH", str(text))  # whoever checks may name it
    assert verify.Case(folder, 0).cfg.data_path == str(text)
