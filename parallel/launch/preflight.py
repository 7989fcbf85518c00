"""Verb `preflight`: what would stop a run, found in a minute and before the first compile.

All machines meet (same commit, same settings), start their ranks, and each rank reports versions, clock and free disk
and makes one collective along every axis of the layout. Machine 0 reports what differs or fails, and how long each axis
takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError
from parallel.common.files import atomic_write
from parallel.common.progress import info, table
from parallel.launch.choose import choice_of, installed
from parallel.launch.launcher import Launcher, MindSporeLauncher, TorchLauncher, figures_in
from parallel.launch.machines import Machines, machines_of
from parallel.launch.plan import Plan, add_node_arguments
from parallel.task import load_run
from parallel.training.agreement import facts_of
from parallel.training.settings import RunSettings

_CLOCK_SECONDS = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add_node_arguments(parser)
    parser.add_argument("--mb", type=float, default=16.0, metavar="MB",
                        help="size of the tensor that is summed along each axis (default %(default)s)")


def run(settings: None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Looks at all machines; {"ranks", "axes", "versions", "free_gb", "clock_spread_s", "problems"}. Exit code 2 if
    there are problems.

    Raises:
        UserError: a machine is missing or runs other code or settings; flags that contradict each other.
    """
    if not 0.0 < arguments.mb <= 4096.0:
        raise UserError("must lie in (0, 4096]", where="--mb", value=arguments.mb)
    _, run_settings = load_run(arguments.config, list(arguments.overrides))
    plan = Plan.of(arguments, run_settings.parallel.devices, run_settings.parallel)
    machines = machines_of(plan, facts_of(run_settings.model_dump(mode="json")))
    with contextlib.closing(machines):
        machines.meet()
        return _looked(run_settings, plan, machines, arguments.mb)


def _looked(settings: RunSettings, plan: Plan, machines: Machines, megabytes: float) -> dict[str, Any]:
    parallel = settings.parallel.resolve(plan.ranks)
    choice = choice_of(settings, plan.ranks)
    info(choice.text())
    folder = Path(settings.output.directory) / "preflight"
    order = folder / f"order-{plan.node_rank}.json"
    with atomic_write(order) as file:
        json.dump({"backend": choice.backend, "device": choice.device, "mb": megabytes,
                   "parallel": parallel.model_dump(mode="json"), "directory": settings.output.directory}, file)
    command = ["-m", "parallel", "preflight-rank", "--order", str(order)]
    kind = TorchLauncher if choice.backend == "torch" else MindSporeLauncher
    launcher: Launcher = kind(plan, command, folder, machines)
    ended = launcher.run()
    if ended["exit_code"]:
        return ended
    own = [figures_in(launcher.log(rank)) for rank in launcher.processes]
    everyone = sorted((one for machine in machines.gather(own) for one in machine), key=lambda one: one["rank"])
    if not everyone:
        return {"ranks": plan.ranks, "exit_code": 0}
    return _reported(settings, everyone, plan)


def _reported(settings: RunSettings, ranks: list[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """The table, and what is wrong."""
    axes = {}
    for axis in ranks[0]["axes"]:
        slowest = max(ranks, key=lambda one: one["axes"].get(axis, {}).get("ms", 0.0))
        axes[axis] = {"ranks": len(slowest["axes"][axis]["group"]), "ms": slowest["axes"][axis]["ms"],
                      "slowest_group": slowest["axes"][axis]["group"][:8], "host": slowest["host"]}
    table("one sum along every axis", ["axis", "ranks of a group", "slowest ms", "group", "host"],
          [[axis, one["ranks"], one["ms"], " ".join(map(str, one["slowest_group"])), one["host"]]
           for axis, one in axes.items()])
    clocks = [one["clock"] for one in ranks]
    free = min(ranks, key=lambda one: one["free_gb"])
    problems = _problems(settings, ranks, plan, max(clocks) - min(clocks), free)
    for problem in problems:
        info(f"problem: {problem}")
    if not problems:
        info(f"{len(ranks)} ranks on {plan.nodes} machines are ready")
    return {"ranks": len(ranks), "axes": axes, "versions": ranks[0]["versions"], "free_gb": free["free_gb"],
            "clock_spread_s": round(max(clocks) - min(clocks), 3), "problems": problems,
            "exit_code": 2 if problems else 0}


def _problems(settings: RunSettings, ranks: list[dict[str, Any]], plan: Plan, spread: float, free: dict) -> list[str]:
    found = []
    first = ranks[0]
    for one in ranks:
        for name, version in one["versions"].items():
            if version != first["versions"].get(name):
                found.append(f"{name} is {version} on {one['host']} (rank {one['rank']}) and "
                             f"{first['versions'].get(name)} on {first['host']}")
        if one["wrong"]:
            found.append(f"rank {one['rank']} on {one['host']}: a sum along {', '.join(one['wrong'])} is wrong")
    if spread > _CLOCK_SECONDS:
        found.append(f"the clocks differ by {spread:.1f} s")
    needed = _disk_needed(settings, plan)
    if needed > free["free_gb"]:
        found.append(f"{needed:.4g} GB are needed for {settings.output.keep + 1} checkpoints and "
                     f"{free['free_gb']:.4g} GB are free on {free['host']}")
    return list(dict.fromkeys(found))


def _disk_needed(settings: RunSettings, plan: Plan) -> float:
    """GB of the checkpoints that are on a disk at once; 0 where no MindSpore is here to work out the shapes."""
    if not installed("mindspore"):
        return 0.0
    from parallel.planning.checkpoint import checkpoint_bytes
    from parallel.task import package_of

    config = settings.parallel.resolve(plan.ranks)
    task = package_of(settings.model.name).build(settings, config, "float32")
    return (settings.output.keep + 1) * checkpoint_bytes(task, settings.train, config).written / 1e9
