"""#864's hashed scorer as written: its buckets, counts and alpha, and why it is no code length."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    SHRUNK,
    Run,
    error_line,
    launch,
    run_here,
    shared_folder,
    tiny,
    train_gpt,
)
from test_ngram import bits, uniform

from records import as_written
from records.as_written import hashed_counts, hashed_keys, pr864

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("scheme", "order", "context", "full"),
    [
        ("864", 2, 1053077, 1887548),
        ("864", 4, 1431369, 3348062),
        ("864", 7, 3765034, 1526733),
        ("993", 7, 2303716, 2041529),
        ("808", 7, 3769518, 1745031),
        ("864", 9, 2611192, 235459),
    ],
)
def test_hash_vectors(scheme, order, context, full, device, monkeypatch):
    """Those of systems.md, 7.1; the other two differ in the primes alone."""
    last = {"993": (196613, 262147), "808": (175447, 209591)}
    if scheme in last:
        monkeypatch.setattr(as_written, "PRIMES", (*as_written.PRIMES[:5], *last[scheme]))
    tokens = torch.tensor([5, 7, 11, 13, 17, 19, 23, 29, 31], device=device)
    keys = hashed_keys(tokens, order, 1 << 22)
    assert keys.shape == (2, len(tokens) - order + 1)
    assert keys[:, -1].tolist() == [context, full]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("chunk", "caches"), [(30, 3), (64, 1), (500, 1)])
def test_counts_equal_plain_loops(chunk, caches, device):
    tokens = np.random.default_rng(7).integers(0, 5, 400)
    orders = dict(ngram_min_order=3, ngram_max_order=6)
    cfg = tiny(ngram_buckets=64, ngram_chunk_tokens=chunk, ngram_caches=caches, **orders)
    rows = list(hashed_counts(tokens, 5, cfg, device=device))
    assert [row[0] for row in rows] == [3, 4, 5, 6]
    for order, n, c, _ in rows:
        keys = hashed_keys(torch.from_numpy(tokens), order, 64).numpy()
        for share in range(caches):
            first, last = 1 + share * 399 // caches, 1 + (share + 1) * 399 // caches
            for t in range(max(first, order - 1), last):
                start = first + (t - first) // chunk * chunk  # of the chunk: all it may know
                past = np.arange(max(first, order - 1), start) - order + 1
                seen = (keys[:, past] == keys[:, t - order + 1, None]).sum(1)
                assert (n[t], c[t]) == (seen[0], seen.min())


def test_counts_of_the_shortest_streams():
    for size in range(2, 12):
        log_prob, mass = pr864(np.zeros(size, int), uniform(size - 1, 2), 2, tiny())
        assert np.array_equal(log_prob, uniform(size - 1, 2).log_prob) and (mass == 1).all()


def test_future_tokens_change_no_count():
    tokens, cfg = np.random.default_rng(8).integers(0, 20, 3000), tiny(ngram_chunk_tokens=100)
    other = tokens.copy()
    other[1950:] = np.random.default_rng(9).integers(0, 20, 1050)
    for a, b in zip(*(hashed_counts(x, 20, cfg) for x in (tokens, other)), strict=True):
        assert np.array_equal(a[1][:1950], b[1][:1950]) and np.array_equal(a[2][:1950], b[2][:1950])


def test_mass_is_that_of_scoring_every_token():
    cfg = tiny(ngram_buckets=16, ngram_chunk_tokens=20)
    rng = np.random.default_rng(11)
    tokens, rows = rng.integers(0, 6, 301), rng.dirichlet(np.ones(6), 301)
    entropy = -(rows * np.log(rows)).sum(1)

    def score(stream):
        p = rows[np.arange(300), stream[1:]]
        return pr864(stream, train_gpt.Scores(np.log(p), entropy[:300]), 6, cfg)

    mass = score(tokens)[1]
    probes = np.linspace(1, 300, as_written.PROBES).astype(int)
    assert len(mass) == len(probes) and mass.max() > 2
    for i in (0, 9, 30, 63):
        total = 0.0
        for token in range(6):
            stream = tokens.copy()
            stream[probes[i]] = token
            total += math.exp(score(stream)[0][probes[i] - 1])
        assert mass[i] == pytest.approx(total, rel=1e-9)


def test_mass_follows_the_load():
    """Z = (n + V L) / (n + L), L = tokens per bucket, for a context planted n times (PR #1147)."""
    rng, vocab_size, buckets, planted = np.random.default_rng(8), 64, 1 << 10, np.arange(1, 5)
    tokens = rng.integers(0, vocab_size, 400_000)
    places = rng.choice(len(tokens) // 8, 3000, replace=False) * 8 + 3
    tokens[places[:, None] + np.arange(4)] = planted
    probes = np.sort(places)[-64:] + 4  # the targets that follow the planted context
    orders = dict(ngram_min_order=5, ngram_max_order=5)
    cfg = tiny(ngram_buckets=buckets, ngram_chunk_tokens=64, **orders)
    ((_, n, _, ratio),) = hashed_counts(tokens, vocab_size, cfg, probes=probes)
    load, true = probes / buckets, 3000 * probes / len(tokens)
    expected = (true + vocab_size * load) / (true + load)
    assert ratio.mean() == pytest.approx(expected.mean(), rel=0.03)
    assert np.abs(n[probes] / (true + load) - 1).max() < 0.2


def test_one_bucket_says_zero_bits(monkeypatch):
    """Every ratio is 1: alpha 1 leaves 0 bits, and #864's largest, 0.95, next to none."""
    tokens, scores = np.random.default_rng(9).integers(0, 1024, 4001), uniform(4000, 1024)
    cfg = tiny(ngram_buckets=1, ngram_chunk_tokens=100, ngram_multipliers=(99.0,))
    log_prob, mass = pr864(tokens, scores, 1024, cfg)
    assert np.allclose(log_prob[200:], math.log(0.95 + 0.05 / 1024), rtol=1e-12)
    assert mass[-1] == pytest.approx(0.05 + 0.95 * 1024)
    monkeypatch.setattr(train_gpt, "backoff_alpha", lambda order, *_: (order > 0).astype(float))
    assert np.all(pr864(tokens, scores, 1024, cfg)[0][200:] == 0)


@pytest.mark.parametrize(
    ("buckets", "tolerance"),
    [(1 << 15, 0.05), pytest.param(1 << 18, 0.01, marks=pytest.mark.slow)],
)
def test_random_tokens_seem_to_cost_1_348_bits(buckets, tolerance):
    """10 in truth; systems.md, 7.2, at 14.8 tokens a bucket as in FineWeb's validation text."""
    size = int(14.8 * buckets)
    tokens = np.random.default_rng(10).integers(0, 1024, size + 1)
    cfg = tiny(ngram_buckets=buckets, ngram_chunk_tokens=buckets // 64)
    log_prob, mass = pr864(tokens, uniform(size, 1024), 1024, cfg)
    assert bits(log_prob) == pytest.approx(1.348, abs=tolerance)
    assert mass.max() > 100 and mass.min() >= 1 - 1e-9


def test_record_asks_for_it():
    pairs = train_gpt.read_record("pr864")
    assert (pairs["NGRAM_SCHEME"], pairs["PSEUDO_WEIGHTS"]) == ("pr864", "ema")
    names = "min_order max_order min_count buckets chunk_tokens".split()
    published = [getattr(train_gpt.Config(), f"ngram_{name}") for name in names]
    assert published == [2, 9, 2, 1 << 22, 65_536]


# -----------------------------------------------------------------------------
# From the command line

CROWDED = dict(NGRAM_SCHEME="pr864", NGRAM_BUCKETS="256", NGRAM_CHUNK_TOKENS="64")


@pytest.fixture(scope="module")
def crowded(tmp_path_factory, dataset):
    """A run scored as #864 was measured, on averaged weights, and its artifact scored again."""
    env = SHRUNK | CROWDED | dict(DATA_PATH=str(dataset))
    with shared_folder(tmp_path_factory, "pseudo") as (cwd, empty):
        if empty:
            averaged = run_here(cwd, "ema", **env, PSEUDO_WEIGHTS="ema")
            run_here(cwd, "artifact", **env, EVAL_ONLY=str(averaged.folder / "artifact.bin"))
    return {weights: Run(cwd / "runs" / weights) for weights in ("ema", "artifact")}


def command(folder, *arguments):
    return launch(ROOT / "records" / "as_written.py", [folder, *arguments], {}, 1, folder)


@pytest.mark.parametrize("weights", ["ema", "artifact"])
def test_pseudo_score_of_a_run(crowded, weights):
    """After the score, with its mass, and far too low to be one."""
    run = crowded[weights]
    stages = [line.split()[0] for line in run.lines if line.startswith("final_")]
    assert stages.index("final_ngram_pseudo") == stages.index("final_ngram_exact") + 1
    line = run.final("ngram_pseudo")
    assert (line["scheme"], line["weights"]) == ("pr864", weights) and "val_bpb" not in line
    assert float(line["pseudo_bpb"]) < run.val_bpb()
    assert 2 < float(line["mass_mean"]) < float(line["mass_max"]) and float(line["mass_min"]) == 1
    assert run.submission()["val_bpb"] == run.val_bpb()


def test_weights_and_command_line_agree_with_the_runs(crowded):
    """Of one folder the command scores either weights; they differ a little."""
    printed = {}
    for weights, run in crowded.items():
        done = command(crowded["ema"].folder, "--weights", weights, "--json")
        assert done.returncode == 0, done.stderr
        printed[weights] = json.loads(done.stdout)
        assert {name: str(x) for name, x in printed[weights].items()} == run.final("ngram_pseudo")
    gap = printed["ema"]["pseudo_bpb"] - printed["artifact"]["pseudo_bpb"]
    assert 0 < abs(gap) < 0.1


def test_command_line_prints_a_line_or_says_what_is_missing(crowded, tmp_path):
    folder = crowded["artifact"].folder
    done = command(folder, "--scheme", "pr864")
    assert done.stdout.startswith("final_ngram_pseudo pseudo_bpb:") and done.returncode == 0
    line = error_line(command(folder, "--weights", "ema"))
    assert "scores_ema.npz" in line and "fix:" in line
    assert "scores.npz" in error_line(command(tmp_path))
