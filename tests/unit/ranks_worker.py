"""What test_optim.py starts through torchrun: train a little, leave every rank's weights behind;
or score with test-time training (steps "ttt"), and leave the scores.

ranks_worker.py FOLDER_WITH_A_SHARD '{"name": [steps, {"num_layers": 3}]}'
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist
from helpers import adapted, fixed_steps, perturbed, tiny, train_gpt


def main():
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for name, (steps, changes) in json.loads(sys.argv[2]).items():
        cfg = tiny(**changes)
        runtime = train_gpt.Runtime(cfg)
        shard = folder / "stream_train_000000.bin"
        if steps == "ttt":
            stream = np.array(train_gpt.read_shard(shard, cfg.vocab_size)[:401])
            result = adapted(perturbed(cfg), runtime, cfg, stream)._asdict()
            result.pop("pe_delta")
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
