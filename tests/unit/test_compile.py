"""What CUDA compiles is traced here without it: one graph each, no break, and none traced twice.

Code is not generated, TorchDynamo's graphs are run as they are; under bf16 autocast, as on CUDA.
"""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import FRONTIER, pack_artifact, perturbed, random_stream, tiny, train_gpt

CFG = tiny(depth_recurrence=(1, 2), polyglu_enabled=True, pre_enrich_dim=16)


GRAPHS = []  # that were traced


def keep(graph, _):
    """A backend; one function, as for the same one Dynamo looks for a graph that fits."""
    GRAPHS.append(graph)
    return graph.forward


class Traced(train_gpt.Runtime):
    """Compiles by Dynamo alone."""

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16)

    def compile(self, function, repeatable=False):
        return torch.compile(function, dynamic=False, fullgraph=True, backend=keep)


def new_graphs():
    count = len(GRAPHS)
    GRAPHS.clear()
    return count


@pytest.fixture
def rt():
    torch._dynamo.reset()
    GRAPHS.clear()
    return Traced(CFG)


def eval_model(cfg=CFG):
    return perturbed(cfg).eval().requires_grad_(False)


def test_training_is_one_graph_with_late_qat(rt):
    model = perturbed(CFG)
    compiled = rt.compile(model)
    ids = torch.from_numpy(random_stream(2 * 32 - 1, 64).astype(np.int64)).view(2, 32)
    losses = []
    for _ in range(2):
        with rt.autocast(), rt.attention():
            loss = compiled(ids, ids)
        loss.backward()
        losses.append(loss.item())
        train_gpt.update_qat_grids(model, CFG)
    assert new_graphs() == 1 and losses[0] != losses[1]


@pytest.mark.parametrize("enrich", [0, 16])
def test_the_residual_stream_is_bf16(enrich, rt):
    """Where autocast is on, in every block; gains and embeddings stay fp32."""
    model = eval_model(replace(CFG, pre_enrich_dim=enrich))
    kinds = []
    block = train_gpt.GPT.block

    def watched(self, i, x, context):
        out = block(self, i, x, context)
        kinds.append((x.dtype, out.dtype, context.x0.dtype))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.GPT, "block", watched)
        ids = torch.ones(1, 8, dtype=torch.int64)
        with rt.autocast():
            model.hidden(ids)
        assert {*kinds} == {(torch.bfloat16,) * 3} and len(kinds) == CFG.num_layers + 2
        kinds.clear()
        model.hidden(ids)
        assert {*kinds} == {(torch.float32,) * 3}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_validation_and_evaluation_share_their_graphs(rt):
    """The network once, the scored positions once a stride, whoever owns the weights."""
    model = perturbed(CFG)
    stream = random_stream(200, 64)
    scorer = train_gpt.WindowScorer(train_gpt.for_scores(model), rt, CFG)
    scorer.score(stream, scorer.length)
    assert new_graphs() == 2
    scorer.score(stream, 4)
    assert new_graphs() == 1
    packed = pack_artifact(dict(model.named_parameters()), CFG)
    read = train_gpt.load_artifact("artifact.bin", content=packed)
    for cfg in (CFG, replace(CFG, eval_lanes=7)):
        again = train_gpt.WindowScorer(read, rt, cfg)
        again.score(stream, again.length)
        again.score(stream, 4)
    assert new_graphs() == 0


def test_lanes_of_scorer_and_codec_share_a_graph(rt):
    """Encoder and decoder run as many groups as there were ranks, each with its own cache."""
    model = eval_model()
    rt.cuda = True  # what the first use makes is made beforehand
    ids = torch.ones(2, 3, dtype=torch.int64)
    with torch.no_grad():
        caches = [train_gpt.LaneCache(model, 3, 16) for _ in range(4)]
        found = [train_gpt.lane_forward(model, rt, cache)(*ids)[0] for cache in caches]
    assert new_graphs() == 1
    assert all(torch.equal(x, found[0]) for x in found)


def test_attention_by_lengths_is_no_break(rt):
    """torch's varlen attention has no kernel here, so its graph is only traced."""
    varlen = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    model = eval_model()
    cache = train_gpt.LaneCache(model, 3, 16)

    def forward(ids, places):
        cache.begin(places)
        with rt.autocast():
            return model.hidden(ids.unsqueeze(1), cache)

    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        raise NotImplementedError("traced")

    ids = torch.ones(2, 3, dtype=torch.int64)
    with torch.no_grad():
        forward(*ids)
        cache.varlen = varlen
        compiled = torch.compile(forward, dynamic=False, fullgraph=True, backend=backend)
        with pytest.raises(Exception, match="traced"):
            compiled(*ids)
    assert sum("varlen" in target for target in targets) == CFG.num_layers + 2


@pytest.mark.parametrize("lora", [False, True])
def test_test_time_training_has_no_break(lora, rt):
    room = dict(scorer="sliding", ttt_enabled=True, ttt_use_lora=lora, ttt_chunk_tokens=64)
    stream = random_stream(200, 64)
    cfg = replace(CFG, **room)
    train_gpt.TestTimeTraining(eval_model(), rt, cfg).warm_up()
    assert 0 < new_graphs() <= 3
    found = train_gpt.TestTimeTraining(eval_model(), rt, cfg).score(stream)
    assert np.isfinite(found.log_prob).all()
    assert new_graphs() == 0, "nothing is compiled on the clock"


def test_flash_alone_is_no_break(rt):
    """ATTN_IMPL=fa3|fa4: on a CPU its own flash attention is the one that is left."""
    rt.flash_alone = True
    scorer = train_gpt.WindowScorer(eval_model(), rt, CFG)
    scorer.score(random_stream(100, 64), 4)
    assert new_graphs() == 2


@pytest.mark.parametrize("alone", [False, True])
def test_lanes_are_captured_with_torch_s_own_attention(alone, rt, monkeypatch):
    """FlashAttention-3 would take varlen's place, too, in the encoder but not in the decoder."""
    calls = []
    attention = torch.nn.attention
    monkeypatch.setattr(attention, "restore_flash_attention_impl", lambda: calls.append("own"))
    monkeypatch.setattr(train_gpt, "use_attention", lambda *_: calls.append("chosen"))
    rt.flash_alone = alone
    with rt.torch_attention():
        calls.append("captured")
    assert calls == (["own", "captured", "chosen"] if alone else ["captured"])


FRONTIER_CFG = tiny(**FRONTIER)


def test_loops_are_a_second_graph_and_no_more(rt):
    """Whatever documents the rows hold, back and forth between both."""
    model = perturbed(FRONTIER_CFG)
    compiled = rt.compile(model)
    rng = np.random.default_rng(0)
    for looped in (False, True, True, False, True):
        model.set_looped(looped)
        ids = torch.from_numpy(rng.integers(0, 4, (2, 32)))
        with rt.autocast(), rt.attention():
            loss = compiled(ids, ids)
        loss.backward()
        model.eval()
        with torch.no_grad(), rt.autocast():
            wanted = model(ids, ids)
        model.train()
        assert loss.item() == pytest.approx(wanted.item(), abs=1e-2)
    assert new_graphs() == 2


class Flex(train_gpt.Context):
    """Attends as on CUDA, wherever it runs."""

    def attend(self, q, k, v):
        if self.mask is None:
            self.mask = train_gpt.flex_mask(self.ids)
        return train_gpt.attend_flex(q, k, v, self.mask)


def test_attention_inside_documents_is_no_break(rt, monkeypatch):
    """FlexAttention and its blocks, traced in the graph of the model, one for all documents. Its
    kernels are CUDA's; here its definition runs, without gradients, which a CPU has none of."""
    model = eval_model(FRONTIER_CFG)

    def forward(ids):
        return model.hidden(ids, Flex(model, ids))

    compiled = torch.compile(forward, dynamic=False, fullgraph=True, backend=keep)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for _ in range(3):
            ids = torch.from_numpy(rng.integers(0, 4, (2, 150)))
            torch.testing.assert_close(compiled(ids), model.hidden(ids), rtol=0, atol=1e-4)
    (graph,) = GRAPHS
    targets = [str(node.target) for node in graph.graph.nodes]
    assert sum("flex_attention" in target for target in targets) == len(model.layers)


def test_what_is_compiled_for_cuda_takes_blocks(monkeypatch):
    """The same choice as in Context.attend, by its two conditions."""
    chosen = []
    sees = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    for name in ("flex_mask", "document_mask"):
        made = lambda ids, *_, name=name: chosen.append(name) or sees  # noqa: E731
        monkeypatch.setattr(train_gpt, name, made)
    monkeypatch.setattr(train_gpt, "attend_flex", lambda *sides: "blocks")
    monkeypatch.setattr(train_gpt, "attend", lambda *sides: "mask")
    model = perturbed(FRONTIER_CFG)
    ids = torch.ones(1, 8, dtype=torch.int64)
    for cuda, compiling in itertools.product((False, True), (False, True)):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        q = SimpleNamespace(is_cuda=cuda, dtype=torch.float32)
        found = train_gpt.Context(model, ids).attend(q, q, q)
        assert found == ("blocks" if cuda and compiling else "mask")
    assert chosen == ["document_mask"] * 3 + ["flex_mask"]
