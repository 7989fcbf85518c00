"""Multiple-choice questions of the synthetic corpus: JSON lines of `pangu.evaluation.questions`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pangu.evaluation.questions import read_questions


def read(path: Path) -> Iterator[dict]:
    """Yields `id`, `skill`, `prompt`, `candidates`, `answer` (index)."""
    for number, row in enumerate(read_questions(path)):
        yield {"id": str(row.get("id", number)), "skill": row["skill"], "prompt": row["prompt"],
               "candidates": row["choices"], "answer": row["answer"]}
