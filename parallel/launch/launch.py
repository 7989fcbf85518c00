"""Verb `launch`: a run in several processes, on one node or several, of MindSpore or torch.

Every rank writes its log to `<output.directory>/logs/rank_<r>.log`; rank 0's is shown as well. When a rank fails, the
others are ended and the exit code is that of the rank that failed. SIGTERM and SIGINT go to all ranks, which save and
stop.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError
from parallel.common.progress import info
from parallel.launch.choose import choice_of
from parallel.launch.inference import grouped, launch_inference, takes_torch
from parallel.launch.launcher import MindSporeLauncher, TorchLauncher
from parallel.launch.machines import Machines, machines_of
from parallel.launch.plan import Plan, add_node_arguments
from parallel.launch.programs import exported, rank_command
from parallel.task import load_run
from parallel.training.agreement import facts_of
from parallel.training.settings import RunSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add_node_arguments(parser)
    parser.add_argument("--run", dest="what", default="train", metavar="VERB",
                        help="what to run: a verb of the model's package (default train)")
    parser.add_argument("--resume", nargs="?", const="auto", metavar="DIR",
                        help="go on from a checkpoint; without DIR from the newest of output.directory")
    parser.add_argument("--compile-only", action="store_true",
                        help="compile the graphs of all distinct ranks, run nothing")
    parser.add_argument("--program", metavar="DIR", help="of verbs that generate: an exported program to run, where "
                        "MindSpore is missing")
    parser.epilog = "What follows -- goes to the verb: launch ... --run generate -- --prompt TEXT"


def run(settings: None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Starts this machine's processes, waits for them and returns rank 0's figures with "ranks", "failed_rank", "logs".

    A single process takes this one's place, without a launcher.

    Raises:
        UserError: flags that contradict each other, a port in use, a config file with an error.
    """
    overrides, resume = list(arguments.overrides), arguments.resume
    if resume is not None and "=" in resume:
        # `--resume key=value`: the flag's optional DIR took the first override.
        overrides, resume = [resume, *overrides], "auto"
    if resume is not None:
        overrides.append(f"output.resume={resume}")
    package, run_settings = load_run(arguments.config, overrides)
    if arguments.compile_only:
        _compile_only(arguments.config, overrides)
    verbs = package.inference_verbs
    if arguments.what in verbs and arguments.program is None:
        overrides += package.inference_overrides(run_settings, arguments.what)
        run_settings = load_run(arguments.config, overrides)[1]
    command = ["-m", package.name, arguments.what, "--config", str(arguments.config), *overrides, *arguments.passed]
    if arguments.what in verbs:
        run_settings, plan = grouped(run_settings, arguments)
        if takes_torch(run_settings, arguments.program) or (plan.ranks > 1 and not verbs[arguments.what]):
            logs = Path(run_settings.output.directory) / "logs" / arguments.what
            return launch_inference(package, run_settings, plan, arguments.what, command, logs, arguments.program)
    elif arguments.program is not None:
        raise UserError("only verbs that generate or score take a program", where="--program", value=arguments.program,
                        hint="python -m parallel.torch_runtime run DIR trains one")
    else:
        plan = Plan.of(arguments, run_settings.parallel.devices, run_settings.parallel)
    if plan.ranks == 1:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *command])
    logs = Path(run_settings.output.directory) / "logs"
    if arguments.what in package.training_verbs:
        package.check_training(run_settings, arguments.what)
    machines = machines_of(plan, facts_of(run_settings.model_dump(mode="json")))
    with contextlib.closing(machines):
        machines.meet()
        if arguments.what not in package.training_verbs:
            return MindSporeLauncher(plan, command, logs, machines).run()
        return _trained(run_settings, plan, machines, command, logs)


def _trained(settings: RunSettings, plan: Plan, machines: Machines, command: list[str], logs: Path) -> dict[str, Any]:
    choice = choice_of(settings, plan.ranks)
    info(choice.text())
    if choice.backend == "mindspore":
        return MindSporeLauncher(plan, command, logs, machines, trains=True).run()
    program, stored = exported(settings, plan.ranks, plan.node_rank)
    return TorchLauncher(plan, rank_command(program, stored, choice.device), logs, machines, trains=True).run()


def _compile_only(config: str, overrides: list[str]) -> None:
    command = ["-m", "parallel", "dryrun", "--config", str(config), "--ranks", "all-distinct", *overrides]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *command])
