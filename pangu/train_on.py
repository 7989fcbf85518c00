"""Training PanGu-alpha on packed records, whatever the backend. Imports no framework."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pangu.adaptation.pairs import PairsDataset
from pangu.config import ModelConfig
from pangu.data.dataset import PackedDataset
from pangu.data.tokenizer import Tokenizer
from pangu.generation.generate import check_vocabulary
from parallel.checkpoint.adapter_names import is_adapter
from parallel.common.progress import table
from parallel.training.backend import Backend
from parallel.training.trainer import Run, Trainer

if TYPE_CHECKING:
    from pangu.settings import Run as RunSettings


def train_on(settings: RunSettings, backend: Backend, figures: dict[str, Any]) -> dict[str, Any]:
    """Trains, validates, saves; resumes where an earlier run of the same output folder stopped. The run's figures.

    Args:
        settings: a `pangu.settings.Run`.
        backend: this process.
        figures: figures of the network (not needed here).

    Raises:
        UserError: records that are missing, damaged or do not fit the model, and see `Trainer.run`.
    """
    training, validation = sources(settings, backend.share, backend.name)
    result = Trainer(backend, run_of(settings, training, validation, backend.ranks)).run()
    if backend.rank == 0:
        table("Trained", ["figure", "value"], result.items())
    return result


def run_of(settings: RunSettings, training: PackedDataset, validation: PackedDataset | None, ranks: int = 1) -> Run:
    """The run for the trainer."""
    tokens = settings.train.global_batch_size * settings.model.sequence_length
    return Run(training, settings.train, settings.output, validation=validation, units_per_step=tokens,
               flops_per_step=tokens * flops_per_token(settings.model), describe=settings.model_dump(mode="json"),
               layout=settings.parallel.resolve(ranks).layout(),
               start_from=settings.adapt.checkpoint if settings.adapt is not None else None, is_new=is_adapter)


def sources(settings: RunSettings, share: tuple[int, int], backend: str | None = None
            ) -> tuple[PackedDataset, PackedDataset | None]:
    """Training and validation records, the `share` (number, of how many) of every batch.

    Args:
        backend: "mindspore" or "torch"; None = what the settings say.
    """
    data, model = settings.data, settings.model
    told = model.is_told_ends(settings.train.precision, backend or settings.parallel.backend)
    most = model.most_documents if told else None
    if settings.adapt is not None:
        return _pairs(settings, share, most)
    shared = {"batch_size": settings.train.global_batch_size, "sequence_length": model.sequence_length,
              "vocabulary_size": model.vocabulary_size, "shard": share,
              "eod_reset": data.eod_reset, "seed": settings.train.seed, "by_file": data.by_file,
              "most_documents": most}
    training = PackedDataset(data.directory, shuffle=data.shuffle, **shared)
    if data.validation_directory is not None:
        return training, PackedDataset(data.validation_directory, shuffle=False, repeat=False, **shared)
    if not training.index.validation.records:
        return training, None
    # One pass, filled up with padding that has no weight: the perplexity is exactly that of the records.
    return training, PackedDataset(data.directory, split="validation", shuffle=False, repeat=False, **shared)


def _pairs(settings: RunSettings, share: tuple[int, int], most: int | None
           ) -> tuple[PairsDataset, PairsDataset | None]:
    tokenizer, adapt = Tokenizer(settings.data.tokenizer), settings.adapt
    check_vocabulary(tokenizer, settings.model.vocabulary_size)
    shared = {"batch_size": settings.train.global_batch_size, "seed": settings.train.seed,
              "sequence_length": settings.model.sequence_length, "shard": share,
              "most_documents": most}
    validation = None
    if adapt.validation is not None:
        validation = PairsDataset(adapt.validation, tokenizer, repeat=False, **shared)
    return PairsDataset(adapt.pairs, tokenizer, **shared), validation


def flops_per_token(model: ModelConfig) -> float:
    """Model FLOPs of one token, forward and backward: three times the forward matmuls.

    Forward: 2 for each weight of the layers and of the head, and 4 S D a layer for scores and mixing. The attention is
    counted in full, not halved for the causal mask; recomputation, norms and lookups are not counted. (Megatron-LM's
    convention.)
    """
    width, inner, length = model.hidden_size, model.ffn, model.sequence_length
    layer = 2 * (4 * width * width + 2 * width * inner) + 4 * length * width
    return 3.0 * (model.layers * layer + 2 * width * model.vocabulary_size)
