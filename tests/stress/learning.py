"""What learning in lanes and the blend's evidence are worth: bits of the same artifacts and texts.

    python tests/stress/learning.py --before REV --artifacts A.bin [...] --texts DIR [...] [--out F]

Each artifact scores each text (a folder of data/prepare_text.py, with the artifacts' tokenizer)
by EVAL_ONLY, three times: by the script of a commit, by the working tree without and with LANE_TTT.
Prints, per text, the mean over artifacts of the bits that the network alone and the mixture take,
in percent of those before where they differ, and the seconds of the documents' stage. Other
settings can be given as variables before the command. Two runs go side by side, a thread each.
"""

import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WAYS = {"before": {}, "without learning": dict(LANE_TTT="0"), "learning": dict(LANE_TTT="1")}
STAGES = ("documents", "ngram")


def score(folder, script, artifact, text, settings):
    """stage -> bits, and the seconds of the documents' stage; by a run of its own in `folder`."""
    given = dict(EVAL_ONLY=str(artifact), DATA_PATH=str(text), SCORER="documents")
    given |= dict(TOKENIZER_PATH=str(text / "tokenizer.model"), CODEC_TOKENS="0", EVAL_SLIDING="0")
    given |= dict(EVAL_LANES="32", SAVE_SCORES="0", RUN_ID="run", OMP_NUM_THREADS="1")
    given |= dict(RECORD="tiny", SAMPLE_TOKENS="0")
    env = given | dict(os.environ) | settings
    done = subprocess.run(
        [sys.executable, script], cwd=folder, env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{artifact} on {text}: {done.stderr.strip().splitlines()[-1:]}")
    lines = map(json.loads, (folder / "runs/run/metrics.jsonl").read_text().splitlines())
    by_key = {line["key"]: line for line in lines}
    targets = by_key["val_text"]["tokens"]
    found = {
        stage: by_key[f"final_{stage}_exact"]["val_loss"] * targets / 0.6931471805599453
        for stage in STAGES
    }
    found["seconds"] = targets / by_key["final_documents_exact"]["tokens_per_s"]
    return found


def measure(job, scripts):
    way, artifact, text = job
    with tempfile.TemporaryDirectory() as folder:
        return score(Path(folder), scripts[way], artifact, text, WAYS[way])


def show(texts, artifacts, found):
    print("| text | way | network, bits | mixture, bits | seconds |\n|---|---|---|---|---|")
    for text in texts:
        for way in WAYS:
            runs = [found[way, artifact, text] for artifact in artifacts]
            first = [found["before", artifact, text] for artifact in artifacts]
            row = [text.name, way]
            for stage in STAGES:
                mean = statistics.mean(run[stage] for run in runs)
                changes = [a[stage] / b[stage] - 1 for a, b in zip(runs, first, strict=True)]
                spread = f"{100 * min(changes):+.2f} to {100 * max(changes):+.2f} %"
                row.append(f"{mean:,.0f}" + (f" ({spread})" if any(changes) else ""))
            row.append(f"{statistics.mean(run['seconds'] for run in runs):.0f}")
            print("| " + " | ".join(row) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", required=True, metavar="REV")
    parser.add_argument("--artifacts", type=Path, nargs="+", required=True)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, help="JSON file for the same figures")
    args = parser.parse_args()
    artifacts = [path.resolve() for path in args.artifacts]
    texts = [path.resolve() for path in args.texts]
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder) / "before"
        tree = ["git", "-C", ROOT, "worktree"]
        subprocess.run([*tree, "add", "-q", "--detach", old, args.before], check=True)
        try:
            scripts = dict.fromkeys(WAYS, ROOT / "train_gpt.py") | {"before": old / "train_gpt.py"}
            jobs = [(way, a, text) for text in texts for a in artifacts for way in WAYS]
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                results = pool.map(lambda job: measure(job, scripts), jobs)
                found = dict(zip(jobs, results, strict=True))
        finally:
            subprocess.run([*tree, "remove", "--force", old], check=True)
    show(texts, artifacts, found)
    if args.out:
        rows = [
            dict(way=way, artifact=a.name, text=text.name) | found[way, a, text]
            for way, a, text in jobs
        ]
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
