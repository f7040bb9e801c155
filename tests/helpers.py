"""What several test files share: tiny configurations, shards by hand, the script as a process."""

import contextlib
import fcntl
import io
import json
import math
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train_gpt.py"
TESTS = "tests", "tests/unit", "tests/tools", "tests/stress"
FOLDERS = "", "data", "data/sample", "records/tools", *TESTS
sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]

import train_gpt  # noqa: E402

ALIASES = {  # whose value is ours as it stands
    name: ours
    for name, (ours, alias) in train_gpt.ALIASES.items()
    if not alias.values and not alias.plus
}

# Texts that English tokenizers and careless readers get wrong.
CHINESE = "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。寒来暑往，秋收冬藏。闰余成岁，律吕调阳。\n" * 40
SCRIPTS = (
    "Hello, world. Привет, мир. Γειά σου, κόσμε. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया। "
    "สวัสดีชาวโลก こんにちは世界。カタカナ 안녕하세요 세계 բարեւ աշխարհ გამარჯობა მსოფლიო "
    "👋🏽🌍 👩‍👩‍👧‍👦 🇺🇳 e\u0301\u200d\ufeff\u2028\U0010ffff\n"
) * 20
SOURCE_CODE = (
    "def f(x):\n\tif x > 10_000:\n\t\treturn {'a': x}  # why\r\n    else:\n        pass\n" * 60
)

# What own's training changes, put back to what it was; test_frontier.py turns it on.
PLAIN = dict(
    shuffle=False,
    mlp_mult=3.0,
    loop_layers="",
    parallel_from=-1,
    skip_gates=False,
    qk_gain_init=1.5,
    gate_inputs=0,
    doc_attention=False,
    ve_enabled=True,
    warmdown_share=0.0,
    min_lr=0.0,
    matrix_lr=0.025,
    muon_momentum=0.99,
    muon_row_norm=False,
    muon_wd=0.04,
    ema_decay=0.997,
    late_qat=True,
)
# Its switches of the model, small enough for TINY.
FRONTIER = dict(
    doc_attention=True,
    loop_layers="1-2",
    loop_times=3,
    parallel_from=2,
    skip_gates=True,
    gate_inputs=6,
)
# Every other architecture switch on, small enough for loops.
TINY = PLAIN | dict(
    device="cpu",
    vocab_size=64,
    num_layers=4,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    rope_dims=4,
    rope_train_seq_len=8,
    xsa_last_n=2,
    value_residual=True,
    gated_attention=True,
    bigram_vocab_size=48,
    bigram_dim=8,
    ve_dim=8,
    train_seq_len=16,
    train_batch_tokens=64,
    grad_accum_steps=1,
    iterations=8,
    max_wallclock_seconds=0.0,
    warmup_steps=0,
    warmdown_iters=6,
    muon_momentum_warmup_steps=4,
    swa_every=1,
    qat_every=2,
    quant_floor=False,  # a few steps leave weights too small for it
    quant="lite",  # test_gptq.py, test_range.py and runs by RECORD=tiny have the other ones
    clip_sigmas=0.0,
    target_bytes=0,
    embed_clip_sigmas=0.0,
    control_coding="fp16",
    compressor="zstd",
    late_qat_threshold=0.5,
    val_loss_every=0,
    eval_stride=4,
    eval_batch_seqs=4,
    eval_lanes=4,
    lane_ttt=False,  # test_learning.py's; the whole runs below learn
    codec_tokens=0,  # of a run; encode and decode are told what to code
    codec_minutes=0.0,  # whatever the machine's load
)
# RECORD=tiny's, coarser, and late QAT on them.
TINY_GRIDS = dict(MATRIX_CODING="int6", CLIP_SIGMAS="6.2", EMBED_CLIP_SIGMAS="9.7", LATE_QAT="1")
# The same idea for the script as a process: RECORD=tiny, shrunk further.
SHRUNK = dict(
    RECORD="tiny",
    DEVICE="cpu",
    ITERATIONS="8",
    WARMDOWN_ITERS="6",
    WARMUP_STEPS="1",
    TRAIN_BATCH_TOKENS="512",
    TRAIN_SEQ_LEN="64",
    MODEL_DIM="64",
    BIGRAM_VOCAB_SIZE="256",
    SWA_EVERY="1",
    **TINY_GRIDS,
    QAT_EVERY="2",
    KNOWN_TOKENS="0",  # test_known.py's
    VALUE_RESIDUAL="1",  # these are no longer tiny's, but are to be alive somewhere
    GATED_ATTENTION="1",
    GATE_INPUTS="0",
    VE_ENABLED="1",
    VE_DIM="32",
    LATE_QAT_THRESHOLD="0.5",
    TRAIN_LOG_EVERY="1",
    VAL_LOSS_EVERY="0",
    EVAL_STRIDE="16",
    SCORER="sliding",  # faster on two long documents; test_smoke's runs score documents
    CODEC_TOKENS="0",
    CODEC_MINUTES="0.0",
)
# Whole runs on one dataset that several tests read: name -> (ranks, each a process, or 0: in the
# test's own process; variables beside SHRUNK). eval_*: the artifact of "one" scored again.
PROOF = dict(SCORER="documents", CODEC_TOKENS="-1")
SMOKE_RUNS = {
    "one": (1, PROOF | dict(VAL_LOSS_EVERY="5")),
    "again": (0, dict(VAL_LOSS_EVERY="0")),
    "other_seed": (0, dict(SEED="7")),
    "two_ranks": (2, PROOF),
    "eval_1": (0, dict(SCORER="documents")),
    "eval_2": (2, dict(SCORER="documents")),
}


def tiny(**changes):
    """A checked Config with every switch on; `changes` by field name."""
    return train_gpt.Config(**TINY | changes).check()


def model_of(text, vocab_size=400, **options):
    """Bytes of a SentencePiece model as upstream trains them: which alters text."""
    import sentencepiece  # only here: tests/gpu runs without it

    model = io.BytesIO()
    known = dict(vocab_size=vocab_size, model_type="bpe", hard_vocab_limit=False, minloglevel=2)
    known |= dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3)
    lines = iter(text.splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, **known | options
    )
    return model.getvalue()


def perturbed(cfg, seed=0, spread=0.3):
    """A model whose every parameter, zeros at the start included, is random."""
    torch.manual_seed(seed)
    model = train_gpt.GPT(cfg).initialise()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * spread)
    return model


def enrichment_change(model, stream, piece=1 << 14):
    """(N,) of N + 1 tokens, in pieces of so many"""
    return train_gpt.enrichment_change(model, stream, piece)


class SilentRuntime:
    """What the mixture asks of a Runtime."""

    device = "cpu"
    cuda = False

    def graph(self, function, *_):
        return function

    def log(self, *_, **__):
        pass

    tick = stage = show = log


def pack_artifact(weights, cfg):
    """Of weights that are rounded without Hessians."""
    payload, _ = train_gpt.quantise(weights, cfg)
    return train_gpt.pack_payload(payload, cfg, train_gpt.artifact_room(cfg))[0]


def gptq_payload(cfg, runtime):
    """What QUANT=gptq makes of random weights, by random tokens -> arrays by name: the Hessians,
    and the payload's bytes."""
    model = perturbed(cfg, spread=0.1).eval()
    rows = train_gpt.calibration_rows(cfg, runtime, [])
    hessians = train_gpt.collect_hessians(model, runtime, cfg, rows)
    weights = dict(model.named_parameters())
    payload, found = train_gpt.quantise(weights, cfg, hessians, runtime)
    arrays = {name: hessian.numpy() for name, hessian in hessians.items()}
    return arrays | dict(payload=np.frombuffer(payload.tobytes(), np.uint8), rows=found["rows"])


def random_ids(cfg, rows=3, seed=0):
    """int64 (rows, train_seq_len) with a BOS in the middle of each row."""
    ids = torch.randint(
        2,
        cfg.vocab_size,
        (rows, cfg.train_seq_len),
        generator=torch.Generator().manual_seed(seed),
    )
    ids[:, cfg.train_seq_len // 2] = train_gpt.BOS
    return ids


def random_stream(count, vocab_size, seed=0):
    """BOS and `count` uniform tokens, uint16 as in a shard; none is <unk>, which no text has."""
    tokens = np.random.default_rng(seed).integers(2, vocab_size, count + 1)
    tokens[tokens == 3] = 2
    tokens[0] = train_gpt.BOS
    return tokens.astype(np.uint16)


def new_trainer(cfg, runtime, shard):
    """A Trainer with fresh weights of this seed over one shard."""
    torch.manual_seed(cfg.seed)
    model = train_gpt.GPT(cfg).initialise()
    loader = train_gpt.TokenLoader([shard], cfg.vocab_size)
    return train_gpt.Trainer(model, loader, runtime, cfg)


def no_validation():
    """What Trainer.run asks for when it is time to validate."""
    return dict(val_loss=0.0, val_bpb=0.0)


def trained(cfg, stream, folder):
    """Run the Trainer over a stream -> (model as the last step left it, averaged weights)"""
    shard = write_shard(folder / "stream_train_000000.bin", stream)
    trainer = new_trainer(cfg, train_gpt.Runtime(cfg), shard)
    weights = trainer.run(no_validation)
    return trainer.model, weights


def fixed_steps(cfg, runtime, shard, steps):
    """Weights (name -> array) after so many steps; 0: as many as run() makes."""
    trainer = new_trainer(cfg, runtime, shard)
    if not steps:
        trainer.run(no_validation)
    for _ in range(steps):
        trainer.update(1.0)
    return {name: w.detach().numpy() for name, w in trainer.model.named_parameters()}


def student_of(model, runtime, cfg):
    """Test-time training of a copy of the model."""
    return train_gpt.TestTimeTraining(model, runtime, cfg)


def adapted(model, runtime, cfg, stream):
    """Scores of a stream by a model that learns from it, chunk by chunk"""
    return student_of(model.eval(), runtime, cfg).score(stream)


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    """One shard in the published format, or wrong in the way that is asked for."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens).astype("<u2").tobytes())
    return path


START = len(train_gpt.ARTIFACT_PREFIX) + 4  # of an artifact's header: magic, version, length


def opened(data):
    """An artifact's bytes -> (header, compressed payload)"""
    length = struct.unpack("<I", data[START - 4 : START])[0]
    return json.loads(data[START : START + length]), data[START + length : -32]


# -----------------------------------------------------------------------------
# The script as a process


def clean_environment():
    """os.environ without anything the script or torchrun reads."""
    ours = {*train_gpt.VARIABLES, *train_gpt.ALIASES, *train_gpt.ANYWAY}
    torchrun = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"}
    return {
        name: text
        for name, text in os.environ.items()
        if name not in ours | torchrun and not name.startswith(train_gpt.FAMILIES)
    }


def worker_number():
    """Of this xdist worker, from 0."""
    return int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])


@contextlib.contextmanager
def cores(count):
    """Processes started in here share `count` cores, so that each rank gets one thread."""
    mine = sorted(os.sched_getaffinity(0))
    first = worker_number()
    os.sched_setaffinity(0, {mine[(first + i) % len(mine)] for i in range(count)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


def launch(script, arguments, env, ranks, cwd):
    """Run a Python script with its output captured, through torchrun for several ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), script, *arguments]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    quiet = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with cores(ranks):
        return subprocess.run(
            list(map(str, command)),
            cwd=cwd,
            env=clean_environment() | quiet | env,
            capture_output=True,
            text=True,
            timeout=240,
        )


def run_script(env, ranks=1, cwd=None, arguments=()):
    """Run train_gpt.py with these variables of ours and no others."""
    return launch(SCRIPT, arguments, {k: str(v) for k, v in env.items()}, ranks, cwd)


class Run:
    """A finished run folder, read back."""

    def __init__(self, folder):
        self.folder = folder
        self.lines = (folder / "log.txt").read_text(encoding="utf-8").splitlines()
        self.artifact = (folder / "artifact.bin").read_bytes()

    def submission(self):
        return json.loads((self.folder / "submission.json").read_text(encoding="utf-8"))

    def metrics(self):
        text = (self.folder / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def arrays(self, name):
        with np.load(self.folder / name, allow_pickle=False) as file:
            return dict(file)

    def final(self, stage):
        """The values of a final line: name -> text."""
        (line,) = [line for line in self.lines if line.split()[0] == f"final_{stage}"]
        return dict(re.findall(r"(\S+?):(\S+)", line))

    def val_bpb(self, stage="ngram_exact"):
        return float(self.final(stage)["val_bpb"])


def finished_run(cwd, run_id, ranks=1, **env):
    """Run the script to its end in a process -> Run; its standard output is kept beside it."""
    done = run_script(env | dict(RUN_ID=run_id), ranks, cwd)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (cwd / f"{run_id}.stdout").write_text(done.stdout, encoding="utf-8")
    return Run(cwd / "runs" / run_id)


def run_here(cwd, run_id, **env):
    """The same in this process, for many short runs -> Run"""
    config = train_gpt.Config.from_env(env | dict(RUN_ID=run_id))
    with cores(1), contextlib.chdir(cwd):
        train_gpt.run(config)
    return Run(cwd / "runs" / run_id)


@contextlib.contextmanager
def shared_folder(tmp_path_factory, name):
    """-> (folder, whether it is empty); one for all xdist workers, of which one fills it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / name
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder.mkdir(exist_ok=True)
        yield folder, not any(folder.iterdir())


def error_line(done):
    """The one line with which a refused run ends; no traceback, nothing half-finished."""
    assert done.returncode != 0, done.stdout
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert "Traceback" not in done.stderr, done.stderr
    assert len(lines) == 1, done.stderr
    return lines[0]


# -----------------------------------------------------------------------------
# Runs that are read by more than one file


def validation(dataset):
    """(tokens, UTF-8 bytes) of a dataset's validation side, read without the script."""
    (shard,) = dataset.glob("*_val_*.bin")
    (source,) = dataset.glob("*_val.jsonl")
    lines = source.read_text(encoding="utf-8").split("\n")
    texts = [json.loads(line)["text"] for line in lines if line]
    return np.fromfile(shard, "<u2", offset=1024), sum(len(text.encode()) for text in texts)


def check_scores(run, dataset):
    """Every target once, the text's own bytes, and the printed figures from the columns."""
    (tokens, text_bytes), columns = validation(dataset), run.arrays("scores.npz")
    assert columns["position"].tolist() == list(range(1, len(tokens)))
    assert columns["token"].tolist() == tokens[1:].tolist()
    assert columns["bytes"].sum() == text_bytes
    assert {columns[name].dtype for name in ("position", "token", "bytes")} <= {
        np.dtype(kind) for kind in ("u2", "i4", "i8")
    }
    for name, stage in (("logp_final", "ngram_exact"), ("logp_model", "documents_exact")):
        log_prob, line = columns[name], run.final(stage)
        assert log_prob.dtype == np.float64 and (log_prob < 0).all()
        assert math.isclose(float(line["val_loss"]), -log_prob.mean(), rel_tol=1e-12)
        bits = -log_prob.sum() / math.log(2)
        assert math.isclose(float(line["val_bpb"]), bits / text_bytes, rel_tol=1e-12)
    assert (columns["entropy"] > 0).all() and columns["entropy"].max() < math.log(1024)
