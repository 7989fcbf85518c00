"""Training a vocabulary of PanGu-alpha's kind from documents.

Source: the settings stored in the published model file (unigram, 40,000 pieces, nmt_nfkc, character coverage 0.9995,
text segmented by jieba and joined by spaces, special pieces at ids 0..9); arXiv:2104.12369, section 5.1, names BPE
instead, so the kind is an option.
"""

from __future__ import annotations

import io
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pangu.data.segmentation import Segmenter
from pangu.data.tokenizer import SPECIAL_PIECES
from parallel.common import protobuf_wire
from parallel.common.errors import UserError
from parallel.common.files import atomic_write
from parallel.common.settings import Settings

_CHUNK_CHARACTERS = 800
# SentencePiece skips longer sentences; 4 bytes a character and a space after each still fit.
_MAX_SENTENCE_BYTES = 5 * _CHUNK_CHARACTERS + 192
_LINE_ENDS = 0.15  # share of words after which a line is ended, see `_sentences`
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class VocabularyOptions(Settings):
    """How a vocabulary of a given size is trained."""

    kind: Literal["unigram", "bpe"] = "unigram"
    """Kind of SentencePiece model: unigram, as the published file is, or bpe, as the paper says."""
    character_coverage: float = Field(0.9995, gt=0.9, le=1.0)
    """Share of the text's characters that get a piece of their own; the rarest beyond it become `<unk>`."""
    max_piece_length: int = Field(16, ge=1, le=256)
    """Longest piece in characters, the word mark included."""
    max_sentences: int = Field(1_000_000, ge=1)
    """Most lines (truncated to 800 characters) to learn from, drawn evenly from the whole corpus; bounds the memory."""
    seed: int = 0
    """Seed of that draw."""
    shrink: bool = False
    """Where the text is too little for the size, train the largest vocabulary it allows instead of stopping."""
    threads: int = Field(4, ge=1, le=256)
    """Threads of the trainer. Fixed rather than taken from the machine, because sums, and with them pieces, can depend
    on it."""


class VocabularySettings(VocabularyOptions):
    """How a vocabulary is trained."""

    size: int = Field(40000, ge=len(SPECIAL_PIECES) + 2, le=1_000_000)
    """Number of pieces, the ten special ones included. The published vocabulary has 40,000."""


class TooLittleText(UserError):
    """The text does not hold enough different pieces; `largest` is the size that it would allow."""

    largest: int = 0


def train_vocabulary(documents: Iterable[str], output: str | Path, *, size: int = 40000, kind: str = "unigram",
                     segmentation: str = "auto", **options: Any) -> dict[str, Any]:
    """Trains a SentencePiece model on jieba's words of `documents` and writes it to `output`.

    The same documents and options give the same file. Special pieces have the published ids: 0 `<unk>`, 1 `<s>`,
    2 `</s>`, 3 U+2583 (newline), 4 U+2582 (space), 5 `<sep>`, 6 `<pad>`, 7 `<mask>`, 8 `<eod>`, 9 `<eot>`.

    Args:
        documents: texts, read once; memory depends on `max_sentences`, not on how many there are.
        output: the model file; it appears only when training has ended well.
        size: number of pieces, the special ones included.
        kind: "unigram" or "bpe".
        segmentation: engine of `pangu.data.segmentation.Segmenter`.
        options: the other fields of `VocabularySettings`.

    Returns:
        `model` (path), `vocabulary_size`, `kind`, `documents` and `sentences` (read and trained on), `seconds`.

    Raises:
        UserError: an option is wrong, there is no text, too little text for the size (the message names the largest
            possible one), more characters than the size, or the file cannot be written.
    """
    settings = _settings(size=size, kind=kind, **options)
    segmenter = Segmenter(segmentation)
    started = time.monotonic()
    with atomic_write(output, "wb") as file:
        lines, counts = _draw(documents, settings.max_sentences, settings.seed)
        if not lines:
            raise UserError("there is no text to train a vocabulary on", hint="name a corpus with text in it")
        settings, content = _train_or_shrink(lambda: _sentences(lines, segmenter, settings.seed), settings)
        file.write(protobuf_wire.with_digest(content))
    return {"model": str(output), "vocabulary_size": settings.size, "kind": settings.kind, **counts,
            "seconds": round(time.monotonic() - started, 2)}


def _settings(**values: Any) -> VocabularySettings:
    from parallel.common.settings import validate

    return validate(VocabularySettings, values, where="vocabulary")


def _draw(documents: Iterable[str], most: int, seed: int) -> tuple[list[str], dict[str, int]]:
    """An even sample of at most `most` chunks (reservoir sampling), in corpus order, with counts of what was read."""
    draw = random.Random(seed)
    kept: list[tuple[int, str]] = []
    seen = number = 0
    for document in documents:
        number += 1
        for chunk in _chunks(document):
            if seen < most:
                kept.append((seen, chunk))
            elif (place := draw.randrange(seen + 1)) < most:
                kept[place] = (seen, chunk)
            seen += 1
    kept.sort()
    return [chunk for _, chunk in kept], {"documents": number, "sentences": len(kept)}


def _chunks(document: str) -> Iterator[str]:
    """The lines of a document that hold text, truncated to 800 characters."""
    for line in document.split("\n"):
        line = line.strip()
        if not line:
            continue
        line = _LONE_SURROGATE.sub("", line).replace("\0", "")
        for start in range(0, len(line), _CHUNK_CHARACTERS):
            yield line[start : start + _CHUNK_CHARACTERS]


def _sentences(lines: list[str], segmenter: Segmenter, seed: int) -> Iterator[str]:
    """Lines as spaced words, ended early after one word in seven or so.

    SentencePiece learns from words, so where a line ends counts for nothing but this: its unigram trainer proposes a
    piece only where two different characters can follow. A word always followed by a space is never proposed undivided,
    and in a small corpus, whose lines all end in a full stop, that is nearly every word.
    """
    draw = random.Random(seed)
    for line in lines:
        words: list[str] = []
        for word in segmenter.cut(line):
            words.append(word)
            if draw.random() < _LINE_ENDS:
                yield " ".join(words)
                words = []
        if words:
            yield " ".join(words)


def _train_or_shrink(sentences: Callable[[], Iterator[str]],
                     settings: VocabularySettings) -> tuple[VocabularySettings, bytes]:
    """Trains; under `shrink` once more with the size that the text allows. Returns the settings that were used."""
    try:
        return settings, _train(sentences(), settings)
    except TooLittleText as error:
        if not settings.shrink:
            raise
        smaller = settings.model_copy(update={"size": error.largest})
        return smaller, _train(sentences(), smaller)


def _train(sentences: Iterator[str], settings: VocabularySettings) -> bytes:
    """Runs SentencePiece quietly on segmented sentences."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=model, vocab_size=settings.size, model_type=settings.kind,
            character_coverage=settings.character_coverage, max_sentencepiece_length=settings.max_piece_length,
            normalization_rule_name="nmt_nfkc", user_defined_symbols=list(SPECIAL_PIECES[3:]), unk_id=0, bos_id=1,
            eos_id=2, pad_id=-1, max_sentence_length=_MAX_SENTENCE_BYTES, shuffle_input_sentence=False,
            num_threads=settings.threads, minloglevel=3,
        )
    except RuntimeError as error:
        raise _explain(str(error), settings) from None
    return model.getvalue()


def _explain(message: str, settings: VocabularySettings) -> UserError:
    """SentencePiece's complaint as one line."""
    if found := re.search(r"set it to a value <= (\d+)", message):
        error = TooLittleText(f"too little text for this vocabulary size; the largest possible here is {found[1]}",
                              where="vocabulary size", value=settings.size,
                              hint=f"set model.vocabulary_size={found[1]} or less, or give more text")
        error.largest = int(found[1])
        return error
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(f"the text's characters alone need a vocabulary of {found[1]}", where="vocabulary size",
                         value=settings.size,
                         hint=f"set model.vocabulary_size={found[1]} or more, or a lower vocabulary.character_coverage")
    if "sentences_.empty()" in message:
        return UserError("there is no text to train a vocabulary on", hint="name a corpus with text in it")
    return UserError(f"SentencePiece could not train: {message.splitlines()[0]}", where="vocabulary")
