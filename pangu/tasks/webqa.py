"""WebQA: questions of a search engine with evidence and answers; an object by question id, or JSON lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pangu.evaluation.task import read_json_lines
from parallel.common.errors import UserError
from parallel.common.files import read_json

_NONE = ("no_answer", "")


def read(path: Path) -> Iterator[dict]:
    """Yields `id`, `question`, `answer` (the first), `answers`; questions without any answer are left out."""
    for name, row in _rows(path):
        found = row.get("answers") or row.get("answer") or []
        found = [found] if isinstance(found, str) else list(found)
        for evidence in (row.get("evidences") or {}).values():
            given = evidence["answer"]
            found += [given] if isinstance(given, str) else list(given)
        answers = list(dict.fromkeys(text.strip() for text in found if text.strip() not in _NONE))
        if answers:
            yield {"id": name, "question": row["question"].strip(), "answer": answers[0], "answers": answers}


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        tree = read_json(path)
    except UserError:
        # One object a line.
        tree = list(read_json_lines(path))
    rows = tree.items() if isinstance(tree, dict) else ((str(row.get("id", n)), row) for n, row in enumerate(tree))
    yield from rows
