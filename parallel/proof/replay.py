"""`python -m parallel replay`: all ranks of a layout executed here, in lock-step, against a plain one-device run.

Every rank's training step is compiled as for a cluster (`child`), the partitioned graphs are executed by NumPy
(`executor`, `rules`), collectives by combining the ranks' tensors (`collectives`). The one-device run is
`parallel.step.TrainStep` on the CPU with the same start values and the same data, which shares no code with the
partitioner.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parallel.proof.accounting import coordinates
from parallel.proof.child import Compilers
from parallel.proof.collectives import Deadlock
from parallel.proof.executor import Rank, run_step
from parallel.proof.one_device import History, OneDevice
from parallel.proof.orders import wrong_order
from parallel.proof.world import World, compile_world, part_of
from parallel.runtime.errors import UserError
from parallel.runtime.progress import note, table

LOSS_TOLERANCE = 1e-5
PARAMETER_TOLERANCE = 1e-4
STATE_TOLERANCE = 1e-3
LARGEST_WORLD = 64
_STATE_FLOOR = 1e-3
# What a user's own overrides, which come after these, may change. From a warm-up's first learning rate, 0, nothing
# would move. Adam divides by the root of the second moment: a gradient that is 0 but for rounding (an attention key's
# bias) would become a full step in a random direction, hence a larger epsilon.
_DEFAULTS = ("train.precision=fp32", "train.optimizer.schedule.warmup_steps=0", "train.optimizer.epsilon=1e-3",
             "train.clip_norm=1.0", "model.dropout=0.0", "train.loss_scale.name=none")
# The same for the tables' own optimizer, where there is one.
_SPARSE_DEFAULTS = ("train.sparse_optimizer.schedule.warmup_steps=0", "train.sparse_optimizer.epsilon=1e-3")
# Routed experts: one device computes every row, so none may be left out; of the epsilon see docs/replay.md.
_EXPERT_DEFAULTS = ("model.moe.capacity_factor={experts}", "train.optimizer.epsilon=1e-2")


@dataclass(frozen=True)
class Difference:
    """How far a rank's part of one parameter or state is from the one-device run, relative to its scale."""

    relative: float
    name: str
    rank: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("--steps", type=int, default=3, help="training steps to compare (default 3)")
    parser.add_argument("--grid", metavar="LIST",
                        help="replay many layouts and print a table: all, or names with commas between (see "
                             "docs/replay.md); overrides of the parallel block come on top of each")
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
    if arguments.grid is not None and arguments.keep:
        raise UserError("keeps the ranks of one layout", where="--keep", value=arguments.keep, mend="leave --grid out")
    started = time.monotonic()
    if arguments.grid is not None:
        from parallel.proof.grid import run_grid

        outcome = run_grid(arguments)
    else:
        overrides = with_defaults(arguments.config, arguments.overrides)
        check_world(arguments.config, overrides)
        with Compilers(arguments.processes) as compilers:
            compilers.start()
            check_layout(arguments.config, overrides)
            with ThreadPoolExecutor(1) as pool:
                compiling = pool.submit(compile_world, arguments.config, overrides, compilers, keep=arguments.keep,
                                        every_rank=arguments.every_rank)
                reference = OneDevice(arguments.config, overrides)
                world = compiling.result()
        outcome = Replay(world, reference, arguments.steps).run()
    outcome["seconds"] = round(time.monotonic() - started, 2)
    return outcome


def with_defaults(config: str, overrides: Sequence[str]) -> list[str]:
    """The user's overrides behind those that replay needs, as far as the file's settings know them.

    Raises:
        UserError: the overrides do not fit the file.
    """
    from parallel.runtime.builder import load_run

    kept: list[str] = []
    for item in _DEFAULTS:
        try:
            load_run(config, [*kept, item])
            kept.append(item)
        except UserError:  # a model without this key
            continue
    settings = load_run(config, [*kept, *overrides])[1]
    if settings.train.sparse_optimizer is not None:
        kept += _SPARSE_DEFAULTS
    moe = getattr(settings.model, "moe", None)
    if hasattr(moe, "capacity_factor"):
        kept += [item.format(experts=moe.experts) for item in _EXPERT_DEFAULTS]
    return [*kept, *overrides]


def check_world(config: str, overrides: Sequence[str]) -> None:
    """Raises a `UserError` if the settings are wrong or the layout has too many ranks for one process, or nothing that
    is cut."""
    from parallel.runtime.builder import load_run
    from parallel.sharded_step import micro_batches

    settings = load_run(config, list(overrides))[1]
    layout = settings.parallel.resolve()
    if layout.world == 1 and micro_batches(settings.train, layout) > 1:
        raise UserError("MindSpore's partitioner gathers no gradients of micro-batches in a world of one rank",
                        where="train.accumulation", value=micro_batches(settings.train, layout),
                        mend="nothing is cut there (training uses the plain step); give data, op or stages 2")
    if layout.world > LARGEST_WORLD:
        raise UserError(
            f"replay holds all ranks in one process, at most {LARGEST_WORLD}; data {layout.data} x op {layout.op} x "
            f"pipeline.stages {layout.pipeline.stages} are", where="parallel", value=layout.world,
            mend="replay a layout with the same kinds of cuts and fewer ways, 2 or 4 along each axis")


def check_layout(config: str, overrides: Sequence[str]) -> None:
    """Raises a `UserError` if the layout does not fit the network or the batch, before anything is compiled."""
    from parallel.parallelize import parallelize
    from parallel.runtime.builder import build_task
    from parallel.sharded_step import input_shapes

    task, settings, layout = build_task(config, list(overrides))
    input_shapes(task, settings.train, layout)
    parallelize(task.network, layout)


class Replay:
    """Runs both sides and compares them.

    Args:
        world: the compiled layout.
        reference: the one-device run.
        steps: how many.
        quiet: print the table of steps only where the runs differ.
    """

    def __init__(self, world: World, reference: OneDevice, steps: int, *, quiet: bool = False) -> None:
        self.world, self.reference, self.steps, self.quiet = world, reference, steps, quiet
        self.ranks: list[Rank] = []
        self.largest: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """The verb's figures; exit_code 1 unless both runs are equal."""
        world = self.world
        rows = self.reference.batch(0)[0].shape[0]
        single = self.reference.run(self.steps, world.order(rows))
        ranks, cut, problem = world.start(self.reference.start), History(), wrong_order(world.programs)
        self.ranks = ranks
        differences: list[list[Difference]] = []
        for number in range(0 if problem else self.steps):
            begin = time.monotonic()
            try:
                results = run_step(ranks, world.inputs(self.reference.batch(number)))
            except Deadlock as error:
                problem = str(error)
                break
            cut.seconds.append(time.monotonic() - begin)
            self._record(cut, results)
            differences.append(self._differences(ranks, single.values[number]))
        return self._report(single, cut, differences, problem)

    def digest(self) -> str:
        """Hash of all parameters and states of all ranks: two layouts with the same one ended equal bit for bit."""
        found = hashlib.sha256()
        for rank in self.ranks:
            for name in sorted(rank.state):
                found.update(f"{rank.number} {name}".encode() + np.ascontiguousarray(rank.state[name]).tobytes())
        return found.hexdigest()

    def _record(self, cut: History, results: list) -> None:
        config = self.world.config
        last = [result for rank, result in enumerate(results)
                if coordinates(rank, config)[0] == config.pipeline.stages - 1]
        cut.losses.append([float(result[0]) for result in last])
        cut.norms.append([float(result[1]) for result in results])

    def _differences(self, ranks: Sequence[Rank], whole: dict[str, np.ndarray]) -> list[Difference]:
        """Of every parameter and state of every rank, largest relative difference first.

        Relative to the largest element that the tensor has had so far: a moment may pass through 0, and keeps the
        rounding errors of what it was.
        """
        for name, value in whole.items():
            self.largest[name] = max(self.largest.get(name, 0.0), float(np.abs(value).max(initial=0.0)))
        trainable = {item.name for item in self.reference.task.network.trainable_params()}
        largest = max((self.largest[name] for name in whole if name.startswith("adam_m.")), default=0.0)
        floors = {"adam_m": _STATE_FLOOR * largest, "adam_v": (_STATE_FLOOR * largest) ** 2}
        found = []
        for rank, boxes in zip(ranks, self.world.boxes, strict=True):
            copies = rank.program.copies
            for name, value in rank.state.items():
                if name not in whole or value.ndim == 0 or name.partition(".")[2] in copies or name in copies:
                    continue
                floor = (self.reference.reach(name) if name in trainable
                         else floors.get(name.partition(".")[0], 1e-12))
                part = part_of(whole[name], boxes.get(name))
                finite = np.isfinite(value).all() and np.isfinite(part).all()
                far = float(np.abs(value - part).max(initial=0.0)) if finite else float("inf")
                found.append(Difference(far / max(self.largest[name], floor, 1e-30), name, rank.number))
        return sorted(found, key=lambda item: -item.relative)

    def _report(self, single: History, cut: History, differences: list[list[Difference]],
                problem: str | None) -> dict[str, Any]:
        trainable = {item.name for item in self.reference.task.network.trainable_params()}
        lines, worst = [], {"loss": 0.0, "norm": 0.0, "parameter": 0.0, "state": 0.0}
        first_wrong, forward = None, False
        for number, found in enumerate(differences):
            now = {"loss": _relative(cut.losses[number], single.losses[number][0]),
                   "norm": _relative(cut.norms[number], single.norms[number][0]),
                   "parameter": max(item.relative for item in found if item.name in trainable),
                   "state": max((item.relative for item in found if item.name not in trainable), default=0.0)}
            worst = {key: _larger(worst[key], now[key]) for key in worst}
            if first_wrong is None and not _within(now):
                first_wrong, forward = number, now["loss"] > LOSS_TOLERANCE
            lines.append([number, single.losses[number][0], cut.losses[number][0], now["loss"], single.norms[number][0],
                          now["norm"], now["parameter"], now["state"]])
        equal = problem is None and first_wrong is None
        if not (equal and self.quiet):
            table("replay against one device (differences are relative)",
                  ["step", "loss, one device", "loss, replay", "difference", "norm", "norm difference",
                   "parameter difference", "state difference"], lines)
        figures = {
            "world": self.world.config.world, "equal": equal, "max_loss_difference": worst["loss"],
            "max_parameter_difference": worst["parameter"], "max_norm_difference": worst["norm"],
            "max_state_difference": worst["state"], "steps": len(differences),
            "compiled_ranks": len(self.world.compiled_ranks),
            "step_seconds": round(min(cut.seconds), 4) if cut.seconds else None,
            "one_device_step_seconds": round(min(single.seconds), 4),
        }  # fmt: skip
        if problem is not None:
            note(problem)
            figures["deadlock"] = problem
        if first_wrong is not None:
            from parallel.proof.locate import locate

            found = locate(self.world, self.reference, first_wrong, differences[first_wrong], forward=forward)
            note(found.text)
            figures["divergence"] = found.to_dict()
        return figures | {"exit_code": 0 if equal else 1}


def _relative(values: Sequence[float], wanted: float) -> float:
    far = max(abs(value - wanted) for value in values) if all(np.isfinite(values)) else float("inf")
    return far / max(abs(wanted), 1e-30)


def _larger(one: float, other: float) -> float:
    return max(one, other) if np.isfinite(one) and np.isfinite(other) else float("inf")


def _within(now: dict[str, float]) -> bool:
    return (now["loss"] <= LOSS_TOLERANCE and now["norm"] <= PARAMETER_TOLERANCE
            and now["parameter"] <= PARAMETER_TOLERANCE and now["state"] <= STATE_TOLERANCE)
