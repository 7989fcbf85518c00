"""Verb `train`: a ranker on an encoded log, by the trainer that all models share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

<<<<<<< HEAD
from parallel.checkpoint.folder import damage, list_checkpoints
from parallel.checkpoint.full import load_parameters, save_checkpoint
=======
>>>>>>> main
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
from recsys.fit import Best, check_device, evaluation_batch, finish, keep_vocabulary, run_of
from recsys.layers.embedding import is_sparse
from recsys.ranker import TrainingLoss
from recsys.ug_sep.user_aggregation import SharedUsers, sharing_loss


def run(settings: Any, arguments: argparse.Namespace | None = None) -> dict:
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


def run_stream(settings: Any, processes: Processes) -> dict:
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


def train_sharded(settings: Any, log: Log, parallel: ParallelConfig, processes: Processes) -> dict:
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
    best = Best(settings, network, Evaluation(model, rows, log.labels, evaluation_batch(settings, rows),
                                              limit=options.validation_batches), processes.rank)
    counted = count(network)
    trainer = Trainer(MindSporeBackend(step), run_of(settings, counted, batches, evaluate=[best]))
    if processes.rank == 0:
        keep_vocabulary(log, Path(settings.output.directory))
    return finish(settings, log, trainer, best, counted)
<<<<<<< HEAD


def finish(settings: Any, log: Log, trainer: Trainer, best: Best, counted: dict) -> dict:
    """Runs the trainer and evaluates the best (or last) parameters on the test rows; the run's figures."""
    rows = log.parts["validation"]
    figures = trainer.run()
    best.restore()
    test = log.parts["test"] if len(log.parts["test"]) else rows
    validation = {f"validation_{name}": figures.pop(name) for name in ("auc", "gauc", "uauc", "logloss")
                  if name in figures}
    batch = min(best.evaluation.batch, len(test)) if best.tables else evaluation_batch(settings, test)
    last = Evaluation(None, test, log.labels, batch, scores=best.evaluation.scores)
    metrics = last(trainer.iteration)
    return {**figures, **metrics, **validation, "best_step": best.step,
            **{key: counted[key] for key in ("parameters", "dense_parameters")}, **_limit(settings, log)}


def run_of(settings: Any, counted: dict[str, Any], batches: Any, **more: Any) -> Run:
    """The run of a ranker for the trainer; `counted` tells its FLOPs."""
    samples = settings.train.global_batch_size
    return Run(batches, settings.train, settings.output, units="samples", units_per_step=samples,
               flops_per_step=3.0 * counted["flops_per_sample"] * samples, describe=settings.model_dump(mode="json"),
               **more)


def evaluation_batch(settings: Any, rows: Any) -> int:
    """Samples of one forward pass over `rows`."""
    return max(1, min(4 * settings.train.global_batch_size, len(rows)))


def keep_vocabulary(log: Log, directory: Path) -> None:
    """Puts the vocabulary beside the checkpoints: with it they read any later log the same way."""
    with atomic_write(directory / VOCABULARY, "wb") as file, (log.directory / VOCABULARY).open("rb") as source:
        shutil.copyfileobj(source, file)


def _limit(settings: Any, log: Log) -> dict[str, float]:
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

    def __init__(self, settings: Any, network: TrainingLoss, evaluation: Evaluation, rank: int,
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
=======
>>>>>>> main
