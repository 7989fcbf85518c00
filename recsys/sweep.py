"""Verb `sweep`: one ranker over a grid of sizes: a table, and a picture of AUC against parameters and FLOPs."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.common.errors import UserError
from parallel.common.files import read_json, write_json
from parallel.common.progress import info, table

if TYPE_CHECKING:
    from recsys.settings import Run

MAX_RUNS = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sweep's own flags."""
    parser.add_argument("--grid", action="append", metavar="KEY=A,B,..", default=[],
                        help="values of one key, for example model.width=32,64,128; may be given several times")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each point, with seeds 1 to N")
    parser.add_argument("--output", metavar="DIR", default="runs/sweep",
                        help="folder for sweep.json, sweep.png and the runs; points that are there are not run again")


def run(settings: Run, arguments: argparse.Namespace) -> dict:
    """Trains every point of the grid and every seed."""
    points = grid(arguments.grid)
    if arguments.seeds < 1 or len(points) * arguments.seeds > MAX_RUNS:
        raise UserError(f"a sweep has 1 to {MAX_RUNS} runs", where="sweep", value=len(points) * arguments.seeds)
    out = Path(arguments.output)
    about = {"config": str(arguments.config), "overrides": sorted(arguments.overrides)}
    results = _done_before(out / "sweep.json", about)
    # Every point is checked before the first one trains.
    plans = [(point, seed, _settings(arguments, point, seed, out)) for point in points
             for seed in range(1, arguments.seeds + 1)]
    for point, seed, own in plans:
        if any(done["point"] == point and done["seed"] == seed for done in results):
            info(f"{_name(point)} seed {seed}: done before")
            continue
        results.append({"point": point, "seed": seed, **_train(own)})
        write_json(out / "sweep.json", {**about, "points": results})
    rows = summary(points, results)
    table("Sweep", list(rows[0]), [row.values() for row in rows])
    laws = scaling_laws(rows)
    if laws:
        table("logloss = factor * size ^ exponent", ["size", "exponent", "factor", "R^2"],
              [[key, *(f"{value:.4g}" for value in law.values())] for key, law in laws.items()])
    draw(rows, out / "sweep.png", settings.model.name)
    best = max(rows, key=lambda row: row["auc"])
    return {"points": len(rows), "best": best["point"], "best_auc": best["auc"], "table": rows, "scaling": laws,
            "picture": str(out / "sweep.png")}


def _done_before(path: Path, about: dict) -> list[dict]:
    """Finished points of an earlier call.

    Raises:
        UserError: they are of another file or other overrides.
    """
    if not path.is_file():
        return []
    found = read_json(path)
    if not isinstance(found, dict) or {key: found.get(key) for key in about} != about:
        raise UserError("the runs there are of another config file or other overrides", where="--output",
                        value=str(path.parent), hint="choose another folder")
    return found["points"]


def grid(words: list[str]) -> list[dict[str, str]]:
    """Every combination of the values, as overrides by key.

    Raises:
        UserError: a word is not KEY=A,B,...
    """
    axes = []
    for word in words:
        key, equals, values = word.partition("=")
        if not equals or not key or not all(_values(values)):
            raise UserError("a grid has the form key=value,value", where="--grid", value=word)
        axes.append([(key, value) for value in _values(values)])
    return [dict(combination) for combination in itertools.product(*axes)]


def _values(text: str) -> list[str]:
    """The values between commas; those inside of brackets and braces part nothing."""
    values, depth = [""], 0
    for sign in text:
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and depth == 0:
            values.append("")
        else:
            values[-1] += sign
    return values


def _name(point: dict[str, str]) -> str:
    return " ".join(f"{key.split('.')[-1]}={value}" for key, value in point.items()) or "as configured"


def _settings(arguments: argparse.Namespace, point: dict[str, str], seed: int, out: Path) -> Any:
    from parallel.common.settings import load_settings
    from recsys.build import build
    from recsys.settings import Run

    folder = out / "runs" / f"{_name(point).replace(' ', '_').replace('/', '_')}_seed{seed}"
    words = [*arguments.overrides, *(f"{key}={value}" for key, value in point.items()), f"train.seed={seed}",
             f"output.directory={folder}", "output.checkpoint_every=null", "output.save_optimizer=false",
             "output.resume=auto", "output.tensorboard=false"]
    own = load_settings(Run.for_file(arguments.config, words), arguments.config, words)
    build(own, own.parallel.resolve())
    return own


def _train(settings: Run) -> dict:
    from recsys.train import run as train

    figures = train(settings)
    from recsys.build import labels_of, loss_network, spec_of
    from recsys.layers.sizes import count

    counted = count(loss_network(settings, spec_of(settings), len(labels_of(settings))))
    return {**{key: figures[key] for key in ("auc", "gauc", "uauc", "logloss", "samples_per_second")}, **counted}


def summary(points: list[dict], results: list[dict]) -> list[dict]:
    """One row a point: mean and spread over the seeds."""
    rows = []
    for point in points:
        own = [result for result in results if result["point"] == point]
        aucs = [result["auc"] for result in own]
        mean = sum(aucs) / len(aucs)
        spread = (sum((value - mean) ** 2 for value in aucs) / max(1, len(aucs) - 1)) ** 0.5
        rows.append({"point": _name(point), "seeds": len(own), "auc": mean, "auc_std": spread,
                     "logloss": sum(result["logloss"] for result in own) / len(own),
                     "dense_parameters": own[0]["dense_parameters"], "active_parameters": own[0]["active_parameters"],
                     "flops_per_sample": own[0]["flops_per_sample"]})
    return rows


SIZES = ("dense_parameters", "flops_per_sample")


def scaling_laws(rows: list[dict]) -> dict[str, dict[str, float]]:
    """For parameters and for FLOPs the power law logloss = factor * size^exponent that fits best: a straight line
    through (log size, log loss) by least squares, with its R^2. Empty where there are fewer than three sizes.

    The papers show such lines without saying how they were fitted; that no constant is taken off the loss was chosen
    here.
    """
    laws = {}
    for key in SIZES:
        if len({row[key] for row in rows}) < 3:
            continue
        x, y = (np.log([row[name] for row in rows]) for name in (key, "logloss"))
        exponent, constant = np.polyfit(x, y, 1)
        spread = ((y - y.mean())**2).sum()
        left = ((y - constant - exponent * x)**2).sum()
        laws[key] = {"exponent": float(exponent), "factor": float(np.exp(constant)),
                     "r2": float(1.0 - left / spread) if spread > 0 else float("nan")}
    return laws


def draw(rows: list[dict], path: Path, title: str) -> None:
    """AUC against dense parameters and against FLOPs, one point a size, bars one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, planes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for plane, key in zip(planes, SIZES, strict=True):
        plane.errorbar([row[key] for row in rows], [row["auc"] for row in rows],
                       yerr=[row["auc_std"] for row in rows], fmt="o", capsize=3)
        for row in rows:
            plane.annotate(row["point"], (row[key], row["auc"]), fontsize=7, xytext=(3, 3), textcoords="offset points")
        plane.set_xscale("log")
        plane.set_xlabel(key.replace("_", " "))
    planes[0].set_ylabel("test AUC")
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
