"""Test AUC of rankers at equal dense parameters over several seeds: a table with means and standard deviations.

    python scripts/bench/ranker_auc.py [--models dlrm_mlp,rankmixer,tokenmixer_large] [--seeds 5]
                                       [--rates 0.0005,0.001,0.002] [--movielens FOLDER] [key.sub=value ..]

On the generated log (default) the small configs of configs/recsys are trained, and the learning rate of each model is
chosen among `--rates` by the validation AUC of seed 1. On MovieLens-100k (`--movielens`; rating >= 4 is a click; sorted
by time, 80/10/10) the recipes of configs/recsys/movielens are taken as they are; they were chosen by validation AUC.
Test AUC is that of the parameters of the best validation.

The last line of stdout is JSON with every run; `ratio` is the mean AUC of the last model over that of the first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Parses the flags, trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="dlrm_mlp,rankmixer,tokenmixer_large", help="configs, weakest first")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each model")
    parser.add_argument("--rates", help="learning rates to choose from (generated log: 0.0005,0.001,0.002,0.004; "
                                        "MovieLens: that of the recipe)")
    parser.add_argument("--movielens", metavar="FOLDER", help="folder of ml-100k.inter, .user, .item")
    parser.add_argument("words", nargs="*", help="overrides for every run, key.sub=value")
    arguments = parser.parse_args()
    rates = (arguments.rates or ("" if arguments.movielens else "0.0005,0.001,0.002,0.004")).split(",")
    runs, rows = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for model in arguments.models.split(","):
            rows.append(model_row(model, rates, arguments, Path(scratch), runs))
            row = rows[-1]
            print(f"{model}: test AUC {row['auc']:.4f} +- {row['std']:.4f}, UAUC {row['uauc']:.4f}, logloss "
                  f"{row['logloss']:.4f}, validation AUC {row['validation_auc']:.4f} over {arguments.seeds} seeds, "
                  f"learning rate {row['rate'] or 'of the recipe'}, {row['dense_parameters']:,} dense parameters",
                  file=sys.stderr)
    print(json.dumps({"ratio": rows[-1]["auc"] / rows[0]["auc"], "ours": rows[-1]["auc"], "peer": rows[0]["auc"],
                      "unit": "AUC", "bayes_auc": runs[0].get("bayes_auc"), "table": rows, "runs": runs}))


def model_row(model: str, rates: list[str], arguments: argparse.Namespace, scratch: Path, runs: list) -> dict:
    """Trains one model: every rate with seed 1, then the other seeds with the best rate."""
    def one(rate: str, seed: int) -> dict:
        figures = train(model, rate, seed, arguments, scratch)
        runs.append({"model": model, "rate": rate, "seed": seed, **figures})
        return figures

    first = {rate: one(rate, 1) for rate in rates}
    rate = max(first, key=lambda rate: first[rate]["validation_auc"])
    own = [first[rate], *(one(rate, seed) for seed in range(2, arguments.seeds + 1))]
    means = {name: statistics.mean(run[name] for run in own)
             for name in ("auc", "gauc", "uauc", "logloss", "validation_auc")}
    return {"model": model, **means, "std": statistics.stdev([run["auc"] for run in own]) if len(own) > 1 else 0.0,
            "rate": rate, "dense_parameters": own[0]["dense_parameters"]}


def train(model: str, rate: str, seed: int, arguments: argparse.Namespace, scratch: Path) -> dict:
    """One run's figures."""
    from parallel.runtime.settings import load_settings
    from recsys.config import Run
    from recsys.train import run

    folder = ROOT / "configs" / "recsys" / ("movielens" if arguments.movielens else "")
    path = str(folder / f"{model}.yaml")
    words = [f"data.cache={scratch}/data", f"train.seed={seed}", f"output.directory={scratch}/{model}-{rate}-{seed}",
             "output.checkpoint_every=null", "output.save_optimizer=false", "output.tensorboard=false",
             "output.loss_curve=false", "train.keep_best=auc"]
    words += [f"train.optimizer.learning_rate={rate}"] if rate else []
    words += [f"data.path={arguments.movielens}"] if arguments.movielens else ["train.validate_every=50"]
    words += arguments.words
    return run(load_settings(Run.for_file(path, words), path, words))


if __name__ == "__main__":
    main()
