"""Both sides of a replay, step by step: all ranks in lock-step, and the one-device run."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from parallel.common.progress import info, table
from parallel.common.start_value import NOT_KEPT
from parallel.proof.dryrun.accounting import coordinates
from parallel.proof.replay.collective_order import wrong_order
from parallel.proof.replay.collectives import Deadlock
from parallel.proof.replay.divergence import locate
from parallel.proof.replay.executor import Rank, run_step
from parallel.proof.replay.ranks import AllRanks, part_of
from parallel.proof.replay.reference import History, OneDevice
from parallel.proof.replay.tolerances import FLOAT32, FLOAT64, HALF, MICRO_BATCHES, STATE_FLOOR, STEP, Difference


class Replay:
    """Runs both sides and compares them.

    Args:
        world: the compiled layout.
        reference: the one-device run.
        steps: how many.
        quiet: print the table of steps only where the runs differ.
        exact: execute ranks and one-rank graph in float64, and hold the one-rank graph against MindSpore's own step;
            False: execute the ranks in float32 and compare them with MindSpore's own step.
    """

    def __init__(self, world: AllRanks, reference: OneDevice, steps: int, *, quiet: bool = False,
                 exact: bool = True) -> None:
        self.world, self.reference, self.steps, self.quiet = world, reference, steps, quiet
        precision = reference.settings.train.precision
        self.exact, self.bounds = exact, FLOAT64 if exact else HALF.get(precision, FLOAT32)
        if exact and world.count > 1 and reference.step.weighted:
            self.bounds = MICRO_BATCHES
        self.ranks: list[Rank] = []
        self.largest: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """The verb's figures; exit_code 1 unless both runs are equal."""
        world = self.world
        rows = self.reference.batch(0)[0].shape[0]
        order = world.order(rows)
        trained = self.reference.run(self.steps, order)
        single = self.reference.exact(self.steps, order) if self.exact else trained
        ranks, sharded = world.start(self.reference.start, self.exact), History()
        problem = wrong_order(world.programs)
        self.ranks = ranks
        differences: list[list[Difference]] = []
        for number in range(0 if problem else self.steps):
            begin = time.monotonic()
            try:
                results = run_step(ranks, world.inputs(self.reference.batch(number)))
            except Deadlock as error:
                problem = str(error)
                break
            sharded.seconds.append(time.monotonic() - begin)
            self._record(sharded, results)
            differences.append(self._differences(ranks, single.values[number]))
        figures = self._report(single, sharded, differences, problem)
        figures["one_device_step_seconds"] = round(min(trained.seconds), 4)
        return self._hold_one_rank(figures, single, trained) if self.exact else figures

    def _hold_one_rank(self, figures: dict[str, Any], single: History, trained: History) -> dict[str, Any]:
        """Adds how far the one-rank graph is from MindSpore's own step: a wrong rule is wrong on all ranks alike."""
        pairs = {"loss": (single.losses, trained.losses), "norm": (single.norms, trained.norms)}
        worst = {name: max(_relative(now, wanted[0]) for now, wanted in list(zip(*both, strict=False))[:self.steps])
                 for name, both in pairs.items()}
        held = worst["loss"] <= STEP.loss and worst["norm"] <= STEP.norm
        figures |= {f"one_rank_{name}_difference": value for name, value in worst.items()}
        if not held:
            info(f"the graph of one rank, executed by the replay's rules, differs from MindSpore's own step on the "
                 f"CPU: loss {worst['loss']:.2g}, norm {worst['norm']:.2g} relative. A rule of numpy_ops is wrong, or "
                 "the step of a sharded run is another than that of one device")
        return figures | {"equal": figures["equal"] and held, "exit_code": figures["exit_code"] if held else 1}

    def digest(self) -> str:
        """Hash of all parameters and states of all ranks: two layouts with the same one ended equal bit for bit."""
        found = hashlib.sha256()
        for rank in self.ranks:
            for name in sorted(rank.state):
                found.update(f"{rank.number} {name}".encode() + np.ascontiguousarray(rank.state[name]).tobytes())
        return found.hexdigest()

    def _record(self, sharded: History, results: list) -> None:
        config = self.world.config
        last = [result for rank, result in enumerate(results)
                if coordinates(rank, config)[0] == config.pipeline.stages - 1]
        sharded.losses.append([float(result[0]) for result in last])
        sharded.norms.append([float(result[1]) for result in results])

    def _differences(self, ranks: Sequence[Rank], full: dict[str, np.ndarray]) -> list[Difference]:
        """Of every parameter and state of every rank, largest relative difference first.

        Relative to the largest element that the tensor has had so far: a moment may pass through 0, and keeps the
        rounding errors of what it was.
        """
        for name, value in full.items():
            self.largest[name] = max(self.largest.get(name, 0.0), float(np.abs(value).max(initial=0.0)))
        trainable = {item.name for item in self.reference.task.network.trainable_params()}
        largest = max((self.largest[name] for name in full if name.startswith("adam_m.")), default=0.0)
        floors = {"adam_m": STATE_FLOOR * largest, "adam_v": (STATE_FLOOR * largest) ** 2}
        found = []
        for rank, extents in zip(ranks, self.world.extents, strict=True):
            copies = rank.program.copies
            for name, value in rank.state.items():
                if name not in full or name.startswith(NOT_KEPT) or value.ndim == 0:
                    continue
                if name.partition(".")[2] in copies or name in copies:
                    continue
                floor = (self.reference.reach(name) if name in trainable
                         else floors.get(name.partition(".")[0], 1e-12))
                part = part_of(full[name], extents.get(name))
                finite = np.isfinite(value).all() and np.isfinite(part).all()
                far = float(np.abs(value - part).max(initial=0.0)) if finite else float("inf")
                found.append(Difference(far / max(self.largest[name], floor, 1e-30), name, rank.number))
        return sorted(found, key=lambda item: -item.relative)

    def _report(self, single: History, sharded: History, differences: list[list[Difference]],
                problem: str | None) -> dict[str, Any]:
        trainable = {item.name for item in self.reference.task.network.trainable_params()}
        lines, worst = [], {"loss": 0.0, "norm": 0.0, "parameter": 0.0, "state": 0.0}
        first_wrong, forward = None, False
        for number, found in enumerate(differences):
            now = {"loss": _relative(sharded.losses[number], single.losses[number][0]),
                   "norm": _relative(sharded.norms[number], single.norms[number][0]),
                   "parameter": max(item.relative for item in found if item.name in trainable),
                   "state": max((item.relative for item in found if item.name not in trainable), default=0.0)}
            worst = {key: _larger(worst[key], now[key]) for key in worst}
            if first_wrong is None and not self.bounds.hold(now):
                first_wrong, forward = number, now["loss"] > self.bounds.loss
            lines.append([number, single.losses[number][0], sharded.losses[number][0], now["loss"],
                          single.norms[number][0],
                          now["norm"], now["parameter"], now["state"]])
        equal = problem is None and first_wrong is None
        if not (equal and self.quiet):
            table("replay against one device (differences are relative)",
                  ["step", "loss, one device", "loss, replay", "difference", "norm", "norm difference",
                   "parameter difference", "state difference"], lines)
        figures = {
            "world": self.world.config.world, "equal": equal, "precision": "float64" if self.exact else "float32",
            "max_loss_difference": worst["loss"],
            "max_parameter_difference": worst["parameter"], "max_norm_difference": worst["norm"],
            "max_state_difference": worst["state"], "steps": len(differences),
            "compiled_ranks": len(self.world.compiled_ranks),
            "step_seconds": round(min(sharded.seconds), 4) if sharded.seconds else None,
        }  # fmt: skip
        if problem is not None:
            info(problem)
            figures["deadlock"] = problem
        if first_wrong is not None:
            found = locate(self.world, self.reference, first_wrong, differences[first_wrong],
                           forward=forward, exact=self.exact)
            info(found.text)
            figures["divergence"] = found.to_dict()
        return figures | {"exit_code": 0 if equal else 1}


def _relative(values: Sequence[float], wanted: float) -> float:
    far = max(abs(value - wanted) for value in values) if all(np.isfinite(values)) else float("inf")
    return far / max(abs(wanted), 1e-30)


def _larger(one: float, other: float) -> float:
    return max(one, other) if np.isfinite(one) and np.isfinite(other) else float("inf")
