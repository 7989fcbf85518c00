"""Verb `train`: a ranker on an encoded log, by the trainer that all models share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.common.errors import UserError
from parallel.common.progress import table
from parallel.layers.parameter import initialize
from parallel.sharding.config import ParallelConfig
from parallel.training.device import Processes, set_seed, start_device
from parallel.training.mindspore_backend import MindSporeBackend, ShardedBackend
from parallel.training.optimizers import run_optimizer
from parallel.training.settings import COMPUTE_DTYPES
from parallel.training.sharded.run import ShardedRun, needs_sharding
from parallel.training.step import TrainStep
from parallel.training.trainer import Trainer
from recsys.build import build, loss_network
from recsys.count import count
from recsys.data.dataset import Batches, Log, prepare
from recsys.data.readers import reader
from recsys.evaluation import Evaluation
from recsys.fit import Best, check_device, compares, evaluation_batch, finish, keep_vocabulary, run_of
from recsys.layers.embedding import is_sparse
from recsys.live.publisher import publisher_of
from recsys.ranker import TrainingLoss
from recsys.ug_sep.user_aggregation import SharedUsers, sharing_loss

if TYPE_CHECKING:
    from recsys.settings import Run


def run(settings: Run, arguments: argparse.Namespace | None = None) -> dict:
    """Trains, evaluates on validation as it goes and on test at the end; resumes where an earlier run stopped."""
    processes = start_device()
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
        figures = train_sharded(settings, log, parallel, processes)
    else:
        initialize(network.model, settings.train.seed)
        figures = train(settings, network, log, processes)
    if processes.rank == 0:
        table("Trained", ["figure", "value"], figures.items())
    return figures


def run_stream(settings: Run, processes: Processes) -> dict:
    """Trains on a stream (readers redis_stream, kafka, tail)."""
    from recsys.stream_training import check, reading_of, train_stream

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


def train_sharded(settings: Run, log: Log, parallel: ParallelConfig, processes: Processes) -> dict:
    """Trains a ranker of which every process holds slices (Ascend); validated by its loss. AUC and the like need whole
    scores: `python -m recsys evaluate` on the merged checkpoint.

    Raises:
        UserError: the run keeps or stops by a metric that a cut run does not have.
    """
    options = settings.train
    if options.keep_best is not None:
        raise UserError("a cut run has no AUC while it trains", where="train.keep_best", value=options.keep_best,
                        hint="set it to null, merge a checkpoint (python -m parallel merge) and evaluate it")
    if options.share_users:
        raise UserError("a cut run does not share users", where="train.share_users", hint="set it to false")
    task = build(settings, parallel, COMPUTE_DTYPES[options.precision])
    counted = count(task.network)
    validated = len(log.parts["validation"]) >= options.global_batch_size
    run = ShardedRun(task, options, parallel, processes, validated=validated)
    batches = Batches(log.parts["train"], options.global_batch_size, options.seed if settings.data.shuffle else None,
                      *run.rows, log.spec, settings.data.together)
    validation = None
    if validated:
        validation = Batches(log.parts["validation"], options.global_batch_size, None, *run.rows)
    trainer = Trainer(ShardedBackend(run), run_of(settings, counted, batches, validation=validation))
    if processes.rank == 0:
        keep_vocabulary(log, Path(settings.output.directory))
    return trainer.run() | {key: counted[key] for key in ("parameters", "dense_parameters")}


def train(settings: Run, network: TrainingLoss, log: Log, processes: Processes) -> dict:
    """Trains a network whose parameters have values; the run's figures."""
    options, model = settings.train, network.model
    optimizer = run_optimizer(network.trainable_params(), options, is_sparse)
    loss = sharing_loss(network, settings) if options.share_users else network
    step = TrainStep(loss, optimizer, options, group=processes.group, rank=processes.rank, ranks=processes.ranks)
    batches = Batches(log.parts["train"], options.global_batch_size,
                      options.seed if settings.data.shuffle else None, processes.rank, processes.ranks, log.spec,
                      settings.data.together, compares(settings))
    if options.share_users:
        batches = SharedUsers(batches, model.sides)
    rows = log.parts["validation"]
    best = Best(settings, network, Evaluation(model, rows, log.labels, evaluation_batch(settings, rows),
                                              limit=options.validation_batches), processes.rank)
    counted, backend = count(network), MindSporeBackend(step)
    if processes.rank == 0:
        keep_vocabulary(log, Path(settings.output.directory))
    publisher = publisher_of(settings, backend, log.spec)
    trainer = Trainer(backend, run_of(settings, counted, batches, evaluate=[best],
                                      companions=[publisher] if publisher is not None else []))
    return finish(settings, log, trainer, best, counted)
