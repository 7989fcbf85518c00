"""Verb `run`: an exported program trained by one process for each of its ranks, without MindSpore."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError
from parallel.common.files import atomic_write
from parallel.common.settings import apply_override
from parallel.launch.choose import gpus, torch_has_cuda
from parallel.launch.launcher import TorchLauncher
from parallel.launch.machines import machines_of
from parallel.launch.plan import Plan, add_node_arguments
from parallel.launch.programs import rank_command
from parallel.torch_runtime.program import Program, shaping
from parallel.torch_runtime.rank import run_rank, stored_settings
from parallel.training.agreement import facts_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("program", metavar="DIR", help="folder that `python -m parallel export` wrote")
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto",
                        help="what it runs on (default: NVIDIA GPUs where there are any)")
    add_node_arguments(parser)


def run(settings: None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Starts this machine's ranks of the program and waits for them; rank 0's figures, as `launch` gives them.

    Raises:
        UserError: no program there, flags that contradict each other, a key that shapes the graphs.
    """
    program = Program(arguments.program)
    own = settings_of(program, arguments.overrides)
    device = arguments.device
    if device == "auto":
        device = "gpu" if gpus() and torch_has_cuda() else "cpu"
    plan = Plan.of(arguments, program.world, own.parallel)
    if plan.ranks == 1:
        return run_rank(program.folder, own, device=device)
    folder = Path(own.output.directory)
    path = folder / (f"settings-{plan.node_rank}.json" if plan.node_rank else "settings.json")
    with atomic_write(path) as file:
        json.dump(own.model_dump(mode="json"), file, ensure_ascii=False, indent=1)
    machines = machines_of(plan, facts_of(own.model_dump(mode="json")))
    command = rank_command(program.folder, path, device)
    with contextlib.closing(machines):
        machines.meet()
        return TorchLauncher(plan, command, folder / "logs", machines, trains=True).run()


def settings_of(program: Program, overrides: list[str]) -> Any:
    """The settings that the program was exported with, with some keys changed.

    Raises:
        UserError: a key that shapes the graphs.
    """
    tree = copy.deepcopy(program.settings) | {"parallel": program.parallel | {"devices": program.world}}
    for override in overrides:
        before = shaping(tree)
        apply_override(tree, override)
        if shaping(tree) != before:
            raise UserError("this key shapes the graphs of the program", where=override.partition("=")[0],
                            value=override.partition("=")[2], hint="export the program again with it")
    return stored_settings(tree, str(program.folder))
