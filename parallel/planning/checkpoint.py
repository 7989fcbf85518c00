"""Bytes of a checkpoint in slices, from the layout alone, by the rule that the ranks themselves follow."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from parallel.checkpoint.owners import Disks, owned_slices, volume
from parallel.planning.memory import STATES
from parallel.sharding.config import ParallelConfig
from parallel.sharding.slices import SliceOfRank, holders, sharded_parameters
from parallel.task import Task
from parallel.training.settings import OptimizerSettings, TrainSettings

_WIDTH = 4  # parameters and moments are float32


@dataclass(frozen=True)
class CheckpointBytes:
    """One checkpoint, parameters and moments.

    Args:
        written: by all ranks together: every slice once.
        held: by all ranks together: what they would write if each wrote all that it holds.
        largest: by the rank that writes the most.
        slices: how many the index names.
    """

    written: int
    held: int
    largest: int
    slices: int


def checkpoint_bytes(task: Task, train: TrainSettings, config: ParallelConfig) -> CheckpointBytes:
    """What one checkpoint of a run under `config` (resolved) takes."""
    trainable = {parameter.name for parameter in task.network.trainable_params()}
    listed, sparse = sharded_parameters(task.network, config), train.sparse_settings()
    tensors = []
    for full in listed:
        own = sparse if sparse is not None and task.is_sparse is not None and task.is_sparse(full.name) else \
            train.optimizer
        copies = 1 + (states_of(own) if full.name in trainable else 0)
        tensors += [(f"{copy}.{full.name}", full.name, _WIDTH) for copy in range(copies)]
    known = holders(listed, config)
    loads, slices = Counter(), 0
    for item in owned_slices(tensors, known, Disks.shared(config.world)):
        loads[item.rank] += item.bytes
        slices += 1
    counts = Counter(owner for _, owner, _ in tensors)
    # Borrowed copies of a shared table are held too, and were written.
    held, alike = 0, {}
    for full in listed:
        rule = full.slice_of_rank
        # Most parameters are those of one layer once more.
        key = rule.key if isinstance(rule, SliceOfRank) else id(full)
        if key not in alike:
            alike[key] = sum(volume(extent) for rank in range(config.world) if (extent := rule(rank)) is not None)
        held += _WIDTH * counts[full.name] * alike[key]
    return CheckpointBytes(sum(loads.values()), held, max(loads.values()), slices)


def states_of(optimizer: OptimizerSettings) -> int:
    """Moments of a parameter."""
    return STATES[optimizer.name] + (1 if optimizer.name == "rmsprop" and optimizer.momentum else 0)
