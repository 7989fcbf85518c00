"""`python -m parallel replay`: all ranks of a layout executed here, in lock-step, against a plain one-device run.

Every rank's training step is compiled as for a cluster (`child`), the partitioned graphs are executed by NumPy
(`executor`, `rules`), collectives by combining the ranks' tensors (`collectives`). One device is the graph of one rank,
executed the same way; both in float64, so that nothing but a mistake makes a difference. That graph is held against
`parallel.training.step.TrainStep` on MindSpore's CPU kernels in float32, which shares no code with the partitioner and
none with the rules.
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError
from parallel.proof.compile.rank_compiler import Compilers
from parallel.proof.replay.layout_grid import run_grid
from parallel.proof.replay.lockstep import Replay
from parallel.proof.replay.ranks import compile_ranks
from parallel.proof.replay.reference import OneDevice
from parallel.proof.replay.settings import check_layout, check_size, with_defaults


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("--steps", type=int, default=3, help="training steps to compare (default 3)")
    parser.add_argument("--grid", metavar="LIST",
                        help="replay many layouts and print a table: all, or names with commas between (see "
                        "docs/replay.md); overrides of the parallel block come on top of each")
    parser.add_argument("--float32", action="store_true",
                        help="execute the ranks in float32 and compare them with MindSpore's own step alone (default: "
                        "ranks and one device in float64)")
    parser.add_argument("--graph", default="step", metavar="KIND",
                        help="the training step (default), or one call of a graph by which a trained model is used: "
                        "decode, prefill, score")
    parser.add_argument("--keep", metavar="DIR", help="keep graphs, layouts and logs of all compiled ranks there")
    parser.add_argument("--every-rank", action="store_true",
                        help="compile every rank, also those whose graphs differ from others in their groups only")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1),
                        help="processes that compile at once (default: 2, or 1 on one core)")


def run(settings: None, arguments: argparse.Namespace) -> dict[str, Any]:
    """The verb.

    Raises:
        UserError: a layout that does not fit or that MindSpore refuses, or a primitive that has no rule.
    """
    if not Path(arguments.config).is_file():
        raise UserError("no such file", where="--config", value=arguments.config)
    for flag in ("steps", "processes"):
        if getattr(arguments, flag) < 1:
            raise UserError("must be at least 1", where=f"--{flag}", value=getattr(arguments, flag))
    if arguments.graph != "step":
        from parallel.proof.replay import inference

        return inference.run(arguments)
    if arguments.grid is not None and arguments.keep:
        raise UserError("keeps the ranks of one layout", where="--keep", value=arguments.keep, hint="leave --grid out")
    started = time.monotonic()
    if arguments.grid is not None:
        outcome = run_grid(arguments)
    else:
        overrides = with_defaults(arguments.config, arguments.overrides)
        check_size(arguments.config, overrides)
        with Compilers(arguments.processes) as compilers:
            compilers.start()
            check_layout(arguments.config, overrides)
            with ThreadPoolExecutor(1) as pool:
                compiling = pool.submit(compile_ranks, arguments.config, overrides, compilers, keep=arguments.keep,
                                        every_rank=arguments.every_rank)
                reference = OneDevice(arguments.config, overrides, compilers)
                world = compiling.result()
            outcome = Replay(world, reference, arguments.steps, exact=not arguments.float32).run()
    outcome["seconds"] = round(time.monotonic() - started, 2)
    return outcome
