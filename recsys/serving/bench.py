"""Verb `bench`: what one request costs: unseparated, separated, separated with the user cached; float32 and int8
weights.

All variants score the same random request in turns, from encoded rows to probabilities, without HTTP. Weights are start
values: time does not depend on what was learned. The unseparated model has the same number of tokens, widths and
    layers.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.common.errors import UserError
from parallel.common.files import write_json
from parallel.common.progress import info, progress, table
from recsys.passes.sharded import is_sharded

if TYPE_CHECKING:
    from recsys.settings import Run

SWEEP_CANDIDATES = (1, 50, 200, 500, 1000)
SWEEP_RATIOS = ("1:2", "1:1", "3:1")
MODES = ("unseparated", "separated", "cached")
PRECISIONS = ("float32", "int8")
SWEEP_SECONDS = 6.0  # of rounds for one ratio and number of candidates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("--candidates", type=int, default=500, metavar="C", help="of one request (default 500)")
    parser.add_argument("--ug-ratio", default="1:1", metavar="U:G", help="user tokens : candidate tokens (default 1:1)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="requests of each variant (default 15)")
    parser.add_argument("--sweep", action="store_true",
                        help="also 1, 50, 200, 500 and 1000 candidates and ratios 1:2, 1:1 and 3:1, with a picture")
    parser.add_argument("--output", metavar="DIR", help="folder for bench.json, and bench.png with --sweep")
    parser.add_argument("--group", type=int, choices=[128], help="a scale for each 128 inputs of an output")
    parser.add_argument("--skip-matmul", action="store_true", help="leave the matrix product alone out")


def run(settings: Run, arguments: argparse.Namespace) -> dict:
    """Measures; the JSON has the figures of --candidates and --ug-ratio.

    Raises:
        UserError: a model without separation, or tokens that do not divide by a ratio.
    """
    from parallel.training.device import start_device
    from recsys.ug_sep.sides import pair

    if is_sharded():
        return _run_sharded(settings, arguments)
    start_device()
    if not settings.model.separable:
        raise UserError("this model has no separation to measure", where="model.name", value=settings.model.name,
                        hint="take rankmixer or tokenmixer_large")
    if arguments.candidates < 1 or arguments.rounds < 1:
        raise UserError("must be above 0", where="--candidates, --rounds")
    ratio = "{}:{}".format(*pair(arguments.ug_ratio, "--ug-ratio"))
    ratios = list(dict.fromkeys([ratio, *(SWEEP_RATIOS if arguments.sweep else ())]))
    sizes = sorted({arguments.candidates, *(SWEEP_CANDIDATES if arguments.sweep else ())})
    info(f"threads {len(os.sched_getaffinity(0))}, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', '-')}, "
         + ", ".join(f"{name} {os.environ.get(name, '-')}" for name in MALLOC))
    rows = measure(settings, ratios, sizes, arguments.rounds, arguments.group,
                   SWEEP_SECONDS if arguments.sweep else math.inf)
    table("Latency of one request, ms", ["U:G", "candidates", "weights", "mode", "p50", "p95", "p99", "candidates/s"],
          [[row["ratio"], row["candidates"], row["weights"], row["mode"],
            *(f"{row[name]:.2f}" for name in ("p50_ms", "p95_ms", "p99_ms")), f"{row['candidates_per_s']:.0f}"]
           for row in rows])
    figures = _figures(rows, ratio, arguments.candidates) | (
        {} if arguments.skip_matmul else {"w8a16_matmul_ratio": _matmul_ratio()})
    if arguments.output:
        write_json(Path(arguments.output) / "bench.json", {**figures, "rows": rows})
        if arguments.sweep:
            _draw(rows, Path(arguments.output) / "bench.png")
    return figures


def _run_sharded(settings: Run, arguments: argparse.Namespace) -> dict:
    """One of the processes of a launch: the model as its file says, with start values in float32, its passes over the
    shards of all of them.

    Raises:
        UserError: flags of what one process alone measures.
    """
    from recsys.passes.sharded import ShardedRanker
    from recsys.passes.tasks import kinds_of, sizes_of, whole_spec
    from recsys.serving.sharded import ShardedScorer
    from recsys.serving.state_cache import StateCache

    if arguments.sweep or arguments.group:
        raise UserError("several processes measure the file's model in float32",
                        where="--sweep" if arguments.sweep else "--group", hint="leave it out")
    ranker, engine = ShardedRanker(settings, None, "bench"), settings.serve.engine
    if not ranker.member.leads:
        return ranker.follow()
    spec, separated_ = whole_spec(settings, sizes_of(settings)), len(kinds_of(settings)) > 1
    scorer, size = ShardedScorer(ranker, spec, separated_, engine, StateCache(0)), arguments.candidates
    ids, numbers, _ = sample_rows(spec, size, separated_)
    figures: dict[str, Any] = {}
    for name, users in (("separated", 0), ("cached", 1)) if separated_ else (("unseparated", 0),):
        scorer.cache = StateCache(users)
        times = []
        for number in range(arguments.rounds + 2):
            begun = time.perf_counter()
            scorer.score([(ids, numbers)])
            if number >= 2:
                times.append(1e3 * (time.perf_counter() - begun))
        figures |= {f"{name}_{key}": float(np.percentile(times, share))
                    for key, share in (("ms", 50), ("p95_ms", 95), ("p99_ms", 99))}
    ranker.close()
    table("Latency of one request over all processes, ms", ["figure", "value"], figures.items())
    return {**figures, "candidates": size}


def sample_rows(spec: Any, size: int, of_one_user: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random rows, as those of one user's candidates where a model is separated."""
    from recsys.build import sample_batch

    ids, numbers, labels = sample_batch(spec, size, 1, 0)
    if of_one_user:
        ids[:], numbers[:] = _one_user(spec, ids, numbers)
    return ids, numbers, labels


MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def _figures(rows: list[dict], ratio: str, candidates: int) -> dict:
    def p50(mode: str, weights: str) -> float:
        return one(mode, weights)["p50_ms"]

    def one(mode: str, weights: str) -> dict:
        return next(row for row in rows if (row["ratio"], row["candidates"], row["mode"], row["weights"])
                    == (ratio, candidates, mode, weights))

    base = p50("unseparated", "float32")
    return {"unseparated_ms": base, "separated_ms": p50("separated", "float32"),
            "ratio": p50("separated", "float32") / base, "cached_ratio": p50("cached", "float32") / base,
            "int8_ratio": p50("unseparated", "int8") / base, "end_to_end_ratio": p50("separated", "int8") / base,
            "p99_ms": one("separated", "int8")["p99_ms"], "candidates": candidates, "ug_ratio": ratio,
            "dense_parameters": one("unseparated", "float32")["dense_parameters"],
            "separated_dense_parameters": one("separated", "float32")["dense_parameters"]}


def _matmul_ratio() -> float:
    from recsys.quantization.matmul_speed import geometric_mean, measure

    found = measure((1, 4))
    table("W8A16 product against MatMul", ["M", "K x O", "int8 ms", "float32 ms", "ratio"],
          [[row["rows"], f"{row['inputs']} x {row['outputs']}", f"{row['int8_ms']:.3f}", f"{row['float32_ms']:.3f}",
            f"{row['ratio']:.3f}"] for row in found])
    return geometric_mean([row["ratio"] for row in found])


# ---------------------------------------------------------------- variants


def unseparated(settings: Run, spec: Any) -> Any:
    """Settings of the model without separation and with the same number of tokens.

    Raises:
        UserError: fewer tokens than semantic groups.
    """
    from recsys.layers.embedding import group_widths
    from recsys.ug_sep.sides import allot

    model = settings.model
    change: dict[str, Any] = {"ug_sep": None}
    if model.name == "tokenmixer_large" and model.tokens is not None:
        groups = list(group_widths(spec))
        made = allot(groups, model.tokens - model.global_token, {})
        if any(len(names) > 1 for names, _ in made):
            raise UserError(f"{len(groups)} groups need at least as many tokens", where="model.tokens",
                            value=model.tokens)
        change["group_tokens"] = {names[0]: count for names, count in made}
    return settings.model_copy(update={"model": model.model_copy(update=change)})


def separated(settings: Run, ratio: str) -> Any:
    """Settings of the separated model with a ratio."""
    from recsys.ug_sep.sides import UGSepSettings

    own = settings.model.ug_sep or UGSepSettings()
    sep = UGSepSettings.model_validate({**own.model_dump(), "ratio": ratio})
    return settings.model_copy(update={"model": settings.model.model_copy(update={"ug_sep": sep})})


def _model(settings: Run, spec: Any, int8: bool, group: int | None) -> tuple[Any, int]:
    """(the model with start values in inference mode, its dense parameters)."""
    from parallel.layers.int8 import prepare
    from parallel.layers.parameter import initialize
    from recsys.build import loss_network
    from recsys.layers.sizes import count
    from recsys.quantization.layers import quantize_model

    network = loss_network(settings, spec, 1)
    dense = count(network)["dense_parameters"]
    initialize(network.model, 1)
    if int8:
        quantize_model(network.model, group)
        prepare(network.model)
    network.model.set_train(False)
    return network.model, dense


def measure(settings: Run, ratios: list[str], sizes: list[int], rounds: int, group: int | None,
            most_seconds: float = math.inf) -> list[dict]:
    """A row for each ratio, number of candidates, mode and kind of weights. Rounds of a size end early after
    `most_seconds`, but not before the fifth."""
    from recsys.build import spec_of
    from recsys.serving.engine import Scorer
    from recsys.serving.settings import EngineSettings
    from recsys.serving.state_cache import StateCache

    spec, shapes = spec_of(settings), EngineSettings(requests=1, candidates=sizes)

    def scorer(changed: Any, kind: str) -> tuple[Any, int]:
        model, dense = _model(changed, spec, kind == "int8", group)
        return Scorer(model, shapes, StateCache(0)), dense

    # Separated and cached are one scorer, hence the same graphs, with another cache.
    plain = unseparated(settings, spec)
    scorers = {("unseparated", kind): scorer(plain, kind) for kind in PRECISIONS}
    rows = []
    for ratio in ratios:
        for kind in PRECISIONS:
            scorers["separated", kind] = scorer(separated(settings, ratio), kind)
        for size in progress(sizes, f"{ratio}"):
            rows += [{"ratio": ratio, "candidates": size, **row}
                     for row in _one_size(scorers, spec, size, rounds, most_seconds)]
    return rows


def _one_size(scorers: dict, spec: Any, size: int, rounds: int, most_seconds: float) -> list[dict]:
    from recsys.serving.state_cache import StateCache

    caches = {"unseparated": StateCache(0), "separated": StateCache(0), "cached": StateCache(len(PRECISIONS))}

    def score(mode: str, kind: str) -> float:
        scorer, _ = scorers["unseparated" if mode == "unseparated" else "separated", kind]
        scorer.cache, scorer.version = caches[mode], PRECISIONS.index(kind)
        begun = time.perf_counter()
        scorer.score([(ids, numbers)])
        return 1e3 * (time.perf_counter() - begun)

    ids, numbers, _ = sample_rows(spec, size, True)
    variants = [(mode, kind) for mode in MODES for kind in PRECISIONS]
    for variant in variants * 2:
        score(*variant)
    times: dict[tuple, list[float]] = {variant: [] for variant in variants}
    begun = time.perf_counter()
    for done in range(rounds):
        if done >= 5 and time.perf_counter() - begun > most_seconds:
            break
        for variant in variants:
            times[variant].append(score(*variant))
    return [_row(*variant, size, times[variant], scorers) for variant in variants]


def _row(mode: str, kind: str, size: int, times: list[float], scorers: dict) -> dict:
    p50, p95, p99 = np.percentile(times, (50, 95, 99))
    return {"mode": mode, "weights": kind, "p50_ms": float(p50), "p95_ms": float(p95), "p99_ms": float(p99),
            "min_ms": min(times), "mean_ms": statistics.fmean(times), "candidates_per_s": 1e3 * size / float(p50),
            "rounds": len(times),
            "dense_parameters": scorers["unseparated" if mode == "unseparated" else "separated", kind][1]}


def _one_user(spec: Any, ids: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows with the first one's user columns."""
    from recsys.ug_sep.sides import UserCandidateSplit

    user = UserCandidateSplit.of(spec).user
    ids[:, list(user.ids)] = ids[:1, list(user.ids)]
    numbers[:, list(user.numbers)] = numbers[:1, list(user.numbers)]
    return ids, numbers


def _draw(rows: list[dict], path: Path) -> None:
    """Latency over candidates, a panel for each ratio."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from parallel.common.files import atomic_write

    ratios = list(dict.fromkeys(row["ratio"] for row in rows))
    figure, axes = pyplot.subplots(1, len(ratios), figsize=(5 * len(ratios), 4), sharey=True, squeeze=False)
    for panel, ratio in zip(axes[0], ratios, strict=True):
        for kind, style in zip(PRECISIONS, ("-", "--"), strict=True):
            for colour, mode in enumerate(MODES):
                own = [row for row in rows if (row["ratio"], row["weights"], row["mode"]) == (ratio, kind, mode)]
                panel.plot([row["candidates"] for row in own], [row["p50_ms"] for row in own], style, marker=".",
                           color=f"C{colour}", label=f"{mode}, {kind}")
        panel.set(title=f"U:G {ratio}", xlabel="candidates", xscale="log", yscale="log")
    axes[0][0].set_ylabel("p50 of one request, ms")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
