"""PanGu-alpha as a `Task`: what the trainer and the proofs in `parallel` build from a config file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pangu.generation.sharded.shapes import KINDS, shapes_inference
from parallel.common.errors import UserError
from parallel.common.settings import Settings
from parallel.sharding.config import ParallelConfig
from parallel.task import Input, Task, with_sample_numbers

if TYPE_CHECKING:
    from pangu.settings import Run

__all__ = ["INFERENCE_VERBS", "MODELS", "TRAINING_VERBS", "build", "check_inference", "decoder_sizes", "inference",
           "inference_kinds", "inference_overrides", "inference_sample", "settings_class", "shapes_inference",
           "train_on", "written_out"]
MODELS = frozenset({"pangu_alpha"})
_LARGEST_BATCH = 256  # sequences that one graph decodes at once; more take several calls
_COUNTED_SHARE = 0.5  # of random positions that belong to an answer
INFERENCE_VERBS = {"generate": False, "evaluate": True, "serve": False}
"""Verbs that run graphs of inference -> whether MindSpore's processes share their work where nothing is sharded."""


def check_adapts(settings: Run) -> None:
    """Raises a UserError unless a run says what to adapt to."""
    if settings.adapt is None:
        raise UserError("the config file does not say what to adapt to", where="adapt",
                        hint="add adapt.checkpoint=DIR adapt.pairs=FILE")


TRAINING_VERBS = {"train": lambda settings: None, "finetune": check_adapts}


def settings_class(name: str) -> type[Settings]:
    """The settings of a run of `name`."""
    from pangu.settings import Run

    return Run


def train_on(settings: Run, backend: Any, figures: dict[str, Any]) -> dict[str, Any]:
    """Trains on packed records, on any backend: see `pangu.train_on`."""
    from pangu import train_on as any_backend

    return any_backend.train_on(settings, backend, figures)


def written_out(settings: Run, chosen: bool) -> list[str]:
    """See `parallel.task`: attention by products and softmax."""
    return ["model.attention=written_out"] if chosen or settings.model.attention == "auto" else []


def replay_overrides(settings: Run) -> list[str]:
    """See `parallel.task`: PanGu-alpha needs none."""
    return []


def build(settings: Run, parallel: ParallelConfig, compute_dtype: str = "float32") -> Task:
    """The training loss of PanGu-alpha for one global batch, checked against the layout.

    Args:
        settings: a `pangu.settings.Run`.
        parallel: resolved.
        compute_dtype: "float32", "float16" or "bfloat16".

    Raises:
        UserError: an axis does not divide what it shards, or the batch; flash attention where it is not to be had.
    """
    from mindspore.nn.utils import no_init_parameters

    from pangu.config import check_layout
    from parallel.training.sharded.step import micro_batches

    check_layout(settings.model, parallel)
    parts = parallel.data * micro_batches(settings.train, parallel) * parallel.micro_batch_interleave
    check_documents(settings, settings.train.global_batch_size // parts)
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


def inference(settings: Run, parallel: ParallelConfig, compute_dtype: str, kind: str) -> Task:
    """The network that generates and scores over a paged cache (`pangu.generation.sharded.graph`).

    Args:
        settings: a `pangu.settings.Run`; `generate` says how much is read at once.
        parallel: resolved, of one group of data parallelism.
        compute_dtype: see `build`.
        kind: one of `pangu.generation.sharded.shapes.KINDS`.

    Raises:
        UserError: an axis does not divide what it shards.
    """
    from mindspore import dtype as mstype
    from mindspore.nn.utils import no_init_parameters

    from pangu.config import check_layout
    from pangu.generation.sharded.graph import span_decoder
    from pangu.generation.sharded.shapes import span_shape
    from pangu.model import PanGuAlpha

    model, shape = settings.model, span_shape(kind, settings.model, settings.generate)
    check_layout(model, parallel)
    with no_init_parameters():
        network = span_decoder(PanGuAlpha(model, getattr(mstype, compute_dtype)), shape)
    inputs = [Input(name, size, "int8" if name == "visible" else "int32") for name, size in shape.inputs().items()]
    tokens = shape.groups * shape.tokens
    return Task(network, inputs, lambda seed: (), tokens, {"model": model.name, "layers": model.layers})


def inference_sample(settings: Run, kind: str, seed: int) -> list[np.ndarray]:
    """Inputs of a graph of `inference` that mean something: sequences at random places of the cache."""
    from pangu.generation.sharded.runner import sample_call
    from pangu.generation.sharded.shapes import span_shape

    return sample_call(kind, span_shape(kind, settings.model, settings.generate), settings.model, seed)


def decoder_sizes(settings: Run) -> dict[str, Any]:
    """What `parallel.planning.serving.Decoder` asks."""
    model, generate = settings.model, settings.generate
    return {"layers": model.layers, "width": model.hidden_size, "heads": model.heads, "inner": model.ffn,
            "vocabulary": model.vocabulary_size, "context": model.sequence_length, "batch": generate.batch_size,
            "chunk": generate.prefill_chunk, "whole_vocabulary": not settings.parallel.vocabulary}


def inference_kinds(settings: Run, verb: str | None = None) -> tuple[str, ...]:
    """The graphs of `inference`; every verb takes all."""
    return KINDS


def inference_overrides(settings: Run, verb: str) -> list[str]:
    """Overrides that give the graphs of a verb the shapes that it works in."""
    if verb != "serve":
        return []
    engine = settings.serve.engine
    return [f"generate.batch_size={min(engine.running, _LARGEST_BATCH)}",
            f"generate.prefill_chunk={engine.prefill_chunk}"]


def check_inference(settings: Run) -> None:
    """Raises a UserError unless a resolved layout fits the model."""
    from pangu.config import check_layout

    check_layout(settings.model, settings.parallel.forward().resolve())


def training_network(settings: Run, compute_dtype: str, weighted: bool = False) -> Any:
    """The cell from the inputs to the loss: of packed records, or of answers where `settings.adapt` says so."""
    from mindspore import dtype as mstype

    from pangu.model import PanGuAlpha, TrainingLoss

    dtype = getattr(mstype, compute_dtype)
    model = PanGuAlpha(settings.model, dtype, attention_of(settings, dtype))
    if settings.adapt is None:
        return TrainingLoss(model, weighted)
    from pangu.adaptation.network import adapted_network

    return adapted_network(model, settings.adapt, weighted)


def attention_of(settings: Run, compute_dtype: Any) -> Any:
    """The form that attention takes in training (`parallel.layers.attention.form_of`)."""
    from parallel.layers.attention import form_of

    model, torch = settings.model, settings.parallel.backend == "torch"
    wanted = "written_out" if model.attention == "auto" and torch else model.attention
    return form_of(wanted, dropout=model.dropout, compute_dtype=compute_dtype,
                   head_width=model.hidden_size // model.heads, length=model.sequence_length)


def check_documents(settings: Run, records: int) -> None:
    """Raises a UserError unless flash attention takes the documents of `records` records, those of a device's
    micro-batch, in one call."""
    from parallel.layers.attention import MOST_SEQUENCES

    model = settings.model
    told = model.is_told_ends(settings.train.precision, settings.parallel.backend)
    if told and records * model.most_documents > MOST_SEQUENCES:
        raise UserError(f"flash attention takes {MOST_SEQUENCES} documents at once, and a device's micro-batch has "
                        f"{records} records", where="model.most_documents", value=model.most_documents,
                        hint=f"at most {MOST_SEQUENCES // records}, or smaller micro-batches"
                        if records <= MOST_SEQUENCES else "smaller micro-batches")


def sample_batch(settings: Run, seed: int) -> tuple[np.ndarray, ...]:
    """A random batch with document ends and uneven padding: records [B, S+1], positions and documents [B, S]."""
    from pangu.data.dataset import document_positions

    model, batch = settings.model, settings.train.global_batch_size
    generator = np.random.default_rng(seed)
    low = min(10, model.vocabulary_size - 1)
    records_BR = generator.integers(low, model.vocabulary_size, (batch, model.sequence_length + 1), dtype=np.int32)
    ends_BR = generator.random(records_BR.shape) < 4.0 / model.sequence_length
    ends_BR &= np.cumsum(ends_BR, axis=1) < model.most_documents
    records_BR[ends_BR] = model.eot_id
    lengths_B = generator.integers(3 * model.sequence_length // 4, records_BR.shape[1] + 1, batch)
    records_BR[np.arange(records_BR.shape[1]) >= lengths_B[:, None]] = model.pad_id
    positions_BS, documents_BS = document_positions(records_BR[:, :-1], model.eot_id)
    if settings.adapt is None:
        return records_BR, positions_BS, documents_BS
    counted_BS = (generator.random(positions_BS.shape) < _COUNTED_SHARE) & (records_BR[:, :-1] != model.pad_id)
    return records_BR, positions_BS, documents_BS, counted_BS.astype(np.int32)
