"""What every way to train a ranker on MindSpore shares: checks of the device, evaluation of the best parameters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.checkpoint.folder import list_checkpoints
from parallel.common.errors import UserError
from parallel.layers.parameter import initialize
from parallel.sharding.config import ParallelConfig
from parallel.training.device import Processes
from parallel.training.sharded.run import needs_sharding
from parallel.training.trainer import Trainer
from recsys.build import check_layout
from recsys.data.log import Log
from recsys.evaluation.log_metrics import Evaluation
from recsys.ranker import TrainingLoss
from recsys.training.any_backend import attainable_auc, sizes, with_test
from recsys.training.validation import Best, evaluation_batch
from recsys.versions.warm_start import warm_start

if TYPE_CHECKING:
    from recsys.settings import Run


def check_device(settings: Run, model: Any, processes: Processes) -> ParallelConfig:
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


def finish(settings: Run, log: Log, trainer: Trainer, best: Best, counted: dict) -> dict:
    """Runs the trainer and evaluates the best (or last) parameters on the test rows; the run's figures."""
    rows = log.parts["validation"]
    figures = trainer.run()
    best.restore()
    test = log.parts["test"] if len(log.parts["test"]) else rows
    batch = min(best.evaluation.batch, len(test)) if best.tables else evaluation_batch(settings, test)
    last = Evaluation(None, test, log.labels, batch, scores=best.evaluation.scores, plan=best.evaluation.plan,
                      backend=trainer.backend)
    return {**with_test(figures, last(trainer.iteration)), "best_step": best.step, **sizes(counted),
            **attainable_auc(settings, log)}


def start_values(settings: Run, network: TrainingLoss, log: Log, tables: Any = None) -> None:
    """Gives a network its start values: those of its names, or of the checkpoint that `train.start_from` names.

    Args:
        settings: the run.
        network: of the log's spec, or of a window's.
        log: with spec and vocabulary.
        tables: `recsys.tables.host.HostTables`, where they are on the host.
    """
    initialize(network.model, settings.train.seed)
    own = list_checkpoints(Path(settings.output.directory) / "checkpoints")
    if settings.train.start_from is not None and not own:
        warm_start(network, tables.window if tables is not None else log.spec, log.vocabulary,
                   settings.train.start_from, tables)
