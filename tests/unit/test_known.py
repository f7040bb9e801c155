"""KNOWN_TOKENS: training text in the artifact, its counts in score, encoder and decoder alike."""

import lzma
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    PROOF,
    SHRUNK,
    START,
    SilentRuntime,
    finished_run,
    opened,
    perturbed,
    random_stream,
    run_script,
    tiny,
    train_gpt,
    write_shard,
)
from hypothesis import given, settings
from hypothesis import strategies as st

KnownText, BOS = train_gpt.KnownText, train_gpt.BOS
CFG = tiny(eval_lanes=3)


def known_of(tokens):
    return KnownText(np.array(tokens, np.uint16))


def packed(known, cfg=CFG):
    """An artifact with it."""
    weights = {name: weight.detach() for name, weight in perturbed(cfg).named_parameters()}
    return train_gpt.make_artifact(weights, cfg, train_gpt.Runtime(cfg), {}, known).packed


@settings(max_examples=40, deadline=None)
@given(tokens=st.lists(st.integers(0, 63), max_size=300))
def test_tokens_come_back(tokens):
    known = known_of(tokens)
    content = known.pack()
    assert KnownText.unpack(content, len(tokens), 64).tokens.tolist() == tokens
    assert bool(content) == bool(tokens)


@pytest.mark.parametrize("compressor", ["range", "zstd"])
def test_an_artifact_holds_it_beside_the_weights(compressor):
    cfg = replace(CFG, compressor=compressor, **dict(clip_sigmas=12.85, embed_clip_sigmas=20.0))
    known = known_of(random_stream(500, 64))
    without, whole = packed(known_of([]), cfg), packed(known, cfg)
    model = train_gpt.load_artifact("a", content=whole)
    assert model.known.tokens.tolist() == known.tokens.tolist()
    other = train_gpt.load_artifact("a", content=without)
    assert len(other.known) == 0
    for name, weight in other.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    assert b'"known"' not in without
    assert len(whole) - len(without) == len(known.pack()) + len(',"known":[501,999]')


def test_target_bytes_counts_it():
    """The clips widen by what the known text takes."""
    script = len(train_gpt.pack_script(train_gpt.SCRIPT))
    how = dict(clip_sigmas=12.85, embed_clip_sigmas=12.85, compressor="range")
    size = len(packed(known_of([]), replace(CFG, **how)))
    known = known_of(random_stream(3000, 64))
    cfg = replace(CFG, **how, target_bytes=script + size + len(known.pack()) // 2)
    found = packed(known, cfg)
    assert len(found) + script <= cfg.target_bytes
    assert (
        train_gpt.load_artifact("a", content=found).known.tokens.tolist() == known.tokens.tolist()
    )


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ([501, 0], "a known text"),
        ([0, 100], "a known text"),
        ([-1, 100], "a known text"),
        ([True, 100], "a known text"),
        ([501, 2**40], "a known text"),
        ([2**40, 300], "a known text"),
        (["501", 300], "a known text"),
        ([500, None], "not as long as the header says|no lzma stream"),
        ([502, None], "not as long as the header says"),
        ([501], "unreadable"),
        (None, "unreadable"),
    ],
)
def test_a_forged_header_is_refused(entry, reason):
    known = known_of(random_stream(500, 64))
    header, body = opened(packed(known))
    right = header["known"]
    header["known"] = [right[1] if x is None else x for x in entry] if entry else entry
    content = train_gpt.seal(train_gpt.ARTIFACT_PREFIX, header, body)
    with pytest.raises(train_gpt.ArtifactError, match=reason):
        train_gpt.load_artifact("a", content=content)


def test_tokens_beyond_the_vocabulary_are_refused():
    with pytest.raises(train_gpt.ArtifactError, match="token 64 of 64"):
        KnownText.unpack(known_of([1, 64]).pack(), 2, 64)


def test_a_bomb_is_refused():
    bomb = lzma.compress(bytes(2**22), filters=train_gpt.LZMA_WORDS)
    with pytest.raises(train_gpt.ArtifactError, match="not as long"):
        KnownText.unpack(bomb, 1000, 64)


def test_it_is_the_shards_end(tmp_path):
    stream = random_stream(299, 64)
    shards = [
        write_shard(tmp_path / f"x_train_{i:06}.bin", part)
        for i, part in enumerate(np.split(stream, [100, 220]))
    ]
    for count in (0, 1, 80, 81, 199, 300, -1):
        cfg = replace(CFG, known_tokens=count)
        wanted = stream[len(stream) - count :] if count >= 0 else stream
        assert KnownText.of(cfg, shards).tokens.tolist() == wanted.tolist()
    with pytest.raises(train_gpt.UserError, match="KNOWN_TOKENS=301: .* hold 300 tokens; fix"):
        KnownText.of(replace(CFG, known_tokens=301), shards)
    with pytest.raises(train_gpt.BadShard):
        KnownText.of(replace(CFG, known_tokens=-1, vocab_size=20), shards)


def test_more_than_any_artifact_could_hold_is_refused(tmp_path, monkeypatch):
    shard = write_shard(tmp_path / "x_train_000000.bin", random_stream(299, 64))
    monkeypatch.setattr(train_gpt, "MOST_KNOWN", 299)
    with pytest.raises(train_gpt.UserError, match="hold 300 tokens; fix: at most 299"):
        KnownText.of(replace(CFG, known_tokens=-1), [shard])
    monkeypatch.setattr(train_gpt, "MOST_KNOWN", 300)
    assert len(KnownText.of(replace(CFG, known_tokens=-1), [shard])) == 300


def count_tokens(path):
    return len(train_gpt.map_shard(path))


def stream_of(*sizes, seed=0):
    """Documents that repeat themselves, and one another."""
    rng = np.random.default_rng(seed)
    words = rng.integers(2, 64, (5, 7))
    parts = [np.append(BOS, words[rng.integers(5, size=size)].ravel()) for size in sizes]
    return np.concatenate([*parts, [BOS]]).astype(np.uint16)


TEXT = stream_of(6, 9, 3, 12, 5)
KNOWN = known_of(stream_of(20, 15, 2)[:-5])  # amid a document: nobody goes on with it


@pytest.mark.parametrize("implementation", ["numba", "torch"])
def test_counts_are_of_known_text_and_of_earlier_steps(implementation, monkeypatch):
    """Against a plain dictionary: of a target's context all that follows it in the known text, and
    in what lanes had coded before this step."""
    if implementation == "torch":
        monkeypatch.setattr(train_gpt, "has_package", lambda name: name != "numba")
    plan = train_gpt.CodingPlan.of(TEXT, CFG, 1)
    coding = train_gpt.LaneSchedule(TEXT, plan).order(TEXT)
    tokens, schedule = train_gpt.after_known(KNOWN, coding)
    skip = len(tokens) - len(TEXT) + 1
    steps, threads = (np.split(column, [len(KNOWN)]) for column in schedule)
    assert {*steps[0]} == {-1} and steps[1].min() == 0
    assert len({*threads[0]}) == 1 and not {*threads[0]} & {*threads[1]}
    for order, stats in train_gpt.count_ngrams(tokens, 64, 4, schedule=schedule):
        past = {}
        contexts = {}

        def see(thread, token, order=order, past=past, contexts=contexts):
            """-> the context that the token follows, where there is one; counted later."""
            before = contexts.get(thread, ())
            known = len(before) >= order - 1
            context = before[len(before) - order + 1 :] if order > 1 else ()
            after = (token,) if token == BOS else (*before, token)
            contexts[thread] = after[-8:]
            return context if known else None

        waiting = []
        step_before = None
        for i, (token, step, thread) in enumerate(zip(tokens.tolist(), *schedule, strict=True)):
            if step != step_before or i < len(KNOWN):
                for context, earlier in waiting:
                    past.setdefault(context, []).append(earlier)
                waiting = []
            step_before = step
            context = see(int(thread), token)
            if context is None:
                assert i < skip or not stats[i].any()
                continue
            if i >= skip:
                seen = Counter(past.get(context, []))
                wanted = [seen.total(), seen[token], len(seen), [*seen.values()].count(1)]
                assert stats[i, :4].tolist() == wanted, (order, i)
            waiting.append((context, token))


@pytest.mark.parametrize("table", [train_gpt.ContextTable, train_gpt.ContextDictionary])
def test_it_comes_back_at_the_cost_that_is_claimed(table, monkeypatch):
    """Encoder and decoder count alike; what they spend is the claim's sum; and it is less than
    without, as these texts have the same words."""
    if table is train_gpt.ContextTable:
        monkeypatch.setattr(train_gpt, "FEW_TARGETS", 0)
    rt = train_gpt.Runtime(CFG)
    plan = train_gpt.CodingPlan.of(TEXT, CFG, 1)
    spent = {}
    for known in (train_gpt.NOTHING_KNOWN, known_of(KNOWN.tokens)):
        model = perturbed(CFG).eval().requires_grad_(False)
        model.known = known
        body, made = train_gpt.encode(model, rt, CFG, TEXT, plan)
        found = train_gpt.decode(model, rt, CFG, body, plan)
        assert found.text.tolist() == TEXT.tolist() and found.mass_error < 1e-12
        if len(known):
            assert isinstance(known.counted[1], table)
        spent[len(known)] = made.nats
        scores, coding = train_gpt.score_documents(model, rt, CFG, TEXT)
        report = Reporting(CFG, rt)
        claimed = -train_gpt.mix_ngrams(scores, coding, report, known).sum()
        assert math.isclose(claimed, made.nats, rel_tol=1e-6)
    assert spent[len(KNOWN)] < 0.9 * spent[0]


class Reporting:
    """What mix_ngrams asks of a Report."""

    def __init__(self, cfg, rt):
        self.cfg = cfg
        self.rt = rt

    def score_in_order(self, *_, **__):
        pass


def test_windows_go_on_from_it(rt):
    """Without lanes the known text is the beginning of the one text: distributions spelt out are
    what is scored, and their mass is 1."""
    cfg = tiny(scorer="sliding", eval_batch_seqs=8)
    model = perturbed(cfg).eval().requires_grad_(False)
    model.known = KNOWN
    assert train_gpt.window_mass(model, train_gpt.Runtime(cfg), cfg, TEXT) < 1e-12
    mixture = train_gpt.Mixture(rt, cfg, 1, 9, isolated=False, known=KNOWN)
    coding = train_gpt.CodingOrder(TEXT, slice(None))
    tokens, schedule = train_gpt.after_known(KNOWN, coding)
    assert schedule is None
    counted = dict(train_gpt.count_ngrams(tokens, 64, 9))
    for place, token in enumerate(TEXT[1:].tolist(), len(KNOWN) + 1):
        stats = mixture.counts.read(np.array([0]))
        for k, order in enumerate(mixture.mixer.orders):
            if order in counted:
                assert stats[k, 0, 0] == counted[order][place, 0]
        mixture.counts.insert(np.array([0]), np.array([token]))


def test_counts_of_it_are_made_once_and_stay_as_they_are(rt):
    known = known_of(KNOWN.tokens)
    first = train_gpt.Mixture(rt, CFG, 2, 9, known=known)
    kept = known.counted[1]
    first.counts.insert(np.array([0, 1]), np.array([5, 6]))
    second = train_gpt.Mixture(rt, CFG, 2, 9, known=known)
    assert known.counted[1] is kept
    lanes = np.array([0])
    third = train_gpt.Mixture(rt, CFG, 2, 9, known=known_of(KNOWN.tokens))
    assert second.counts.read(lanes).tolist() == third.counts.read(lanes).tolist()
    train_gpt.Mixture(rt, CFG, 3, 9, known=known)  # other lanes are other counts
    assert known.counted[1] is not kept


def test_a_run_with_it_is_proved(tmp_path, dataset):
    """All of it as a process: artifact, score, stream and decoder; scored again it is the same."""
    env = SHRUNK | PROOF | dict(DATA_PATH=str(dataset), KNOWN_TOKENS="-1")
    shards = train_gpt.find_shards(dataset, "train")
    run = finished_run(tmp_path, "known", **env)
    bare = finished_run(tmp_path, "bare", **env | dict(KNOWN_TOKENS="0"))
    assert run.final("codec")["decoded"] == "ok"
    scores = [one.val_bpb() for one in (run, bare)]
    (line,) = [line for line in run.lines if line.startswith("known_text")]
    assert line == f"known_text:{sum(map(count_tokens, shards))}"
    assert not [line for line in bare.lines if "KNOWN_TOKENS=0: none" in line]
    assert [line for line in run.lines if "KNOWN_TOKENS=0: none" in line]
    assert scores[0] < scores[1]
    model = train_gpt.load_artifact(run.folder / "artifact.bin")
    assert model.known.tokens.tolist() == [t for path in shards for t in train_gpt.map_shard(path)]
    env |= dict(EVAL_ONLY=str(run.folder / "artifact.bin"), CODEC_TOKENS="0", KNOWN_TOKENS="5")
    again = finished_run(tmp_path, "again", **env)
    assert again.val_bpb() == scores[0] and line in again.lines  # what the artifact holds
    assert not [line for line in again.lines if "KNOWN_TOKENS=0: none" in line]  # no way out here


def test_too_many_are_refused_before_anything_is_touched(tmp_path, dataset):
    """Not even by who asks to overwrite a run."""
    (tmp_path / "runs/many").mkdir(parents=True)
    (tmp_path / "runs/many/submission.json").write_text("{}")
    env = SHRUNK | dict(DATA_PATH=str(dataset), KNOWN_TOKENS="99999999", RUN_ID="many")
    done = run_script(env | dict(OVERWRITE="1"), cwd=tmp_path)
    assert done.returncode == 2 and "step:1/" not in done.stdout
    assert "error: KNOWN_TOKENS=99999999: the training shards hold" in done.stderr
    assert [path.name for path in (tmp_path / "runs/many").iterdir()] == ["submission.json"]


def test_messages_on_bytes_name_it(rt):
    known = known_of(random_stream(3000, 64))
    how = dict(clip_sigmas=12.85, embed_clip_sigmas=12.85, compressor="range")
    cfg = replace(CFG, **how, target_bytes=len(train_gpt.pack_script(train_gpt.SCRIPT)) + 2_000)
    size = len(known.pack())
    words = f"{size:,} bytes are known text \\(KNOWN_TOKENS\\); fix: .*, or fewer KNOWN_TOKENS"
    with pytest.raises(train_gpt.UserError, match=words):
        train_gpt.quantising_seconds(train_gpt.Runtime(cfg), replace(cfg, quant="lite"), [], known)


def test_without_numba_nothing_is_known(monkeypatch):
    """A dictionary of tiny's text would take 9 GB; where the artifact has one, it is asked for."""
    cfg = replace(CFG, known_tokens=-1)
    assert train_gpt.without_missing_parts(cfg).known_tokens == -1
    monkeypatch.setattr(train_gpt, "lack_of", lambda name: "no numba" if name == "numba" else "")
    found = train_gpt.without_missing_parts(cfg)
    assert found.known_tokens == 0 and found.origin["KNOWN_TOKENS"] == "no numba"
    monkeypatch.setattr(train_gpt, "available_memory", lambda: 10**6)
    with pytest.raises(
        train_gpt.LackOfMemory, match="258 known tokens .* in Python's dictionaries"
    ):
        train_gpt.announce_known(KNOWN, SilentRuntime(), CFG)
    train_gpt.announce_known(KNOWN, SilentRuntime(), replace(CFG, ngram_enabled=False))
    train_gpt.announce_known(train_gpt.NOTHING_KNOWN, SilentRuntime(), CFG)
    monkeypatch.setattr(train_gpt, "available_memory", lambda: 10**9)
    train_gpt.announce_known(KNOWN, SilentRuntime(), CFG)


def test_start_of_the_header_is_where_it_was():
    assert packed(known_of([]))[START:].startswith(b'{"model":')
