"""Eight ranks on the CPU, as on eight GPUs: a whole run, beside the same run on one rank."""

import json

import numpy as np
import pytest
from helpers import ROOT, SHRUNK, Run, launch, train_gpt

pytestmark = pytest.mark.slow

RANKS = 8
# A row of 64 tokens a rank; banks of 6 and 3 matrices, none a multiple of eight; the dataset's
# twelve documents make twelve lanes, so sixteen: eight groups of two, the last two of none.
SMALL = SHRUNK | dict(
    NUM_LAYERS="3",
    MODEL_DIM="32",
    ROPE_DIMS="4",
    ITERATIONS="6",
    SCORER="documents",
    CODEC_TOKENS="-1",
)


def whole(tmp_path_factory, dataset, ranks):
    """-> the run, facts of each rank"""
    folder = tmp_path_factory.mktemp(f"ranks_{ranks}")
    env = SMALL | dict(DATA_PATH=str(dataset), RUN_ID="whole")
    done = launch(ROOT / "tests/unit/main_worker.py", [folder], env, ranks, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    names = [folder / f"facts_rank{rank}.json" for rank in range(ranks)]
    return Run(folder / "runs/whole"), [json.loads(name.read_text()) for name in names]


@pytest.fixture(scope="module")
def eight(tmp_path_factory, dataset):
    return whole(tmp_path_factory, dataset, RANKS)


@pytest.fixture(scope="module")
def one(tmp_path_factory, dataset):
    return whole(tmp_path_factory, dataset, 1)


def losses(run):
    return np.array([line["train_loss"] for line in run.metrics() if "train_loss" in line])


def test_ranks_end_with_the_same_weights(eight):
    assert len({facts["weights"] for facts in eight[1]}) == 1


def test_they_train_as_one_rank_does(one, eight):
    """To fp32's rounding, which a step of late QAT, itself a rounding, makes larger."""
    alone, together = losses(one[0]), losses(eight[0])
    (begun,) = [line for line in one[0].lines if line.startswith("late_qat:enabled")]
    begun = int(begun.split("step:")[1].split()[0])
    assert len(alone) == len(together) == 6 and begun == 4
    apart = np.abs(alone - together)
    assert apart[:begun].max() < 1e-5 and apart.max() < 1e-3


def test_windows_and_documents_score_as_on_one_rank(one, eight):
    """Of two artifacts that differ by rounding, which GPTQ spreads over the columns behind."""
    for stage in ("int6_sliding_window_exact", "documents_exact"):
        nats = [float(run.final(stage)["val_loss"]) for run, _ in (one, eight)]
        assert abs(nats[0] - nats[1]) < 3e-3


def test_documents_are_dealt_to_eight_groups_and_decoded(eight):
    run, _ = eight
    line = run.final("codec")
    assert line["decoded"] == "ok" and line["proved_tokens"] == line["total_tokens"]
    content = (run.folder / "stream.bin").read_bytes()
    plan = train_gpt.CodingPlan(*train_gpt.unseal(train_gpt.STREAM_PREFIX, content)[0]["shape"])
    assert (plan.groups, plan.lanes, plan.pieces) == (RANKS, 16, 12)
