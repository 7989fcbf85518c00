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
from recsys.metrics import Accumulator
from recsys.ranker import Ranker, Scores

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
    """

    def __init__(self, model: Ranker, rows: Encoded, labels: list[str], batch: int, *, limit: int | None = None,
                 show: bool = False) -> None:
        self.scores, self.rows, self.labels, self.batch = Scores(model), rows, labels, batch
        self.limit, self.show = limit, show

    def __call__(self, step: int) -> dict[str, float]:
        """auc, gauc, uauc, logloss, calibration, ece for each task."""
        if len(self.rows) == 0:
            return {}
        collected = [Accumulator() for _ in self.labels]
        for labels, scores, users in self.predictions():
            for task, own in enumerate(collected):
                own.update(labels[:, task], scores[:, task], users)
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
    parser.add_argument("--checkpoint", metavar="DIR", help="checkpoint to load (none: the newest of output.directory)")
    parser.add_argument("--part", choices=["train", "validation", "test"], default="test", help="rows to evaluate on")


def run(settings: Any, arguments: argparse.Namespace) -> dict:
    """Verb `evaluate`: exact metrics of a checkpoint on one part of the log."""
    start_device()
    log = open_log(settings, arguments.checkpoint)
    rows = log.parts[arguments.part]
    if len(rows) == 0:
        raise UserError("this part has no rows", where="--part", value=arguments.part)
    model, path = load_model(settings, log, arguments.checkpoint)
    batch = min(settings.train.global_batch_size * 4, len(rows))
    evaluation = Evaluation(model, rows, log.labels, batch, show=True)
    metrics = evaluation(0)
    table(f"{settings.model.name} on {arguments.part} ({len(rows)} rows)", ["metric", "value"], metrics.items())
    return {**metrics, "samples": len(rows), "part": arguments.part, "checkpoint": str(path)}
