"""Metrics of a ranker while it trains, on any backend, and the best parameters by them. Imports no framework."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.checkpoint.folder import damage, list_checkpoints
from parallel.checkpoint.full import load_checkpoint, save
from parallel.checkpoint.writing import Holder
from parallel.common.files import read_json
from parallel.common.progress import info
from parallel.launch.session import ranks_here
from parallel.training.backend import Backend
from parallel.training.operation.saving import disks_of
from recsys.data.batches import in_order
from recsys.data.encode import Encoded
from recsys.evaluation.metrics import Accumulator, NumberAccumulator
from recsys.evaluation.score_merging import RankScores
from recsys.layers.tasks import TaskPlan

if TYPE_CHECKING:
    from recsys.settings import Run

_SMALLER_IS_BETTER = ("logloss", "validation_loss", "ece")
Prediction = tuple[np.ndarray, np.ndarray, np.ndarray]
"""labels_nT, scores_nK, users_n."""


def evaluation_batch(settings: Run, rows: Encoded) -> int:
    """Samples of one forward pass over `rows` on one device."""
    return max(1, min(4 * settings.train.global_batch_size, len(rows)))


def validation_rows(settings: Run, rows: Encoded) -> Encoded:
    """The rows that a validation looks at, the same on every backend and layout: those of the first
    `train.validation_batches` batches of one device."""
    limit = settings.train.validation_batches
    return rows if limit is None else rows.take(slice(limit * evaluation_batch(settings, rows)))


def metrics_of(predictions: Iterable[Prediction], labels: list[str], plan: TaskPlan) -> dict[str, float]:
    """BINARY_METRICS (or NUMBER_METRICS) for each task, exact, on the samples that count for it; of the tasks after the
    first with `_<label>` at the end."""
    collected = [Accumulator() if task.kind == "binary" else NumberAccumulator() for task in plan.tasks]
    for labels_nT, scores_nK, users_n in predictions:
        counted_nK = plan.counted(labels_nT)
        for task, own in enumerate(collected):
            mine = counted_nK[:, task]
            own.update(labels_nT[mine, task], scores_nK[mine, task], users_n[mine])
    metrics: dict[str, float] = {}
    for task, own in enumerate(collected):
        found = own.result()
        found.pop("samples"), found.pop("users")
        ending = f"_{labels[task]}" if task else ""
        metrics.update({f"{name}{ending}": value for name, value in found.items()})
    return metrics


class RanksEvaluation:
    """Exact metrics on a part of a log whose rows are scored by all processes of a run; callable as `evaluate(step)`.

    Args:
        backend: scores this process's rows of a batch.
        rows: the part; every process has it.
        labels: names of the tasks.
        plan: what the tasks are.
        batch: rows of a global batch, which the backend is made for.
    """

    def __init__(self, backend: Backend, rows: Encoded, labels: list[str], plan: TaskPlan, batch: int) -> None:
        self.backend, self.rows, self.labels, self.plan = backend, rows, labels, plan
        self.batch = batch
        number, parts = backend.share
        self.mine = slice(number * batch // parts, (number + 1) * batch // parts)

    def __call__(self, step: int) -> dict[str, float]:
        """The metrics, the same on all processes; {} without rows."""
        return metrics_of(self.predictions(), self.labels, self.plan) if len(self.rows) else {}

    def predictions(self) -> Iterator[Prediction]:
        """Batch by batch, in the order of the rows."""
        for (ids, numbers, labels), users, real in in_order(self.rows, self.batch):
            own = self.backend.scores((ids[self.mine], numbers[self.mine]))
            yield labels[:real], self.merged(own)[:real].astype(np.float64), users

    def merged(self, own: np.ndarray | None) -> np.ndarray:
        """float32 [batch, tasks] of the rows that the processes give; what one alone gives comes back exactly."""
        return RankScores(self.backend).gathered(own, (self.batch, len(self.labels)), self.mine.start)


class Best:
    """Evaluates at every validation and, where the run keeps the best parameters, saves them when they improve.

    Args:
        settings: the run; `train.keep_best` names the metric.
        evaluation: what gives the metrics, the same on all processes.
        parameters: gives what is saved, `NamedTensor`s or MindSpore parameters.
        rank: only rank 0 writes full parameters.
        holder: which slices this process holds; None = everything.
        tables: `recsys.tables.host.HostTables` whose rows are kept beside the parameters.
    """

    def __init__(self, settings: Run, evaluation: Any, parameters: Callable[[], list], rank: int, *,
                 holder: Holder | None = None, tables: Any = None) -> None:
        self.metric, self.evaluation, self.parameters = settings.train.keep_best, evaluation, parameters
        self.directory, self.rank = Path(settings.output.directory) / "best", rank
        self.holder, self.tables = holder, tables
        self.disks = disks_of(holder.ranks if holder is not None else ranks_here(), settings.output)
        self.value, self.step = None, None
        found = list_checkpoints(self.directory) if self.metric and settings.output.resume != "never" else []
        if found:
            self._remember(found[-1])

    def _remember(self, path: Path) -> None:
        """What was best before; damage is reported, since the run then takes the next validation for the best."""
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
            save(self.directory, step, self.parameters(), (), {"value": value, "step": step, "metric": self.metric}, 1,
                 rank=self.rank, holder=self.holder, disks=self.disks,
                 add_files=self.tables.add_files if self.tables is not None else None)
        return metrics

    def restore(self) -> None:
        """Brings the best parameters back for the last evaluation. All processes call it."""
        found = list_checkpoints(self.directory) if self.metric else []
        if found:
            load_checkpoint(found[-1], self.parameters(), (), self.holder.extents if self.holder is not None else None)
            if self.tables is not None:
                self.tables.restore_files(found[-1])
            if self.rank == 0:
                info(f"evaluating the parameters of step {self.step}, the best {self.metric} on validation")
