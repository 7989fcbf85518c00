"""Verb `train`: PanGu-alpha on packed records, on MindSpore or torch."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pangu.config import check_layout
from pangu.train_on import flops_per_token, sources, train_on
from parallel.common.errors import UserError
from parallel.launch.session import ranks_here, runs_on_torch, train_on_torch, trained

__all__ = ["flops_per_token", "run", "sources", "train_on", "training_step"]

if TYPE_CHECKING:
    from pangu.settings import Run

def run(settings: Run, arguments: argparse.Namespace | None = None) -> dict:
    """Trains, validates, saves; resumes where an earlier run of the same output folder stopped."""
    check_layout(settings.model, settings.parallel.resolve(ranks_here()))
    if runs_on_torch(settings):
        return train_on_torch(settings)
    return trained(lambda: mindspore_backend(settings), lambda backend: train_on(settings, backend, {}))


def mindspore_backend(settings: Run) -> Any:
    """This process on MindSpore: the full model, or its slices of it (Ascend, or NVIDIA GPUs as an experiment)."""
    from pangu.build import build
    from parallel.training.agreement import graph_key
    from parallel.training.device import set_seed, start_device
    from parallel.training.mindspore_backend import MindSporeBackend, ShardedBackend
    from parallel.training.settings import COMPUTE_DTYPES
    from parallel.training.sharded.run import ShardedRun, needs_sharding

    processes = start_device(settings.parallel.mindspore, key=graph_key(settings.model_dump(mode="json")))
    parallel = settings.parallel.resolve(processes.ranks)
    sharded = needs_sharding(parallel, processes)
    _check_device(settings, processes)
    set_seed(settings.train.seed)
    if not sharded:
        return MindSporeBackend(training_step(settings, processes))
    validated = sources(settings, (0, 1))[1] is not None
    return ShardedBackend(ShardedRun(build(settings, parallel, COMPUTE_DTYPES[settings.train.precision]),
                                     settings.train, parallel, processes, validated=validated))


def training_step(settings: Run, processes: Any) -> Any:
    """The model with start values, its loss and its optimizer, as one `TrainStep`."""
    from mindspore.nn.utils import no_init_parameters

    from pangu.build import most_records, training_network
    from parallel.layers.parameter import initialize
    from parallel.training.optimizers.run import Optimizer
    from parallel.training.settings import COMPUTE_DTYPES
    from parallel.training.sharded.run import unsharded_network
    from parallel.training.sharded.step import check_rows
    from parallel.training.step import TrainStep

    train = settings.train
    check_rows(most_records(settings, COMPUTE_DTYPES[train.precision]),
               train.global_batch_size // (processes.ranks * train.accumulation))
    with no_init_parameters():
        network = training_network(settings, COMPUTE_DTYPES[train.precision], weighted=True)
    train = unsharded_network(network, train, settings.parallel.resolve(processes.ranks))
    initialize(network.model, train.seed)
    optimizer = Optimizer(network.trainable_params(), train.optimizer, train.steps)
    return TrainStep(network, optimizer, train, weighted=True, group=processes.group, rank=processes.rank,
                     ranks=processes.ranks)


def _check_device(settings: Run, processes: Any) -> None:
    train = settings.train
    if processes.target != "CPU":
        return
    if train.precision != "fp32":
        raise UserError("half precision is for Ascend and torch; MindSpore's CPU kernels lack it",
                        where="train.precision", value=train.precision,
                        hint="train.precision=fp32, or parallel.backend=torch")
    if train.global_batch_size % (processes.ranks * train.accumulation):
        raise UserError(f"{processes.ranks} processes x accumulation {train.accumulation} do not divide it",
                        where="train.global_batch_size", value=train.global_batch_size)
