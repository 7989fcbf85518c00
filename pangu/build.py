"""PanGu-alpha as a `Task`: what the trainer and the proofs in `parallel` build from a config file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.common.settings import Settings
from parallel.sharding.config import ParallelConfig
from parallel.task import Input, Task, with_sample_numbers

if TYPE_CHECKING:
    from pangu.settings import Run

MODELS = frozenset({"pangu_alpha"})
_COUNTED_SHARE = 0.5  # of random positions that belong to an answer


def settings_class(name: str) -> type[Settings]:
    """The settings of a run of `name`."""
    from pangu.settings import Run

    return Run


def train_on(settings: Run, backend: Any, figures: dict[str, Any]) -> dict[str, Any]:
    """Trains on packed records, on any backend: see `pangu.train_on`."""
    from pangu import train_on as any_backend

    return any_backend.train_on(settings, backend, figures)


def replay_overrides(settings: Run) -> list[str]:
    """See `parallel.task`: PanGu-alpha needs none."""
    return []


def build(settings: Run, parallel: ParallelConfig, compute_dtype: str = "float32") -> Task:
    """The training loss of PanGu-alpha for one global batch, checked against the layout.

    Args:
        settings: a `pangu.settings.Run`.
        parallel: resolved.
        compute_dtype: "float32" or "float16".

    Raises:
        UserError: an axis does not divide what it shards, or the batch.
    """
    from mindspore.nn.utils import no_init_parameters

    from pangu.config import check_layout

    check_layout(settings.model, parallel)
    with no_init_parameters():
        network = training_network(settings, compute_dtype)
    batch, length = settings.train.global_batch_size, settings.model.sequence_length
    vocabulary = settings.model.vocabulary_size
    inputs = [Input("records", (batch, length + 1), "int32", vocabulary),
              Input("position_ids", (batch, length), "int32", length),
              Input("documents", (batch, length), "int32", 2)]
    if settings.adapt is not None:
        inputs.append(Input("counted", (batch, length), "int32", 2))
    task = Task(network, inputs, lambda seed: sample_batch(settings, seed), batch * length,
                {"model": settings.model.name, "layers": settings.model.layers})
    return with_sample_numbers(task, settings.model.dropout)


def training_network(settings: Run, compute_dtype: str, weighted: bool = False) -> Any:
    """The cell from the inputs to the loss: of packed records, or of answers where `settings.adapt` says so."""
    from mindspore import dtype as mstype

    from pangu.model import PanGuAlpha, TrainingLoss

    model = PanGuAlpha(settings.model, getattr(mstype, compute_dtype))
    if settings.adapt is None:
        return TrainingLoss(model, weighted)
    from pangu.adaptation.network import adapted_network

    return adapted_network(model, settings.adapt, weighted)


def sample_batch(settings: Run, seed: int) -> tuple[np.ndarray, ...]:
    """A random batch with document ends and uneven padding: records [B, S+1], positions and documents [B, S]."""
    from pangu.data.dataset import document_positions

    model, batch = settings.model, settings.train.global_batch_size
    generator = np.random.default_rng(seed)
    low = min(10, model.vocabulary_size - 1)
    records_BR = generator.integers(low, model.vocabulary_size, (batch, model.sequence_length + 1), dtype=np.int32)
    ends_BR = generator.random(records_BR.shape) < 4.0 / model.sequence_length
    records_BR[ends_BR] = model.eot_id
    lengths_B = generator.integers(3 * model.sequence_length // 4, records_BR.shape[1] + 1, batch)
    records_BR[np.arange(records_BR.shape[1]) >= lengths_B[:, None]] = model.pad_id
    positions_BS, documents_BS = document_positions(records_BR[:, :-1], model.eot_id)
    if settings.adapt is None:
        return records_BR, positions_BS, documents_BS
    counted_BS = (generator.random(positions_BS.shape) < _COUNTED_SHARE) & (records_BR[:, :-1] != model.pad_id)
    return records_BR, positions_BS, documents_BS, counted_BS.astype(np.int32)
