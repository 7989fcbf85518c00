"""`python -m parallel replay --graph decode`: a call of a graph by which a trained model is used, by all ranks of a
group in lock-step, against the graph of one device; both in float64.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from parallel.common.errors import UserError
from parallel.common.progress import table
from parallel.common.start_value import start_value
from parallel.proof.compile.rank_compiler import Compilers
from parallel.proof.dryrun.inference import check_kind
from parallel.proof.export import inference_layout
from parallel.proof.replay.executor import Rank, run_step
from parallel.proof.replay.ranks import AllRanks, compile_graphs, part_of, read_ranks
from parallel.torch_runtime.program import CACHE

TOLERANCE = 1e-9
_ONE = ("parallel.op=1", "parallel.pipeline.stages=1", "parallel.pipeline.micro_batches=1",
        "parallel.pipeline.offsets=null")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compiles, executes and compares.

    Args:
        arguments: those of the verb.

    Raises:
        UserError: a kind that the model has not; a layout that does not fit it; results that differ.
    """
    from parallel.proof.replay.settings import check_size
    from parallel.task import load_run

    for flag in ("grid", "float32"):
        if getattr(arguments, flag):
            raise UserError("is for the training step", where=f"--{flag}", hint="leave it out")
    package, settings = load_run(arguments.config, list(arguments.overrides))
    check_kind(package, settings, arguments.graph)
    batch = package.inference_sample(settings, arguments.graph, settings.train.seed)
    check_size(arguments.config, list(arguments.overrides))
    began, layout = time.monotonic(), inference_layout(settings.parallel.forward().resolve())
    with Compilers(arguments.processes) as compilers:
        world, values = _compiled(arguments, [*arguments.overrides, *layout], compilers, settings.train.seed)
        one, _ = _compiled(arguments, [*arguments.overrides, *layout, *_ONE], compilers, settings.train.seed)
    ranks, results = _executed(world, values, batch)
    (alone,), wanted = _executed(one, values, batch)
    last = world.config.op * (world.config.pipeline.stages - 1)
    difference = max(_difference(results[rank], wanted[0]) for rank in range(last, last + world.config.op))
    cache = max(_difference(rank.state[name], part_of(alone.state[name], extents.get(name)))
                for rank, extents in zip(ranks, world.extents, strict=True) for name in rank.state
                if name.startswith(CACHE))
    table(f"{arguments.graph}: ranks against one device", ["what", "largest relative difference"],
          [["result", difference], ["cache", cache]])
    if max(difference, cache) > TOLERANCE:
        raise UserError(f"the ranks' results differ from one device's by {max(difference, cache):.1e}",
                        where=arguments.graph)
    return {"graph": arguments.graph, "world": world.config.world, "result": difference, "cache": cache,
            "compiled_ranks": world.compiled_ranks, "seconds": round(time.monotonic() - began, 2)}


def _compiled(arguments: argparse.Namespace, overrides: list[str], compilers: Compilers, seed: int
              ) -> tuple[AllRanks, dict[str, np.ndarray]]:
    """All ranks, and start values of everything that they hold; a cache is full of random numbers."""
    compiled, graphs = compile_graphs(arguments.config, overrides, compilers, keep=arguments.keep,
                                      every_rank=arguments.every_rank, compute_dtype="float32", graph=arguments.graph)
    values = {}
    for name, _, shape, _, start in next(iter(compiled.values())).result["tensors"]:
        start = ("normal", 1.0) if name.startswith(CACHE) else tuple(start)
        values[name] = start_value(name, tuple(shape), start, seed)
    return read_ranks(compiled, graphs), values


def _executed(world: AllRanks, values: dict[str, np.ndarray], batch: list[np.ndarray]) -> tuple[list[Rank], list]:
    ranks = world.start(values, exact=True)
    return ranks, run_step(ranks, world.inputs(batch))


def _difference(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / max(1e-30, float(np.abs(wanted).max())))
