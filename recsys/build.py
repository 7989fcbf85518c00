"""Rankers as `Task`s: what the trainer and the proofs in `parallel` build from a config file."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.common.errors import UserError
from parallel.common.settings import Settings
from parallel.sharding.config import ParallelConfig, divides
from parallel.task import Input, ModelPackage, Task, with_sample_numbers
from parallel.training.backend import SlicedBackend
from recsys.data.features import FeatureSpec
from recsys.models import NAMES
from recsys.network import labels_of, loss_network
from recsys.passes import tasks as passes
from recsys.settings import run_class
from recsys.tables.columns import window_spec

if TYPE_CHECKING:
    from recsys.settings import Run

__all__ = ["PACKAGE", "build", "labels_of", "loss_network", "sample_batch", "spec_of"]


def build(settings: Run, parallel: ParallelConfig, compute_dtype: str = "float32") -> Task:
    """The training loss of a ranker for one global batch, checked against the layout.

    Args:
        settings: a `recsys.settings.Run`.
        parallel: resolved.
        compute_dtype: "float32" or "float16".

    Raises:
        UserError: an axis does not divide what it shards, or a vocabulary's size is neither given nor to be had.
    """
    from mindspore.nn.utils import no_init_parameters

    from recsys.layers.embedding import Table
    from recsys.layers.sizes import count
    from recsys.tables.names import is_sparse

    spec = spec_of(settings)
    hosted = settings.data.tables.place == "host"
    if hosted:
        spec = windows_of(settings, spec, parallel)
    tasks = len(labels_of(settings))
    columns = target_columns(settings)
    network = loss_network(settings, spec, tasks, compute_dtype)
    if hosted:
        with no_init_parameters():
            for _, cell in network.cells_and_names():
                if isinstance(cell, Table):
                    cell.divide(parallel.data)
    check_layout(settings, network.model, parallel)
    batch = settings.train.global_batch_size
    known = min(spec.tables.values()) // (parallel.data if hosted else 1)
    inputs = [Input("ids", (batch, spec.id_columns), "int32", known),
              Input("numbers", (batch, spec.numeric_columns), "float32"),
              Input("labels", (batch, columns), "float32")]
    figures = {"model": settings.model.name, "layers": settings.model.depth(), **count(network)}
    task = Task(network, inputs, lambda seed: sample_batch(spec, batch, columns, seed), batch, figures, is_sparse,
                scores, given=hosted)
    return with_sample_numbers(task, settings.model.dropout)


def windows_of(settings: Run, spec: FeatureSpec, parallel: ParallelConfig) -> FeatureSpec:
    """The spec of a network whose tables are on the host: a window for each data-parallel part of a batch.

    Raises:
        UserError: micro-batches or stages, which windows do not know, or a batch that does not divide.
    """
    if parallel.pipeline.stages * parallel.pipeline.micro_batches * parallel.micro_batch_interleave > 1 or \
            settings.train.accumulation > 1:
        raise UserError("tables on the host know no stages and no micro-batches", where="data.tables.place",
                        value="host", hint="set it to graph")
    divides(parallel.data, settings.train.global_batch_size, where="parallel.data", what="train.global_batch_size")
    spec = window_spec(spec, settings.train.global_batch_size // parallel.data, settings.data.tables.window)
    return replace(spec, tables={width: rows * parallel.data for width, rows in spec.tables.items()})


def scores(network: Any) -> Any:
    """The cell from features to probabilities in a `TrainingLoss`, with the same parameters."""
    from recsys.ranker import Scores

    return Scores(network.model)


def target_columns(settings: Run) -> int:
    """T: labels, columns of weights, and one for the group where a loss compares a user's samples."""
    return (len(labels_of(settings)) + len(set(settings.data.label_weights.values()))
            + int(any(task.pairwise or task.listwise for task in settings.model.tasks)))


def spec_of(settings: Run) -> FeatureSpec:
    """Where the features are in rows and tables; reads the log only where a vocabulary's size is not given."""
    from recsys.data.columns import spec_without_data
    from recsys.data.log import prepare

    spec = spec_without_data(settings.data, settings.model.embedding_size)
    return spec or prepare(settings.data, settings.model.embedding_size).spec


def check_layout(settings: Run, model: Any, parallel: ParallelConfig) -> None:
    """Raises a `UserError` unless every axis divides what it shards."""
    batch = settings.train.global_batch_size
    micro = max(parallel.pipeline.micro_batches, settings.train.accumulation)
    if any(task.pairwise or task.listwise for task in settings.model.tasks) and (parallel.world > 1 or micro > 1):
        raise UserError("losses that compare a user's samples need all of the batch on one device", where="model.tasks",
                        hint="set pairwise and listwise to 0, or train on one device without micro-batches")
    divides(parallel.data * parallel.pipeline.micro_batches if parallel.pipeline.stages > 1 else parallel.data, batch,
            where="parallel.data", what="train.global_batch_size")
    if parallel.sequence:
        raise UserError("rankers have no residual stream of a sequence's tokens to shard", where="parallel.sequence",
                        value=True, hint="set it to false; model.op_sharding: tokens shards feature tokens")
    if parallel.pipeline.stages > 1 and parallel.pipeline.schedule != "1f1b":
        raise UserError("stages of rankers run 1f1b only", where="parallel.pipeline.schedule",
                        value=parallel.pipeline.schedule, hint="set it to 1f1b")
    if parallel.optimizer_shard > 1 and parallel.optimizer.level > 1 and micro > 1:
        raise UserError("gradients of a ranker's micro-batches are not kept sharded", where="parallel.optimizer.level",
                        value=parallel.optimizer.level, hint="set it to 1, or train without micro-batches")
    if settings.model.lookup.by == "alltoall":
        check_exchange(settings, model, parallel)
    model.check_layout(parallel, batch)


def check_exchange(settings: Run, model: Any, parallel: ParallelConfig) -> None:
    """Raises a `UserError` unless tables and ids can be sharded over all devices of data x op."""
    if settings.model.separation() is not None or settings.data.tables.place == "host":
        raise UserError("is for rankers with one lookup of tables in the graph", where="model.lookup.by",
                        value="alltoall", hint="set it to op")
    if parallel.pipeline.stages > 1:
        raise UserError("tables over all devices know no stages", where="model.lookup.by", value="alltoall")
    devices = parallel.data * parallel.op
    for width, rows in model.spec.tables.items():
        columns = sum(slot.length for slot in model.spec.slots.values() if slot.width == width)
        divides(devices, rows, where="parallel", what=f"table of width {width}, rows")
        divides(devices, settings.train.global_batch_size * columns, where="train.global_batch_size",
                what=f"ids of width {width} in a batch,")


def sample_batch(spec: FeatureSpec, batch: int, tasks: int, seed: int) -> tuple[np.ndarray, ...]:
    """A random batch: ids within each feature's rows, standard normal numbers, labels of 0 and 1."""
    generator = np.random.default_rng(seed)
    ids = np.zeros((batch, spec.id_columns), np.int32)
    for slot in spec.slots.values():
        columns = slice(slot.start, slot.start + slot.length)
        ids[:, columns] = slot.offset + generator.integers(0, slot.rows, (batch, slot.length))
    numbers = generator.standard_normal((batch, spec.numeric_columns)).astype(np.float32)
    labels = generator.integers(0, 2, (batch, tasks)).astype(np.float32)
    return ids, numbers, labels


class RankerPackage(ModelPackage["Run"]):
    """The rankers, for `parallel`."""

    name = "recsys"
    models = NAMES
    inference_verbs = MappingProxyType({"evaluate": False, "serve": False, "bench": False})
    has_scores = True

    def settings_class(self, name: str) -> type[Settings]:
        """See `ModelPackage`."""
        return run_class(name)

    def stored_settings_class(self, name: str) -> type[Settings]:
        """The model block is taken as it is, so that no model (and no MindSpore) need be imported."""
        from recsys.settings import StoredRun

        return StoredRun

    def build(self, settings: Run, parallel: ParallelConfig, compute_dtype: str = "float32") -> Task:
        """See `build`."""
        return build(settings, parallel, compute_dtype)

    def train_on(self, settings: Run, backend: SlicedBackend, figures: dict[str, Any]) -> dict[str, Any]:
        """See `recsys.training.any_backend`."""
        from recsys.training import any_backend

        return any_backend.train_on(settings, backend, figures)

    def replay_overrides(self, settings: Run) -> list[str]:
        """One device computes every row of routed experts, so no capacity may leave one out. Of the epsilon see
        docs/replay.md."""
        if settings.data.tables.place == "host":
            raise UserError("a replay compares networks that hold their tables", where="data.tables.place",
                            value="host", hint="set it to graph")
        capacity, epsilon = settings.model.full_capacity(), ["train.optimizer.epsilon=1e-2"]
        if capacity is not None:
            return [f"model.moe.capacity_factor={capacity}", *epsilon]
        return epsilon if settings.model.separation() is not None else []

    def inference_kinds(self, settings: Run, verb: str | None = None) -> tuple[str, ...]:
        """See `recsys.passes.tasks`."""
        return passes.inference_kinds(settings, verb)

    def inference(self, settings: Run, parallel: ParallelConfig, compute_dtype: str, kind: str) -> Task:
        """See `recsys.passes.tasks`."""
        return passes.inference(settings, parallel, compute_dtype, kind)

    def check_inference(self, settings: Run) -> None:
        """See `recsys.passes.tasks`."""
        passes.check_inference(settings)

    def shapes_inference(self, tree: dict[str, Any]) -> dict[str, Any]:
        """See `recsys.passes.tasks`."""
        return passes.shapes_inference(tree)


PACKAGE = RankerPackage()
