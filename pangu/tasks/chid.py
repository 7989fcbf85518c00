"""CHID, idioms in blanks: FewCLUE's lines with seven candidates, and CLUE's with ten and a file of answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pangu.evaluation.task import read_json_lines
from parallel.common.errors import UserError
from parallel.common.files import read_json

_BLANK = re.compile(r"#idiom\d*#")


def read(path: Path) -> Iterator[dict]:
    """Yields `id`, `before`, `after` (text around the blank), `candidates`, `answer` (index)."""
    answers = None
    for row in read_json_lines(path):
        if isinstance(row["content"], str):
            yield _blank(row["id"], row["content"], _BLANK.search(row["content"]), row, row["answer"])
            continue
        answers = answers if answers is not None else _answers(path)
        for text in row["content"]:
            for match in _BLANK.finditer(text):
                yield _blank(match[0].strip("#"), text, match, row, answers[match[0]])


def _answers(path: Path) -> dict[str, int]:
    file = path.with_name(f"{path.stem}_answer.json")
    if not file.is_file():
        raise UserError("the answers are missing", where=file, hint="CLUE publishes them beside the passages")
    return read_json(file)


def _blank(name: str, text: str, match: re.Match | None, row: dict, answer: int) -> dict:
    if match is None:
        raise ValueError(f"record {name} has no #idiom#")
    # Other blanks of the passage are not to be read as text.
    return {"id": name, "before": _BLANK.sub("", text[:match.start()]), "after": _BLANK.sub("", text[match.end():]),
            "candidates": list(row["candidates"]), "answer": int(answer)}
