"""The settings of one run: every block of a file under configs/pangu/."""

from __future__ import annotations

from typing import Any

import pydantic

from pangu.adaptation.settings import AdaptSettings
from pangu.config import ModelConfig
from pangu.data.packing import PackOptions
from pangu.data.train_vocabulary import VocabularyOptions
from pangu.generation.settings import GenerateSettings
from pangu.serving.settings import ServeSettings
from parallel.common.settings import Settings
from parallel.sharding.config import ParallelConfig
from parallel.training.settings import OutputSettings, TrainSettings


class DataConfig(Settings):
    """What the model is trained on."""

    corpus: str | None = None
    """Text that `train-vocabulary` and `pack` read: txt or jsonl, plain or .xz .gz .zst, or a folder of such."""
    tokenizer: str = "runs/tiny/vocabulary.model"
    """SentencePiece model: written by `train-vocabulary`, read by everything else."""
    directory: str = "runs/tiny/records"
    """Packed records: written by `pack`, read by `train`."""
    validation_directory: str | None = None
    """Packed records to validate on, its training part; null = the held-out records of `directory`."""
    by_file: bool = False
    """Each row of the batches comes from files of its own, in an order of its own, so that a machine reads (and needs)
    only the files of its rows: rows and files are divided into as many equal shares as divide both, whatever the number
    of machines. false: records of all files are shuffled together."""
    shuffle: bool = True
    """Whether records are read in an order drawn anew for every epoch, or as written."""
    eod_reset: bool = True
    """Whether attention and positions start anew after every document end inside a record."""


class Run(Settings):
    """All blocks. A block that a verb does not need may be left out."""

    model: ModelConfig = ModelConfig()
    """Sizes and choices of the model."""
    data: DataConfig = DataConfig()
    """Corpus, tokenizer and packed records."""
    vocabulary: VocabularyOptions = VocabularyOptions()
    """How a vocabulary is trained; its size is always model.vocabulary_size."""
    pack: PackOptions = PackOptions()
    """How documents become records; their length is always model.sequence_length + 1."""
    train: TrainSettings = TrainSettings()
    """Batch, steps, optimizer."""
    parallel: ParallelConfig = ParallelConfig()
    """How the model is sharded over devices."""
    output: OutputSettings = OutputSettings()
    """Where results go."""
    generate: GenerateSettings = GenerateSettings()
    """Decoding."""
    adapt: AdaptSettings | None = None
    """Pairs of prompt and answer to train a trained model on (`finetune`); null = `train` trains on packed records."""
    serve: ServeSettings = ServeSettings()
    """The HTTP server."""


class ServeRun(Run):
    """All blocks; a key of `serve` may be given without the block's name, as port=8000."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _serve_keys(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or not isinstance(tree.get("serve") or {}, dict):
            return tree
        short = {key for key in tree if key in ServeSettings.model_fields and key not in cls.model_fields}
        block = {**(tree.get("serve") or {}), **{key: tree[key] for key in short}}
        return {key: value for key, value in tree.items() if key not in short} | ({"serve": block} if short else {})
