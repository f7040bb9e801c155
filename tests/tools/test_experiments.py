"""experiments.py: what it runs, what it remembers, what it makes of it."""

import json
import math
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import experiments
import numpy as np
import pytest
from experiments import SWITCHES, Estimate, Row, estimate
from helpers import ROOT, launch, train_gpt, write_shard
from run_folder import markdown

# Stands in for train_gpt.py: its files and lines in a few milliseconds.
FAKE = """
import json, os, sys, time
from pathlib import Path

env = os.environ
call = {name: env[name] for name in env if name.isupper()} | {"PID": os.getpid()}
call["CORES"] = sorted(os.sched_getaffinity(0))
with open(env["FAKE_LOG"], "ab", buffering=0) as log:  # whole lines, as two runs write at a time
    log.write(json.dumps(call).encode() + b"\\n")
time.sleep(float(env.get("FAKE_SECONDS", 0)))
seed, relu2, decay = int(env.get("SEED", 0)), env.get("LEAKY_SLOPE") == "0", "MUON_WD" in env
if env.get("FAKE_FAILS") == env.get("XSA_LAST_N", "none"):
    sys.exit("error: as it was told")
bpb = 2 + 0.1 * seed**2 - (0.2 + 0.001 * seed) * relu2 + 0.3 * decay
size = 600_000 + 10 * seed
lines = [
    dict(key="step", value="7/8", step_avg_ms=100.0 + seed),
    dict(key="averaged", value=None, val_bpb=bpb - 0.01),
    dict(key="final_int6_roundtrip_exact", val_bpb=bpb),
    dict(key="final_ngram_exact", val_bpb=bpb + 0.01 * len(env["RECORD"])),
    dict(key="final_artifact_bytes", weights=size, total=size + 90_000),
]
if env.get("NGRAM_CHUNK_TOKENS"):
    lines.append(dict(key="final_ngram_pseudo", pseudo_bpb=0.3, mass_mean=900.0))
folder = Path("runs") / env["RUN_ID"]
folder.mkdir(parents=True)
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""
SMALL = "NUM_LAYERS=2 MODEL_DIM=32 NUM_HEADS=2 NUM_KV_HEADS=1 XSA_LAST_N=1 VE_DIM=8".split()
SMALL += "TRAIN_SEQ_LEN=32 EVAL_STRIDE=32 TRAIN_BATCH_TOKENS=64 BIGRAM_VOCAB_SIZE=64".split()
BASE = experiments.FIXED | experiments.schedule_of_steps(100)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """FAKE in the place of the script -> function that lists its calls so far."""
    script, log = tmp_path / "train_gpt.py", tmp_path / "calls.jsonl"
    script.write_text(FAKE)
    monkeypatch.setattr(experiments, "SCRIPT", script)
    monkeypatch.setattr(experiments, "CODE", {script: script.read_bytes()})
    monkeypatch.setenv("FAKE_LOG", str(log))

    def calls():
        text = log.read_text() if log.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a line may be half written
        return list(map(json.loads, whole.splitlines()))

    return calls


def ablation(out, dataset, *arguments):
    where = ["--out", str(out), "--set", f"DATA_PATH={dataset}"]
    return experiments.main(["ablation", *arguments, *where])


def table_rows(out):
    """First cell -> the other cells of the tables in a README.md."""
    lines = (out / "README.md").read_text(encoding="utf-8").splitlines()
    tables = [line.strip("|").split("|") for line in lines if line.startswith("| ")]
    rows = [[cell.strip() for cell in row] for row in tables]
    return {row[0]: row[1:] for row in rows if set(row[0]) != {"-"}}


def row(name, seed, **measures) -> Row:
    return dict(labels=dict(name=name, seed=seed), measures=measures)


# -----------------------------------------------------------------------------
# The real script


def test_ablation_end_to_end(dataset, tmp_path, monkeypatch):
    """One switch, one seed, four steps of a very small model."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    size = ["--steps", "4", "--seeds", "1", "--val-tokens", "500", "--jobs", "1"]
    assert ablation(tmp_path, dataset, *size, "--only", "relu2", "--set", *SMALL) == 0
    done = list(experiments.read_rows(tmp_path).values())
    assert [r["labels"]["name"] for r in done] == ["baseline", "relu2"]
    assert done[1]["env"]["LEAKY_SLOPE"] == "0" and "LEAKY_SLOPE" not in done[0]["env"]
    plain, relu2 = (r["measures"] for r in done)
    for name in ("averaged_bpb", "int6_bpb"):
        assert plain[name] != relu2[name] and 2 < plain[name] < 12
    assert plain["steps"] == 4 and plain["step_ms"] > 0
    assert plain["artifact_bytes"] < plain["total_bytes"] < 400_000
    change = relu2["int6_bpb"] - plain["int6_bpb"]
    assert table_rows(tmp_path)[SWITCHES[0].words][4] == f"{change:+.4f}"
    assert not any((tmp_path / "temporary").iterdir())


# -----------------------------------------------------------------------------
# Switches and configurations


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.name)
def test_switch_resolves_and_changes_the_configuration(switch):
    env = BASE | switch.env(800_000)
    assert train_gpt.Config.from_env(env) != train_gpt.Config.from_env(BASE)
    assert switch.changes(BASE) and switch.fits(BASE)
    assert {*switch.env(800_000)} <= {*train_gpt.VARIABLES}


def test_switches_differ():
    """No two of them are the same configuration, and names and words are their own."""
    cfgs = [train_gpt.Config.from_env(BASE | s.env(8e5)) for s in SWITCHES]
    assert all(a != b for i, a in enumerate(cfgs) for b in cfgs[:i])
    for field in ("name", "words", "variables"):
        assert len({getattr(s, field) for s in SWITCHES}) == len(SWITCHES)


def test_on_and_off_are_seen_from_tiny():
    """A technique that a switch takes out is in `tiny`; one that it adds is not."""
    plain = train_gpt.Config.from_env(BASE)
    for switch in SWITCHES:
        if switch.how in ("on", "off") and switch.name != "relu2":
            (name, text), *_ = switch.env(8e5).items()
            assert bool(getattr(plain, name.lower())) == (switch.how == "off"), switch.name
            assert (text == "0") == (switch.how == "off"), switch.name


def test_switch_without_effect_is_refused(fake, dataset, tmp_path, capsys):
    given = ["--only", "relu2", "--set", "LEAKY_SLOPE=0"]
    assert ablation(tmp_path, dataset, *given) == 2
    error = capsys.readouterr().err
    assert "relu2" in error and error.count("\n") == 1 and fake() == []


def test_schedule_is_that_of_tiny():
    """Within a tenth."""
    full = train_gpt.Config.from_env({"RECORD": "tiny"})
    for name, text in experiments.schedule_of_steps(full.iterations).items():
        if name != "VAL_LOSS_EVERY":
            assert int(text) == pytest.approx(getattr(full, name.lower()), rel=0.101), name


def test_what_is_held_out_is_of_the_training_text(tmp_path):
    """Each document on one side, none of the validation text, the same ones each time."""
    source = tmp_path / "source"
    source.mkdir()
    rng = np.random.default_rng(3)
    documents = [[1, *rng.integers(2, 60, n).tolist()] for n in rng.integers(1, 20, 200)]
    write_shard(source / "x_train_000000.bin", np.concatenate(documents[:120]))
    write_shard(source / "x_train_000001.bin", np.concatenate(documents[120:]))
    (source / "tokenizer.model").write_bytes(b"model")
    sides = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        folder = experiments.hold_out(source, tmp_path / name)
        sides.append(
            [train_gpt.map_shard(*train_gpt.find_shards(folder, s)) for s in ("train", "val")]
        )
    (train, val), again = sides
    assert all(np.array_equal(x, y) for x, y in zip((train, val), again, strict=True))
    assert val[-1] == 1 and (val == 1).sum() == experiments.HELD_OUT + 1
    parts = [np.split(x, np.flatnonzero(x == 1)[1:]) for x in (train, val[:-1])]
    found = sorted(part.tolist() for side in parts for part in side)
    assert found == sorted(documents)
    write_shard(source / "x_train_000001.bin", np.array([1, 5]))
    with pytest.raises(train_gpt.UserError, match="121 training documents; fix: a text of 170"):
        experiments.hold_out(source, tmp_path / "b")


@pytest.mark.parametrize("switch", experiments.MIXTURE_SWITCHES, ids=lambda switch: switch.name)
def test_switches_of_the_mixture_change_it(switch):
    assert switch.fits(BASE | experiments.MIXED) and switch.name not in {s.name for s in SWITCHES}


def test_a_table_to_choose_by(fake, dataset, tmp_path, monkeypatch):
    """Of the mixture, on held-out documents, in a folder of its own by default."""
    monkeypatch.setattr(experiments, "HELD_OUT", 5)
    given = ["--held-out", "--only", "relu2,known", "--seeds", "2"]
    assert ablation(tmp_path, dataset, *given) == 0
    assert {call["KNOWN_TOKENS"] for call in fake()} == {"-1", "0"}
    assert {call["NGRAM_ENABLED"] for call in fake()} == {"1"}
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "5 documents held out of the training text" in text and "val_bpb difference" in text
    assert experiments.parse(["ablation", "--held-out"]).out.name == "search"
    assert experiments.parse(["ablation"]).out.name == "ablation"
    assert ablation(tmp_path, dataset, "--only", "known") == 2


@pytest.mark.parametrize("name", experiments.CONFIGS)
def test_shrunk_configuration(name):
    """It resolves; layers stay in their places, and nothing else of the RECORD is lost."""
    given = {"RECORD": name, "DEVICE": "cpu"}
    full = train_gpt.Config.from_env(given)
    plan = experiments.schedule_of_seconds(20, 250.0) | experiments.shrunk(name, {})
    small = train_gpt.Config.from_env(plan)
    assert small.model_dim == 128 and small.max_wallclock_seconds == 20
    assert small.ve_layers == (-2, -1)
    assert small.depth_recurrence == ((1, 2) if full.depth_recurrence else ())
    assert small.loop_layers == ("1-2" if full.loop_layers else "")
    assert small.parallel_from == (3 if full.parallel_from == 7 else -1)
    assert small.warmdown_share == full.warmdown_share
    share = full.xsa_last_n / full.num_layers
    assert small.xsa_last_n == max(round(4 * share), share > 0)
    assert bool(small.pre_enrich_dim) == bool(full.pre_enrich_dim)
    for field in set(train_gpt.VARIABLES) - plan.keys() - {"RUN_ID", "DATA_PATH"}:
        assert getattr(small, field.lower()) == getattr(full, field.lower()), field


def test_deeper_shrunk_configuration():
    six = train_gpt.Config.from_env(experiments.shrunk("pr808", {"NUM_LAYERS": "6"}))
    assert (six.depth_recurrence, six.ve_layers, six.xsa_last_n) == ((2, 3), (-2, -1), 2)


@pytest.mark.parametrize("step_ms", [80.0, 250.0, 900.0])
def test_rate_falls_over_the_last_half(step_ms):
    """By the script's own rule, at the speed that was measured; EMA forgets the first weights."""
    env = experiments.schedule_of_seconds(20, step_ms) | experiments.shrunk("pr864", {})
    cfg, times = train_gpt.Config.from_env(env), np.arange(1, 20_000 / step_ms) * step_ms / 1000
    factors = [train_gpt.lr_factor(i, t, cfg) for i, t in enumerate(times, 1)]
    assert np.mean(np.less(factors, 1)) == pytest.approx(0.5, abs=0.05)
    assert factors[-1] < 0.1
    assert cfg.ema_decay ** len(times) < 1e-6


# -----------------------------------------------------------------------------
# Runs


def test_done_runs_are_not_made_again(fake, dataset, tmp_path):
    """Nor forgotten by a table of other switches; one that a kill cut short is made again."""
    assert ablation(tmp_path, dataset, "--only", "relu2,muon_wd", "--seeds", "2") == 0
    assert len(fake()) == 6
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    cut, path = json.loads(lines[5])["labels"], tmp_path / "results.jsonl"
    path.write_text("\n".join([*lines[:5], lines[5][:40]]))
    assert ablation(tmp_path, dataset, "--only", "lzma", "--seeds", "2") == 0
    assert ["COMPRESSOR" in call for call in fake()[6:]] == [True, True]
    words = {switch.name: switch.words for switch in SWITCHES}
    assert {*table_rows(tmp_path)} > {words[name] for name in ("relu2", "muon_wd", "lzma")}
    assert ablation(tmp_path, dataset, "--only", "relu2,muon_wd", "--seeds", "2") == 0
    assert len(fake()) == 9 and fake()[8]["SEED"] == str(cut["seed"])
    labels = [tuple(row["labels"].values()) for row in experiments.read_rows(tmp_path).values()]
    assert len(set(labels)) == 8 == len(path.read_text().splitlines())


def test_a_killed_ablation_goes_on(fake, dataset, tmp_path, monkeypatch):
    """SIGTERM ends its runs as well; what was done stays."""
    monkeypatch.setenv("FAKE_SECONDS", "0.4")
    arguments = ["--only", "relu2,muon_wd,lzma", "--seeds", "3"]
    given = ["ablation", *arguments, "--out", str(tmp_path), "--set", f"DATA_PATH={dataset}"]
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'records/tools')!r})\n"
        "from pathlib import Path\nimport experiments\n"
        f"experiments.SCRIPT = Path({str(experiments.SCRIPT)!r})\n"
        "experiments.CODE = {experiments.SCRIPT: experiments.SCRIPT.read_bytes()}\n"
        f"sys.exit(experiments.main({given!r}))\n"
    )
    with subprocess.Popen([sys.executable, driver], stdout=subprocess.PIPE) as process:
        while len(fake()) < 6:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    assert not any(Path(f"/proc/{call['PID']}").exists() for call in fake())
    done, begun = len(experiments.read_rows(tmp_path)), len(fake())
    assert 3 <= done < 12
    monkeypatch.setenv("FAKE_SECONDS", "0")
    assert ablation(tmp_path, dataset, *arguments) == 0
    assert len(fake()) - begun == 12 - done and len(experiments.read_rows(tmp_path)) == 12


def test_other_code_or_settings_or_data_are_other_runs(fake, dataset, tmp_path, monkeypatch):
    out, only = tmp_path / "out", ["--only", "relu2", "--seeds", "1"]
    for more in ([], ["--val-tokens", "300"], ["--set", "ADAM_WD=0"]):
        before = len(fake())
        assert ablation(out, dataset, *only, *more) == 0
        assert len(fake()) == before + 2
    experiments.SCRIPT.write_text(FAKE + "# a comment\n")
    monkeypatch.setattr(experiments, "CODE", {experiments.SCRIPT: experiments.SCRIPT.read_bytes()})
    assert ablation(out, dataset, *only) == 0
    assert len(fake()) == before + 4


def test_code_that_changes_meanwhile_ends_the_table(fake, dataset, tmp_path, capsys):
    experiments.SCRIPT.write_text(FAKE + "# a comment\n")
    assert ablation(tmp_path, dataset, "--only", "relu2", "--jobs", "1") == 2
    assert "edited meanwhile" in capsys.readouterr().err
    assert experiments.read_rows(tmp_path) == {} and len(fake()) <= 2


def test_runs_have_cores_of_their_own(fake, dataset, tmp_path):
    """Equal shares that do not overlap; this process keeps all of them."""
    mine = experiments.my_cores()
    jobs = min(2, len(mine))
    assert ablation(tmp_path, dataset, "--only", "relu2,lzma", "--jobs", str(jobs)) == 0
    shares = {tuple(call["CORES"]) for call in fake()}
    assert 1 <= len(shares) <= jobs and all(len(s) == len(mine) // jobs for s in shares)
    assert len(shares) == 1 or not set.intersection(*map(set, shares))
    assert experiments.my_cores() == mine


def test_more_jobs_than_cores_are_refused(fake, dataset, tmp_path, capsys):
    assert ablation(tmp_path, dataset, "--jobs", "4096") == 2
    error = capsys.readouterr().err
    assert "--jobs 4096" in error and error.count("\n") == 1 and fake() == []


def test_variables_from_outside_stay_outside(fake, dataset, tmp_path, monkeypatch):
    """train_gpt.py's and their published names; the rest, such as PATH, goes through."""
    monkeypatch.setenv("NUM_LAYERS", "9")
    monkeypatch.setenv("USE_EMA", "0")
    assert ablation(tmp_path, dataset, "--only", "relu2", "--seeds", "1", "--set", "ADAM_WD=0") == 0
    for call in fake():
        assert not {"NUM_LAYERS", "USE_EMA"} & call.keys() and "PATH" in call
        assert call["ADAM_WD"] == "0" and call["RECORD"] == "tiny"


def test_a_failing_run_leaves_the_others(fake, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_FAILS", "0")
    assert ablation(tmp_path, dataset, "--only", "xsa_off,relu2", "--seeds", "2") == 1
    printed = capsys.readouterr().out
    assert printed.count("failed: name xsa_off seed") == 2 and "as it was told" in printed
    done = {row["labels"]["name"] for row in experiments.read_rows(tmp_path).values()}
    assert done == {"baseline", "relu2"}
    assert [*table_rows(tmp_path)][1:] == ["**baseline**", SWITCHES[0].words]


@pytest.mark.parametrize("arguments", [["--only", "relu3"], ["--set", "ADAM_WD"]])
def test_wrong_arguments_are_one_line(arguments, fake, dataset, tmp_path, capsys):
    assert ablation(tmp_path, dataset, *arguments) == 2
    error = capsys.readouterr().err
    assert arguments[1] in error and error.count("\n") == 1 and fake() == []


def test_cut_validation(dataset, tmp_path):
    (shard,) = dataset.glob("*_val_*.bin")
    whole = train_gpt.read_shard(shard, 512)
    for tokens in (100, 10**9):
        folder = tmp_path / str(tokens)
        folder.mkdir()
        assert experiments.cut_validation(dataset, folder, tokens) == str(folder)
        (cut,) = train_gpt.find_shards(folder, "val")
        assert train_gpt.read_shard(cut, 512).tolist() == whole[:tokens].tolist()
        (train,) = train_gpt.find_shards(folder, "train")
        assert train.is_symlink() and (folder / "tokenizer.model").exists()


# -----------------------------------------------------------------------------
# Statistics and tables


def test_estimates_equal_numpy():
    random = np.random.default_rng(3)
    for count in (2, 3, 8):
        a, b = random.normal(2, 0.1, (2, count))
        rows = [row("a", seed, bpb=x) for seed, x in enumerate(a)]
        base = [row("b", seed, bpb=x) for seed, x in enumerate(b)]
        for found, values in (
            (estimate(rows, "bpb"), a),
            (estimate(rows, "bpb", base[::-1]), a - b),
        ):
            assert found.mean == pytest.approx(values.mean(), rel=1e-12)
            error = values.std(ddof=1) / math.sqrt(count)
            assert found.error == pytest.approx(error, rel=1e-9)


def test_markdown():
    """Columns as wide as their widest cell; `left` of them begin at the left."""
    table = markdown(["name", "", "bpb"], [["a ± b", "x", "1.5"], ["c", "yz", "12.25"]], left=2)
    assert table.splitlines() == [
        "| name  |     |   bpb |",
        "| ----- | --- | ----: |",
        "| a ± b | x   |   1.5 |",
        "| c     | yz  | 12.25 |",
    ]
    assert markdown(["a", "b"], []) == "| a   |   b |\n| --- | --: |"


def test_estimates_of_little():
    """One seed has no error; seeds without a partner, or a measure, do not count."""
    rows = [row("a", 1, bpb=3.0), row("a", 2, bpb=9.0), row("a", 3)]
    base = [row("b", 1, bpb=2.0), row("b", 3, bpb=1.0)]
    assert estimate(rows, "bpb", base) == Estimate(1.0, None)
    assert estimate([], "bpb") is estimate(rows, "none") is estimate(rows[1:2], "bpb", base) is None
    assert experiments.cell(Estimate(1.0, None)) == "1.0000" and experiments.cell(None) == "-"
    assert experiments.cell(Estimate(-1234.5, 6.7), "+,.0f") == "-1,234 ± 7"
    assert experiments.cell(Estimate(1.23456, 0.1), error=False) == "1.2346"


@pytest.mark.parametrize(
    ("how", "mean", "error", "words"),
    [
        ("off", 0.10, 0.04, "helps"),
        ("off", -0.10, 0.04, "hurts"),
        ("on", 0.10, 0.04, "hurts"),
        ("other", 0.10, 0.04, "stays switchable"),
        ("on", -0.10, 0.04, "helps"),
        ("on", 0.10, 0.06, ""),
        ("off", 0.0, 0.0, ""),
        ("off", -0.10, None, ""),
    ],
)
def test_remarks(how, mean, error, words):
    found = experiments.remark(experiments.Switch("a", how, "", ""), Estimate(mean, error))
    assert words in found and bool(words) == bool(found)


def test_ablation_table(fake, dataset, tmp_path):
    """Sorted by effect, worst first; the command, the machine, the runs' own numbers."""
    assert ablation(tmp_path, dataset, "--only", "relu2,lzma,muon_wd", "--steps", "40") == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    command = "    python records/tools/experiments.py ablation --only relu2,lzma,muon_wd "
    assert text.splitlines()[2].startswith(f"{command}--steps 40 --out ")
    assert "torch" in text and "cores" in text and " min" in text
    words = {switch.name: switch.words for switch in SWITCHES}
    rows, order = table_rows(tmp_path), ["**baseline**"]
    order += [words[name] for name in ("muon_wd", "lzma", "relu2")]
    assert [*rows][1:] == order
    plain = ["2.4567 ± 0.2333", "2.4667 ± 0.2333", "", "600,020 ± 6", "101"]
    assert rows["**baseline**"][2:7] == plain
    assert rows[words["muon_wd"]][4:] == ["+0.3000 ± 0.0000", "+0", "+0", "helps"]
    assert rows[words["lzma"]][4:] == ["+0.0000 ± 0.0000", "+0", "+0", ""]
    assert rows[words["relu2"]][4] == "-0.2020 ± 0.0006" and "hurts" in rows[words["relu2"]][-1]
    results = json.loads((tmp_path / "results.json").read_text())
    bpb = [2 + 0.1 * seed**2 for seed in (1, 2, 3)]
    expected = [np.mean(bpb), np.std(bpb, ddof=1) / math.sqrt(3)]
    assert results["results"]["baseline"]["int6_bpb"] == pytest.approx(expected)
    assert results["results"]["relu2"]["int6_bpb_difference"][0] == pytest.approx(-0.202)
    assert results["command"] in text and results["variables"]["lzma"] == "COMPRESSOR=lzma"


def test_pruning_aims_below_the_same_seed(fake, dataset, tmp_path):
    assert ablation(tmp_path, dataset, "--only", "prune", "--seeds", "2") == 0
    targets = {c["SEED"]: float(c["TARGET_MB"]) for c in fake() if "TARGET_MB" in c}
    for seed in (1, 2):
        assert targets[str(seed)] * 2**20 == pytest.approx(0.97 * (690_000 + 10 * seed))


# -----------------------------------------------------------------------------
# Tournament


def play(out, *arguments):
    return experiments.main(["tournament", *arguments, "--out", str(out)])


def test_tournament_tables(fake, dataset, tmp_path):
    """Two texts, two seeds, three configurations: the shortest name has the least bits."""
    texts = f"{dataset},{dataset}/."
    given = ["--configs", "pr1026,pr864,tiny", "--texts", texts, "--seeds", "2", "--seconds", "9"]
    assert play(tmp_path, *given) == 0
    calls = fake()
    assert len(calls) == 3 + 3 * 2 * 2
    measured = [c for c in calls if c["MAX_WALLCLOCK_SECONDS"] == "9"]
    assert len(measured) == 12 and {c["DEVICE"] for c in measured} == {"cpu"}
    assert {c["WARMDOWN_ITERS"] for c in measured} == {"45"}
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["ranks"] == {"tiny": [1] * 4, "pr864": [2] * 4, "pr1026": [3] * 4}
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert re.search(r"\| tiny +\| +1.00 \| +2.2900 ± 0.1500 \|", text)
    assert "after TTT" not in text and "|   900.00 |" in text
    assert play(tmp_path, *given) == 0 and len(fake()) == len(calls)


def test_ranks_are_within_text_and_seed():
    def scored(name, text, seed, bpb):
        return dict(labels=dict(name=name, text=text, seed=seed), measures=dict(val_bpb=bpb))

    rows = [scored("a", "x", 1, 2.0), scored("b", "x", 1, 3.0), scored("a", "y", 1, 5.0)]
    rows += [scored("b", "y", 1, 4.0), scored("b", "y", 2, 1.0), scored("a", "y", 2, 2.0)]
    assert experiments.ranks(rows) == {"a": [1, 2, 2], "b": [2, 1, 1]}


def test_python_text_is_the_same_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "PYTHON_BYTES", 200_000)
    shards = []
    for name in "ab":
        experiments.prepare_python(tmp_path / name)
        shards += [[path.read_bytes() for path in sorted((tmp_path / name).glob("*.bin"))]]
    assert shards[0] == shards[1] and len(shards[0]) == 2
    assert all(len(shard) > 10_000 for shard in shards[0])


def test_text_that_is_no_dataset_is_refused(fake, tmp_path, capsys):
    assert play(tmp_path, "--texts", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error and error.count("\n") == 1 and fake() == []


@pytest.mark.parametrize("name", ["ablation", "tournament"])
def test_help_is_given_in_another_folder(name, tmp_path):
    """What it does, how long it takes, an example; all in one command that starts anywhere."""
    done = launch(ROOT / "records/tools/experiments.py", [name, "--help"], {}, 1, tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    for words in ("--jobs", "minutes", f"python records/tools/experiments.py {name} --"):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "NUM_LAYERS=abc"], "NUM_LAYERS='abc'"),
        (["--set", "RECORD=own"], "--set RECORD=own: each run has its own"),
        (["--set", "SEED=3"], "--set SEED=3: each run has its own"),
    ],
)
def test_settings_that_no_tournament_can_use(arguments, words, dataset, tmp_path, capsys):
    given = ["tournament", "--texts", str(dataset), "--out", str(tmp_path), *arguments]
    assert experiments.main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line


@pytest.mark.parametrize("line", ["not json", "{}", "[]"])
def test_a_damaged_line_of_results_is_named(line, tmp_path):
    (tmp_path / "results.jsonl").write_text(line + "\n")
    with pytest.raises(train_gpt.UserError, match="results.jsonl: damaged"):
        experiments.read_rows(tmp_path)


def test_an_empty_name_is_no_configuration(capsys):
    with pytest.raises(SystemExit):
        experiments.main(["tournament", "--configs", "own,"])
    assert "has an empty name" in capsys.readouterr().err


@pytest.mark.parametrize("pair", ["NGRAM_ENABLED=0", "KNOWN_TOKENS=0", "SCORER=documents"])
def test_held_out_keeps_what_its_page_says(pair, tmp_path, capsys):
    given = ["ablation", "--held-out", "--set", pair, "--out", str(tmp_path)]
    assert experiments.main(given) == 2
    assert f"--set {pair}: --held-out sets it; fix: leave one out" in capsys.readouterr().err


def test_paths_are_meant_from_here():
    """Runs start elsewhere."""
    found = experiments.overrides(["INIT_FROM=runs/a", "DATA_PATH=b", "MATRIX_LR=0.03"])
    assert found == dict(
        INIT_FROM=str(Path("runs/a").resolve()),
        DATA_PATH=str(Path("b").resolve()),
        MATRIX_LR="0.03",
    )
