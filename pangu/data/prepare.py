"""From text to records: the verbs `train-vocabulary` and `pack`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from parallel.common.errors import UserError
from parallel.common.progress import table

if TYPE_CHECKING:
    from pangu.settings import Run


def run_train_vocabulary(settings: Run, arguments: argparse.Namespace) -> dict:
    """Verb `train-vocabulary`: trains model.vocabulary_size pieces on data.corpus and writes data.tokenizer."""
    from pangu.data.corpus import documents
    from pangu.data.train_vocabulary import train_vocabulary

    options = settings.vocabulary.model_dump()
    figures = train_vocabulary(documents(_corpus(settings)), settings.data.tokenizer,
                               size=settings.model.vocabulary_size, **options)
    table("Vocabulary", ["figure", "value"], figures.items())
    return figures


def run_pack(settings: Run, arguments: argparse.Namespace) -> dict:
    """Verb `pack`: packs data.corpus into records of model.sequence_length + 1 ids at data.directory."""
    from pangu.data import packing
    from pangu.data.tokenizer import Tokenizer

    _corpus(settings)
    check_tokenizer(Tokenizer(settings.data.tokenizer), settings)
    return packing.run_pack(packing.PackSettings(
        corpus=settings.data.corpus, tokenizer=settings.data.tokenizer, output=settings.data.directory,
        sequence_length=settings.model.sequence_length, **settings.pack.model_dump()))


def check_tokenizer(tokenizer: Any, settings: Run) -> None:
    """Raises a `UserError` unless the tokenizer has as many pieces as the model has rows."""
    if tokenizer.vocabulary_size != settings.model.vocabulary_size:
        raise UserError(f"the tokenizer has {tokenizer.vocabulary_size} pieces, but model.vocabulary_size differs",
                        where=settings.data.tokenizer, value=settings.model.vocabulary_size,
                        hint=f"set model.vocabulary_size={tokenizer.vocabulary_size}")


def _corpus(settings: Run) -> str:
    if settings.data.corpus is None:
        raise UserError("no corpus given", where="data.corpus", hint="data.corpus=FILE or a folder")
    return settings.data.corpus
