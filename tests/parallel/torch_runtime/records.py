"""Packed records for the tests of this room."""

from __future__ import annotations

from pathlib import Path

VOCABULARY, LENGTH = 64, 16


class CharacterTokenizer:
    """One id a character."""

    eot_id, pad_id, vocabulary_size, fingerprint = 9, 6, VOCABULARY, "characters"

    def encode(self, text: str) -> list[int]:
        return [10 + ord(char) % (VOCABULARY - 10) for char in text]


def packed(folder: Path, documents: int = 200, shards: int = 1) -> Path:
    """Real packed records of short documents: several in a record; about as many records as documents for training, and
    some for validation."""
    from pangu.data.packing import PackOptions, pack

    texts = [f"{number}号" + chr(0x4E00 + number % 50) * (number % 29) for number in range(documents)]
    pack(texts, CharacterTokenizer, PackOptions(shards=shards, workers=1, validation_fraction=0.1), output=folder,
         sequence_length=LENGTH)
    return folder
