"""Fine-tuning on TNEWS's few-shot training file, scored on its public test: against always naming one topic.

    python scripts/bench/tnews.py --data DIR --corpus FILE [--seeds 3] [--base-steps 300] [--steps 400] [--low-rank R]

DIR holds the folder `tnews` with `train_few_all.json` and `test_public.json` as published; FILE is Chinese text that
the base model is trained on first (its vocabulary sees the training headlines, too). The commands are those a user
types, on configs/pangu/tiny.yaml; every seed draws its own start, base and order. The last line of stdout is JSON:
`ratio` is the mean accuracy over the share of the test's most frequent topic.
"""

from __future__ import annotations

import argparse
import collections
import json
import lzma
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["model.vocabulary_size=6000", "train.validate_every=null", "output.tensorboard=false"]


def verb(*words: object) -> dict:
    """The JSON line of `python -m pangu ...`."""
    done = subprocess.run([sys.executable, "-m", "pangu", *map(str, words)], cwd=ROOT, check=True,
                          stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def corpus(arguments: argparse.Namespace, folder: Path) -> Path:
    """The beginning of the text, and the training headlines."""
    made = folder / "corpus.jsonl"
    opened = lzma.open if arguments.corpus.endswith(".xz") else open
    with made.open("w", encoding="utf-8") as out, opened(arguments.corpus, "rt", encoding="utf-8") as lines:
        size = 0
        for line in lines:
            out.write(line)
            size += len(line.encode())
            if size > 1e6 * arguments.megabytes:
                break
        for line in (Path(arguments.data) / "tnews" / "train_few_all.json").read_text("utf-8").splitlines():
            out.write(json.dumps({"text": json.loads(line)["sentence"]}, ensure_ascii=False) + "\n")
    return made


def main() -> None:
    """Trains, scores and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="DIR", help="folder with tnews/ as published")
    parser.add_argument("--corpus", required=True, metavar="FILE", help="Chinese text, txt or jsonl, plain or .xz")
    parser.add_argument("--megabytes", type=float, default=6.0, help="of the text that are used (default 6)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base-steps", type=int, default=300, help="training steps of the base model")
    parser.add_argument("--steps", type=int, default=400, help="steps of fine-tuning")
    parser.add_argument("--low-rank", type=int, metavar="R", help="train adapters of this rank, not all weights")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in
            (Path(arguments.data) / "tnews" / "test_public.json").read_text("utf-8").splitlines()]
    most = max(collections.Counter(row["label_desc"] for row in rows).values()) / len(rows)
    started, found = time.monotonic(), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        own = ["--config", "configs/pangu/tiny.yaml", f"data.corpus={corpus(arguments, folder)}",
               f"data.tokenizer={folder / 'v.model'}", f"data.directory={folder / 'records'}", *SIZES]
        verb("train-vocabulary", *own)
        verb("pack", *own)
        verb("make-pairs", "--task", "tnews_topic", "--data", arguments.data, "--output", folder / "pairs.jsonl")
        for seed in range(1, arguments.seeds + 1):
            base, tuned = folder / f"base{seed}", folder / f"tuned{seed}"
            verb("train", *own, f"train.steps={arguments.base_steps}", f"train.seed={seed}",
                 f"output.directory={base}", "output.checkpoint_every=null")
            ranked = [f"adapt.low_rank.rank={arguments.low_rank}"] if arguments.low_rank else []
            verb("finetune", *own, f"adapt.checkpoint={base}", f"adapt.pairs={folder / 'pairs.jsonl'}", *ranked,
                 f"train.steps={arguments.steps}", f"train.seed={seed}", f"output.directory={tuned}",
                 "train.optimizer.learning_rate=0.001", "output.checkpoint_every=null")
            result = verb("evaluate", *own, "--checkpoint", tuned, "--tasks", "tnews_topic", "--data", arguments.data,
                          "--shots", 0, "--output", folder / "scores")["results"]["tnews_topic"]
            found.append(result["metric"])
            print(f"seed {seed}: accuracy {found[-1]:.4f} of {result['instances']}", file=sys.stderr)
    mean = statistics.fmean(found)
    print(json.dumps({"ratio": round(mean / most, 3), "accuracy": round(mean, 4), "by_seed": found,
                      "peer": "the most frequent topic", "share": round(most, 4), "instances": len(rows),
                      "seconds": round(time.monotonic() - started)}))


if __name__ == "__main__":
    main()
