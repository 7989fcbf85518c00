"""Published training speeds, and the planner's estimates of them: `python -m parallel.planning.published`.

The models are described with PanGu-alpha's layers (GPT-3 has the same products but for the query layer). Layouts that
the sources do not give are assumptions and marked as such. Points marked `fitted` were used to choose the defaults of
`EfficiencySettings`; the others were not looked at for that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

from parallel.common.progress import progress, table
from parallel.planning.planner import Estimate, Planner, planner_for
from parallel.sharding.config import ParallelConfig

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GRID = {
    "products": (0.6, 0.65, 0.7, 0.75, 0.8, 0.85), "memory": (0.5, 0.6, 0.7, 0.8, 0.9),
    "communication": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8), "overlap": (0.5, 0.8), "op_overlap": (0.5, 0.8),
}
"""What `fit` tries. The other constants are not fitted: no published product is small enough to determine `half_size`
(128 is the least dim that fills the matrix units), and no point determines `kernel_us` or `jitter`."""
_GPT3 = ("model.layers=96", "model.hidden_size=12288", "model.heads=96", "model.sequence_length=2048",
         "model.vocabulary_size=51200", "model.dropout=0", "parallel.vocabulary=true")
_LARGE = ("model.vocabulary_size=131072",)
_MINDFORMERS = ("model.softmax_dtype=float16", "parallel.optimizer.shard=-1", "parallel.recompute.policy=full",
                "parallel.vocabulary=false")
# Megatron-LM keeps a rank's own part of what column-parallel products read under sequence parallelism and gathers it
# again in the backward pass, as MindSpore does where the norms before them are computed again.
_GATHERED_AGAIN = ("parallel.recompute.policy=selective", "parallel.recompute.cells=[norm1,norm2]")
_FUSED_DROPOUT = ("dropout", "dropout1", "dropout2")


@dataclass(frozen=True)
class Point:
    """One published figure.

    Args:
        name: what was measured.
        config: file under configs/pangu.
        overrides: what differs from it.
        cluster: file under configs/cluster.
        mfu: the published utilisation, or the one that follows from tokens per second by the source's convention.
        tokens_per_second: of one device, where that is what was published.
        fitted: whether the constants were chosen with it.
        source: where it was published, and what we assumed.
        fused: cells that the published software runs as one kernel.
        overlapped: whether it runs products in parts with the op axis's communication.
    """

    name: str
    config: str
    overrides: tuple[str, ...]
    cluster: str
    mfu: float | None
    tokens_per_second: float | None
    fitted: bool
    source: str
    fused: tuple[str, ...] = ()
    overlapped: bool = False


def _gpt3(name: str, cluster: str, batch: int, layout: tuple[int, int, int], micro: int, chunks: int, mfu: float,
          fitted: bool, source: str, *more: str) -> Point:
    """A GPT3-175B; layout: data, op, stages; micro: sequences of a micro-batch."""
    data, op, stages = layout
    words = (f"parallel.devices={data * op * stages}", f"parallel.data={data}", f"parallel.op={op}",
             f"parallel.pipeline.stages={stages}", f"parallel.pipeline.micro_batches={batch // data // micro}",
             f"train.global_batch_size={batch}", "parallel.sequence=true", *_GATHERED_AGAIN,
             "parallel.pipeline.schedule=interleaved", f"parallel.pipeline.interleave={chunks}", *more)
    return Point(name, "2_6b.yaml", (*_GPT3, *words), cluster, mfu, None, fitted, source, ("attention.core",), True)


_CARD = "MindFormers r1.0 model card, Atlas 800; layout, batch and recomputation of the YAML file that it names"
_MINDSPEED = ("MindSpeed-LLM linearity plot; flash attention, mc2, op 8, stages 16, 3 chunks, micro-batches of 2, 1024 "
              "sequences a replica: the repository's script for 128 devices")
_GROWN = _MINDSPEED + "; that the batch grows with the devices is an assumption"
_MEGATRON = ("Megatron-LM README, strong scaling on H100 with 1,152 sequences and all overlaps on; op 8, stages 12, "
             "4 chunks and micro-batches of 1 are assumptions")

POINTS = [
    Point("PanGu-alpha 2.6B, 8 x 910", "2_6b_8.yaml",
          ("train.global_batch_size=128", "parallel.data=8", "parallel.op=1", *_MINDFORMERS), "ascend910.yaml", None,
          4075, True, _CARD, _FUSED_DROPOUT),
    Point("PanGu-alpha 13B, 16 x 910", "13b_16.yaml",
          ("train.global_batch_size=32", "parallel.data=4", "parallel.op=4", *_MINDFORMERS), "ascend910.yaml", None,
          575, True, _CARD, _FUSED_DROPOUT),
    _gpt3("GPT3-175B, 128 x 910B", "ascend910b.yaml", 1024, (1, 8, 16), 2, 3, 0.538, True, _MINDSPEED),
    _gpt3("GPT3-175B, 512 x 910B", "ascend910b.yaml", 4096, (4, 8, 16), 2, 3, 0.532, False, _GROWN),
    _gpt3("GPT3-175B, 2,048 x 910B", "ascend910b.yaml", 16384, (16, 8, 16), 2, 3, 0.515, False, _GROWN),
    _gpt3("GPT3-175B, 4,096 x 910B", "ascend910b.yaml", 32768, (32, 8, 16), 2, 3, 0.503, False, _GROWN),
    _gpt3("GPT3-175B, 7,968 x 910B", "ascend910b.yaml", 83 * 768, (83, 8, 12), 2, 4, 0.505, False,
          _GROWN + "; 7,968 = 8 x 12 x 83, so 12 stages here, 768 sequences a replica"),
    _gpt3("GPT3-175B, 96 x H100", "h100.yaml", 1152, (1, 8, 12), 1, 4, 0.47, False, _MEGATRON, *_LARGE),
    _gpt3("GPT3-175B, 1,536 x H100", "h100.yaml", 1152, (16, 8, 12), 1, 4, 0.45, False,
          _MEGATRON + "; read off the plot between the ends", *_LARGE),
    _gpt3("GPT3-175B, 4,608 x H100", "h100.yaml", 1152, (48, 8, 12), 1, 4, 0.42, True, _MEGATRON, *_LARGE),
]


def planners(points: list[Point]) -> list[tuple[Point, Planner, ParallelConfig]]:
    """Every point with its model, cluster and layout."""
    made = []
    for point in points:
        planner, settings = planner_for(_CONFIGS / "pangu" / point.config, list(point.overrides),
                                        _CONFIGS / "cluster" / point.cluster)
        planner.cluster.fused, planner.cluster.overlapped = list(point.fused), point.overlapped
        made.append((point, planner, settings.parallel.resolve()))
    return made


def estimate(planner: Planner, config: ParallelConfig, constants: dict[str, float]) -> Estimate:
    """One point with some of the constants replaced."""
    for name, value in constants.items():
        setattr(planner.cluster.efficiency, name, value)
    # Passes of many micro-batches one by one would take longer than they are worth.
    return planner.evaluate(config, exact=config.pipeline.micro_batches <= 256 and not constants)


def ratio(point: Point, found: Estimate) -> float:
    """Planner / published."""
    return found.mfu / point.mfu if point.mfu is not None else (
        found.tokens_per_second_per_device / point.tokens_per_second)


def check(points: list[Point]) -> list[dict]:
    """The planner's figure for every point beside the published one."""
    rows = []
    for point, planner, config in planners(points):
        found = estimate(planner, config, {})
        value = point.mfu if point.mfu is not None else point.tokens_per_second
        rows.append({"point": point.name, "published": value, "planner": value * ratio(point, found),
                     "ratio": ratio(point, found), "fitted": point.fitted, "source": point.source,
                     "memory_gb": found.fullest.total / 1e9, "usable_gb": found.limit / 1e9})
    return rows


def fit() -> dict[str, float]:
    """The constants of `GRID` with the least sum of squared logarithms of the ratios of the fitted points."""
    made = planners([point for point in POINTS if point.fitted])
    best: tuple[float, dict[str, float]] | None = None
    trials = list(itertools.product(*GRID.values()))
    for values in progress(trials, "fit"):
        constants = dict(zip(GRID, values, strict=True))
        loss = sum(math.log(ratio(point, estimate(planner, config, constants))) ** 2
                   for point, planner, config in made)
        if best is None or loss < best[0]:
            best = loss, constants
    return best[1]


def main() -> None:
    """Prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description="published speeds beside the planner's")
    parser.add_argument("--fit", action="store_true", help="choose the constants anew on the points marked fitted")
    if parser.parse_args().fit:
        print(json.dumps({"constants": fit()}))
        return
    rows = check(POINTS)
    table("published speeds and the planner's", ["point", "published", "planner", "ratio", "", "GB", "of", "source"],
          [[row["point"], row["published"], row["planner"], row["ratio"], "fitted" if row["fitted"] else "held out",
            row["memory_gb"], row["usable_gb"], row["source"]] for row in rows])
    print(json.dumps({"points": rows}))


if __name__ == "__main__":
    main()
