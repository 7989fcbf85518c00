"""WPLC, the last word of a passage: JSON lines with `masked_text`, which ends in <mask>, and `correct_word`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pangu.evaluation.task import read_json_lines

_MASKS = ("<mask>", "[MASK]")


def read(path: Path) -> Iterator[dict]:
    """Yields `id`, `before` (the passage up to the word), `word`."""
    for row in read_json_lines(path):
        text = row["masked_text"]
        place = max(text.find(mask) for mask in _MASKS)
        if place < 0:
            raise ValueError(f"record {row['id']} has no <mask>")
        yield {"id": row["id"], "before": text[:place], "word": row["correct_word"]}
