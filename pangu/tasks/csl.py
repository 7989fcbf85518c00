"""CSL: are these the abstract's keywords? JSON lines whose keywords are a list."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pangu.evaluation.task import read_json_lines


def read(path: Path) -> Iterator[dict]:
    """Yields the rows with `keyword` joined by commas."""
    for row in read_json_lines(path):
        yield {**row, "keyword": ",".join(row["keyword"])}
