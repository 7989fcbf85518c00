"""What every way to train a ranker shares: checks of the device, evaluation of the best parameters, figures."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.checkpoint.folder import damage, list_checkpoints
from parallel.checkpoint.full import load_parameters, save_checkpoint
from parallel.common.errors import UserError
from parallel.common.files import atomic_write, read_json
from parallel.common.progress import info
from parallel.sharding.config import ParallelConfig
from parallel.training.device import Processes
from parallel.training.sharded.run import needs_sharding
from parallel.training.trainer import Run, Trainer
from recsys.build import check_layout
from recsys.data.dataset import Log
from recsys.evaluation import VOCABULARY, Evaluation
from recsys.layers.embedding import is_sparse
from recsys.ranker import TrainingLoss

if TYPE_CHECKING:
    from recsys.settings import Run as RunSettings

_SMALLER_IS_BETTER = ("logloss", "validation_loss", "ece")


def check_device(settings: RunSettings, model: Any, processes: Processes) -> ParallelConfig:
    """The resolved layout; refuses layouts and types that this device does not run."""
    parallel = settings.parallel.resolve(processes.ranks)
    check_layout(settings, model, parallel)
    needs_sharding(parallel, processes)
    if processes.target != "CPU":
        return parallel
    if settings.train.precision != "fp32":
        raise UserError("half precision is for Ascend", where="train.precision", value=settings.train.precision,
                        hint="train.precision=fp32")
    share = processes.ranks * settings.train.accumulation
    if settings.train.global_batch_size % share:
        raise UserError(f"{processes.ranks} processes x accumulation {settings.train.accumulation} do not divide it",
                        where="train.global_batch_size", value=settings.train.global_batch_size)
    return parallel


def finish(settings: RunSettings, log: Log, trainer: Trainer, best: Best, counted: dict) -> dict:
    """Runs the trainer and evaluates the best (or last) parameters on the test rows; the run's figures."""
    rows = log.parts["validation"]
    figures = trainer.run()
    best.restore()
    test = log.parts["test"] if len(log.parts["test"]) else rows
    validation = {f"validation_{name}": figures.pop(name) for name in ("auc", "gauc", "uauc", "logloss")
                  if name in figures}
    batch = min(best.evaluation.batch, len(test)) if best.tables else evaluation_batch(settings, test)
    last = Evaluation(None, test, log.labels, batch, scores=best.evaluation.scores, plan=best.evaluation.plan)
    metrics = last(trainer.iteration)
    return {**figures, **metrics, **validation, "best_step": best.step,
            **{key: counted[key] for key in ("parameters", "dense_parameters")}, **attainable_auc(settings, log)}


def run_of(settings: RunSettings, counted: dict[str, Any], batches: Any, **more: Any) -> Run:
    """The run of a ranker for the trainer; `counted` tells its FLOPs."""
    samples = settings.train.global_batch_size
    return Run(batches, settings.train, settings.output, units="samples", units_per_step=samples,
               flops_per_step=3.0 * counted["flops_per_sample"] * samples, describe=settings.model_dump(mode="json"),
               **more)


def compares(settings: RunSettings) -> bool:
    """Whether a loss compares the samples of one user."""
    return any(task.pairwise or task.listwise for task in settings.model.tasks)


def evaluation_batch(settings: RunSettings, rows: Any) -> int:
    """Samples of one forward pass over `rows`."""
    return max(1, min(4 * settings.train.global_batch_size, len(rows)))


def keep_vocabulary(log: Log, directory: Path) -> None:
    """Puts the vocabulary beside the checkpoints: with it they read any later log the same way."""
    with atomic_write(directory / VOCABULARY, "wb") as file, (log.directory / VOCABULARY).open("rb") as source:
        shutil.copyfileobj(source, file)


def attainable_auc(settings: RunSettings, log: Log) -> dict[str, float]:
    """The best AUC that any model can expect on the test rows, where the truth is known."""
    data = settings.data
    if data.reader != "synthetic" or data.split.by not in ("default", "order"):
        return {}
    from recsys.data.readers.synthetic import probabilities
    from recsys.metrics import bayes_auc

    return {"bayes_auc": bayes_auc(probabilities(data)[-max(1, len(log.parts["test"])):])}


class Best:
    """Evaluates at every validation and, where the run keeps the best parameters, saves them when they improve.

    Args:
        settings: the run; `train.keep_best` names the metric.
        network: whose parameters are saved.
        evaluation: what gives the metrics.
        rank: only rank 0 writes.
        tables: `recsys.tables.host.HostTables` whose rows are kept beside the parameters.
    """

    def __init__(self, settings: RunSettings, network: TrainingLoss, evaluation: Evaluation, rank: int,
                 tables: Any = None) -> None:
        self.metric, self.network, self.evaluation = settings.train.keep_best, network, evaluation
        self.directory, self.rank, self.tables = Path(settings.output.directory) / "best", rank, tables
        self.value, self.step = None, None
        found = list_checkpoints(self.directory) if self.metric and settings.output.resume != "never" else []
        if found:
            self._remember(found[-1])

    def _remember(self, path: Path) -> None:
        """What was best before; damage is told, since the run then takes the next validation for the best."""
        if (error := damage(path)) is not None:
            if self.rank == 0:
                info(f"note: the best parameters of the run cannot be read and are looked for anew: {error}")
            return
        state = read_json(path / "state.json")
        self.value, self.step = state.get("value"), state.get("step")

    def __call__(self, step: int) -> dict[str, float]:
        metrics = self.evaluation(step)
        if self.metric is None or self.metric not in metrics or not math.isfinite(metrics[self.metric]):
            return metrics
        sign = -1.0 if self.metric in _SMALLER_IS_BETTER else 1.0
        value = sign * metrics[self.metric]
        if self.value is None or value > self.value:
            self.value, self.step = value, step
            if self.tables is not None:
                self.tables.before_checkpoint(self.directory, step)
            if self.rank == 0:
                save_checkpoint(self.directory, step, self.parameters(), (),
                                {"value": value, "step": step, "metric": self.metric}, keep=1,
                                add_files=self.tables.add_files if self.tables is not None else None)
        return metrics

    def parameters(self) -> list:
        """The model's parameters."""
        return [parameter for parameter in self.network.get_parameters()
                if self.tables is None or not is_sparse(parameter.name)]

    def restore(self) -> None:
        """Brings the best parameters back for the last evaluation."""
        found = list_checkpoints(self.directory) if self.metric else []
        if found:
            load_parameters(found[-1], self.parameters())
            if self.tables is not None:
                self.tables.restore_files(found[-1])
            info(f"evaluating the parameters of step {self.step}, the best {self.metric} on validation")
