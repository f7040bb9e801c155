"""A whole run of the script, as torchrun starts it, that leaves more behind than a run does.

main_worker.py FOLDER  # facts_rank<r>.json: sha256 of the weights that training ends with
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from helpers import train_gpt


def digest(weights):
    """Of tensors by name, to the bit."""
    values = [weights[name].detach().cpu().numpy().tobytes() for name in sorted(weights)]
    return hashlib.sha256(b"".join(values)).hexdigest()


def whole_run(facts, then=lambda rt: None):
    """What the variables ask for, without a picture. then: called while the ranks are still one
    group"""
    run_stages, train_model = train_gpt.run_stages, train_gpt.train_model

    def kept(*given):
        weights, packed = train_model(*given)
        facts["weights"] = digest(weights)
        return weights, packed

    def followed(rt, cfg):
        run_stages(rt, cfg)
        then(rt)

    train_gpt.close_run = lambda rt: None
    train_gpt.train_model, train_gpt.run_stages = kept, followed
    train_gpt.run(train_gpt.Config.from_env(os.environ))


def leave(facts, folder):
    name = f"facts_rank{os.environ.get('RANK', '0')}.json"
    Path(folder, name).write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    found = {}
    whole_run(found)
    leave(found, sys.argv[1])
    if train_gpt.dist.is_initialized():
        train_gpt.dist.destroy_process_group()
