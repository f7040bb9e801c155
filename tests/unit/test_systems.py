"""The five published systems: their sizes, settings, optimizer groups, commands and cascades."""

import math
import re
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ROOT,
    SCRIPT,
    SHRUNK,
    TINY_GRIDS,
    new_trainer,
    no_validation,
    pack_artifact,
    perturbed,
    random_ids,
    random_stream,
    run_here,
    run_script,
    train_gpt,
    write_shard,
)
from oracles import bits, mixed, oracle, uniform

Config = train_gpt.Config


def system(name, **variables):
    """The configuration of a RECORD, with the published vocabulary."""
    known = dict(DEVICE="cpu", VOCAB_SIZE="1024", RECORD=name)
    return Config.from_env(known | variables)


# -----------------------------------------------------------------------------
# Sizes

PARAMETERS = {  # of the published logs (systems.md, 1.0 and 1.2)
    "pr864": 26_744_007,
    "pr810": 25_254_992,
    "pr1026": 26_928_220,
    "pr993": 26_993_756,
    "pr808": 26_993_756,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name):
    assert train_gpt.count_parameters(system(name)) == PARAMETERS[name]


def test_polyglu_adds_a_slope_a_neuron():
    more = train_gpt.count_parameters(system("pr1026", POLYGLU_ENABLED="1"))
    assert more - PARAMETERS["pr1026"] == 16_896


@pytest.mark.parametrize(
    ("name", "published", "wider", "values"),
    [
        ("pr810", 25_993_024, "smear", 512),
        ("pr864", 27_627_290, "bigram_scale", 1),
    ],
)
def test_payload_before_compression(name, published, wider, values):
    """Theirs, but for one parameter that they store in fp16, ours as fp32 like the other gains."""
    specs = train_gpt.parameter_specs(system(name))
    assert train_gpt.payload_type(specs).itemsize == published + 2 * values
    assert specs[wider].coding == "fp32" and math.prod(specs[wider].shape) == values
    half = specs | {wider: specs[wider]._replace(coding="fp16")}
    assert train_gpt.payload_type(half).itemsize == published


# -----------------------------------------------------------------------------
# Settings (systems.md, 1.0b) and optimizer groups (1.0, 1.2, 1.3)

COMMON = dict(
  train_seq_len=2048, window=2048, eval_stride=64, max_wallclock_seconds=600.0, warmup_steps=20,
  warmdown_iters=3500, model_dim=512, num_heads=8, num_kv_heads=4, mlp_mult=3.0, qk_gain_init=1.5,
  tied_embed_init_std=0.005, rope_base=10_000.0, logit_softcap=30.0, bigram_dim=128,
  smear_gate=True, bos_reset=False, matrix_lr=0.025, scalar_lr=0.025, tied_embed_lr=0.035,
  muon_momentum=0.99, muon_momentum_warmup_start=0.92, muon_momentum_warmup_steps=1500,
  muon_backend_steps=5, muon_wd=0.04, adam_wd=0.04, beta1=0.9, beta2=0.95, adam_eps=1e-8,
  ema_enabled=True, ema_decay=0.997, ema_warmup=False, swa_enabled=True, swa_every=50, seed=1337,
  quant_floor=True, ngram_enabled=True, ngram_min_order=2, ngram_buckets=1 << 22,
  ttt_lr=0.002, ttt_epochs=3, ttt_chunk_tokens=32_768, ttt_momentum=0.9, ttt_batch_seqs=32,
  ttt_grad_clip=1.0, ttt_lora_rank=8, ttt_lora_lr=0.01, ttt_enabled=False,
)  # fmt: skip
S549 = dict(
  train_batch_tokens=786_432, num_layers=11, rope_dims=16, rope_train_seq_len=1024,
  grad_clip_norm=0.3, clip="local", leaky_slope=0.5, bigram_kind="xor", smear_init=0.0,
  ortho_init=True, overtone_init=False, pre_enrich_dim=0, qat_enabled=False, late_qat=True,
  clip_quantiles=(0.999, 0.9995, 0.9999, 0.99999, 1.0), val_loss_every=4000, train_log_every=500,
  polyglu_enabled=False,
)  # fmt: skip
LATER = dict(  # what #1026, #993 and #808 share beyond it
  ln_scale=True, ve_enabled=True, ve_dim=128, ve_layers=(9, 10), value_residual=False,
  gated_attention=False, late_qat_threshold=0.15, quant_per="matrix", compressor="lzma",
  embed_coding="int8", table_coding="int8", control_coding="fp16", ngram_max_order=7,
)  # fmt: skip
SETTINGS = {
  "pr864": S549 | dict(
    bigram_vocab_size=1024, xsa_last_n=4, ln_scale=False, ve_enabled=False, value_residual=True,
    gated_attention=True, late_qat_threshold=0.29, quant_per="row", compressor="zstd",
    embed_coding="fp16", table_coding="int6", control_coding="fp32", swa_source="ema",
    ngram_max_order=9, ngram_min_count=2, iterations=20_000, depth_recurrence=(),
    ngram_chunk_tokens=65_536, ngram_caches=1, pseudo_weights="ema",
  ),
  "pr810": dict(
    train_batch_tokens=524_288, num_layers=10, rope_dims=0, grad_clip_norm=0.0, leaky_slope=0.0,
    bigram_kind="linear", bigram_vocab_size=2048, smear_init=-3.0, ortho_init=False,
    overtone_init=True, pre_enrich_dim=768, qat_enabled=True, late_qat=False, xsa_last_n=4,
    ln_scale=False, ve_enabled=False, value_residual=False, gated_attention=False,
    clip_quantiles=(0.999, 0.9999, 0.99999, 0.999999, 0.9999999), quant_per="matrix",
    compressor="lzma", embed_coding="fp16", table_coding="int6", control_coding="fp32",
    swa_source="raw", swa_weight=0.5, iterations=20_000, val_loss_every=1000,
    train_log_every=200, ngram_max_order=11, ngram_min_count=2, ngram_chunk_tokens=16_384,
    ngram_caches=1, polyglu_enabled=False, depth_recurrence=(),
  ),
  "pr1026": S549 | LATER | dict(
    bigram_vocab_size=1536, xsa_last_n=4, iterations=9000, depth_recurrence=(), ngram_min_count=1,
    ngram_caches=8,
  ),
  "pr993": S549 | LATER | dict(
    bigram_vocab_size=2048, xsa_last_n=11, iterations=20_000, depth_recurrence=(),
    ngram_min_count=2, ngram_caches=8, target_mb=15.149,
  ),
  "pr808": S549 | LATER | dict(
    bigram_vocab_size=2048, xsa_last_n=4, iterations=9000, depth_recurrence=(4, 5),
    ngram_min_count=2, ngram_caches=8, ttt_use_lora=True,
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_the_published_ones(name):
    cfg, wanted = system(name), COMMON | SETTINGS[name] | dict(ngram_scheme=name)
    assert {field: getattr(cfg, field) for field in wanted} == wanted
    assert cfg.target_mb == (15.149 if name == "pr993" else 0)


def test_rotation_of_pr810_is_not_stretched():
    cos, sin = train_gpt.rotary_table(system("pr810"), torch.arange(2))
    assert cos.shape == (2, 32)
    assert math.atan2(sin[1, 16], cos[1, 16]) ** -2 == pytest.approx(10_000, rel=1e-4)


def fake(weight):
    """A CastedLinear's weight in #810's training (systems.md, 1.2): on 63 steps of each row's
    largest value / 31, with the gradient of the weight itself."""
    step = weight.detach().abs().amax(1, keepdim=True).clamp_min(1e-12) / 31
    rounded = torch.clamp(torch.round(weight.detach() / step), -31, 31) * step
    return weight + (rounded - weight.detach())


def embedding_of_pr810(model, ids):
    """Its token path up to the blocks, by plain torch: (B, T) -> (B, T, D)"""
    before = F.pad(ids, (1, 0))[:, :-1]
    pairs = model.bigram_embed[(before * 92821 + ids) % len(model.bigram_embed)]
    x = model.tok_emb[ids] + pairs @ fake(model.bigram_proj).T
    gate = torch.sigmoid(-model.smear)  # of the current token there
    x = gate * x + (1 - gate) * F.pad(x, (0, 0, 1, 0))[:, :-1]
    x = F.gelu(x @ fake(model.enrich_up).T) @ fake(model.enrich_down).T
    return F.rms_norm(x, x.shape[-1:])


def test_training_of_pr810_rounds_its_bigram_projection_too():
    """Values and gradients of the token path; 10 % of the projection's gradient is at stake."""
    small = dict(MODEL_DIM="32", BIGRAM_DIM="16", PRE_ENRICH_DIM="24", BIGRAM_VOCAB_SIZE="64")
    cfg = system("pr810", TRAIN_SEQ_LEN="16", EVAL_STRIDE="16", VOCAB_SIZE="64", **small)
    model = perturbed(cfg)
    ids = random_ids(cfg)
    direction = torch.randn(*ids.shape, 32, generator=torch.Generator().manual_seed(1))
    names = ("tok_emb", "bigram_embed", "bigram_proj", "smear", "enrich_up", "enrich_down")
    weights = [getattr(model, name) for name in names]
    context = train_gpt.Context(model, ids)
    ours = train_gpt.rms_norm(model.enrich(model.embed(ids, context), context))
    theirs = embedding_of_pr810(model, ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    found, wanted = (torch.autograd.grad((x * direction).sum(), weights) for x in (ours, theirs))
    for name, a, b in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert torch.equal(model.eval().bank("bigram_proj"), model.bigram_proj)


BLOCK = {"q_gain", "attn_scale", "mlp_scale", "resid_mix", "skip_weights", "smear"}
BIGRAM, VE = {"bigram_proj", "bigram_scale"}, {"ve_proj", "ve_scale", "ve_layer_scales"}
GATES = {"vr_lambda", "attn_gate_weight", "attn_gate_bias"}
GROUPS = {  # RECORD -> members of (muon beside the banks, embed, scalar, routing)
  "pr864": (set(), {"tok_emb", "bigram_embed"}, BLOCK | BIGRAM | GATES, set()),
  "pr810": (
    {"enrich_up", "enrich_down", "bigram_embed", "bigram_proj"}, {"tok_emb"}, BLOCK, set()
  ),
  "pr1026": (set(), {"tok_emb", "bigram_embed", "ve_embed"}, BLOCK | BIGRAM | VE, set()),
}  # fmt: skip
GROUPS |= {"pr993": GROUPS["pr1026"], "pr808": GROUPS["pr1026"]}
GROUPS["polyglu"] = (*GROUPS["pr1026"][:3], {"routing_alpha"})


@pytest.mark.parametrize("name", GROUPS)
def test_optimizer_groups_are_the_published_ones(name):
    cfg = system("pr1026", POLYGLU_ENABLED="1") if name == "polyglu" else system(name)
    groups = train_gpt.optimizer_groups(cfg)
    rates = dict(
        muon=(0.025, 0.04), embed=(0.035, 0.04), scalar=(0.025, 0.04), routing=(0.025, 0.0)
    )
    wanted = dict(zip(rates, GROUPS[name], strict=True))
    wanted["muon"] = wanted["muon"] | set(train_gpt.BANKS)
    assert {group: set(members) for group, (members, *_) in groups.items()} == {
        group: members for group, members in wanted.items() if members
    }
    assert {group: tuple(rest) for group, (_, *rest) in groups.items()} == {
        group: rates[group] for group in groups
    }


# -----------------------------------------------------------------------------
# Published run commands (systems.md, 1.1, 1.3, 1.5)

S549_COMMAND = """NUM_LAYERS=11 XSA_LAST_N=4 EMA_ENABLED=1 EMA_DECAY=0.997 SWA_ENABLED=1
 SWA_EVERY=50 ROPE_DIMS=16 LN_SCALE=1 LATE_QAT=1 LATE_QAT_THRESHOLD=0.15 VE_ENABLED=1 VE_DIM=128
 VE_LAYERS=9,10 TTT_ENABLED=0 MUON_WD=0.04 ADAM_WD=0.04 MATRIX_LR=0.025 SCALAR_LR=0.025
 TIED_EMBED_LR=0.035 MUON_MOMENTUM=0.99 MUON_MOMENTUM_WARMUP_START=0.92
 MUON_MOMENTUM_WARMUP_STEPS=1500 WARMDOWN_ITERS=3500 ITERATIONS=9000 MAX_WALLCLOCK_SECONDS=600
 EVAL_STRIDE=64 """
COMMANDS = {  # RECORD -> command, what it changes of the RECORD
  "pr1026": (
    S549_COMMAND + """BIGRAM_VOCAB_SIZE=1536 POLYGLU_ENABLED=0 NGRAM_ENABLED=1 NGRAM_MAX_ORDER=7
    NGRAM_ALPHA=0.50 NGRAM_NLL_THRESHOLD=2.5 SEED=1337""",
    {},
  ),
  "pr808": (
    S549_COMMAND + "BIGRAM_VOCAB_SIZE=2048 NGRAM_CACHE=1 DEPTH_RECURRENCE=4,5 SEED=2025",
    dict(seed=2025, run_id="pr808_seed2025"),
  ),
  "pr864": (
    """SEED=42 MAX_WALLCLOCK_SECONDS=600 EVAL_STRIDE=64 USE_EMA=1 EMA_DECAY=0.997 SWA_ENABLED=1
    SWA_EVERY=50 WARMDOWN_ITERS=3500 TRAIN_BATCH_TOKENS=786432 USE_TTT=0 NGRAM_EVAL=1
    NGRAM_CHUNK_TOKENS=256000""",
    dict(seed=42, run_id="pr864_seed42", ngram_chunk_tokens=256_000),
  ),
}  # fmt: skip


def pasted(command):
    return dict(pair.split("=", 1) for pair in command.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_command_pasted_with_record_is_the_record(name):
    command, changes = COMMANDS[name]
    known = dict(DEVICE="cpu", RECORD=name)
    alone, cfg = Config.from_env(known), Config.from_env(known | pasted(command))
    assert cfg == replace(alone, **changes)
    different = {f.name for f in fields(cfg) if f.compare and getattr(cfg, f.name) != f.default}
    assert len(different) > 10  # so the comparison says something


@pytest.mark.parametrize("name", COMMANDS)
def test_command_pasted_alone_resolves(name):
    command, _ = COMMANDS[name]
    cfg, variables = Config.from_env(dict(DEVICE="cpu") | pasted(command)), pasted(command)
    for variable in variables.keys() & train_gpt.VARIABLES.keys():
        assert getattr(cfg, variable.lower()) == train_gpt.parse(variable, variables[variable])
        assert cfg.origin[variable] == "env"


# -----------------------------------------------------------------------------
# Cascades: the published formulas on exact counts, with an alpha that does not know the target

PR810_ORDERS = {  # order -> entropy centre, weight (systems.md, 4.4.2)
  11: (2.5, 2.0), 10: (2.7, 2.0), 9: (3.0, 2.0), 8: (3.0, 2.0), 7: (3.0, 2.0), 6: (3.2, 1.88),
  5: (3.5, 1.88), 4: (3.8, 1.0), 3: (4.2, 0.45), 2: (4.5, 0.30),
}  # fmt: skip


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def published_alpha(name, order, entropy, confidence):
    """The weight of the counts, by the text of each pull request; at most 0.95."""
    if name == "pr864":
        centre = 3.0 - 0.25 * (order - 2)
        alpha = 0.05 + 0.55 * sigmoid(2 * (entropy - centre))
        alpha *= {2: 0.3, 3: 0.3, 4: 0.97}.get(order, 2.0)
    elif name == "pr810":
        centre, weight = PR810_ORDERS[order]
        alpha = (0.20 + 0.55 * sigmoid(2 * (entropy - centre))) * weight * (0.5 + confidence)
    elif name == "pr1026":
        alpha = 0.5 * min(max(entropy / 2.5, 0.1), 2.0)
    else:
        alpha = 0.05 + 0.55 * sigmoid(2 * (entropy - 4.0))
    return min(alpha, 0.95)


def random_scores(size, vocab_size, seed):
    """-> distributions (size, V) of varying entropy, the same in Scores of any targets, changes"""
    rng = np.random.default_rng(seed)
    sharpness = rng.choice([0.05, 0.5, 5.0], (size, 1))
    rows = rng.gamma(np.broadcast_to(sharpness, (size, vocab_size))) + 1e-12
    rows /= rows.sum(1, keepdims=True)
    return rows, rng.gamma(2.0, 2.0, size)


def scores_of(rows, tokens, change):
    entropy = -(rows * np.log(rows)).sum(1)
    chosen = rows[np.arange(len(rows)), tokens[1:]]
    return train_gpt.Scores(np.log(chosen), entropy, change)


def cascade_config(name):
    """The cascade of a RECORD, and nothing else of it, as changes to a tiny configuration."""
    names = [f.name for f in fields(Config) if f.name.startswith("ngram_")]
    cfg = system(name)
    return {n: getattr(cfg, n) for n in names} | dict(ngram_mixer="cascade", ngram_scheme="")


def repetitive(size, vocab_size, seed):
    rng = np.random.default_rng(seed)
    tokens = np.tile(rng.integers(0, vocab_size, size // 4), 5)[: size + 1]
    noise = rng.random(size + 1) < 0.05
    tokens[noise] = rng.integers(0, vocab_size, noise.sum())
    return tokens


@pytest.mark.parametrize("name", PARAMETERS)
def test_cascade_is_the_published_formula(name):
    size, vocab_size = 400, 12
    tokens = repetitive(size, vocab_size, seed=1)
    rows, change = random_scores(size, vocab_size, seed=2)
    scores = scores_of(rows, tokens, change if name == "pr810" else None)
    final, stages = mixed(tokens, scores, **cascade_config(name), vocab_size=12)
    assert stages["ngram_backoff"]["log_prob"].tobytes() == final.tobytes()
    cfg, table, used = system(name), oracle(tokens, 11)[:, :, 1:], set()
    for t in range(size):
        usable = range(2, cfg.ngram_max_order + 1)
        usable = [k for k in usable if table[k - 1, 0, t] >= (1 if name == "pr1026" else 2)]
        p, order = math.exp(scores.log_prob[t]), max(usable, default=0)
        if order:
            confidence = change[t] / change[: t + 1].max()
            alpha = published_alpha(name, order, scores.entropy[t], confidence)
            p = (1 - alpha) * p + alpha * table[order - 1, 1, t] / table[order - 1, 0, t]
        assert math.exp(final[t]) == pytest.approx(p, rel=1e-9)
        used.add(order)
    assert {0, 2, cfg.ngram_max_order} <= used


@pytest.mark.parametrize("name", PARAMETERS)
def test_cascade_s_probabilities_add_up_to_one(name):
    """Each token of the vocabulary is the last target in turn, and scored."""
    vocab_size, changes = 9, cascade_config(name)
    for place in (1, 2, 40, 117, 160):
        tokens = repetitive(160, vocab_size, seed=place)[: place + 1]
        rows, change = random_scores(place, vocab_size, seed=place)
        total = 0.0
        for token in range(vocab_size):
            tokens[-1] = token
            scores = scores_of(rows, tokens, change if name == "pr810" else None)
            final, _ = mixed(tokens, scores, **changes, vocab_size=vocab_size)
            total += math.exp(final[-1])
        assert total == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("name", PARAMETERS)
def test_random_tokens_cost_ten_bits_under_every_cascade(name):
    """Whose formulas as written report 1.25 to 9.71 (systems.md, 7.2)."""
    size = 40_000
    tokens = np.random.default_rng(3).integers(0, 1024, size + 1)
    scores = uniform(size, 1024)._replace(pe_delta=np.random.default_rng(4).gamma(2, 2, size))
    final, _ = mixed(tokens, scores, **cascade_config(name), vocab_size=1024)
    error = final.std() / math.log(2) / math.sqrt(size)
    assert bits(final) >= 10 - 4 * error and bits(final) != 10


# -----------------------------------------------------------------------------
# Each from end to end, small

SMALL = {name: text for name, text in SHRUNK.items() if name not in TINY_GRIDS} | dict(
    MAX_WALLCLOCK_SECONDS="0",
    WARMUP_STEPS="0",
    NUM_LAYERS="4",
    NUM_HEADS="4",
    NUM_KV_HEADS="2",
    BIGRAM_DIM="16",
    VE_DIM="16",
    VAL_LOSS_EVERY="8",
    NGRAM_SCHEME="",
    NGRAM_MIXER="cascade",
    SAVE_SCORES="1",
    SCORER="sliding",
)
SYSTEMS = {  # RECORD -> its own switches at this size
  "pr864": dict(),
  "pr810": dict(PRE_ENRICH_DIM="24"),
  "pr1026": dict(VE_LAYERS="2,3", POLYGLU_ENABLED="1"),
  "pr993": dict(VE_LAYERS="2,3", TARGET_MB="0.2"),
  "pr808": dict(
    VE_LAYERS="2,3", DEPTH_RECURRENCE="1,2", TTT_ENABLED="1", TTT_CHUNK_TOKENS="1024",
    TTT_EPOCHS="1",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.usefixtures("no_picture")
def test_system_from_end_to_end(name, dataset, tmp_path):
    env = SMALL | SYSTEMS[name] | dict(RECORD=name, DATA_PATH=str(dataset))
    run = run_here(tmp_path, name, **env)
    keys = [row["key"] for row in run.metrics()]
    assert ("late_qat:enabled" in keys) == (name != "pr810")
    assert ("prune" in keys) == (name == "pr993")
    assert ("final_ttt_exact" in keys) == (name == "pr808")
    assert keys.count("averaged") == 1 and float(run.final("ngram_exact")["mass_error"]) < 1e-9
    assert run.val_bpb() == run.val_bpb("ngram_backoff_exact")
    model, columns = train_gpt.load_artifact(run.folder / "artifact.bin"), run.arrays("scores.npz")
    assert model.cfg.depth_recurrence == ((1, 2) if name == "pr808" else ())
    assert ("routing_alpha" in dict(model.named_parameters())) == (name == "pr1026")
    assert ("pe_delta" in columns) == (name == "pr810")
    tokens = np.append(train_gpt.BOS, columns["token"])
    scores = train_gpt.Scores(*(columns.get(c) for c in ("logp_model", "entropy", "pe_delta")))
    final, _ = mixed(tokens, scores, **cascade_config(name), vocab_size=512)
    assert final.tobytes() == columns["logp_final"].tobytes()


# -----------------------------------------------------------------------------
# As run, to the last setting: the line of each README, and that what was dead there is dead

ALIVE = {  # what had a part in the published weights (systems.md, 0.1, 3.2, 3.3, 3.5)
    "pr864": {"ema"},
    "pr810": {"qat", "ema", "swa"},
    "pr1026": {"ema"},
    "pr993": {"ema", "pruning"},
    "pr808": {"ema"},
}
DEAD = {name: set() if name == "pr810" else {"late_qat", "swa"} for name in ALIVE}


def as_run(name):
    """-> the variables of the README's line, what it says that DRY_RUN prints"""
    text = (ROOT / f"records/track_10min_16mb/{name}/README.md").read_text(encoding="utf-8")
    section = text.split("## As run, to the last setting\n")[1].split("\n## ")[0]
    command = re.search(
        r"^(.+) torchrun --standalone --nproc_per_node=8 train_gpt.py$", section, re.M
    )
    printed = re.search(r"^techniques .+$", section, re.M)
    return pasted(command[1]), printed[0]


def dry_run(capsys, **env):
    """The line of techniques that DRY_RUN=1 prints -> itself, those that are on"""
    train_gpt.run(Config.from_env(env | dict(DRY_RUN="1", DEVICE="cpu")))
    printed = capsys.readouterr().out.splitlines()
    (line,) = [line for line in printed if line.startswith("techniques ")]
    return line, {word.partition(":")[0] for word in line.split() if word.endswith(":on")}


@pytest.mark.parametrize("name", ALIVE)
def test_dry_run_shows_what_was_dead_as_dead(name, capsys):
    variables, said = as_run(name)
    assert variables["RECORD"] == name
    line, on = dry_run(capsys, **variables)
    assert line == said and on == ALIVE[name]
    assert dry_run(capsys, RECORD=name)[1] == ALIVE[name] | DEAD[name]


def test_techniques_of_a_process(tmp_path):
    variables, said = as_run("pr993")
    done = run_script(variables | dict(DRY_RUN="1", DEVICE="cpu"), cwd=tmp_path)
    assert done.returncode == 0 and said in done.stdout.splitlines() and not done.stderr


@pytest.mark.parametrize(
    ("changes", "off", "on"),
    [
        (dict(EMA_ENABLED="0"), {"ema"}, {"swa"}),
        (dict(EMA_ENABLED="0", SWA_WEIGHT="0"), {"ema"}, {"swa"}),  # the weight is of both
        (dict(SWA_ENABLED="0"), {"swa"}, {"ema"}),
        (dict(SWA_WEIGHT="1"), {"ema"}, {"swa"}),
        (dict(SWA_WEIGHT="1", SWA_SOURCE="ema"), set(), {"ema", "swa"}),
        (dict(QAT_ENABLED="1"), {"late_qat"}, {"qat"}),  # whose grid is the one that is used
        (dict(LATE_QAT_THRESHOLD="0"), {"late_qat"}, set()),
        (dict(LATE_QAT="0"), {"late_qat"}, set()),
        (dict(TTT_ENABLED="1", SCORER="sliding"), set(), {"ttt"}),
        (dict(TARGET_MB="1", TARGET_BYTES="0", COMPRESSOR="zstd"), set(), {"pruning"}),
    ],
)
def test_dry_run_knows_what_another_setting_puts_out(changes, off, on, capsys):
    _, found = dry_run(capsys, RECORD="own", **changes)
    assert not found & off and on <= found


def last_steps(folder, name, **variables):
    """A small RECORD trained to its end -> trainer, exported weights"""
    env = SMALL | SYSTEMS[name] | dict(VOCAB_SIZE="512", RUN_ID="x") | variables
    cfg = Config.from_env(env | dict(RECORD=name))
    shard = write_shard(folder / "stream_train_000000.bin", random_stream(5000, 512))
    trainer = new_trainer(cfg, train_gpt.Runtime(cfg), shard)
    return trainer, trainer.run(no_validation)


@pytest.mark.parametrize("name", ALIVE)
def test_training_as_run_has_the_parts_that_were_alive(name, tmp_path):
    """By what they do: late QAT never begins and no layer sees rounded weights; the export is the
    EMA to the last bit, although there are snapshots. Without the line it is otherwise."""
    trainer, weights = last_steps(tmp_path, name, **as_run(name)[0])
    model, averages = trainer.model, trainer.averages
    late = trainer.qat_since is not None or any(grid.any() for grid in model.buffers())
    rounded = {n for n in train_gpt.BANKS if not torch.equal(model.bank(n), getattr(model, n))}
    assert not late and rounded == (set(train_gpt.BANKS) if "qat" in ALIVE[name] else set())
    assert averages.snapshots
    for place, (weight, last) in enumerate(zip(weights.values(), averages.weights, strict=True)):
        share = 0.5 if "swa" in ALIVE[name] else 0.0
        wanted = averages.ema[place].lerp(averages.swa[place], share)
        assert torch.equal(weight, wanted) and not torch.equal(weight, last)
        assert share or torch.equal(weight, averages.ema[place])
    usual, others = last_steps(tmp_path, name)
    assert (usual.qat_since is not None) == ("late_qat" in DEAD[name])
    changed = any(not torch.equal(weights[n], others[n]) for n in weights)
    assert changed == bool(DEAD[name])


@pytest.mark.slow
def test_the_published_quantiser_fits_the_cap_with_the_floor_alone():
    """26,993,756 Gaussian weights of the spread that #993's log implies (its share of +-1)."""
    sizes = {}
    published = dict(QUANT="lite", CLIP_SIGMAS="0", EMBED_CLIP_SIGMAS="0", TARGET_BYTES="0")
    published |= dict(COMPRESSOR="zstd", CONTROL_CODING="fp16", TARGET_MB="0")
    for floor in ("1", "0"):
        cfg = Config.from_env(
            dict(RECORD="pr993", DEVICE="cpu", VOCAB_SIZE="1024", QUANT_FLOOR=floor) | published
        )
        torch.manual_seed(0)
        weights = {
            name: torch.randn(spec.shape) * {"muon": 0.16, "embed": 0.1}.get(spec.group, 0.3)
            for name, spec in train_gpt.parameter_specs(cfg).items()
        }
        sizes[floor] = len(pack_artifact(weights, cfg)) + SCRIPT.stat().st_size
    print(sizes)
    assert sizes["1"] < train_gpt.CAP_BYTES < sizes["0"]
