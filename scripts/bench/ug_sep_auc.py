"""Test AUC of separated (UG-Sep) against unseparated rankers over several seeds: a table like the paper's Table 3.

For each model and ratio of user to group tokens variants are trained on the same tokens, with the same seeds and
learning rate: unseparated (no mask), separated, and separated with information compensation; TokenMixer-Large also with
2 U mixing heads. A difference is taken seed by seed. Parameters of the best validation are kept.

    python scripts/bench/ug_sep_auc.py [--models tokenmixer_large,rankmixer] [--seeds 5] [--ratios 1:1] [--variants ...]
                                       [--compensation low_rank] [--steps N] [--movielens FOLDER]
                                       [--runs FILE] [--minutes N] [key.sub=value ...]

On the generated log a run sees 820,000 samples once, with a falling learning rate, and is tested on 150,000 others:
with a fifth of them models are still learning what the log is made of, the separated one more slowly (see
docs/ug_sep.md), and on 12,000 test rows differences of 0.1 % cannot be separated from chance.

`--runs` keeps finished runs in a file of JSON lines and reads it when started again; `--minutes` stops beginning new
ones, so that a table can be made in parts. Last line of stdout: JSON with the table; `ratio` is the mean over
models of separated (the first of `--variants` that is not unseparated) over unseparated AUC at the first of `--ratios`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# 12 tokens divide by every ratio of the paper.
SIZES = {"tokenmixer_large": [], "rankmixer": ["model.tokens=12", "model.width=60"]}
VARIANTS = {"unseparated": ["model.ug_sep.mixing_mask=false", "model.ug_sep.reverting_mask=false"], "separated": [],
            "compensated": ["model.ug_sep.compensation={compensation}"], "heads": ["model.ug_sep.user_heads=2"]}


# A log's own settings, and the steps of a run.
GENERATED = (["data.synthetic.samples=1000000", "data.split.fractions=[0.82,0.03,0.15]", "train.global_batch_size=1024",
              "train.optimizer.schedule.name=cosine", "train.validate_every=200"], 800)
MOVIELENS = (["train.validate_every=80"], 320)
RATES = {"tokenmixer_large": 4e-3, "rankmixer": 3e-3}  # of the generated log's larger batches


def train(model: str, words: list[str], folder: Path) -> dict:
    """One run's figures."""
    from parallel.common.settings import load_settings
    from recsys.settings import Run
    from recsys.train import run

    path = str(ROOT / "configs" / "recsys" / f"{model}_ug_sep.yaml")
    words = [*words, f"output.directory={folder}", "output.checkpoint_every=null", "output.save_optimizer=false",
             "output.tensorboard=false", "output.loss_curve=false", "train.keep_best=auc"]
    return run(load_settings(Run.for_file(path, words), path, words))


def runs(arguments: argparse.Namespace):
    """Figures of every run of the table, those of `--runs` read back."""
    kept, begun = Path(arguments.runs) if arguments.runs else None, time.monotonic()
    lines = kept.read_text().splitlines() if kept and kept.exists() else []
    done = {tuple({"steps": 320, **row}[key] for key in KEYS): row for row in map(json.loads, lines)}
    log = "movielens" if arguments.movielens else "synthetic"
    words, steps = MOVIELENS if arguments.movielens else GENERATED
    steps = arguments.steps or steps
    if arguments.movielens:
        words = [*words, "data.reader=movielens", f"data.path={arguments.movielens}"]
    with tempfile.TemporaryDirectory() as scratch:
        words = [*words, f"data.cache={scratch}/data", f"train.steps={steps}"]
        for seed, model, ratio, variant in itertools.product(
                range(1, arguments.seeds + 1), arguments.models.split(","), arguments.ratios.split(","),
                arguments.variants.split(",")):
            key = (log, model, ratio, variant, seed, steps)
            if (model, variant) == ("rankmixer", "heads"):  # has a head for each token
                continue
            if key not in done and time.monotonic() - begun < 60 * arguments.minutes:
                own = [word.format(**vars(arguments)) for word in VARIANTS[variant]]
                if not arguments.movielens:
                    own.append(f"train.optimizer.learning_rate={RATES[model]}")
                own += [f"model.ug_sep.ratio={ratio}", f"train.seed={seed}", *words, *arguments.words]
                figures = train(model, [*SIZES[model], *own], Path(scratch) / "-".join(map(str, key)).replace(":", "_"))
                done[key] = {**dict(zip(KEYS, key, strict=True)), **{name: figures.get(name) for name in (
                    "auc", "uauc", "logloss", "best_step", "dense_parameters", "bayes_auc")}}
                if kept:
                    with kept.open("a") as file:
                        file.write(json.dumps(done[key]) + "\n")
                print(done[key], file=sys.stderr, flush=True)
            if key in done:
                yield done[key]


KEYS = ("data", "model", "ratio", "variant", "seed", "steps")


def tabulate(found: list[dict]) -> list[dict]:
    """A row for each model, ratio and variant: mean AUC, and the mean difference to unseparated with its standard
    error, in points of 1 % of AUC, over the seeds that have both."""
    table = []
    for place in sorted({tuple(row[key] for key in KEYS[:4]) for row in found}):
        base = {row["seed"]: row["auc"] for row in found
                if tuple(row[key] for key in KEYS[:4]) == (*place[:3], "unseparated")}
        own = {row["seed"]: row for row in found
               if tuple(row[key] for key in KEYS[:4]) == place and row["seed"] in base}
        if not own:
            continue
        gaps = [100 * (own[seed]["auc"] - base[seed]) for seed in own]
        aucs = [row["auc"] for row in own.values()]
        spread = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
        table.append({**dict(zip(KEYS, place, strict=False)), "seeds": len(aucs), "auc": statistics.mean(aucs),
                      "std": statistics.stdev(aucs) if len(aucs) > 1 else 0.0, "delta_percent": statistics.mean(gaps),
                      "delta_error": spread, "relative_percent": 100 * (statistics.mean(aucs) / statistics.mean(
                          base[seed] for seed in own) - 1),
                      "dense_parameters": next(iter(own.values()))["dense_parameters"]})
    return table


def main() -> None:
    """Parses the flags, trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="tokenmixer_large,rankmixer", help="models, with commas")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each variant")
    parser.add_argument("--ratios", default="1:1", help="user tokens : candidate tokens, of 12; several with commas")
    parser.add_argument("--compensation", default="low_rank", help="form of the third variant")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="which of them, with commas")
    parser.add_argument("--steps", type=int, help="steps of a run (default 800, MovieLens 320)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after this many")
    parser.add_argument("--movielens", metavar="FOLDER", help="folder of ml-100k.inter, .user, .item")
    parser.add_argument("--runs", metavar="FILE", help="file of finished runs")
    parser.add_argument("words", nargs="*", help="overrides for every run, key.sub=value")
    arguments = parser.parse_args()
    table = tabulate(list(runs(arguments)))
    for row in table:
        print(f"{row['data']} {row['model']} {row['ratio']} {row['variant']}: AUC {row['auc']:.4f} +- "
              f"{row['std']:.4f}, {row['delta_percent']:+.3f} +- {row['delta_error']:.3f} % over {row['seeds']} seeds",
              file=sys.stderr)
    first = [row for row in table if row["ratio"] == arguments.ratios.split(",")[0]]
    own = next((name for name in arguments.variants.split(",") if name != "unseparated"), "unseparated")
    both = [row for row in first if row["variant"] == own]
    if not both:
        raise SystemExit(f"error: there is no seed with finished runs of both, unseparated and {own}")
    ratio, ours = (statistics.mean(values) for values in zip(
        *((1 + row["relative_percent"] / 100, row["auc"]) for row in both), strict=True))
    print(json.dumps({"ratio": ratio, "ours": ours, "peer": ours / ratio, "unit": "AUC", "table": table}))


if __name__ == "__main__":
    main()
