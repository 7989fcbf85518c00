"""Test AUC of rankers at equal dense parameters over several seeds: a table with means and standard deviations.

    python scripts/bench/ranker_auc.py [--models dlrm_mlp,rankmixer,tokenmixer_large] [--seeds 5]
                                       [--rates 0.0005,0.001,0.002] [--movielens FOLDER] [--runs FILE]
                                       [key.sub=value ..]

On the generated log (default) the small configs of configs/recsys are trained, and the learning rate of each model is
chosen among `--rates` by the validation AUC of seed 1. On MovieLens-100k (`--movielens`; rating >= 4 is a click; sorted
by time, 80/10/10) the recipes of configs/recsys/movielens are taken as they are; they were chosen by validation AUC.
Test AUC is that of the parameters of the best validation. Each finished run is added to the file `--runs` and taken
from there the next time, so that a long table can be made in parts.

The last line of stdout is JSON with every run; `ratio` is the mean AUC of the last model over that of the first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

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
    parser.add_argument("--runs", metavar="FILE", type=Path, help="keep finished runs here, one JSON object a line")
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
                      "unit": "AUC", "bayes_auc": rows[0]["bayes_auc"], "table": rows, "runs": runs}))


def model_row(model: str, rates: list[str], arguments: argparse.Namespace, scratch: Path, runs: list) -> dict:
    """Trains one model: every rate with seed 1, then the other seeds with the best rate."""
    def one(rate: str, seed: int) -> dict:
        figures = finished_run(model, rate, seed, arguments, scratch)
        runs.append({"model": model, "rate": rate, "seed": seed, **figures})
        print(f"{model} seed {seed} rate {rate or 'of the recipe'}: validation AUC {figures['validation_auc']:.4f} at "
              f"step {figures['best_step']}, test AUC {figures['auc']:.4f}", file=sys.stderr, flush=True)
        return figures

    first = {rate: one(rate, 1) for rate in rates}
    rate = max(first, key=lambda rate: first[rate]["validation_auc"])
    own = [first[rate], *(one(rate, seed) for seed in range(2, arguments.seeds + 1))]
    means = {name: statistics.mean(run[name] for run in own)
             for name in ("auc", "gauc", "uauc", "logloss", "validation_auc")}
    return {"model": model, **means, "std": statistics.stdev([run["auc"] for run in own]) if len(own) > 1 else 0.0,
            "rate": rate, **{name: own[0][name] for name in ("dense_parameters", "bayes_auc")}}


def finished_run(model: str, rate: str, seed: int, arguments: argparse.Namespace, scratch: Path) -> dict:
    """Metrics of one run, from the file of runs if it is there."""
    key = {"model": model, "rate": rate, "seed": seed, "words": arguments.words,
           "log": "movielens" if arguments.movielens else "generated"}
    if arguments.runs is not None and arguments.runs.exists():
        for line in arguments.runs.read_text(encoding="utf-8").splitlines():
            kept = json.loads(line)
            if kept["key"] == key:
                return kept["figures"]
    # Each run compiles its own step: a compiled one does not see its optimizer's states set from outside.
    trained = Trained(settings_of(model, rate, arguments, scratch))
    figures = {**trained.train(seed), "dense_parameters": trained.dense_parameters, "bayes_auc": trained.bayes_auc}
    if arguments.runs is not None:
        with arguments.runs.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "figures": figures}) + "\n")
    return figures


def settings_of(model: str, rate: str, arguments: argparse.Namespace, scratch: Path):
    """The run's settings: the model's file, the rate, the words of the command line."""
    from parallel.common.settings import load_settings
    from recsys.settings import Run

    folder = ROOT / "configs" / "recsys" / ("movielens" if arguments.movielens else "")
    path = str(folder / f"{model}.yaml")
    words = [f"data.cache={scratch}/data", f"output.directory={scratch}/{model}-{rate}"]
    words += [f"train.optimizer.learning_rate={rate}"] if rate else []
    words += [f"data.path={arguments.movielens}"] if arguments.movielens else ["train.validate_every=50"]
    words += arguments.words
    return load_settings(Run.for_file(path, words), path, words)


class Trained:
    """A training step for one run.

    Args:
        settings: of the run.
    """

    def __init__(self, settings) -> None:
        import mindspore as ms

        from parallel.training.optimizers.run import run_optimizer
        from parallel.training.step import TrainStep
        from recsys.build import loss_network
        from recsys.data.log import prepare
        from recsys.evaluation.log_metrics import Evaluation
        from recsys.layers.sizes import count
        from recsys.tables.names import is_sparse
        from recsys.training.any_backend import attainable_auc

        ms.set_context(mode=ms.GRAPH_MODE)
        self.settings, self.log = settings, prepare(settings.data, settings.model.embedding_size)
        self.network = loss_network(settings, self.log.spec, len(self.log.labels))
        self.optimizer = run_optimizer(self.network.trainable_params(), settings.train, is_sparse)
        self.step = TrainStep(self.network, self.optimizer, settings.train)
        # Both parts in batches of one size: one graph.
        size = min(len(self.log.parts["validation"]), len(self.log.parts["test"]), 4096)
        self.evaluations = {part: Evaluation(self.network.model, self.log.parts[part], self.log.labels, size)
                            for part in ("validation", "test")}
        self.evaluations["test"].scores = self.evaluations["validation"].scores
        self.dense_parameters = count(self.network)["dense_parameters"]
        self.bayes_auc = attainable_auc(settings, self.log).get("bayes_auc")

    def train(self, seed: int) -> dict:
        """Metrics on the test rows of the parameters that were best on the validation rows."""
        from mindspore import Tensor

        from parallel.layers.parameter import initialize
        from recsys.data.batches import Batches

        initialize(self.network.model, seed)
        options, best = self.settings.train, {}
        batches = Batches(self.log.parts["train"], options.global_batch_size, seed, spec=self.log.spec).batches(0)
        for number, batch in zip(range(options.steps), batches, strict=False):  # batches never end
            # Samples are numbered for dropout, each seed with numbers of its own.
            rows = (np.arange(len(batch[0])) + number * len(batch[0]) + seed * 10**7).astype(np.int32)
            self.step.set_train(True)
            self.step(*map(Tensor, (*batch, rows) if self.step.numbered else batch))
            if (number + 1) % options.validate_every == 0 or number + 1 == options.steps:
                value = self.evaluations["validation"](number)["auc"]
                if value > best.get("validation_auc", 0.0):
                    best = {**self.evaluations["test"](number), "validation_auc": value, "best_step": number + 1}
        return best


if __name__ == "__main__":
    main()
