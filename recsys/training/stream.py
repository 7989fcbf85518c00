"""`train` on a stream: the same trainer, fed by events, validated before each step, without an end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from parallel.common.errors import UserError
from parallel.layers.parameter import initialize
from parallel.training.device import Processes
from parallel.training.mindspore_backend import MindSporeBackend
from parallel.training.optimizers.run import run_optimizer
from parallel.training.sharded.run import unsharded_network
from parallel.training.step import TrainStep
from parallel.training.trainer import Trainer
from recsys.data.columns import columns_of, features_of
from recsys.data.features import FeatureSpec, assign_columns
from recsys.data.readers import reader
from recsys.data.streams.source import StreamSource
from recsys.data.vocabulary import VOCABULARY, Vocabulary
from recsys.evaluation.progressive import Progressive
from recsys.layers.sizes import count
from recsys.live.publisher import publisher_of
from recsys.network import tables_by_rows
from recsys.ranker import Scores, TrainingLoss
from recsys.tables.names import is_sparse
from recsys.tables.run import hosted_backend
from recsys.training.any_backend import compares, run_of

if TYPE_CHECKING:
    from recsys.settings import Run


def reading_of(settings: Run) -> tuple:
    """(features, columns, spec, vocabulary) of a stream: no statistics pass goes before it.

    Raises:
        UserError: a feature waits for a vocabulary or for quantiles, and no vocabulary is given.
    """
    data = settings.data
    features = features_of(data)
    vocabulary = Vocabulary.load(data.vocabulary) if data.vocabulary is not None else Vocabulary()
    for feature in features:
        waits = (feature.name not in vocabulary.values if feature.type != "numeric" and feature.values == "vocabulary"
                 and feature.target is None else feature.type == "numeric" and feature.boundaries is None
                 and feature.name not in {**vocabulary.boundaries, **vocabulary.moments} and not feature.is_value)
        if waits:
            raise UserError("a stream cannot be counted before training", where=f"features.{feature.name}",
                            hint="values: hash or integer, boundaries for buckets, or data.vocabulary of files")
    spec = assign_columns(features, settings.model.embedding_size, vocabulary.sizes())
    return features, columns_of(data, reader(data.reader)), spec, vocabulary


def check(settings: Run) -> None:
    """Raises a `UserError` for what does not go with a stream."""
    options = settings.train
    if options.share_users:
        raise UserError("samples of a stream come as they come", where="train.share_users", hint="set it to false")
    if compares(settings):
        raise UserError("losses that compare a user's samples are for logs", where="model.tasks",
                        hint="set pairwise and listwise to 0")
    if options.keep_best is not None:
        raise UserError("a stream goes on: the newest parameters are the ones to keep", where="train.keep_best",
                        value=options.keep_best, hint="set it to null")
    if settings.data.stream.kafka.assignment == "group" and settings.data.stream.labels is not None:
        raise UserError("labels that come later need all partitions", where="data.stream.kafka.assignment",
                        value="group", hint="set it to all")


def stream_source(settings: Run, reading: tuple, processes: Processes) -> StreamSource:
    """The source of a run."""
    data = settings.data
    return StreamSource(reader(data.reader).stream(data), data.stream, reading, data.on_bad_row,
                        settings.train.global_batch_size, settings.output.directory, processes.rank, processes.ranks)


def train_stream(settings: Run, network: TrainingLoss, reading: tuple, processes: Processes) -> dict:
    """Trains as long as the stream goes on, or `train.steps`; the run's figures."""
    options, model = settings.train, network.model
    spec: FeatureSpec
    _, columns, spec, vocabulary = reading
    tables = None
    if settings.data.tables.place == "host":
        backend, network = hosted_backend(settings, spec, len(columns.labels), processes)
        model, tables = network.model, backend.hosted.tables
    else:
        options = unsharded_network(network, options, settings.parallel.resolve(processes.ranks))
        by_rows = tables_by_rows(settings, network, processes.ranks)
        optimizer = run_optimizer(network.trainable_params(), options, is_sparse, by_rows)
        step = TrainStep(network, optimizer, options, group=processes.group, rank=processes.rank,
                         ranks=processes.ranks)
        backend = MindSporeBackend(step, scorer=Scores(model))
    initialize(model, options.seed)
    source = stream_source(settings, reading, processes)
    companions, evaluate = [source], []
    if tables is not None:
        # What expires by seconds does so by the time of the events.
        tables.clock = lambda: source.event_time(tables.steps + 1) or 1.0
        companions.append(tables)
    if settings.data.stream.progressive:
        progressive = Progressive(backend, columns.labels, settings.data.stream.windows)
        companions.append(progressive)
        evaluate.append(progressive)
    counted = count(network)
    if processes.rank == 0:
        vocabulary.save(Path(settings.output.directory) / VOCABULARY)
    publisher = publisher_of(settings, backend, spec, event_time=source.event_time, tables=tables)
    if publisher is not None:
        companions.append(publisher)
    trainer = Trainer(backend, run_of(settings, counted, source, evaluate=evaluate, companions=companions))
    return {**trainer.run(), **{key: counted[key] for key in ("parameters", "dense_parameters")}}
