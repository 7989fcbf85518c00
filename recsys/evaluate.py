"""Metrics of a model on a part of a log, and the verb `evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor

from parallel.checkpoint.folder import resolve_checkpoint
from parallel.common.errors import UserError
from parallel.common.progress import progress, table
from parallel.training.device import start_device
from recsys.build import loss_network
from recsys.data.dataset import Log, in_order, prepare
from recsys.data.encode import Encoded
from recsys.data.features import FIRST_KNOWN
from recsys.metrics import Accumulator, NumberAccumulator, segmented_ne
from recsys.ranker import Ranker, Scores
from recsys.tasks import TaskPlan

VOCABULARY = "vocabulary.json"


class Evaluation:
    """Exact metrics on a part of a log; callable as `evaluate(step) -> dict` by the trainer.

    The first task's metrics have plain names, those of the others end in `_<label>`.

    Args:
        model: the ranker.
        rows: the part.
        labels: names of the tasks.
        batch: samples of one forward pass.
        prefix: put before every name.
        limit: batches at most; None = all.
        scores: what gives the probabilities; None = `Scores` of the model.
        plan: of the tasks; None = the model's.
    """

    def __init__(self, model: Ranker, rows: Encoded, labels: list[str], batch: int, *, limit: int | None = None,
                 show: bool = False, scores: Any = None, plan: TaskPlan | None = None) -> None:
        self.scores, self.rows, self.labels, self.batch = scores or Scores(model), rows, labels, batch
        self.limit, self.show = limit, show
        self.plan = plan or (model.plan if model is not None else TaskPlan.of((), len(labels)))

    def __call__(self, step: int) -> dict[str, float]:
        """`recsys.metrics.BINARY_METRICS` (or NUMBER_METRICS) for each task, on the samples that count for it."""
        if len(self.rows) == 0:
            return {}
        collected = [Accumulator() if task.kind == "binary" else NumberAccumulator() for task in self.plan.tasks]
        for labels, scores, users in self.predictions():
            counted = self.plan.counted(labels)
            for task, own in enumerate(collected):
                mine = counted[:, task]
                own.update(labels[mine, task], scores[mine, task], users[mine])
        metrics: dict[str, float] = {}
        for task, own in enumerate(collected):
            found = own.result()
            found.pop("samples"), found.pop("users")
            ending = f"_{self.labels[task]}" if task else ""
            metrics.update({f"{name}{ending}": value for name, value in found.items()})
        return metrics

    def predictions(self):
        """(labels_nK, probabilities_nK, users_n) batch by batch, in the order of the rows."""
        self.scores.set_train(False)
        total = -(-len(self.rows) // self.batch)
        batches = enumerate(in_order(self.rows, self.batch))
        for index, ((ids, numbers, labels), users, real) in (progress(batches, "evaluate", total) if self.show
                                                             else batches):
            if self.limit is not None and index >= self.limit:
                return
            scores = self.scores(Tensor(ids), Tensor(numbers)).asnumpy()
            yield labels[:real], scores[:real].astype(np.float64), users


def load_model(settings: Any, log: Log, checkpoint: str | None) -> tuple[Ranker, Path]:
    """The run's model with the parameters of a checkpoint (None = the newest of the run's folder), quantized if it
    is."""
    from recsys.quantization import layers as quantization

    path = resolve_checkpoint(checkpoint or settings.output.directory)
    model = loss_network(settings, log.spec, len(log.labels)).model
    quantization.load(path, model)
    return model, path


def open_log(settings: Any, checkpoint: str | None = None) -> Log:
    """The run's log, read with the vocabulary that the run was trained with, where there is one."""
    places = [Path(settings.output.directory) / VOCABULARY]
    if checkpoint is not None:
        places = [folder / VOCABULARY for folder in list(Path(checkpoint).resolve().parents)[:2]] + places
        places.insert(0, Path(checkpoint) / VOCABULARY)
    vocabulary = next((place for place in places if place.is_file()), None)
    return prepare(settings.data, settings.model.embedding_size, vocabulary)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb `evaluate`."""
    parser.add_argument("--segments", metavar="FEATURE",
                        help="also the NE within each value of this feature (for the first task)")
    parser.add_argument("--checkpoint", metavar="DIR", help="checkpoint to load (none: the newest of output.directory)")
    parser.add_argument("--part", choices=["train", "validation", "test"], default="test", help="rows to evaluate on")


def segments(evaluation: Evaluation, log: Log, name: str) -> dict[str, float | None]:
    """NE of the first task within each value of a feature (its row, or key, where the vocabulary does not name it).

    Raises:
        UserError: there is no such feature with single values, or the first task is a number.
    """
    slot = log.spec.slots.get(name)
    if slot is None or slot.length != 1 or evaluation.plan.tasks[0].kind != "binary":
        raise UserError("segments are the values of an id feature, of a task of kind binary", where="--segments",
                        value=name)
    collected = [(labels[:, 0], scores[:, 0]) for labels, scores, _ in evaluation.predictions()]
    labels, scores = (np.concatenate(part) for part in zip(*collected, strict=True))
    own = np.asarray(evaluation.rows.ids[:len(labels), slot.start])
    counted = ~np.isnan(labels)
    found = segmented_ne(labels[counted], scores[counted], own[counted])
    values = log.vocabulary.values.get(name, [])

    def called(row: int) -> str:
        known = row - slot.offset - FIRST_KNOWN
        return values[known] if 0 <= known < len(values) else str(known)

    table(f"NE by {name}", ["value", "ne"], [[called(row), value] for row, value in found.items()])
    return {called(row): None if np.isnan(value) else value for row, value in found.items()}


def run(settings: Any, arguments: argparse.Namespace) -> dict:
    """Verb `evaluate`: exact metrics of a checkpoint on one part of the log."""
    start_device()
    log = open_log(settings, arguments.checkpoint)
    rows = log.parts[arguments.part]
    if len(rows) == 0:
        raise UserError("this part has no rows", where="--part", value=arguments.part)
    batch, scores = min(settings.train.global_batch_size * 4, len(rows)), None
    if settings.data.tables.place == "host":
        from recsys.tables.run import load_hosted

        path = resolve_checkpoint(arguments.checkpoint or settings.output.directory)
        model, scores = load_hosted(settings, log.spec, len(log.labels), path, batch, Scores)
    else:
        model, path = load_model(settings, log, arguments.checkpoint)
    evaluation = Evaluation(model, rows, log.labels, batch, show=True, scores=scores)
    metrics = evaluation(0)
    if arguments.segments:
        metrics |= {"segments": segments(evaluation, log, arguments.segments)}
    table(f"{settings.model.name} on {arguments.part} ({len(rows)} rows)", ["metric", "value"], metrics.items())
    return {**metrics, "samples": len(rows), "part": arguments.part, "checkpoint": str(path)}
