"""Verb `train`: a ranker on an encoded log, by the trainer that all models share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.common.errors import UserError
from parallel.common.progress import table
from parallel.launch.session import runs_on_torch, train_on_torch
from parallel.sharding.config import ParallelConfig
from parallel.training.agreement import graph_key
from parallel.training.device import Processes, set_seed, start_device
from parallel.training.mindspore_backend import MindSporeBackend, ShardedBackend
from parallel.training.optimizers.run import run_optimizer
from parallel.training.settings import COMPUTE_DTYPES
from parallel.training.sharded.run import ShardedRun, needs_sharding, unsharded_network
from parallel.training.step import TrainStep
from parallel.training.stop import listen_early
from parallel.training.trainer import Trainer
from recsys.build import build, loss_network
from recsys.data.log import Log, prepare
from recsys.data.readers import reader
from recsys.evaluation.log_metrics import Evaluation
from recsys.layers.sizes import count
from recsys.live.publisher import publisher_of
from recsys.network import tables_by_rows
from recsys.ranker import TrainingLoss
from recsys.tables.names import is_sparse
from recsys.training.any_backend import batches_of, keep_vocabulary, run_of, train_on
from recsys.training.fit import check_device, finish, start_values
from recsys.training.validation import Best, evaluation_batch, validation_rows
from recsys.ug_sep.user_aggregation import SharedUsers, sharing_loss

if TYPE_CHECKING:
    from recsys.settings import Run


def run(settings: Run, arguments: argparse.Namespace | None = None) -> dict:
    """Trains, evaluates on validation as it goes and on test at the end; resumes where an earlier run stopped."""
    if _is_flat(settings) and runs_on_torch(settings):
        return train_on_torch(settings)
    listen_early()
    if settings.parallel.mindspore.device is not None and not _is_flat(settings):
        raise UserError("MindSpore's CUDA backend trains on encoded logs with tables in the graph only",
                        where="parallel.mindspore.device", value="GPU", hint="leave it out")
    processes = start_device(settings.parallel.mindspore, key=graph_key(settings.model_dump(mode="json")))
    if reader(settings.data.reader).stream is not None:
        return run_stream(settings, processes)
    log = prepare(settings.data, settings.model.embedding_size)
    set_seed(settings.train.seed)
    if settings.data.tables.place == "host":
        from recsys.tables.run import train_hosted

        figures = train_hosted(settings, log, processes)
        if processes.rank == 0:
            table("Trained", ["figure", "value"], figures.items())
        return figures
    network = loss_network(settings, log.spec, len(log.labels), COMPUTE_DTYPES[settings.train.precision])
    parallel = check_device(settings, network.model, processes)
    if needs_sharding(parallel, processes):
        return train_sharded(settings, parallel, processes)
    start_values(settings, network, log)
    figures = train(settings, network, log, processes)
    if processes.rank == 0:
        table("Trained", ["figure", "value"], figures.items())
    return figures


def _is_flat(settings: Run) -> bool:
    """Whether the run is one over an encoded log with tables in the graph, which any backend runs."""
    here = settings.data.tables.place != "host" or settings.parallel.backend == "torch"
    return here and reader(settings.data.reader).stream is None


def run_stream(settings: Run, processes: Processes) -> dict:
    """Trains on a stream (readers redis_stream, kafka, tail)."""
    from recsys.training.stream import check, reading_of, train_stream

    check(settings)
    reading = reading_of(settings)
    set_seed(settings.train.seed)
    network = loss_network(settings, reading[2], len(reading[1].labels), COMPUTE_DTYPES[settings.train.precision])
    if needs_sharding(check_device(settings, network.model, processes), processes):
        raise UserError("a stream is trained on with data parallelism only", where="parallel", hint="set parallel.data")
    figures = train_stream(settings, network, reading, processes)
    if processes.rank == 0:
        table("Trained", ["figure", "value"], figures.items())
    return figures


def train_sharded(settings: Run, parallel: ParallelConfig, processes: Processes) -> dict:
    """Trains a ranker of which every process holds slices, on MindSpore (Ascend, or NVIDIA GPUs as an experiment).

    Raises:
        UserError: the run shares users.
    """
    task = build(settings, parallel, COMPUTE_DTYPES[settings.train.precision])
    run = ShardedRun(task, settings.train, parallel, processes, scored=True)
    return train_on(settings, ShardedBackend(run), task.figures)


def train(settings: Run, network: TrainingLoss, log: Log, processes: Processes) -> dict:
    """Trains a network whose parameters have values; the run's figures."""
    options = unsharded_network(network, settings.train, settings.parallel.resolve(processes.ranks))
    model = network.model
    tables = tables_by_rows(settings, network, processes.ranks)
    optimizer = run_optimizer(network.trainable_params(), options, is_sparse, tables)
    loss = sharing_loss(network, settings) if options.share_users else network
    step = TrainStep(loss, optimizer, options, group=processes.group, rank=processes.rank, ranks=processes.ranks)
    batches = batches_of(settings, log, processes.rank, processes.ranks)
    if options.share_users:
        batches = SharedUsers(batches, model.sides)
    rows = validation_rows(settings, log.parts["validation"])
    counted, backend = count(network), MindSporeBackend(step)
    best = Best(settings, Evaluation(model, rows, log.labels, evaluation_batch(settings, rows),
                                     backend=backend),
                lambda: list(network.get_parameters()), processes.rank)
    if processes.rank == 0:
        keep_vocabulary(log, Path(settings.output.directory))
    of_both = {"ids_of": batches.ids_of} if options.share_users else {}
    publisher = publisher_of(settings, backend, log.spec, **of_both)
    trainer = Trainer(backend, run_of(settings, counted, batches, ranks=processes.ranks, evaluate=[best],
                                      companions=[publisher] if publisher is not None else []))
    return finish(settings, log, trainer, best, counted)
