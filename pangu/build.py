"""PanGu-alpha as a `Task`: what the trainer and the proofs in `parallel` build from a config file."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from pangu.generation.sharded.shapes import KINDS, shapes_inference
from parallel.common.errors import UserError
from parallel.common.settings import Settings
from parallel.sharding.config import ParallelConfig
from parallel.task import Input, ModelPackage, Task, with_sample_numbers
from parallel.training.backend import Backend

if TYPE_CHECKING:
    from pangu.settings import Run

_LARGEST_BATCH = 256  # sequences that one graph decodes at once; more take several calls
_COUNTED_SHARE = 0.5  # of random positions that belong to an answer


def check_adapts(settings: Run) -> None:
    """Raises a UserError unless a run says what to adapt to."""
    if settings.adapt is None:
        raise UserError("the config file does not say what to adapt to", where="adapt",
                        hint="add adapt.checkpoint=DIR adapt.pairs=FILE")


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
                {"model": settings.model.name, "layers": settings.model.layers},
                most_rows=most_records(settings, compute_dtype))
    return with_sample_numbers(task, settings.model.dropout)


def training_network(settings: Run, compute_dtype: str, weighted: bool = False) -> Any:
    """The cell from the inputs to the loss: of packed records, or of answers where `settings.adapt` says so."""
    from mindspore import dtype as mstype

    from pangu.model import PanGuAlpha, TrainingLoss

    model = PanGuAlpha(settings.model, getattr(mstype, compute_dtype), attention_of(settings, compute_dtype))
    if settings.adapt is None:
        return TrainingLoss(model, weighted)
    from pangu.adaptation.network import adapted_network

    return adapted_network(model, settings.adapt, weighted)


def attention_of(settings: Run, compute_dtype: str) -> Any:
    """The form that attention takes in training (`parallel.layers.attention.form_of`)."""
    from mindspore import dtype as mstype

    from parallel.layers.attention import form_of

    model, torch = settings.model, settings.parallel.backend == "torch"
    wanted = "written_out" if model.attention == "auto" and torch else model.attention
    return form_of(wanted, dropout=model.dropout, compute_dtype=getattr(mstype, compute_dtype),
                   head_width=model.hidden_size // model.heads, length=model.sequence_length)


def most_records(settings: Run, compute_dtype: str) -> int | None:
    """Records of a device's micro-batch at most: flash attention takes so many documents at once."""
    from parallel.layers.attention import MOST_SEQUENCES

    told = attention_of(settings, compute_dtype) == "packed"
    return MOST_SEQUENCES // settings.model.most_documents if told else None


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


class PanguPackage(ModelPackage["Run"]):
    """PanGu-alpha, for `parallel`."""

    name = "pangu"
    models = frozenset({"pangu_alpha"})
    training_verbs = frozenset({"train", "finetune"})
    inference_verbs = MappingProxyType({"generate": False, "evaluate": True, "serve": False})

    def settings_class(self, name: str) -> type[Settings]:
        """See `ModelPackage`."""
        from pangu.settings import Run

        return Run

    def build(self, settings: Run, parallel: ParallelConfig, compute_dtype: str = "float32") -> Task:
        """See `build`."""
        return build(settings, parallel, compute_dtype)

    def train_on(self, settings: Run, backend: Backend, figures: dict[str, Any]) -> dict[str, Any]:
        """See `pangu.train_on`."""
        from pangu import train_on as any_backend

        return any_backend.train_on(settings, backend, figures)

    def check_training(self, settings: Run, verb: str) -> None:
        """See `ModelPackage`."""
        if verb == "finetune":
            check_adapts(settings)

    def written_out(self, settings: Run) -> list[str]:
        """Attention by products and softmax."""
        return ["model.attention=written_out"]

    def inference_kinds(self, settings: Run, verb: str | None = None) -> tuple[str, ...]:
        """The graphs that generate and score over a paged cache; every verb takes all."""
        return KINDS

    def inference(self, settings: Run, parallel: ParallelConfig, compute_dtype: str, kind: str) -> Task:
        """See `ModelPackage`; `settings.generate` says how much is read at once."""
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

    def check_inference(self, settings: Run) -> None:
        """See `ModelPackage`."""
        from pangu.config import check_layout

        check_layout(settings.model, settings.parallel.forward().resolve())

    def shapes_inference(self, tree: dict[str, Any]) -> dict[str, Any]:
        """See `ModelPackage`."""
        return shapes_inference(tree)

    def inference_overrides(self, settings: Run, verb: str) -> list[str]:
        """See `ModelPackage`."""
        if verb != "serve":
            return []
        engine = settings.serve.engine
        return [f"generate.batch_size={min(engine.running, _LARGEST_BATCH)}",
                f"generate.prefill_chunk={engine.prefill_chunk}"]

    def inference_sample(self, settings: Run, kind: str, seed: int) -> list[np.ndarray]:
        """Sequences at random places of the cache."""
        from pangu.generation.sharded.runner import sample_call
        from pangu.generation.sharded.shapes import span_shape

        return sample_call(kind, span_shape(kind, settings.model, settings.generate), settings.model, seed)

    def decoder_sizes(self, settings: Run) -> dict[str, Any]:
        """See `ModelPackage`."""
        model, generate = settings.model, settings.generate
        return {"layers": model.layers, "width": model.hidden_size, "heads": model.heads, "inner": model.ffn,
                "vocabulary": model.vocabulary_size, "context": model.sequence_length, "batch": generate.batch_size,
                "chunk": generate.prefill_chunk, "whole_vocabulary": not settings.parallel.vocabulary}


PACKAGE = PanguPackage()
