"""Verb `train`: a ranker on an encoded log, by the trainer that all models share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError
from parallel.common.progress import table
from parallel.launch.session import runs_on_torch, train_on_torch
from parallel.layers.parameter import initialize
from parallel.sharding.config import ParallelConfig
from parallel.training.device import Processes, set_seed, start_device
from parallel.training.mindspore_backend import MindSporeBackend, ShardedBackend
from parallel.training.optimizers import run_optimizer
from parallel.training.settings import COMPUTE_DTYPES
from parallel.training.sharded_run import ShardedRun, needs_sharding
from parallel.training.step import TrainStep
from parallel.training.trainer import Trainer
from recsys.build import build, check_layout, loss_network
from recsys.count import count
from recsys.data.dataset import Batches, Log, prepare
from recsys.evaluate import Evaluation
from recsys.layers.embedding import is_sparse
from recsys.ranker import TrainingLoss
from recsys.train_on import keep_vocabulary, limit, run_of, sizes, train_on, with_test
from recsys.ug_sep.user_aggregation import SharedUsers, sharing_loss
from recsys.validation import Best


def run(settings: Any, arguments: argparse.Namespace | None = None) -> dict:
    """Trains, evaluates on validation as it goes and on test at the end; resumes where an earlier run stopped."""
    if settings.data.tables.place != "host" and runs_on_torch(settings):
        return train_on_torch(settings)
    processes = start_device()
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
    initialize(network.model, settings.train.seed)
    figures = train(settings, network, log, processes)
    if processes.rank == 0:
        table("Trained", ["figure", "value"], figures.items())
    return figures


def check_device(settings: Any, model: Any, processes: Processes) -> ParallelConfig:
    """The resolved layout; refuses layouts and types that this device does not run."""
    parallel = settings.parallel.resolve(processes.ranks)
    check_layout(settings, model, parallel)
    needs_sharding(parallel, processes)
    if processes.target != "CPU":
        return parallel
    if settings.train.precision != "fp32":
        raise UserError("half precision is for Ascend and torch", where="train.precision",
                        value=settings.train.precision, hint="train.precision=fp32, or parallel.backend=torch")
    share = processes.ranks * settings.train.accumulation
    if settings.train.global_batch_size % share:
        raise UserError(f"{processes.ranks} processes x accumulation {settings.train.accumulation} do not divide it",
                        where="train.global_batch_size", value=settings.train.global_batch_size)
    return parallel


def train_sharded(settings: Any, parallel: ParallelConfig, processes: Processes) -> dict:
    """Trains a ranker of which every process holds slices, on MindSpore (Ascend).

    Raises:
        UserError: the run shares users.
    """
    task = build(settings, parallel, COMPUTE_DTYPES[settings.train.precision])
    run = ShardedRun(task, settings.train, parallel, processes, scored=True)
    return train_on(settings, ShardedBackend(run), task.figures)


def train(settings: Any, network: TrainingLoss, log: Log, processes: Processes) -> dict:
    """Trains a network whose parameters have values; the run's figures."""
    options, model = settings.train, network.model
    optimizer = run_optimizer(network.trainable_params(), options, is_sparse)
    loss = sharing_loss(network, settings) if options.share_users else network
    step = TrainStep(loss, optimizer, options, group=processes.group, rank=processes.rank, ranks=processes.ranks)
    batches = Batches(log.parts["train"], options.global_batch_size,
                      options.seed if settings.data.shuffle else None, processes.rank, processes.ranks, log.spec,
                      settings.data.together)
    if options.share_users:
        batches = SharedUsers(batches, model.sides)
    rows = log.parts["validation"]
    best = Best(settings, Evaluation(model, rows, log.labels, evaluation_batch(settings, rows),
                                     limit=options.validation_batches),
                lambda: list(network.get_parameters()), processes.rank)
    counted = count(network)
    run = run_of(settings, counted, batches, ranks=processes.ranks, evaluate=[best])
    trainer = Trainer(MindSporeBackend(step), run)
    if processes.rank == 0:
        keep_vocabulary(log, Path(settings.output.directory))
    return finish(settings, log, trainer, best, counted)


def finish(settings: Any, log: Log, trainer: Trainer, best: Best, counted: dict) -> dict:
    """Runs the trainer and evaluates the best (or last) parameters on the test rows; the run's figures."""
    rows = log.parts["validation"]
    figures = trainer.run()
    best.restore()
    test = log.parts["test"] if len(log.parts["test"]) else rows
    batch = min(best.evaluation.batch, len(test)) if best.tables else evaluation_batch(settings, test)
    last = Evaluation(None, test, log.labels, batch, scores=best.evaluation.scores)
    return {**with_test(figures, last(trainer.iteration)), "best_step": best.step, **sizes(counted),
            **limit(settings, log)}


def evaluation_batch(settings: Any, rows: Any) -> int:
    """Samples of one forward pass over `rows`."""
    return max(1, min(4 * settings.train.global_batch_size, len(rows)))
