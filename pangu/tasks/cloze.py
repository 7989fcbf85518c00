"""Cloze tests of HFL: People Daily, Children's Fairy Tale (PD&CFT) and CMRC2017.

A passage is lines `number ||| words`. The line after them asks: words with XXXXX, numbered on or called `<qid_n>`, and
`||| answer` at its end (PD&CFT) or the answer in a file of its own, `.answer` in place of `.doc_query` (CMRC2017).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from parallel.common.errors import UserError
from parallel.common.lines import text_lines

BLANK = "XXXXX"
_FENCE = "|||"
_BEFORE_QUESTION = 2


def read(path: Path) -> Iterator[dict]:
    """Yields `id` (the name of the question, or which it is, from 0), `context` (the passage without the sentence asked
    about), `recent` (the same with the two sentences before the question moved to the end), `question` (up to the
    blank), `answer`, `answers`."""
    answers = _answers(path)
    lines: list[str] = []
    asked = 0
    for _, line in text_lines(path):
        first, *parts = [part.strip() for part in line.split(_FENCE)]
        if not parts:
            continue
        asks = not first.isdigit() or (len(parts) > 1 and parts[1] != "" and BLANK in parts[0])
        if not asks:
            lines.append(_joined(parts[0]))
            continue
        yield _record(str(asked) if first.isdigit() else first, lines, parts, answers, path)
        lines, asked = [], asked + 1


def _answers(path: Path) -> dict[str, str]:
    file = path.with_suffix(".answer")
    if path.suffix != ".doc_query" or not file.is_file():
        return {}
    pairs = (line.partition(_FENCE) for _, line in text_lines(file))
    return {name.strip(): _joined(answer) for name, _, answer in pairs}


def _record(name: str, lines: list[str], parts: list[str], answers: dict[str, str], path: Path) -> dict:
    answer = _joined(parts[1]) if len(parts) > 1 and parts[1] else answers.get(name)
    if answer is None:
        raise UserError(f"no answer for {name}", where=path, hint="put the file of answers beside it")
    question = _joined(parts[0])
    place = next((index for index, line in enumerate(lines) if BLANK in line), len(lines))
    rest = [line for line in lines if BLANK not in line]
    near = lines[max(0, place - _BEFORE_QUESTION):place]
    far = [line for index, line in enumerate(lines) if not place - len(near) <= index <= place and BLANK not in line]
    return {"id": name.strip("<>"), "context": "".join(rest), "recent": "".join(far + near), "answer": answer,
            "question": question.partition(BLANK)[0], "answers": [answer]}


def _joined(words: str) -> str:
    return words.replace(" ", "").strip()
