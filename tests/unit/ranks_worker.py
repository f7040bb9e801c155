"""What the fixture two_ranks starts through torchrun: train a little, leave every rank's weights
behind; or score with test-time training (steps "ttt"), and leave the scores.

ranks_worker.py FOLDER_WITH_A_SHARD_OF_STREAM
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist
from helpers import adapted, fixed_steps, gptq_payload, perturbed, random_stream, tiny, train_gpt

SIBLINGS = dict(  # 2-D Muon parameters, one matrix for two ranks, and the group without decay
    bigram_kind="linear", pre_enrich_dim=24, polyglu_enabled=True, depth_recurrence=(1, 2)
)


STREAM = random_stream(5000, 64, seed=4)


ODD = dict(num_layers=3)  # banks of 3 and 6 matrices, so that two ranks need padding


# chunks of four sequences in batches of three, so that a rank has two, one or none
TTT = dict(ttt_enabled=True, scorer="sliding", ttt_chunk_tokens=64, ttt_batch_seqs=3, ttt_lr=0.05)


CAPPED = dict(max_wallclock_seconds=1.5, iterations=10**6, warmdown_iters=10**6)


# banks of 3 and 6 matrices, and one of a single matrix, which rank 1 has no part of
GPTQ = ODD | dict(quant="gptq", clip_sigmas=12.85, embed_clip_sigmas=20.0, pre_enrich_dim=24)
GPTQ |= dict(calibration="random", calibration_rows=7)


JOBS = {  # what two ranks do: name -> (steps, changes to the configuration); steps 0: to the cap,
    # "ttt": no training but scores that learn, "gptq": none but weights that are rounded
    "odd": (3, ODD),
    "micro": (3, dict(grad_accum_steps=2, train_batch_tokens=128)),
    "local": (2, dict(clip="local", grad_clip_norm=0.05)),
    "siblings": (3, SIBLINGS),
    "ttt_sgd": ("ttt", TTT),
    "ttt_lora": ("ttt", TTT | dict(ttt_use_lora=True)),
    "gptq": ("gptq", GPTQ),
    "capped": (0, CAPPED | dict(swa_every=3, train_log_every=10**6)),
}


def main():
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for name, (steps, changes) in JOBS.items():
        cfg = tiny(**changes)
        runtime = train_gpt.Runtime(cfg)
        shard = folder / "stream_train_000000.bin"
        if steps == "ttt":
            stream = np.array(train_gpt.read_shard(shard, cfg.vocab_size)[:401])
            result = adapted(perturbed(cfg), runtime, cfg, stream)._asdict()
            result.pop("pe_delta")
        elif steps == "gptq":
            result = gptq_payload(cfg, runtime)
        else:
            result = fixed_steps(cfg, runtime, shard, steps)
        np.savez(folder / f"{name}_rank{runtime.rank}.npz", **result)
    largest = runtime.largest(runtime.rank + 1, -runtime.rank).tolist()
    (folder / f"largest_rank{runtime.rank}.json").write_text(json.dumps(largest))
    dist.destroy_process_group()
    tasks = Path("/proc/self/task").iterdir()
    names = [(task / "comm").read_text().strip() for task in tasks]
    (folder / f"threads_rank{runtime.rank}.json").write_text(json.dumps(names))


if __name__ == "__main__":
    main()
