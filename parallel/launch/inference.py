"""Launch of verbs that generate and score with a model over several devices: torch runs the graphs that MindSpore's
partitioner made of the same `parallel:` block; several groups of op x stages processes share the work.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError
from parallel.common.progress import info
from parallel.launch.choose import choose, has_ascend
from parallel.launch.launcher import TorchLauncher
from parallel.launch.machines import Machines, machines_of
from parallel.launch.plan import Plan
from parallel.launch.programs import exported
from parallel.sharding.config import ParallelConfig
from parallel.task import ModelPackage
from parallel.training.agreement import facts_of
from parallel.training.settings import RunSettings

PROGRAM, DEVICE = "PARALLEL_PROGRAM", "PARALLEL_DEVICE"
"""Variables that name the program that a process runs, and on what ("cpu", "gpu")."""
_FOLDER = "inference"


def groups_of(parallel: ParallelConfig, ranks: int | None) -> ParallelConfig:
    """The block resolved for a number of processes: as many groups of op x stages as they make, whatever `data` says.

    Raises:
        UserError: they do not divide into groups.
    """
    parallel = parallel.forward()
    if ranks is None or parallel.op == -1:
        return parallel.resolve(ranks)
    size = parallel.op * parallel.pipeline.stages
    if ranks % size:
        raise UserError(f"op {parallel.op} x stages {parallel.pipeline.stages} takes groups of {size} processes",
                        where="--nproc", value=ranks, hint=f"start a multiple of {size}, or set these two to 1")
    changed = {"data": ranks // size, "devices": None}
    return parallel.model_copy(update=changed, deep=True).resolve(ranks)


def grouped(settings: RunSettings, arguments: argparse.Namespace) -> tuple[RunSettings, Plan]:
    """A run's settings with the `parallel` block of its processes (`groups_of`), and the plan of these.

    Args:
        settings: of a run of any model.
        arguments: with the flags of `add_node_arguments`.

    Raises:
        UserError: flags that contradict each other or the block.
    """
    ranks = arguments.nodes * arguments.nproc if arguments.nproc else settings.parallel.devices
    parallel = groups_of(settings.parallel, ranks)
    return settings.model_copy(update={"parallel": parallel}), Plan.of(arguments, None, parallel)


def takes_torch(settings: RunSettings, program: str | None = None) -> bool:
    """Whether torch runs a verb under a resolved layout: where op or stages shard the model, a program is given, or
    the machine is one whose training runs on torch."""
    parallel = settings.parallel.model_copy(update={"execution": "auto"})
    return program is not None or parallel.op * parallel.pipeline.stages > 1 \
        or choose(parallel, settings.train.precision).backend == "torch"


def compare_settings(wanted: dict[str, Any], held: dict[str, Any], folder: Path) -> None:
    """Raises a `UserError` naming the first key in which a run's settings shape other graphs than a program's.

    Args:
        wanted, held: `ModelPackage.shapes_inference` of either.
        folder: of the program.
    """
    for where, one, other in _leaves(wanted, held):
        if one != other:
            raise UserError(f"the program was exported with {other}", where=where, value=one,
                            hint=f"export it again, or set {where}={other} ({folder})")


def _leaves(one: Any, other: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(one, dict) and isinstance(other, dict):
        return [leaf for key in one for leaf in _leaves(one[key], other.get(key), f"{where}.{key}" if where else key)]
    return [(where, one, other)]


def launch_inference(package: ModelPackage, settings: RunSettings, plan: Plan, verb: str, command: list[str],
                     logs: Path, program: str | None = None) -> dict[str, Any]:
    """Starts this machine's processes of a verb, waits for them and returns rank 0's figures.

    Args:
        package: the model's.
        settings, plan: see `grouped`.
        verb: what is run.
        command: the verb's, for the Python interpreter.
        logs: folder of the logs.
        program: folder of an exported program; None = compiled here.

    Raises:
        UserError: a layout that does not fit the model; torch is missing.
    """
    package.check_inference(settings)
    machines = machines_of(plan, facts_of(settings.model_dump(mode="json")))
    with contextlib.closing(machines):
        machines.meet()
        return _launched(package, settings, plan, machines, verb, command, logs, program)


def _launched(package: ModelPackage, settings: RunSettings, plan: Plan, machines: Machines, verb: str,
              command: list[str], logs: Path, program: str | None) -> dict[str, Any]:
    parallel = settings.parallel
    choice = choose(parallel.model_copy(update={"backend": "auto" if has_ascend() else "torch"}),
                    settings.train.precision)
    if choice.backend != "torch":
        raise UserError("graphs of inference are compiled for Ascend, and not run there", where="parallel",
                        value=parallel.layout(), hint="python -m parallel dryrun --graph decode")
    info(f"{choice.text()}; {parallel.layout()}")
    if program is None:
        kinds = package.inference_kinds(settings, verb)
        program, _ = exported(settings, plan.ranks, plan.node_rank, folder=_FOLDER, graphs=kinds)
    environment = {PROGRAM: str(Path(program).resolve()), DEVICE: choice.device.lower()}
    return TorchLauncher(plan, command, logs, machines, environment=environment).run()
