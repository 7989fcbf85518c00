"""Verb `evaluate`: exact metrics of a checkpoint on a part of a log, or requests scored again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from parallel.checkpoint.folder import resolve_checkpoint
from parallel.common.errors import UserError
from parallel.common.progress import table
from parallel.training.device import start_device
from recsys.build import loss_network
from recsys.data.encode import Encoded
from recsys.data.features import FIRST_KNOWN
from recsys.data.log import Log, prepare
from recsys.data.vocabulary import VOCABULARY
from recsys.evaluation.log_metrics import Evaluation
from recsys.evaluation.metrics import segmented_ne
from recsys.passes.sharded import ShardedRanker, is_sharded
from recsys.passes.sharded_evaluation import ShardedEvaluation
from recsys.ranker import Ranker, Scores
from recsys.versions.request_log import compare

if TYPE_CHECKING:
    from recsys.settings import Run


def load_model(settings: Run, log: Log, checkpoint: str | None) -> tuple[Ranker, Path]:
    """The run's model with the parameters of a checkpoint (None = the newest of the run's folder), quantized if it
    is."""
    from recsys.quantization import layers as quantization

    path = resolve_checkpoint(checkpoint or settings.output.directory)
    model = loss_network(settings, log.spec, len(log.labels)).model
    quantization.load(path, model)
    return model, path


def open_log(settings: Run, checkpoint: str | None = None) -> Log:
    """The run's log, read with the vocabulary that the run was trained with, where there is one."""
    places = [Path(settings.output.directory) / VOCABULARY]
    if checkpoint is not None:
        places = [folder / VOCABULARY for folder in list(Path(checkpoint).resolve().parents)[:2]] + places
        places.insert(0, Path(checkpoint) / VOCABULARY)
    vocabulary = next((place for place in places if place.is_file()), None)
    return prepare(settings.data, settings.model.embedding_size, vocabulary)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb `evaluate`."""
    parser.add_argument("--requests", metavar="FILE", help="score the requests that a server logged (serve key "
                        "request_log) again and compare, instead of a part of the log")
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


def run(settings: Run, arguments: argparse.Namespace) -> dict:
    """Verb `evaluate`: exact metrics of a checkpoint on one part of the log."""
    if is_sharded():
        return _run_sharded(settings, arguments)
    start_device()
    if arguments.requests:
        figures = compare(arguments.requests, arguments.checkpoint)
        table("Logged requests, scored again", ["figure", "value"], figures.items())
        return figures
    log = open_log(settings, arguments.checkpoint)
    rows = _part(log, arguments.part)
    batch, scores = min(settings.train.global_batch_size * 4, len(rows)), None
    if settings.data.tables.place == "host":
        from recsys.tables.loaded import load_hosted

        path = resolve_checkpoint(arguments.checkpoint or settings.output.directory)
        model, scores = load_hosted(settings, log.spec, len(log.labels), path, batch, Scores)
    else:
        model, path = load_model(settings, log, arguments.checkpoint)
    evaluation = Evaluation(model, rows, log.labels, batch, show=True, scores=scores)
    metrics = evaluation(0)
    if arguments.segments:
        metrics |= {"segments": segments(evaluation, log, arguments.segments)}
    return _result(settings, arguments, metrics, len(rows), path)


def _run_sharded(settings: Run, arguments: argparse.Namespace) -> dict:
    """One of the processes of a launch."""
    if arguments.requests:
        raise UserError("logged requests are scored again by one process", where="--requests",
                        hint="leave parallel.op and parallel.pipeline.stages at 1")
    path = resolve_checkpoint(arguments.checkpoint or settings.output.directory)
    ranker = ShardedRanker(settings, path, "evaluate")
    try:
        log = open_log(settings, arguments.checkpoint)
        evaluation = ShardedEvaluation(ranker, settings, _part(log, arguments.part), log.labels)
        metrics = evaluation(0)
        if arguments.segments:
            metrics |= {"segments": segments(evaluation, log, arguments.segments)}
    finally:
        ranker.member.close()
    return _result(settings, arguments, metrics, len(evaluation.rows), path)


def _part(log: Log, name: str) -> Encoded:
    rows = log.parts[name]
    if len(rows) == 0:
        raise UserError("this part has no rows", where="--part", value=name)
    return rows


def _result(settings: Run, arguments: argparse.Namespace, metrics: dict, rows: int, path: Path) -> dict:
    table(f"{settings.model.name} on {arguments.part} ({rows} rows)", ["metric", "value"], metrics.items())
    return {**metrics, "samples": rows, "part": arguments.part, "checkpoint": str(path)}
