"""Training a ranker on an encoded log, whatever the backend and the layout. Imports no framework."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.checkpoint.folder import list_checkpoints
from parallel.common.errors import UserError
from parallel.common.files import atomic_write
from parallel.common.progress import table
from parallel.training.backend import Backend, SlicedBackend
from parallel.training.trainer import Run, Trainer
from recsys.data.batches import Batches
from recsys.data.log import Log, prepare
from recsys.data.vocabulary import VOCABULARY
from recsys.layers.tasks import TaskPlan
from recsys.live.ranks import ranks_publisher
from recsys.training.hosted import hosted_ranks
from recsys.training.validation import Best, RanksEvaluation, validation_rows
from recsys.versions.warm_start import warm_start_slices

if TYPE_CHECKING:
    from recsys.settings import Run as RunSettings


def train_on(settings: RunSettings, backend: SlicedBackend, figures: dict[str, Any]) -> dict[str, Any]:
    """Trains, evaluates on validation as it goes and on test at the end; resumes where an earlier run stopped.

    Args:
        settings: a `recsys.settings.Run`.
        backend: this process.
        figures: parameters, dense_parameters and flops_per_sample of the network.

    Raises:
        UserError: anything wrong with the log, settings that only an unsharded run has, and see `Trainer.run`.
    """
    options = settings.train
    if options.share_users:
        raise UserError("a sharded run does not share users", where="train.share_users", hint="set it to false")
    log = prepared(settings, backend)
    tables = None
    if settings.data.tables.place == "host":
        backend = hosted_ranks(settings, log.spec, backend)
        tables = backend.tables
    batches = batches_of(settings, log, *backend.share)
    plan, batch = TaskPlan.of(settings.model.tasks, len(log.labels)), options.global_batch_size
    evaluation = RanksEvaluation(backend, validation_rows(settings, log.parts["validation"]), log.labels, plan, batch)
    best = Best(settings, evaluation, backend.parameters, backend.rank, holder=backend.holder, tables=tables)
    if backend.rank == 0:
        keep_vocabulary(log, Path(settings.output.directory))
    if options.start_from is not None and not list_checkpoints(Path(settings.output.directory) / "checkpoints"):
        warm_start_slices(backend, tables.window if tables is not None else log.spec, log.vocabulary,
                          options.start_from, tables)
    companions = [companion for companion in (tables, ranks_publisher(settings, backend, tables))
                  if companion is not None]
    trainer = Trainer(backend, run_of(settings, figures, batches, ranks=backend.ranks, evaluate=[best],
                                      companions=companions))
    result = trainer.run()
    best.restore()
    test = log.parts["test"] if len(log.parts["test"]) else log.parts["validation"]
    result = with_test(result, RanksEvaluation(backend, test, log.labels, plan, batch)(trainer.iteration))
    result |= {"best_step": best.step, **sizes(figures), **attainable_auc(settings, log)}
    if tables is not None:
        result |= {"parameters": figures["dense_parameters"], **tables.figures()}
    if backend.rank == 0:
        table("Trained", ["figure", "value"], result.items())
    return result


def batches_of(settings: RunSettings, log: Log, rank: int, ranks: int) -> Batches:
    """Training batches of one of `ranks` data-parallel processes."""
    data, options = settings.data, settings.train
    return Batches(log.parts["train"], options.global_batch_size, options.seed if data.shuffle else None, rank, ranks,
                   log.spec, data.together, compares(settings), data.shards)


def compares(settings: RunSettings) -> bool:
    """Whether a loss compares the samples of one user."""
    return any(task.pairwise or task.listwise for task in settings.model.tasks)


def prepared(settings: RunSettings, backend: Backend) -> Log:
    """The encoded log; one process of each machine encodes it, if nobody has yet."""
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    log = prepare(settings.data, settings.model.embedding_size) if first else None
    backend.barrier()
    return log or prepare(settings.data, settings.model.embedding_size)


def run_of(settings: RunSettings, counted: dict[str, Any], batches: Any, *, ranks: int = 1, **more: Any) -> Run:
    """The run of a ranker for the trainer; `counted` tells its FLOPs."""
    samples = settings.train.global_batch_size
    return Run(batches, settings.train, settings.output, units="samples", units_per_step=samples,
               flops_per_step=3.0 * counted["flops_per_sample"] * samples, describe=settings.model_dump(mode="json"),
               layout=settings.parallel.resolve(ranks).layout(), **more)


def with_test(figures: dict[str, Any], metrics: dict[str, float]) -> dict[str, Any]:
    """The figures of a run with the metrics on test rows; those on validation rows get names that say so."""
    validation = {f"validation_{name}": figures.pop(name) for name in ("auc", "gauc", "uauc", "logloss")
                  if name in figures}
    return {**figures, **metrics, **validation}


def sizes(counted: dict[str, Any]) -> dict[str, int]:
    """Numbers of parameters, for the figures."""
    return {key: counted[key] for key in ("parameters", "dense_parameters")}


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
    from recsys.evaluation.metrics import bayes_auc

    return {"bayes_auc": bayes_auc(probabilities(data)[-max(1, len(log.parts["test"])):])}
