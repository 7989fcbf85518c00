"""One process of `preflight`: what it is, and one sum along every axis of the layout."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from parallel.common.errors import UserError
from parallel.common.files import read_json
from parallel.sharding.config import ParallelConfig
from parallel.sharding.topology import AXES, group_of

_PACKAGES = ("mindspore", "torch", "numpy")
_REPEATS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--order", required=True, metavar="FILE", help="what preflight wrote")


def run(settings: None, arguments: argparse.Namespace) -> dict[str, Any]:
    """{"rank", "host", "versions", "free_gb", "clock", "axes": {axis: {"group", "ms"}}, "wrong"}.

    Raises:
        UserError: the processes do not find each other.
    """
    order = read_json(Path(arguments.order), dict)
    config = ParallelConfig.model_validate(order["parallel"])
    rank, groups, sum_over = (_torch if order["backend"] == "torch" else _mindspore)(order, config)
    directory = Path(order["directory"])
    directory.mkdir(parents=True, exist_ok=True)
    axes: dict[str, Any] = {}
    wrong = []
    values = np.full(int(order["mb"] * 1e6 / 4), 1.0 + rank, np.float32)
    for axis, ranks in groups.items():
        # The first call connects.
        best, expected = np.inf, float(sum(1.0 + other for other in ranks))
        for _ in range(1 + _REPEATS):
            began = time.perf_counter()
            found = sum_over(axis, values)
            best = min(best, time.perf_counter() - began)
        axes[axis] = {"group": list(ranks), "ms": round(1e3 * best, 3)}
        if not np.allclose(found, expected, rtol=1e-6):
            wrong.append(axis)
    return {"rank": rank, "host": socket.gethostname(), "versions": versions(), "axes": axes, "wrong": wrong,
            # All come out of the last sum together.
            "clock": time.time(), "free_gb": round(shutil.disk_usage(directory).free / 1e9, 3)}


def versions() -> dict[str, str]:
    """Of Python, the packages that train, and CANN where it is installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    home = Path(os.environ.get("ASCEND_HOME_PATH", "/usr/local/Ascend/ascend-toolkit/latest"))
    for line in (home / "version.cfg").read_text(errors="replace").splitlines()[:50] if (
            home / "version.cfg").is_file() else ():
        if "version" in line:
            found["cann"] = line.partition("=")[2].strip()[:40]
            break
    return found


def _axes(config: ParallelConfig, rank: int) -> dict[str, list[int]]:
    """This rank's group along every axis that has more than one rank; all ranks last."""
    found = {axis: group_of(axis, config, rank) for axis in AXES}
    return {axis: ranks for axis, ranks in found.items() if len(ranks) > 1} | {"all": list(range(config.world))}


def _torch(order: dict, config: ParallelConfig) -> tuple[int, dict, Callable]:
    import torch
    import torch.distributed as dist

    from parallel.torch_runtime.groups import join
    from parallel.torch_runtime.step import device_of

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = device_of("cuda" if order["device"] == "GPU" else "cpu")
    join(rank, world, device)
    own = _axes(config, rank)
    made = {}
    for axis in own:
        if axis == "all":
            made[axis] = dist.group.WORLD
            continue
        for ranks in sorted({tuple(group_of(axis, config, other)) for other in range(world)}):
            group = dist.new_group(list(ranks))  # all ranks make all groups
            if rank in ranks:
                made[axis] = group

    def sum_over(axis: str, values: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(values).to(device, copy=True)
        dist.all_reduce(tensor, group=made[axis])
        return tensor.cpu().numpy()

    return rank, own, sum_over


def _mindspore(order: dict, config: ParallelConfig) -> tuple[int, dict, Callable]:
    from mindspore import Tensor, ops
    from mindspore.communication import create_group

    from parallel.training.device import start_device

    processes = start_device(config.mindspore)
    if processes.ranks == 1:
        raise UserError("one process has nobody to talk to", where="--nproc", value=1, hint="start several")
    own = _axes(config, processes.rank)
    made = {}
    for axis, ranks in own.items():
        group = processes.group
        if len(ranks) < processes.ranks:
            group = f"preflight_{axis}_{ranks[0]}"
            create_group(group, ranks)
        made[axis] = ops.AllReduce(ops.ReduceOp.SUM, group)
    return processes.rank, own, lambda axis, values: made[axis](Tensor(values)).asnumpy()
