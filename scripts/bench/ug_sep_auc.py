"""Test AUC of separated (UG-Sep) against entangled rankers over several seeds: a table like the paper's Table 3.

For each model and ratio of user to group tokens three variants are trained on the same tokens, with the same seeds and
learning rate: entangled (no mask), separated, and separated with information compensation. A difference is taken seed
by seed. Parameters of the best validation are kept.

    python scripts/bench/ug_sep_auc.py [--models tokenmixer_large,rankmixer] [--seeds 5] [--ratios 1:1]
                                       [--compensation low_rank] [--steps 320] [--movielens FOLDER] [--runs FILE]

`--runs` keeps finished runs in a file of JSON lines and reads it when started again. Last line of stdout: JSON with
the table; `ratio` is the mean over models of separated over entangled AUC at the first of `--ratios`.
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

# 12 tokens divide by every ratio of the paper.
SIZES = {"tokenmixer_large": [], "rankmixer": ["model.tokens=12", "model.width=60"]}
VARIANTS = {"entangled": ["model.ug_sep.mixing_mask=false", "model.ug_sep.reverting_mask=false"], "separated": [],
            "compensated": ["model.ug_sep.compensation={compensation}"]}


def train(model: str, words: list[str], folder: Path) -> dict:
    """One run's figures."""
    from parallel.runtime.settings import load_settings
    from recsys.config import Run
    from recsys.train import run

    path = str(ROOT / "configs" / "recsys" / f"{model}_ug_sep.yaml")
    words = [*words, f"output.directory={folder}", "output.checkpoint_every=null", "output.save_optimizer=false",
             "output.tensorboard=false", "output.loss_curve=false", "train.keep_best=auc", "train.validate_every=80"]
    return run(load_settings(Run.for_file(path, words), path, words))


def runs(arguments: argparse.Namespace, data: list[str]):
    """Figures of every run of the table, those of `--runs` read back."""
    kept = Path(arguments.runs) if arguments.runs else None
    lines = kept.read_text().splitlines() if kept and kept.exists() else []
    done = {tuple(row[key] for key in KEYS): row for row in map(json.loads, lines)}
    log = "movielens" if arguments.movielens else "synthetic"
    with tempfile.TemporaryDirectory() as scratch:
        words = [*data, f"data.cache={scratch}/data", f"train.steps={arguments.steps}", *arguments.words]
        for model in arguments.models.split(","):
            for ratio in arguments.ratios.split(","):
                for seed in range(1, arguments.seeds + 1):
                    for variant, own in VARIANTS.items():
                        key = (log, model, ratio, variant, seed)
                        if key not in done:
                            own = [word.format(compensation=arguments.compensation) for word in own]
                            figures = train(model, [*SIZES[model], f"model.ug_sep.ratio={ratio}", *own, *words,
                                                    f"train.seed={seed}"],
                                            Path(scratch) / "-".join(map(str, key)).replace(":", "_"))
                            done[key] = {**dict(zip(KEYS, key, strict=True)), **{name: figures[name] for name in (
                                "auc", "uauc", "logloss", "best_step", "dense_parameters")}}
                            if kept:
                                with kept.open("a") as file:
                                    file.write(json.dumps(done[key]) + "\n")
                            print(done[key], file=sys.stderr, flush=True)
                        yield done[key]


KEYS = ("data", "model", "ratio", "variant", "seed")


def tabulate(found: list[dict]) -> list[dict]:
    """A row for each model, ratio and variant: mean AUC, and the mean difference to entangled with its standard error,
    in points of 1 % of AUC."""
    table = []
    for place in sorted({tuple(row[key] for key in KEYS[:4]) for row in found}):
        own = {row["seed"]: row for row in found if tuple(row[key] for key in KEYS[:4]) == place}
        base = {row["seed"]: row["auc"] for row in found
                if tuple(row[key] for key in KEYS[:4]) == (*place[:3], "entangled")}
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
    parser.add_argument("--ratios", default="1:1", help="user tokens : group tokens, of 12; several with commas")
    parser.add_argument("--compensation", default="low_rank", help="form of the third variant")
    parser.add_argument("--steps", type=int, default=320, help="steps of a run")
    parser.add_argument("--movielens", metavar="FOLDER", help="folder of ml-100k.inter, .user, .item")
    parser.add_argument("--runs", metavar="FILE", help="file of finished runs")
    parser.add_argument("words", nargs="*", help="overrides for every run, key.sub=value")
    arguments = parser.parse_args()
    data = ["data.reader=movielens", f"data.path={arguments.movielens}"] if arguments.movielens else []
    table = tabulate(list(runs(arguments, data)))
    for row in table:
        print(f"{row['data']} {row['model']} {row['ratio']} {row['variant']}: AUC {row['auc']:.4f} +- "
              f"{row['std']:.4f}, {row['delta_percent']:+.3f} +- {row['delta_error']:.3f} % over {row['seeds']} seeds",
              file=sys.stderr)
    first = [row for row in table if row["ratio"] == arguments.ratios.split(",")[0]]
    mean = {name: statistics.mean(row["auc"] for row in first if row["variant"] == name) for name in VARIANTS}
    print(json.dumps({"ratio": mean["separated"] / mean["entangled"], "ours": mean["separated"],
                      "peer": mean["entangled"], "unit": "AUC", "table": table}))


if __name__ == "__main__":
    main()
