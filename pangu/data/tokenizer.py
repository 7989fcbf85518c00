"""The PanGu-alpha tokenizer: jieba words, joined by spaces, encoded by a SentencePiece model.

Source: the release's `tokenization_jieba.py` and vocabulary (arXiv:2104.12369, section 5.1, names BPE; the published
file is a unigram model). A space in the text becomes U+2582 and a newline U+2583, each word of jieba's is set apart by
one space, and SentencePiece (normaliser nmt_nfkc) makes ids of it; decoding goes the other way and drops every space.
The round trip is lossy where the normaliser is (full-width punctuation becomes ASCII) and for characters outside the
vocabulary, which become `<unk>`; U+2582 and U+2583 written in the text come back as a space and a newline.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from pangu.data.segmentation import NEWLINE_MARK, SPACE_MARK, Segmenter
from parallel.common import protobuf_wire
from parallel.common.errors import UserError

WORD_MARK = "\u2581"  # SentencePiece's own sign for a space
SPECIAL_PIECES = ("<unk>", "<s>", "</s>", NEWLINE_MARK, SPACE_MARK, "<sep>", "<pad>", "<mask>", "<eod>", "<eot>")
"""The published ids 0..9, in order."""

_MAX_MODEL_BYTES = 256 << 20


class Tokenizer:
    """Text to ids and back, exactly as PanGu-alpha's release does it.

    Special ids never come out of text: `<eot>` written in a document is split into `<`, `eot`, `>` and encoded as
    ordinary words. Append `tokenizer.eot_id` to end a document.

    Args:
        model_file: a SentencePiece model with PanGu-alpha's special pieces.
        engine: word segmentation, "auto", "compiled" or "jieba" (see `pangu.data.segmentation`); the ids are the same.

    Raises:
        UserError: the model file is missing, damaged, or lacks `<eot>` or `<pad>`.
    """

    def __init__(self, model_file: str | Path, engine: str = "auto") -> None:
        self.model_file = Path(model_file)
        content = _read_model(self.model_file)
        self._model = _load_model(content, self.model_file)
        self.fingerprint = hashlib.sha256(content).hexdigest()
        """SHA-256 of the model file: what ids depend on, for indexes and checkpoints to remember."""
        self._segmenter = Segmenter(engine)
        self.engine = self._segmenter.engine
        for piece in ("<eot>", "<pad>"):
            if self.piece_id(piece) is None:
                raise UserError(f"this SentencePiece model has no piece {piece}: not a PanGu-alpha vocabulary",
                                where=self.model_file, hint="train one with `python -m pangu train-vocabulary`")

    def __reduce__(self) -> tuple:
        # Sent to another process as the path alone: the SentencePiece object is loaded anew there.
        return Tokenizer, (self.model_file, self.engine)

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, special ones included: 40,000 in the published model."""
        return self._model.get_piece_size()

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The special pieces that the model has, with their ids."""
        found = {piece: self.piece_id(piece) for piece in SPECIAL_PIECES}
        return {piece: number for piece, number in found.items() if number is not None}

    @property
    def eot_id(self) -> int:
        """End of document, stop of generation (`<eot>`, 9 as published)."""
        return self.special_ids["<eot>"]

    @property
    def pad_id(self) -> int:
        """Padding, masked in loss and attention (`<pad>`, 6 as published)."""
        return self.special_ids["<pad>"]

    @property
    def unknown_id(self) -> int:
        """What a character outside the vocabulary becomes (`<unk>`, 0 as published)."""
        return self._model.unk_id()

    def piece_id(self, piece: str) -> int | None:
        """The id of a piece; None when the model has no such piece."""
        number = self._model.piece_to_id(piece)
        return number if self._model.id_to_piece(number) == piece else None

    def id_piece(self, number: int) -> str:
        """The piece of an id, as the model writes it (a leading U+2581 begins a word).

        Raises:
            UserError: the id is outside the vocabulary.
        """
        self._check(number)
        return self._model.id_to_piece(int(number))

    def words(self, text: str) -> list[str]:
        """jieba's words of `text`."""
        return self._segmenter.cut(text)

    def prepare(self, text: str) -> bytes:
        """What SentencePiece is given for `text`: marked spaces and newlines, words joined by one space, as UTF-8."""
        return self._segmenter.join(text)

    def normal_form(self, text: str) -> str:
        """`text` as decoding writes it: full-width forms become half-width, for example. Characters outside the
        vocabulary stay. What is looked for in a generated text must be in this form."""
        normal = self._model.normalize(self.prepare(text).decode("utf-8", "replace"))
        return _unmark(normal.replace(WORD_MARK, ""))

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without any special id before or after.

        A lone surrogate, which no UTF-8 file can hold, counts as U+FFFD (chosen here: the release would stop).
        """
        return self._model.encode(self._segmenter.join(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special ids come out as their names, unknown ones as U+2047.

        Raises:
            UserError: an id is outside the vocabulary.
        """
        ids = [int(number) for number in ids]
        if ids:
            self._check(min(ids))
            self._check(max(ids))
        return _unmark(self._model.decode(ids))

    def stream(self) -> StreamDecoder:
        """A decoder that is fed one id at a time."""
        return StreamDecoder(self)

    @cached_property
    def _texts(self) -> list[str | None]:
        """What each id adds to a decoded text; None for a byte, whose text depends on its neighbours."""
        model = self._model
        return [None if model.is_byte(number) else _unmark(model.decode([number]))
                for number in range(self.vocabulary_size)]

    def _check(self, number: int) -> None:
        if not 0 <= number < self.vocabulary_size:
            raise UserError(f"id outside the vocabulary of {self.vocabulary_size}", where=self.model_file, value=number)


class StreamDecoder:
    """Turns ids into printable text one by one: the texts handed out, joined, are `Tokenizer.decode` of the ids.

    Since decoding drops all spaces, the text of an id does not depend on its neighbours. The exception is a model with
    byte pieces (the published one has none): a run of bytes is held until an id of another kind ends it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes: list[int] = []

    def feed(self, number: int) -> str:
        """The text that can be shown now that this id has come; may be empty.

        Raises:
            UserError: the id is outside the vocabulary.
        """
        number = int(number)
        self._tokenizer._check(number)
        text = self._tokenizer._texts[number]
        if text is None:
            self._bytes.append(number)
            return ""
        return self.finish() + text

    def finish(self) -> str:
        """What was still held back."""
        held, self._bytes = self._bytes, []
        return self._tokenizer.decode(held) if held else ""


def _unmark(text: str) -> str:
    return text.replace(" ", "").replace(SPACE_MARK, " ").replace(NEWLINE_MARK, "\n")


def _read_model(path: Path) -> bytes:
    if not path.is_file():
        raise UserError("no such vocabulary file", where=path,
                        hint="name a SentencePiece .model file, or train one with `python -m pangu train-vocabulary`")
    try:
        size = path.stat().st_size
        if not 0 < size <= _MAX_MODEL_BYTES:
            raise UserError("not a SentencePiece model: the file is empty or far too large", where=path, value=size)
        content = path.read_bytes()
        if protobuf_wire.has_changed(content):
            raise UserError("vocabulary file is damaged: it has changed since it was written", where=path,
                            hint="fetch it anew, or train one with `python -m pangu train-vocabulary`")
        return content
    except OSError as error:
        raise UserError(f"vocabulary file cannot be read: {error.strerror}", where=path) from None


def _load_model(content: bytes, path: Path):
    """A SentencePiece processor; a file that is no such model is reported in one line."""
    import sentencepiece

    sentencepiece.set_min_log_level(3)
    try:
        processor = sentencepiece.SentencePieceProcessor()
        processor.load_from_serialized_proto(content)
        # A truncated file can load and fail only later; the pieces must be there and encoding must work.
        if processor.get_piece_size() == 0:
            raise ValueError("no pieces")
        processor.encode("word")
    except Exception:  # noqa: BLE001 - SentencePiece raises half a dozen kinds for a damaged file
        raise UserError("vocabulary file is damaged or not a SentencePiece model", where=path,
                        hint="fetch it anew, or train one with `python -m pangu train-vocabulary`") from None
    return processor
