"""Plant faults, one at a time, and see whether the tests notice each.

    python tests/stress/planted.py                       # all faults, in the files as they are now
    python tests/stress/planted.py --only future,sha     # some, by name
    python tests/stress/planted.py --rev HEAD~3          # in the files of a commit
    python tests/stress/planted.py --check               # only: has every fault a place?

A fault is a short edit of the code. Each is planted in a copy of the repository, where the tests
that should notice it run; first they must pass without one. Exit status 1: a fault was not noticed.

How an edit finds its place: white space, line breaks and a comma before a closing bracket do not
matter, and `$name` stands for any name, dotted or not, the same one wherever it is repeated.
"""

import argparse
import ast
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = Path("data/datasets/sample_en")
SCRIPT = "train_gpt.py"
TIMEOUT = 600  # seconds of a run of tests
BROKEN = (  # by an edit that does not fit the code: nothing that a test is for
    *("NameError", "UnboundLocalError", "AttributeError", "TypeError"),
    *("SyntaxError", "ImportError", "ModuleNotFoundError"),
)
Edit = tuple[str, str, str]


class RowError(ValueError):
    """A row of the table that does not do what it says."""


class Fault(NamedTuple):
    """One row: the edits are alternatives, of which exactly one has its place in the code."""

    name: str
    wrong: str  # what the code does then
    tests: str  # that should notice it: file in tests/, and -k of pytest
    edits: list[Edit]


def script(old: str, new: str) -> list[Edit]:
    """An edit of train_gpt.py."""
    return [(SCRIPT, old, new)]


def tool(name: str, old: str, new: str) -> list[Edit]:
    """An edit of a program of records/tools/."""
    return [(f"records/tools/{name}.py", old, new)]


def moved(module: str, old: str, new: str) -> list[Edit]:
    """An edit of what was in records/ once and is in train_gpt.py now."""
    return [(f"records/{module}.py", old, new), (SCRIPT, old, new)]


# -----------------------------------------------------------------------------
# The faults

CONFIG = [
    Fault(
        "bounds",
        "a number outside its bounds is taken",
        "test_config.py -k wrong_values",
        script("if $least <= $value <= $most: return $value", "return $value"),
    ),
    Fault(
        "alias",
        "two names of one variable may contradict each other",
        "test_config.py -k sibling_names",
        moved("variables", "if $ours != text and", "if False and"),
    ),
    Fault(
        "precedence",
        "a RECORD outweighs the environment",
        "test_config.py -k precedence",
        moved(
            "variables",
            '$texts |= {$name: ($text, "env") for $name, $text in $given.items() if $name in $all}',
            '$texts = {$name: ($text, "env") for $name, $text in $given.items() if $name in $all}'
            " | $texts",
        ),
    ),
    Fault(
        "header",
        "a field of the model is not in the artifact's header",
        "test_artifact.py -k ready_to_score",
        [
            *script(
                'MODEL_FIELDS = $names[$names.index("vocab_size") : $names.index("quant_per")]',
                'MODEL_FIELDS = $names[$names.index("vocab_size") : $names.index("quant_per")];'
                ' MODEL_FIELDS.remove("xsa_last_n")',
            ),
            *script(
                'MODEL_FIELDS = stored_names("artifact")',
                'MODEL_FIELDS = stored_names("artifact"); MODEL_FIELDS.remove("xsa_last_n")',
            ),
        ],
    ),
    Fault(
        "arguments",
        "arguments of the command line are ignored",
        "test_config.py -k one_ends_the_process",
        script("refuse_arguments(sys.argv[1:]) run(", "run("),
    ),
    Fault(
        "others",
        "short names of other programs are taken for slips of ours",
        "test_config.py -k names_of_others",
        script("2 if min(len($name), len($near)) >= 8 else int($family)", "2"),
    ),
    Fault(
        "launcher",
        "launchers' variables are not looked at",
        "test_config.py -k launch",
        script('if not re.fullmatch("[0-9]{1,6}", $text) or int($text) < $alone:', "if False:"),
    ),
]
RUNTIME = [
    Fault(
        "broken_package",
        "a package that cannot be imported is called missing",
        "test_alone.py -k broken_package",
        script('found = "is missing" if absent else', 'found = "is missing" if True else'),
    ),
    Fault(
        "clock",
        "the clock of all ranks is the sum of theirs, not the largest",
        "test_optim.py -k clock_of_all",
        script("dist.ReduceOp.MAX, async_op=True)", "dist.ReduceOp.SUM, async_op=True)"),
    ),
    Fault(
        "atomic",
        "a file is written where it shall appear",
        "test_runtime.py -k failed_write",
        script(
            "else: $partial.write_bytes($content)",
            "else: $partial.write_bytes(b''); path.write_bytes($content);"
            " $partial.write_bytes($content)",
        ),
    ),
    Fault(
        "known_partial",
        "partial files have a name that somebody can have made a link of",
        "test_stats.py -k partial_file",
        script(
            'tempfile.mkstemp(f"_{$path.name}", PARTIAL, $path.parent)',
            "(lambda name: (os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), name))("
            'str($path.with_name(f".partial_{$path.name}")))',
        ),
    ),
    Fault(
        "signal",
        "a second signal is collected like the first",
        "test_runtime.py -k second_signal",
        script(
            "signal.signal($each, signal.SIG_IGN if $each in $spared else signal.SIG_DFL)", "pass"
        ),
    ),
    Fault(
        "hangup",
        "SIGHUP ends a run like a kill",
        "test_runtime.py -k after_a_warning",
        script(
            "[signal.SIGINT, signal.SIGTERM, *WARNINGS]",
            "[signal.SIGINT, signal.SIGTERM]",
        ),
    ),
    Fault(
        "nohup",
        "SIGHUP is heard where the caller ignores it",
        "test_runtime.py -k ignored_signal_stays",
        script("if signal.getsignal($each) not in (signal.SIG_IGN, None):", "if True:"),
    ),
    Fault(
        "unsaved",
        "a signal ends the process although trained weights lie in no file",
        "test_runtime.py -k waits_for_what",
        script("if not self.unsaved: self.release_signals()", "self.release_signals()"),
    ),
    Fault(
        "terminal",
        "a terminal that is gone ends the run",
        "test_runtime.py -k lost_stream",
        script(
            "except OSError as $error: self.lose($error) return len($text)",
            "except OSError as $error:\n            raise\n        return len($text)",
        ),
    ),
    Fault(
        "lock",
        "two processes may have one run folder",
        "test_runtime.py -k in_use",
        script("self.lock = self.lock or lock_folder(self)", "self.lock = None"),
    ),
    Fault(
        "lock_link",
        "the lock is written through a link",
        "test_runtime.py -k lock_is_no_link",
        script(
            "open_no_link(str($path), os.O_RDWR | os.O_CREAT)",
            "os.open(str($path), os.O_RDWR | os.O_CREAT)",
        ),
    ),
    Fault(
        "quota",
        "a quota of CPU time does not limit the threads",
        "test_runtime.py -k quota",
        script("min(($a / $b for $a, $b in $quotas if $a > 0), default=math.inf)", "math.inf"),
    ),
    Fault(
        "preflight",
        "what is missing is found in the middle of the run",
        "test_runtime.py -k all_that_is_missing",
        script("if $faults: raise Missing(", "if False: raise Missing("),
    ),
    Fault(
        "links",
        "read_regular follows links",
        "test_runtime.py -k only_regular_files",
        script(
            'getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)',
            'getattr(os, "O_NONBLOCK", 0)',
        ),
    ),
    Fault(
        "pipes",
        "read_regular reads what is no file",
        "test_runtime.py -k only_regular_files",
        script("if not stat.S_ISREG($status.st_mode):", "if False:"),
    ),
    Fault(
        "sizes",
        "read_regular reads however much there is",
        "test_runtime.py -k only_regular_files",
        script("if status.st_size > $most and not $first:", "if False:"),
    ),
    Fault(
        "memory",
        "memory is taken without asking how much there is",
        "test_verify.py -k memory_is_asked",
        script("if $free is not None and needed > $free:", "if False:"),
    ),
]
DATA = [
    Fault(
        "boundary",
        "the last token of a shard is dropped",
        "test_loader.py -k plain_slices",
        script("if self.offset == len(self.tokens):", "if self.offset >= len(self.tokens) - 1:"),
    ),
    Fault(
        "rows",
        "the ranks take each other's rows",
        "test_loader.py -k plain_slices",
        script(
            "batch[$rt.rank * share :][: $share + 1]",
            "batch[($rt.world_size - 1 - $rt.rank) * share :][: $share + 1]",
        ),
    ),
    Fault(
        "space",
        "a leading space is counted twice",
        "test_loader.py -k byte_tables",
        script(".is_byte($ids), 1, $sizes - $leading)", ".is_byte($ids), 1, $sizes)"),
    ),
    Fault(
        "byte_spaces",
        "a space that three byte tokens spell counts three bytes",
        "test_loader.py -k spaces_in_byte_tokens",
        script("self.bytes[$spaces[:, None] + np.arange(3)] = 0", "pass"),
    ),
    Fault(
        "numeric",
        "shard 10 comes before shard 2",
        "test_loader.py -k order_of_their_numbers",
        script("int($part) if $i % 2 else $part", "$part"),
    ),
    Fault(
        "laps",
        "a batch longer than the shards ends elsewhere than plain reading does",
        "test_loader.py -k after_laps",
        script("self.read($size % self.total)", "self.read(0)"),
    ),
    Fault(
        "looked_through",
        "a shard is looked through again at each lap",
        "test_loader.py -k however_many_laps",
        script("if $shard not in self.opened:", "if True:"),
    ),
    Fault(
        "bytes_check",
        "the byte table is not compared with the decoded text",
        "test_loader.py -k wrong_table",
        script("if len(spelt) != counted:", "if False:"),
    ),
    Fault(
        "bytes_rest",
        "of a long text a share is checked alone",
        "test_loader.py -k checked_later",
        script("if $rest == ($number % $every == 0):", "if $rest or $number % $every:"),
    ),
    Fault(
        "unknown",
        "validation tokens that nobody can decode are accepted",
        "test_loader.py -k unknown_tokens_are_refused",
        script("if $count := int(($tokens == self.unknown).sum()):", "if $count := 0:"),
    ),
    Fault(
        "foreign_bos",
        "a tokenizer whose BOS is another id is accepted",
        "test_loader.py -k foreign_bos",
        script("if $bos != BOS or $pieces > MOST_PIECES:", "if $pieces > MOST_PIECES:"),
    ),
    Fault(
        "other_tokenizer",
        "shards are read with another tokenizer than they were made with",
        "test_loader.py -k shards_of_another_tokenizer",
        script('$theirs = $facts.get("tokenizer_sha256", $ours)', "$theirs = $ours"),
    ),
    Fault(
        "lossy",
        "a tokenizer that alters the text is not said to",
        "test_loader.py -k altered_text",
        script("return self.changed > 0 or self.text_bytes != self.spelt_bytes", "return False"),
    ),
    Fault(
        "lossy_divisor",
        "bits are divided by the bytes of the altered text",
        "test_report.py -k altered_text",
        script("self.measure_text() if self.sources else self.spelt_bytes", "self.spelt_bytes"),
    ),
    Fault(
        "overlap",
        "a document that goes on in the next shard is not compared",
        "test_loader.py -k shared_documents",
        script("$last += self.heads(", "$last += [] and self.heads("),
    ),
    Fault(
        "overlap_wait",
        "the first step waits until all is compared",
        "test_loader.py -k wait_for_long",
        script("wait($scans, $seconds).not_done", "wait($scans).not_done"),
    ),
    Fault(
        "copies",
        "documents of the validation text are trained on",
        "test_data.py -k copies_are_dropped",
        [
            (
                "data/prepare_text.py",
                "$train_docs = without_copies($train_docs, $val_docs)",
                "pass",
            )
        ],
    ),
]
MODEL = [
    Fault(
        "rotary",
        "heads turn the other way",
        "test_model.py -k rotation",
        script(
            "[$a * $cos + $b * $sin, $b * $cos - $a * $sin,",
            "[$a * $cos - $b * $sin, $b * $cos + $a * $sin,",
        ),
    ),
    Fault(
        "smear",
        "the smear goes on across a BOS",
        "test_model.py -k bos_reset",
        script(".masked_fill($starts.unsqueeze(-1), 0.0)", ""),
    ),
    Fault(
        "xsa",
        "a position's own value is not normalised before it is taken off",
        "test_model.py -k exclusive",
        script("F.normalize($v, dim=-1).unsqueeze(2)", "$v.unsqueeze(2)"),
    ),
    Fault(
        "detach",
        "quantisation while training lets a gradient through its rounding",
        "test_model.py -k straight_through",
        script(", 0.0).detach()", ", 0.0)"),
    ),
    Fault(
        "stream",
        "the residual stream is fp32 under autocast",
        "test_compile.py -k residual_stream",
        script("x = stream_dtype(x)", "pass"),
    ),
    Fault(
        "rows_scaled",
        "the scale of attention's output is left out",
        "test_model.py -k plain_model",
        script("outputs = outputs * model.attn_scale.unsqueeze(2)", "pass"),
    ),
    Fault(
        "future",
        "the token before is the token after",
        "test_model.py -k later_tokens",
        script(
            "torch.cat([torch.zeros_like($x[:, :1]), $x[:, :-1]]",
            "torch.cat([$x[:, 1:], torch.zeros_like($x[:, :1])]",
        ),
    ),
    Fault(
        "qat_bigram",
        "quantisation while training leaves the bigram projection out, unlike #810's",
        "test_systems.py -k rounds_its_bigram",
        script('F.linear($pairs, self.bank("bigram_proj"))', "F.linear($pairs, self.bigram_proj)"),
    ),
]
FRONTIER = [
    Fault(
        "inside",
        "training attends across documents",
        "test_frontier.py -k packed_row",
        script(
            "unseen = ~same.tril().unsqueeze(1)",
            "unseen = ~torch.ones_like(same).tril().unsqueeze(1)",
        ),
    ),
    Fault(
        "blocks",
        "FlexAttention attends across documents",
        "test_frontier.py -k flex_attention_is",
        script(
            "return (query >= key) & (document[row, query] == document[row, key])",
            "return query >= key",
        ),
    ),
    Fault(
        "loop_order",
        "each looped layer runs three times before the next",
        "test_frontier.py -k order_of_layers",
        script(
            "layers[: part[0]] + part * cfg.loop_times +",
            "layers[: part[0]] + sorted(part * cfg.loop_times) +",
        ),
    ),
    Fault(
        "loop_skips",
        "skips are paired from the outside in",
        "test_model.py -k plain_model",
        script(
            "self.add_skip(place - half, x, skips.pop())",
            "self.add_skip(place - half, x, skips.pop(0))",
        ),
    ),
    Fault(
        "loop_resume",
        "a resumed run loops no more",
        "test_frontier.py -k resume_keeps",
        script("self.set_loops_since(state.loops_since)", "pass"),
    ),
    Fault(
        "loop_warm_up",
        "the warm-up leaves the model looped",
        "test_frontier.py -k warm_up_runs",
        script("self.set_loops_since(since) with", "with"),
    ),
    Fault(
        "loop_scores",
        "validation loops from the start",
        "test_frontier.py -k copies_follow",
        script("other.set_looped(model.looped)", "pass"),
    ),
    Fault(
        "loop_share",
        "loops begin later where GPTQ has a reserve",
        "test_frontier.py -k clock_decides",
        script("max(1e-9, cap - reserve)", "max(1e-9, cap)"),
    ),
    Fault(
        "shuffle_epoch",
        "every epoch has the same order",
        "test_frontier.py -k once_an_epoch",
        script("default_rng((self.seed, epoch))", "default_rng(self.seed)"),
    ),
    Fault(
        "shuffle_ranks",
        "all ranks train on the same sequences",
        "test_frontier.py -k ranks_are_disjoint",
        script("batch[rt.rank * share :][:share]", "batch[:share]"),
    ),
    Fault(
        "shuffle_strides",
        "training's first step is compiled on the clock, for other strides than the warm-up's",
        "test_frontier.py -k ranks_are_disjoint",
        script("mine[:, :-1].contiguous()", "mine[:, :-1]"),
    ),
    Fault(
        "shuffle_state",
        "a resumed run begins its epoch again",
        "test_frontier.py -k state_is_restored",
        script("self.epoch = epoch self.done = done", "self.epoch = epoch; self.done = 0"),
    ),
    Fault(
        "min_lr",
        "rates fall to 0",
        "test_frontier.py -k share_of_the_run",
        script("max($cfg.min_lr, $left / $length)", "$left / $length"),
    ),
    Fault(
        "row_norm",
        "matrices are normed, not their rows",
        "test_frontier.py -k rows_of_momentum",
        script(
            "matrices / (matrices.norm(dim=-1, keepdim=True) + 1e-7)",
            "matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)",
        ),
    ),
    Fault(
        "parallel",
        "no MLP reads what its attention does",
        "test_model.py -k plain_model",
        script("if not 0 <= self.cfg.parallel_from <= i:", "if True:"),
    ),
    Fault(
        "skip_gates",
        "an open gate lets the skip through, not x",
        "test_frontier.py -k skip_gates_begin",
        script("torch.lerp(skip, x, torch", "torch.lerp(x, skip, torch"),
    ),
    Fault(
        "gate_inputs",
        "heads are gated by the last inputs",
        "test_model.py -k plain_model",
        script(
            "h[..., : self.attn_gate_weight.shape[-1]]",
            "h[..., -self.attn_gate_weight.shape[-1] :]",
        ),
    ),
]
OPTIMIZERS = [
    Fault(
        "warmdown",
        "the rate does not fall",
        "test_optim.py -k rate",
        script(
            "return 1.0 if $left >= $length else max($cfg.min_lr, $left / $length)", "return 1.0"
        ),
    ),
    Fault(
        "nesterov",
        "Muon's update is its plain momentum",
        "test_optim.py -k nesterov",
        script(
            "torch._foreach_add($gradients, $momenta, alpha=$momentum)",
            "[x.clone() for x in $momenta]",
        ),
    ),
    Fault(
        "muon_scale",
        "wide matrices are scaled up, not tall ones",
        "test_optim.py -k tall",
        script("max(1.0, $rows / $columns) **", "max(1.0, $columns / $rows) **"),
    ),
    Fault(
        "clip",
        "a rank clips by the norm of its own shards",
        "test_optim.py -k two_ranks_train_as_one",
        script(
            "if $shards and self.rt.world_size > 1: dist.all_reduce($square)",
            "if $shards and self.rt.world_size > 2: dist.all_reduce($square)",
        ),
    ),
    Fault(
        "nonfinite",
        "an update that is not finite is applied",
        "test_optim.py -k not_finite",
        script("$own.masked_fill_($flag, 0)", "$own"),
    ),
]
AVERAGES = [
    Fault(
        "ema",
        "the warm-up of the moving average is off by one",
        "test_averages.py -k plain_loops",
        script("(1 + $step) / (10 + $step) if", "(1 + $step) / (11 + $step) if"),
    ),
    Fault(
        "swa",
        "snapshots are taken at high rates, not at low ones",
        "test_averages.py -k plain_loops",
        [
            *script("$factor < 0.2", "$factor > 0.2"),
            *script("$factor < SWA_BELOW", "$factor > SWA_BELOW"),
        ],
    ),
]
QUANTISATION = [
    Fault(
        "clamp",
        "weights are rounded to -32 .. 31",
        "test_artifact.py -k grid",
        script(".clamp(-$largest, $largest)", ".clamp(-$largest - 1, $largest)"),
    ),
    Fault(
        "prune",
        "pruning begins with the largest steps",
        "test_artifact.py -k pruning",
        moved(
            "prune",
            'np.concatenate($steps).argsort(kind="stable")',
            '(-np.concatenate($steps)).argsort(kind="stable")',
        ),
    ),
    Fault(
        "prune_order",
        "of equal scales all queries are pruned before the first output",
        "test_artifact.py -k breaks_ties",
        script('$ones = $ones[$layers.argsort(kind="stable")]', "pass"),
    ),
    Fault(
        "sha",
        "a damaged artifact is read",
        "test_artifact.py -k every_damaged_byte",
        script("if hashlib.sha256($body).digest() !=", "if False and hashlib.sha256($body) !="),
    ),
    Fault(
        "constant_rows",
        "a row's deviation is about its mean, so that a constant row is clipped away",
        "test_gptq.py -k constant_rows",
        script(
            "$weight.square().mean(-1, keepdim=True).sqrt()",
            "$weight.std(-1, correction=0, keepdim=True)",
        ),
    ),
    Fault(
        "short_scales",
        "a scale is rounded up to what half precision does not hold",
        "test_gptq.py -k constant_rows",
        script(
            "$scale.clamp(32 * LEAST_FP16, MOST_SHORT_FP16)", "$scale.clamp_min(32 * LEAST_FP16)"
        ),
    ),
    Fault(
        "makes_up",
        "the columns behind a block do not make up for its rounding",
        "test_gptq.py -k the_best_while",
        script("$free[:, :, $end:] -= torch.cat", "$free[:, :, $end:] -= 0 * torch.cat"),
    ),
    Fault(
        "column_order",
        "integers stay in the order in which the columns were rounded",
        "test_gptq.py -k two_columns or best_while",
        script("torch.empty_like($integers).scatter_(2, $places, $integers)", "$integers"),
    ),
    Fault(
        "worse_rows",
        "GPTQ's rows are kept where rounding to nearest makes less of an error",
        "test_gptq.py -k no_row_is_worse",
        script("torch.where($worse, $nearest, $integers)", "$integers"),
    ),
    Fault(
        "other_inputs",
        "keys and values are calibrated by the output's inputs",
        "test_gptq.py -k of_what_torch_multiplies",
        script('"kv_bank": ("query", "query")', '"kv_bank": ("output", "output")'),
    ),
    Fault(
        "one_rank_s_inputs",
        "each rank calibrates by its own rows alone",
        "test_gptq.py -k two_ranks",
        script("dist.all_reduce($total) $total /=", "pass\n        $total /="),
    ),
    Fault(
        "coder_learns",
        "the range coder's counts learn nothing",
        "test_range.py -k take_their_entropy",
        script("$counts += COUNT_STEP * np.bincount", "$counts += 0 * np.bincount"),
    ),
    Fault(
        "columns",
        "columns of small and large integers are coded alike",
        "test_range.py -k of_other_sizes",
        script(
            "$sums += 256 * abs($block.astype(np.int64)).sum(0)",
            "$sums += 256 * abs($block.astype(np.int64)).sum(0) * 0",
        ),
    ),
    Fault(
        "words_left",
        "words after the last weight are passed over",
        "test_range.py -k words_of_no_weights",
        script("if not $coder.maybe_exhausted():", "if False:"),
    ),
    Fault(
        "over_target",
        "TARGET_BYTES is passed by the script's bytes",
        "test_range.py -k until_the_bytes_fit",
        script("return $target - len(pack_script(SCRIPT))", "return $target"),
    ),
    Fault(
        "many_tries",
        "clips are tried by the first guess of the slope alone",
        "test_range.py -k until_the_bytes_fit",
        script("$slope = max($fall, $least / 16)", "$slope = $least"),
    ),
    Fault(
        "lost_training",
        "weights that fit nowhere end the run behind its training",
        "test_range.py -k cannot_fit",
        script(
            "$best = $found break",
            "raise UserError('no')",
        ),
    ),
    Fault(
        "reserve",
        "training leaves GPTQ no time",
        "test_report.py -k leaves_time_for_gptq",
        script(
            "$reserve = min(cfg.gptq_reserve_seconds or $needed, cfg.max_wallclock_seconds / 2)",
            "$reserve = 0.0",
        ),
    ),
    Fault(
        "packed_damage",
        "a packed script runs whatever it unpacks to",
        "test_packed.py -k another_text",
        script('if hashlib.sha256(SCRIPT).hexdigest() != "{sha256(script)}":', "if False:"),
    ),
]
CHECKPOINT = [
    Fault(
        "adam",
        "AdamW's state is not in a checkpoint",
        "test_checkpoint.py -k next_step_needs",
        [
            *moved(
                "checkpoint",
                "[$x for $state in $adam.state.values() for $x in $state.values()]",
                "[]",
            ),
            *script("[$x for $state in $adam for $x in $state.values()]", "[]"),
        ],
    ),
    Fault(
        "only_one",
        "one checkpoint is kept, not two",
        "test_checkpoint.py -k last_two",
        [
            *moved("checkpoint", "sorted($earlier)[-2:]", "sorted($earlier)[-1:]"),
            *script("KEPT_CHECKPOINTS = 2", "KEPT_CHECKPOINTS = 1"),
        ],
    ),
    Fault(
        "torn",
        "a checkpoint that its sha256 does not fit is taken",
        "test_checkpoint.py -k passed_over",
        moved("checkpoint", '!= $entry["sha256"]', 'is $entry["sha256"]'),
    ),
]
SCORING = [
    Fault(
        "stride",
        "a window scores the targets one place before its own",
        "test_scoring.py -k every_target_once",
        script("- $stride + np.arange($stride)", "- $stride - 1 + np.arange($stride)"),
    ),
    Fault(
        "partial",
        "the last windows are left out where they fill no batch",
        "test_scoring.py -k every_target_once",
        script(
            "range(self.rt.rank * self.batch, len($ends),",
            "range(self.rt.rank * self.batch, len($ends) - self.batch + 1,",
        ),
    ),
    Fault(
        "schedule",
        "a lane that was laid out beforehand waits a step between documents",
        "test_codec.py -k schedule_is_what_lanes",
        script(
            "heapq.heapreplace($free, ($step + $size,",
            "heapq.heapreplace($free, ($step + $size + 1,",
        ),
    ),
    Fault(
        "captured",
        "what capturing a batch of the blend trained is not undone",
        "test_cuda_path.py -k late_blend",
        script("torch._foreach_copy_(self.layers, before)", "pass"),
    ),
    Fault(
        "on_the_clock",
        "test-time training compiles on the clock",
        "test_cuda_path.py -k goes_on_from",
        script("TestTimeTraining(model, rt, cfg).warm_up()", "pass"),
    ),
    Fault(
        "lanes",
        "a lane still sees the keys of the document before",
        "test_codec.py -k lanes_are_the_ordinary",
        script("$slots <= $positions.unsqueeze(1)", "$slots < $positions.unsqueeze(1) + 2**30"),
    ),
    Fault(
        "ttt_first",
        "test-time training learns a chunk before it scores it",
        "test_ttt.py -k first_chunk",
        [
            *moved(
                "ttt",
                "$parts.append($scorer.score_windows($stream, np.arange($a, $b, $stride)",
                "self.learn($stream[$a : $b + 1], 0.0);"
                " $parts.append($scorer.score_windows($stream, np.arange($a, $b, $stride)",
            ),
            *script(
                "parts.append(scorer.score_windows(stream, ends, stride))",
                "self.learn(stream[begin : end + 1], 0.0);"
                " parts.append(scorer.score_windows(stream, ends, stride))",
            ),
        ],
    ),
]
NGRAM = [
    Fault(
        "itself",
        "a target's count includes itself",
        "test_ngram.py -k of_the_shortest_streams or equal_a_dictionary",
        [
            *script("= $same - $first, $i - $first", "= $same - $first + 1, $i - $first"),
            *script("stats[t, 1] = same - first", "stats[t, 1] = same - first + 1"),
        ],
    ),
    Fault(
        "same_step",
        "lanes see the tokens of the same step",
        "test_ngram.py -k in_steps_of_a_longer_text",
        script(
            "or $times[$t] != $times[packed[$i - 1] & $mask]: same = $i",
            "or True: same = $i",
        ),
    ),
    Fault(
        "own_count",
        "the backoff takes the longest context in which the target itself was seen",
        "test_ngram.py -k backoff_by_hand or add_up_to_one",
        moved(
            "cascade",
            "$stats[..., 0] >= $cfg.ngram_min_count",
            "$stats[..., 1] >= $cfg.ngram_min_count",
        ),
    ),
    Fault(
        "learn_first",
        "the blend learns from a target before it scores it",
        "test_ngram.py -k add_up_to_one and mixture",
        [
            *script(
                "$rows, $p = $mixer.rows($stats, *$inputs), expert_p($stats, $log_prob)",
                "$rows, $p = $mixer.rows($stats, *$inputs), expert_p($stats, $log_prob);"
                " $mixer.learn(*$rows, $p)",
            ),
            *script(
                "p = expert_probabilities(mixer, stats, log_prob) mixed",
                "p = expert_probabilities(mixer, stats, log_prob); mixer.learn(*inputs, p); mixed",
            ),
        ],
    ),
]
NGRAM += [
    Fault(
        "uint16",
        "65,536 kinds of tokens after a context are 0",
        "test_ngram.py -k 65536",
        script("if $few.max(initial=0) < 2**16:", "if True:"),
    ),
    Fault(
        "said_orders",
        "the orders that are printed are those of the configuration, not those that get weight",
        "test_ngram.py -k lines_of_the_mixture or printed_orders",
        script(
            "$orders = show_orders(weighed_orders(cfg.mixer, cfg))",
            "$orders = show_orders(range(cfg.ngram_min_order, cfg.ngram_max_order + 1))",
        ),
    ),
]
NGRAM += [
    Fault(
        "recent",
        "the gate sees how the target itself went",
        "test_ngram.py -k spelt_out or target_by_target",
        script("torch.arange(1, REMEMBERED + 1, device=device)", "torch.arange(REMEMBERED)"),
    ),
    Fault(
        "last_follower",
        "what followed last is that of another context",
        "test_ngram.py -k equal_a_dictionary or in_steps",
        script("$follower = -1 if $new else", "$follower ="),
    ),
]
TABLE = [
    Fault(
        "leaf",
        "a longer context is taken for known where its end is",
        "test_ngram.py -k decoder_counts",
        script("if not same_tokens($text, $place, ~$entry, $shorter, $size):", "if False:"),
    ),
    Fault(
        "collision",
        "contexts whose hashes collide share their counts",
        "test_ngram.py -k collision",
        script("if same_tokens($text, $place, $other, 0, $size[$order]):", "if True:"),
    ),
    Fault(
        "moved_leaf",
        "a context that was seen once is lost when a shorter one is seen again",
        "test_ngram.py -k decoder_counts",
        script("if $order + 1 < len($arrays.sizes):", "if False:"),
    ),
    Fault(
        "grown",
        "a table that doubles loses entries",
        "test_ngram.py -k table_that_grows",
        script("if $word != 0:", "if $word > 0:"),
    ),
]
LEARNING = [
    Fault(
        "peeking_chunk",
        "tokens of a chunk see later ones",
        "test_learning.py -k fixed or still_holds",
        script("& ($back >= 0) & ($back < len($slots))", "& ($back < len($slots))"),
    ),
    Fault(
        "idle",
        "lanes without work teach",
        "test_learning.py -k idle",
        script("($losses * $busy.flatten()).sum()", "$losses.sum()"),
    ),
    Fault(
        "old_weights",
        "lanes go on with the weights of before a step",
        "test_learning.py -k adam",
        script("$cache.refresh(self.model)", "pass"),
    ),
    Fault(
        "old_mark",
        "a chunk begins with what was before the first one",
        "test_learning.py -k fixed",
        script("$cache.refresh(self.model) $cache.mark()", "$cache.refresh(self.model)"),
    ),
    Fault(
        "artifact_learns",
        "the model that was read from the artifact is changed",
        "test_learning.py -k what_learnt",
        script("return copy.deepcopy($model) if", "return $model if"),
    ),
    Fault(
        "one_group",
        "of several groups the last one alone teaches",
        "test_learning.py -k groups_add_up",
        script("self.total += $part", "self.total.copy_($part)"),
    ),
    Fault(
        "piece_input",
        "the scorer gives a piece the token before it",
        "test_learning.py -k what_the_codec_spends",
        script(
            "np.where($busy & ($places > 0), $stream[$inputs], BOS)",
            "np.where($busy, $stream[$inputs], BOS)",
        ),
    ),
    Fault(
        "forgotten",
        "the codec's contexts go on into the next piece",
        "test_learning.py -k score_s_price",
        script("mixture.forget($step.lanes", "len($step.lanes"),
    ),
    Fault(
        "paid_cuts",
        "the bytes that name the cuts are not in the stream",
        "test_learning.py -k side_bytes",
        script("numbers += [first - end, count]", "pass"),
    ),
]
CODEC = [
    Fault(
        "dictionary",
        "the decoder's contexts go on across a BOS",
        "test_ngram.py -k decoder_counts",
        script("if $token == BOS and self.isolated else", "if False else"),
    ),
    Fault(
        "chunk",
        "the codec's mixer learns a chunk in another order",
        "test_ngram.py -k spelt_out",
        [
            *script("zip(*self.chunk, strict=True)", "zip(*self.chunk[::-1], strict=True)"),
            *script("zip(*self.pending, strict=True)", "zip(*self.pending[::-1], strict=True)"),
        ],
    ),
    Fault(
        "integers",
        "the coder's integers do not add up",
        "test_codec.py -k integers",
        script("$p.argmax(1)] += $rest", "$p.argmax(1)] += 0"),
    ),
    Fault(
        "side_bytes",
        "the bytes that name the documents ahead are not in the score",
        "test_verify.py -k longest_first_are_paid",
        script("log_prob - $share if $share else log_prob", "log_prob"),
    ),
    Fault(
        "forged_side",
        "numbers of documents ahead may fall",
        "test_codec.py -k nobody_wrote",
        script("and all($number > 0 for $number in $numbers)", "and True"),
    ),
    Fault(
        "proof",
        "the proof does not compare what was decoded with the text",
        "test_codec.py -k proof_compares",
        script("np.array_equal(np.load($decoded), $text)", "$decoded.exists()"),
    ),
    Fault(
        "proof_claim",
        "a stream of other bytes than the score claims is a proof",
        "test_codec.py -k proof_compares",
        script("$right &= abs(len($words) - $claimed) <= $slack", "pass"),
    ),
    Fault(
        "proof_files",
        "a stream that another process replaced is a proof",
        "test_codec.py -k proof_compares",
        script('$right &= ($folder / "stream.bin").read_bytes() == $sealed', "pass"),
    ),
    Fault(
        "decoded_nats",
        "what the decoder adds up is rounded by the coder",
        "test_verify.py -k decode_adds_up",
        script(
            "$nats[:] -= np.log($p[$places]).sum(),",
            "$nats[:] -= np.log(chosen / (1 << PRECISION)).sum(),",
        ),
    ),
]
TRAINING = [
    Fault(
        "prefetched",
        "a checkpoint stands where the thread reads, not where training does",
        "test_checkpoint.py -k interrupted_training",
        script("sides, self.place = $coming.result()", "sides, _ = $coming.result()"),
    ),
    Fault(
        "veto",
        "what is not finite on another rank is applied here",
        "test_checkpoint.py -k one_rank_s_gradient",
        script(
            "average_gradients(self.small, self.rt, [$bad])",
            "average_gradients(self.small, self.rt)",
        ),
    ),
    Fault(
        "veto_said",
        "a loss that is not finite ends nothing",
        "test_checkpoint.py -k not_finite",
        script("nonfinite = $found.tolist()", "nonfinite = [*$found.tolist()[:2], 0]"),
    ),
    Fault(
        "beginning",
        "INIT_FROM's weights are read and not used",
        "test_init.py -k goes_on_better",
        script("model.load_state_dict(beginning.weights, strict=False)", "pass"),
    ),
    Fault(
        "drawn",
        "the temperature of what the model writes changes nothing",
        "test_generate.py -k as_often",
        script(") / temperature)", "))"),
    ),
    Fault(
        "silence",
        "a stage says where it stands although something else is said",
        "test_progress.py -k something_else",
        script("and now - self.said >= self.patience:", "and True:"),
    ),
    Fault(
        "incomplete",
        "an incomplete name of ours is nobody's",
        "test_progress.py -k incomplete",
        script('words = family or "_" in name', "words = family"),
    ),
    Fault(
        "late_qat",
        "late quantisation begins above its threshold",
        "test_training.py -k late_qat_starts",
        script("$factor < $cfg.late_qat_threshold", "$factor > $cfg.late_qat_threshold"),
    ),
    Fault(
        "rewind",
        "what the warm-up trains is not undone",
        "test_optim.py -k warm_up",
        script("tensor.copy_($kept[name])", "pass"),
    ),
    Fault(
        "log_loss",
        "the loss in the log is the sum over ranks",
        "test_optim.py -k logged_loss",
        script("$loss.get()])).item() / $rt.world_size", "$loss.get()])).item()"),
    ),
]
REPORT = [
    Fault(
        "bytes",
        "bits per byte are bits per token",
        "test_scoring.py -k bits_per_byte",
        script("/ math.log(2) / $bytes.sum()", "/ math.log(2) / len($bytes)"),
    ),
    Fault(
        "over_cap",
        "an artifact over the cap is passed over in silence",
        "test_report.py -k over_the_cap",
        script("caps = dict(bytes=CAP_BYTES, ", "caps = dict(bytes=2**40, "),
    ),
    Fault(
        "stage",
        "a submission carries the score of another stage",
        "test_run_folder.py -k values_are",
        [
            (
                "records/tools/run_folder.py",
                '$run.last("final_ngram_exact"), $run.last("final_artifact_bytes")',
                '$run.last("final_int6_roundtrip_exact"), $run.last("final_artifact_bytes")',
            ),
            *script(
                'final = run.last("final_ngram_exact") size',
                'final = run.last("final_int6_roundtrip_exact"); size',
            ),
        ],
    ),
]
VERIFY = [
    Fault(
        "own_tokenizer",
        "the tokenizer is the folder's",
        "test_verify.py -k longer or chooses_neither",
        tool(
            "verify",
            "values |= {name.lower(): str(path) for name, path in paths.items()}",
            "values |= {name.lower(): str(path) for name, path in paths.items()};"
            ' values["tokenizer_path"] = str(self.folder / "tokenizer.model")',
        ),
    ),
    Fault(
        "twice",
        "files are read again when they are decoded",
        "test_verify.py -k read_once",
        tool(
            "verify",
            "return (self.folder / name).read_bytes()",
            "return run_folder.locate(self.origin, name).read_bytes()",
        ),
    ),
    Fault(
        "doubled",
        "an object may name a key twice",
        "test_verify.py -k tampering and doubled",
        script("if len($found) < len($pairs): raise", "if False: raise"),
    ),
    Fault(
        "tolerance",
        "a claim may be a hundredth off the decode",
        "test_verify.py -k consistent_forgery",
        tool("verify", "SAME_SUM = 1e-6", "SAME_SUM = 1e-2"),
    ),
    Fault(
        "mass",
        "probabilities need not add up to 1",
        "test_verify.py -k unnormalised",
        tool("verify", "require(found.mass_error <= train_gpt.MASS_LIMIT,", "require(True,"),
    ),
    Fault(
        "other_settings",
        "a log may tell of other settings than those that are proved",
        "test_verify.py -k log_of_other",
        tool(
            "verify",
            'require(here == there, f"{name} is {there[:60]}',
            'require(True, f"{name} is {there[:60]}',
        ),
    ),
    Fault(
        "other_orders",
        "a submission may tell of another mixture than is decoded",
        "test_verify.py -k log_of_other",
        tool(
            "verify",
            'require(there == here, f"{name} is {there} in',
            'require(True, f"{name} is {there} in',
        ),
    ),
    Fault(
        "other_code",
        "a folder with other code is proved",
        "test_verify.py -k changed_code",
        tool("verify", "require(found == OUR_CODE,", "require(True,"),
    ),
    Fault(
        "other_text",
        "what was decoded is not compared with the text",
        "test_verify.py -k another_text",
        tool("verify", "require(not len(differ),", "require(True,"),
    ),
    Fault(
        "made_with",
        "a stream of another artifact is decoded",
        "test_verify.py -k tampering and another",
        tool(
            "verify",
            'require(there == here, f"stream.bin was made with',
            'require(True, f"stream.bin was made with',
        ),
    ),
    Fault(
        "part_proved",
        "a stretch of the text is as good as the whole",
        "test_verify.py -k stretch_is_not",
        tool(
            "verify", 'raise NotChecked(f"{reason}; no others', 'return str(f"{reason}; no others'
        ),
    ),
    Fault(
        "another_machine",
        "a stream of another machine is FAILED, not left open",
        "test_verify.py -k another_machine",
        tool("verify", 'if name not in ("threads", "code", "artifact") and', "if False and"),
    ),
    Fault(
        "own_fault",
        "errors of the verifier's machine are FAILED",
        "test_verify.py -k errors_of_this_machine",
        tool(
            "verify",
            "except (NotChecked, OSError, MemoryError, train_gpt.LackOfMemory) as why:",
            "except NotChecked as why:",
        ),
    ),
    Fault(
        "rescored",
        "what the artifact scores again is not held against the claim",
        "test_verify.py -k scored_again",
        tool("verify", "require(gap <= limit,", "require(True,"),
    ),
    Fault(
        "same_device",
        "a claim of this kind of device may be as far off as another's",
        "test_verify.py -k little_room",
        tool("verify", "SAME_DEVICE if made == device else OTHER_DEVICE", "OTHER_DEVICE"),
    ),
    Fault(
        "endless",
        "a decode may take for ever",
        "test_verify.py -k has_a_limit",
        tool("verify", "timeout=60 * self.minutes", "timeout=None"),
    ),
    Fault(
        "codec_claims",
        "the codec's figures are believed",
        "test_verify.py -k codec_line",
        tool(
            "verify",
            'require(there == here, f"{name} is {here}, submission.json says',
            'require(True, f"{name} is {here}, submission.json says',
        ),
    ),
    Fault(
        "escapes",
        "what a folder says may move the cursor",
        "test_verify.py -k moves_the_cursor",
        script("c if c.isprintable() else repr(c)[1:-1]", "c"),
    ),
    Fault(
        "npz_twice",
        "a member of an npz may stand there many times",
        "test_run_folder.py -k archives_that_claim",
        tool("run_folder", "if len({$member.filename for $member in $members}) <", "if 0 >"),
    ),
    Fault(
        "kept_verdict",
        "a verdict is kept although the folder has changed",
        "test_stats.py -k kept_results",
        tool("stats", '$same = $kept["sha256"] == marks($folder)', "$same = True"),
    ),
    Fault(
        "unproved",
        "a submission need not be proved",
        "test_submit.py -k not_proved",
        tool("submit", "if not stats.holds(run.verification):", "if False:"),
    ),
    Fault(
        "unscored",
        "a submission that is neither proved nor scored again here holds",
        "test_submit.py -k not_proved",
        tool("stats", 'and why.endswith(f"{SCORED_AGAIN})")', ""),
    ),
    Fault(
        "forged",
        "submit.py believes a verdict that lies in the folder",
        "test_submit.py -k forged_verdict",
        tool("submit", "with_verification(runs, make=True)", "with_verification(runs, make=False)"),
    ),
    Fault(
        "submit_over",
        "what is over a cap can be submitted",
        "test_submit.py -k over_the_cap",
        tool("submit", "$found = stats.over_budget($run)", "$found = []"),
    ),
]
KNOWN = [
    Fault(
        "known_thread",
        "lanes go on from the known text",
        "test_known.py -k counts_are_of",
        script("threads.max(initial=-1) + 1, np.int32)", "threads[0], np.int32)"),
    ),
    Fault(
        "known_decoder",
        "encoder and decoder do not begin with the known text",
        "test_known.py -k cost_that_is_claimed",
        script("expected or plan.targets, known=model.known)", "expected or plan.targets)"),
    ),
    Fault(
        "known_windows",
        "the mass of windows is taken without it",
        "test_known.py -k windows_go_on",
        script("counts.insert(np.full(len(part), lane), part)", "pass"),
    ),
    Fault(
        "known_end",
        "it is the shards' beginning",
        "test_known.py -k shards_end",
        script("mapped[max(0, len(mapped) - wanted) :]", "mapped[:wanted]"),
    ),
    Fault(
        "known_vocabulary",
        "tokens that the model does not have are taken",
        "test_known.py -k beyond_the_vocabulary",
        script("if count and tokens.max() >= vocab_size:", "if False:"),
    ),
    Fault(
        "known_kept",
        "what a text adds to the counts stays for the next one",
        "test_known.py -k made_once",
        script("return copy.deepcopy(self.counted[1])", "return self.counted[1]"),
    ),
    Fault(
        "known_bytes",
        "its bytes do not count for TARGET_BYTES",
        "test_known.py -k target_bytes",
        script(
            "seal(ARTIFACT_PREFIX, header, body + beside.content)",
            "seal(ARTIFACT_PREFIX, header, body)",
        ),
    ),
    Fault(
        "known_late",
        "too many known tokens are refused after training",
        "test_known.py -k before_the_first_step",
        script("known = KnownText.of(cfg, shards) overlap =", "known = NOTHING_KNOWN; overlap ="),
    ),
    Fault(
        "known_copy",
        "an artifact may hold the text that it scores",
        "test_verify.py -k that_holds_the_text",
        tool("verify", "case.shared <= MOST_SHARED,", "True,"),
    ),
    Fault(
        "known_foreign",
        "a known text that is not the verifier's is proved",
        "test_verify.py -k others_is_no_proof",
        tool("verify", "raise NotChecked(other)", "return other"),
    ),
    Fault(
        "known_embedded",
        "the embedded training text may be another one",
        "test_verify.py -k training_text_is_known",
        tool(
            "verify",
            "if embedded and tokens_sha256(case.training) != TRAIN_TOKENS_SHA256:",
            "if False:",
        ),
    ),
    Fault(
        "known_first",
        "a run folder is opened before the known text is counted",
        "test_known.py -k anything_is_touched",
        script(
            'KnownText.size(cfg, find_shards(cfg.data_path, "train"))',
            'find_shards(cfg.data_path, "train")',
        ),
    ),
]
RACE = [
    Fault(
        "race_other",
        "a race on another text breaks the record",
        "test_race.py -k another_race_breaks",
        tool("experiments", "(apart, not others)", "(apart, True)"),
    ),
    Fault(
        "race_steps",
        "the clock may end a candidate's training",
        "test_race.py -k rule_that",
        tool("experiments", "len(steps) == 1 and not capped)", "True)"),
    ),
    Fault(
        "race_kept",
        "a race replaces some of another one's runs",
        "test_race.py -k another_race_stay",
        tool("experiments", 'if read_mark(folder).get("digest", digest) != digest:', "if False:"),
    ),
    Fault(
        "race_embedded",
        "the embedded text may be edited",
        "test_race.py -k as_published",
        tool("experiments", "if tokens_sha256(read_split(folder, split)) != known:", "if False:"),
    ),
    Fault(
        "race_paired",
        "a race's test does not pair by seed",
        "test_race.py -k paired",
        tool(
            "experiments",
            'by["candidate"][seed]) for seed, row in by["record"].items()',
            'other) for row, other in zip(by["record"].values(), by["candidate"].values())',
        ),
    ),
    Fault(
        "race_time",
        "a candidate may take longer",
        "test_race.py -k rule_that",
        tool("experiments", "ratio <= MOST_TIME)", "True)"),
    ),
    Fault(
        "race_text",
        "racers may score different texts",
        "test_race.py -k rule_that",
        tool("experiments", "len(texts) == 1)", "True)"),
    ),
    Fault(
        "race_swap",
        "a racer keeps its core",
        "test_race.py -k side_by_side",
        tool("experiments", "cores[:: -1 if number % 2 else 1]", "cores"),
    ),
    Fault(
        "held_out",
        "held-out documents are trained on",
        "test_experiments.py -k held_out_is",
        tool("experiments", '(i in drawn) == (split == "val")', 'i in drawn or split == "train"'),
    ),
]
FAULTS = [
    *(KNOWN + RACE),
    *(CONFIG + RUNTIME + DATA + MODEL + FRONTIER + OPTIMIZERS + AVERAGES + QUANTISATION),
    *CHECKPOINT,
    *(SCORING + LEARNING + NGRAM + TABLE + CODEC + TRAINING + REPORT + VERIFY),
]

# -----------------------------------------------------------------------------
# Edits


def pattern(old: str) -> re.Pattern:
    """Matches the code whatever its white space, with any name for each `$name`."""
    parts, seen = [], set()
    for token in re.findall(r"\$\w+|\w+|\S", old):
        gap = r"\s*,?\s*" if token in ")]}" else r"\s*"
        parts.append(gap * bool(parts) + expression(token, seen))
    return re.compile("".join(parts))


def expression(token: str, seen: set[str]) -> str:
    """Of one token; `seen`: the `$name`s that stand for something already."""
    if token[0] != "$" or len(token) == 1:
        return rf"(?<!\w){token}(?!\w)" if token.isidentifier() else re.escape(token)
    name = token[1:]
    if name in seen:
        return rf"(?<![\w.])(?P={name})(?!\w)"
    seen.add(name)
    return rf"(?<![\w.])(?P<{name}>[^\W\d][\w.]*)(?!\w)"


def find_place(fault: Fault, tree: Path) -> tuple[Path, str]:
    """-> file, and its text with the fault; RowError unless one alternative matches, and once"""
    found = []
    for file, old, new in dict.fromkeys(fault.edits):
        text = (tree / file).read_text(encoding="utf-8") if (tree / file).exists() else ""
        found += [(file, text, match, new) for match in pattern(old).finditer(text)]
    if not found:
        raise RowError(f"row {fault.name}: its place is gone")
    if len(found) > 1:
        raise RowError(f"row {fault.name}: it has {len(found)} places")
    file, text, match, new = found[0]
    if foreign := set(re.findall(r"\$(\w+)", new)) - match.groupdict().keys():
        raise RowError(f"row {fault.name}: ${foreign.pop()} is not in what it replaces")
    new = re.sub(r"\$(\w+)", lambda name: match[name[1]], new)
    text = text[: match.start()] + new + text[match.end() :]
    try:
        ast.parse(text)
    except SyntaxError as error:
        raise RowError(f"row {fault.name}: its edit is no Python, {error}") from None
    return tree / file, text


# -----------------------------------------------------------------------------
# Runs of tests


@contextlib.contextmanager
def checked_out(rev: str) -> Iterator[Path]:
    """The working tree, or a temporary one of a commit."""
    if not rev:
        yield ROOT
        return
    with tempfile.TemporaryDirectory(prefix="planted_rev_") as folder:
        git(ROOT, "worktree", "add", "--detach", "--force", folder, rev)
        try:
            yield Path(folder)
        finally:
            git(ROOT, "worktree", "remove", "--force", folder)


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def copy_tree(source: Path, target: Path) -> None:
    """The repository's files, changed and new ones too, and the sample's data where they are."""
    names = git(source, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, names.split("\0")):
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)
    if (ROOT / SAMPLE).is_dir():
        shutil.copytree(ROOT / SAMPLE, target / SAMPLE)


class Outcome(NamedTuple):
    """Of a run of tests."""

    status: str  # "passed", "failed", "late" or "broken"
    told: str  # the first test that failed; else, but for "passed", why not


def split_tests(tests: str) -> tuple[str, str]:
    """-> file, expression of -k or nothing"""
    file, _, expression = tests.partition(" -k ")
    return file, expression


def run_tests(tree: Path, file: str, expression: str) -> Outcome:
    """Tests of a copy, in one thread, to the first that fails."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no"]
    command += ["--hypothesis-seed=0", f"--basetemp={tree.parent / 'temporary'}"]
    (path,) = (tree / "tests").rglob(file)
    command += [str(path.relative_to(tree)), "-k", expression]
    quiet = dict(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", COLUMNS="400")
    process = subprocess.Popen(
        command,
        cwd=tree,
        env={n: text for n, text in os.environ.items() if n != "PYTEST_ADDOPTS"} | quiet,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return Outcome("late", f"not done after {TIMEOUT} s")
    finally:
        end(process)
    return outcome(process.returncode, output)


def end(process: subprocess.Popen) -> None:
    """The process and what it started, wherever they are."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def outcome(status: int, output: str) -> Outcome:
    """What pytest's status and lines mean."""
    lines = output.strip().splitlines() or ["no output"]
    if status == 0:
        return Outcome("passed", "")
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+::.+?)(?: - (.*))?$", output, re.MULTILINE)
    if status != 1 or not failed:
        return Outcome("broken", lines[-1])
    test, reason = failed[1], failed[2] or ""
    if reason.startswith(BROKEN):
        return Outcome("broken", f"{test}: {reason}")
    return Outcome("failed", test)


def run_in_copy(base: Path, fault: Fault | None, tests: tuple[str, str]) -> Outcome:
    """Tests in a copy of their own, with the fault or without one"""
    with tempfile.TemporaryDirectory(prefix="planted_") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(base, tree)
        if fault:
            path, text = find_place(fault, tree)
            path.write_text(text, encoding="utf-8")
        return run_tests(tree, *tests)


def joined_tests(faults: list[Fault]) -> list[tuple[str, str]]:
    """File and expression of all that the rows name of it, each file once."""
    expressions = {}
    for fault in faults:
        file, expression = split_tests(fault.tests)
        expressions.setdefault(file, set()).add(expression)
    return [
        (file, "" if "" in found else " or ".join(f"({one})" for one in sorted(found)))
        for file, found in expressions.items()
    ]


def check_clean(base: Path, faults: list[Fault], jobs: int) -> set[str]:
    """Run what the rows name without a fault -> the files whose tests pass"""
    sets, passed = joined_tests(faults), set()
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = pool.map(lambda tests: run_in_copy(base, None, tests), sets)
        for (file, _), (status, told) in zip(sets, outcomes, strict=True):
            if status == "passed":
                passed.add(file)
            print(f"{'without a fault':<16}{file}: {status} {told}", flush=True)
    return passed


def try_fault(fault: Fault, base: Path) -> tuple[bool, str]:
    """Plant it in a copy -> was it noticed, and what to print"""
    began = time.monotonic()
    status, told = run_in_copy(base, fault, split_tests(fault.tests))
    seconds = f"{time.monotonic() - began:.0f} s"
    said = {
        "failed": f"noticed by {told}, {seconds}",
        "passed": f"NOT NOTICED by {fault.tests}: {fault.wrong}",
        "late": f"NOT NOTICED by {fault.tests}, {told}: {fault.wrong}",
        "broken": f"NOT NOTICED, the edit breaks the code or the tests are not there: {told}",
    }
    return status == "failed", f"{fault.name:<16}{said[status]}"


# -----------------------------------------------------------------------------
# The program


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="NAME,...", help="these rows")
    parser.add_argument("--rev", default="", help="a commit, in place of the working tree")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    parser.add_argument("--skip-clean", action="store_true", help="no tests without a fault")
    parser.add_argument("--check", action="store_true", help="look for the places, run nothing")
    return parser.parse_args(arguments)


def chosen(only: str | None) -> list[Fault]:
    """The rows of these names, comma between, else all."""
    rows = {fault.name: fault for fault in FAULTS}
    if len(rows) != len(FAULTS):
        raise RowError("two rows have one name")
    names = [*rows] if only is None else only.split(",")
    if unknown := [name for name in names if name not in rows]:
        raise RowError(f"no row {unknown[0]!r}; there are {', '.join(rows)}")
    return [rows[name] for name in names]


def check_places(faults: list[Fault], tree: Path) -> int:
    """Print the rows without their one place -> how many"""
    wrong = 0
    for fault in faults:
        try:
            find_place(fault, tree)
        except RowError as error:
            print(f"error: {error}")
            wrong += 1
    return wrong


def plant_all(faults: list[Fault], base: Path, options: argparse.Namespace) -> int:
    """Each in turn, where the tests pass without it -> how many were noticed"""
    if not options.skip_clean:
        clean = check_clean(base, faults, options.jobs)
        faults = [fault for fault in faults if split_tests(fault.tests)[0] in clean]
    noticed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for found, line in pool.map(lambda fault: try_fault(fault, base), faults):
            noticed += found
            print(line, flush=True)
    return noticed


def main(arguments: list[str] | None = None) -> int:
    options, began = parse_arguments(arguments), time.monotonic()
    try:
        faults = chosen(options.only)
    except RowError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="planted_base_") as folder:
        base = Path(folder) / "tree"
        with checked_out(options.rev) as source:
            copy_tree(source, base)
        if wrong := check_places(faults, base):
            print(f"{wrong} of {len(faults)} without a place")
            return 1
        if options.check:
            print(f"{len(faults)} of {len(faults)} have their place")
            return 0
        noticed = plant_all(faults, base, options)
    print(f"{noticed} of {len(faults)} noticed, {time.monotonic() - began:.0f} s")
    return int(noticed < len(faults))


if __name__ == "__main__":
    sys.exit(main())
