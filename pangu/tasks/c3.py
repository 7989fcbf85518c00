"""C3, dialogues and texts with questions: lists of [sentences, questions, id]."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from parallel.common.files import read_json


def read(path: Path) -> Iterator[dict]:
    """Yields `id`, `passage`, `question`, `candidates`, `answer` (index), `group` (the passage)."""
    for sentences, questions, name in read_json(path):
        for number, question in enumerate(questions):
            candidates = list(question["choice"])
            yield {"id": f"{name}-{number}", "passage": "".join(sentences), "question": question["question"],
                   "candidates": candidates, "answer": candidates.index(question["answer"]), "group": name}
