"""Verbs `reshard` and `merge`: a checkpoint sharded by one layout becomes one sharded by another, or a full one.

Streaming: a slice of one tensor is in memory at a time, so memory is bounded by the largest parameter. There and back
is the identity, bit for bit.
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

from parallel.checkpoint.folder import PARAMETERS_FILE
from parallel.checkpoint.owners import Disks, Holders, owned_slices
from parallel.checkpoint.safetensors_file import DTYPES
from parallel.checkpoint.sharded import Slices, parameter_of
from parallel.checkpoint.writing import write_checkpoint, write_full, write_index, write_rank
from parallel.common.errors import UserError
from parallel.common.progress import Bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of both verbs."""
    parser.add_argument("--from", dest="source", required=True, metavar="DIR", help="checkpoint, full or in slices")
    parser.add_argument("--to", dest="target", required=True, metavar="DIR", help="folder to make; must not exist")


def run_reshard(settings: None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Shards a checkpoint by the parallel block of `--config`; a layout of one device gives a full checkpoint.

    Raises:
        UserError: the checkpoint is of another model, damaged or incomplete; no disk space.
    """
    from parallel.task import build_task, load_run

    package, run = load_run(arguments.config, arguments.overrides)
    plain = package.written_out(run)  # the same parameters, without a device
    task, _, config = build_task(arguments.config, [*arguments.overrides, *plain])
    slices = Slices(arguments.source)
    if config.world == 1:
        return _timed(arguments, slices, 1, lambda folder: write_full(folder, slices), slices_bytes(slices))
    from parallel.sharding.slices import holders, sharded_parameters

    listed = sharded_parameters(task.network, config)
    _compare(slices, {full.name: full for full in listed})
    plans = rank_plans(slices, holders(listed, config), config.world)

    def write(folder: Path) -> None:
        written = []
        with Bar(config.world, "ranks") as bar:
            for rank, plan in enumerate(plans):
                written += write_rank(folder, rank, config.world, plan, slices.read)
                bar.advance()
        write_index(folder, written, config.world)

    return _timed(arguments, slices, config.world, write, slices_bytes(slices))


def run_merge(settings: None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Joins slices into a full checkpoint.

    Raises:
        UserError: the checkpoint is damaged or incomplete; no disk space.
    """
    slices = Slices(arguments.source)
    return _timed(arguments, slices, 1, lambda folder: write_full(folder, slices), slices_bytes(slices))


def rank_plans(slices: Slices, holders: Holders, ranks: int) -> list[list[tuple]]:
    """What each rank writes: (name, kind of file, dtype, full shape, extent); moments are sharded as their
    parameters."""
    plans: list[list[tuple]] = [[] for _ in range(ranks)]
    listed = [(name, parameter_of(name), np.dtype(DTYPES[tensor.dtype]).itemsize)
              for name, tensor in slices.tensors.items()]
    for item in owned_slices(listed, holders, Disks.shared(ranks)):
        tensor = slices.tensors[item.name]
        plans[item.rank].append((item.name, tensor.kind, tensor.dtype, tensor.shape, item.extent))
    return plans


def slices_bytes(slices: Slices) -> int:
    """Bytes of all full tensors."""
    return sum(tensor.nbytes for tensor in slices.tensors.values())


def _compare(slices: Slices, full_parameters: dict[str, Any]) -> None:
    saved = {name: slices.tensors[name] for name in slices.names(PARAMETERS_FILE)}
    for name, full in full_parameters.items():
        if name not in saved:
            raise UserError(f"the checkpoint lacks parameter {name}", where=slices.path, hint="is it of another model?")
        if saved[name].shape != full.shape:
            raise UserError(f"'{name}' has shape {list(full.shape)} in the model and {list(saved[name].shape)} in the "
                            "checkpoint", where=slices.path, hint="use the config that it was trained with")
    extra = [name for name in slices.tensors if parameter_of(name) not in full_parameters]
    if extra:
        raise UserError(f"the checkpoint has the unknown parameter {extra[0]}", where=slices.path,
                        hint="is it of another model?")


def _timed(arguments: argparse.Namespace, slices: Slices, ranks: int, write: Any, needed: int) -> dict[str, Any]:
    started = time.monotonic()
    target = write_checkpoint(arguments.target, needed, write, slices.state)
    return {
        "parameters": sum(math.prod(slices.tensors[name].shape) for name in slices.names(PARAMETERS_FILE)),
        "tensors": len(slices.tensors), "ranks": ranks, "seconds": round(time.monotonic() - started, 3),
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3), "checkpoint": str(target),
    }

