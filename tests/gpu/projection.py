"""What 8 such GPUs would need, from the rows of one, and which assumptions a row replaces."""

from common import RANKS, record_names

BUDGET_SECONDS = 600  # of training, and again of evaluation
H100 = 989e12  # dense bf16 FLOP/s: the caps are for 8 devices of at least that
# Part, key and item of a measured row -> rates of records/tools/estimate.py that it replaces.
REPLACES = {
    ("step", "step_ms", "own"): "products, blocks, fused, launch, loop: a step of own with loops",
    ("step", "step_ms", "unlooped"): "the same before the loops",
    ("step", "step_ms", "across"): "blocks beside attention: the same not inside documents",
    ("step", "step_ms", "fp32"): "Script.stream: 2 or 4 bytes",
    ("step", "step_ms", "xsa4"): "the chains of XSA in forward_layer and backward_layer",
    ("lanes", "step_ms", "compiled, varlen"): "lane_step_seconds with SEEN_KEYS_ONLY",
    ("lanes", "step_ms", "compiled, masked"): "lane_step_seconds over all slots, MATH_FALLBACK",
    ("warmup", "seconds", "packing"): "zstd",
    ("counts", "seconds", "counts"): "sort, collect, pageable",
    ("counts", "schedule", "counts"): "schedule",
    ("counts", "seconds", "backoff"): "backoff, threads",
    ("counts", "seconds", "blend"): "mixing, eager, CHUNK_LAUNCHES",
    ("proof", "clock", "proof"): "codec, start",
}


def projection(table, peak):
    """Evaluation by part, steps in the budget, and what estimate.py need no longer assume."""
    evaluation(table, peak)
    for record in record_names():
        if step := table.value("step", "step_ms", record):
            tokens = table.value("step", "batch_tokens", record) * RANKS
            made = 1e3 * BUDGET_SECONDS / step
            text = f"{made:,.0f} steps in {BUDGET_SECONDS} s, {made * tokens / 1e9:.2f} G tokens; "
            text += "one GPU does all of Muon here, and no transfer is in it"
            row(table, record, "PASS", text, steps=made)
    for (part, key, item), rates in REPLACES.items():
        value = table.value(part, key, item)
        if value is not None:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            row(table, "estimate.py", "PASS", f"{part}, {item}: {key} {shown} replaces {rates}")


def evaluation(table, peak):
    """Seconds by part on RANKS GPUs: rank 0 counts and mixes alone."""
    spent = {
        "packing": table.value("warmup", "seconds", "packing"),
        "roundtrip": table.value("windows", "seconds", "roundtrip"),
        "documents": table.value("lanes", "seconds", "all targets"),
        "schedule": table.value("counts", "schedule"),
        "counts": table.value("counts", "seconds", "counts"),
        "backoff": table.value("counts", "seconds", "backoff"),
        "blend": table.value("counts", "seconds", "blend"),
    }
    known = [value for value in spent.values() if value is not None]
    if not known:
        return
    text = ", ".join(f"{n} {'?' if v is None else f'{v:.0f}'} s" for n, v in spent.items())
    text += f": {sum(known):.0f} of {BUDGET_SECONDS} s"
    text += ", and what is not known" if len(known) < len(spent) else ""
    fits = sum(known) <= BUDGET_SECONDS
    late = "FAIL" if peak and peak >= H100 else "SKIP"
    status = ("PASS" if len(known) == len(spent) else "SKIP") if fits else late
    row(table, "evaluation", status, text, **spent)


def row(table, item, status, text, **values):
    table.add(dict(part="on 8", item=item, status=status, text=text, values=values))
