"""A ranker under its loss, by the settings of a run. MindSpore is imported when one is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.common.errors import UserError
from recsys.data.features import FeatureSpec
from recsys.data.readers import reader
from recsys.models import module_of

if TYPE_CHECKING:
    from parallel.layers.embedding import RowTable
    from recsys.settings import Run


def loss_network(settings: Run, spec: FeatureSpec, tasks: int, compute_dtype: str = "float32") -> Any:
    """The model under its loss, without parameter values."""
    from mindspore import dtype as mstype
    from mindspore.nn.utils import no_init_parameters

    from recsys.ranker import TrainingLoss

    if spec.is_dynamic and settings.data.tables.place != "host":
        name = next(name for name, slot in spec.slots.items() if slot.feature.is_dynamic)
        raise UserError("values: dynamic needs tables on the host", where=f"features.{name}.values",
                        hint="set data.tables.place: host")
    with no_init_parameters():
        model = module_of(settings.model.name).MODEL(settings.model, spec, tasks, getattr(mstype, compute_dtype))
        move_by_rows(settings, model)
        return TrainingLoss(model, label_weights(settings) if settings.data.label_weights else None)


def move_by_rows(settings: Run, model: Any) -> None:
    """Lets the gradients of tables in the graph be those of a step's rows, where their optimizer has a form that moves
    no others and each device looks a batch up at once.

    Raises:
        UserError: the optimizer has no other form, and this run looks tables up otherwise.
    """
    from parallel.layers.embedding import RowTable
    from parallel.training.optimizers.dense import OPTIMIZERS
    from parallel.training.optimizers.rows import ROW_OPTIMIZERS

    if settings.data.tables.place == "host":
        return
    own, parallel = settings.train.sparse_optimizer or settings.train.optimizer, settings.parallel
    pieces = settings.train.accumulation * parallel.pipeline.micro_batches * parallel.micro_batch_interleave
    if settings.model.lookup.by == "alltoall" and pieces == 1 and own.name in ROW_OPTIMIZERS:
        for _, cell in model.cells_and_names():
            if isinstance(cell, RowTable):
                columns = sum(slot.length for slot in model.spec.slots.values() if slot.width == cell.width)
                cell.by_rows, cell.ids_of_step = True, settings.train.global_batch_size * columns
                if own.name == "rowwise_adagrad":
                    cell.keep_accumulator(own.initial_accumulator)
    elif own.name not in OPTIMIZERS:
        hint = ("set model.lookup.by: alltoall, or data.tables.place: host" if pieces == 1 else
                "set train.accumulation, parallel.pipeline.micro_batches and parallel.micro_batch_interleave to 1")
        raise UserError("moves only the rows of a step, which this lookup does not give",
                        where="train.sparse_optimizer.name", value=own.name, hint=hint)


def tables_by_rows(settings: Run, network: Any, ranks: int) -> list[RowTable]:
    """The tables of an unsharded network whose gradients are of rows; none over several processes, which add up the
    gradients of whole tables.

    Raises:
        UserError: the optimizer has no form that moves whole tables.
    """
    from parallel.training.optimizers.dense import OPTIMIZERS
    from parallel.training.optimizers.row_gradients import row_tables

    tables, own = row_tables(network), settings.train.sparse_optimizer or settings.train.optimizer
    if ranks == 1 or not tables:
        return tables
    if own.name not in OPTIMIZERS:
        raise UserError("on the CPU MindSpore's processes hold whole tables", where="train.sparse_optimizer.name",
                        value=own.name, hint="set parallel.backend: torch, or data.tables.place: host")
    for cell in tables:
        cell.by_rows = False
    return []


def label_weights(settings: Run) -> np.ndarray:
    """bool [K, W]: which of the columns of weights each label's samples have."""
    names, own = labels_of(settings), settings.data.label_weights
    columns = list(dict.fromkeys(own.values()))
    return np.array([[own.get(name) == column for column in columns] for name in names])


def labels_of(settings: Run) -> list[str]:
    """Label columns of the run."""
    return settings.data.labels or reader(settings.data.reader).labels
