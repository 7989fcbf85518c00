"""SQuAD-like files: CMRC2018 and DRCD, and the flat list that CLUE makes of CMRC2018."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from parallel.common.files import read_json


def read(path: Path) -> Iterator[dict]:
    """Yields `id`, `context`, `question`, `answer` (the first), `answers`, `group` (the passage)."""
    tree = read_json(path)
    articles = tree["data"] if isinstance(tree, dict) else [{"paragraphs": tree}]
    for article in articles:
        for number, paragraph in enumerate(article["paragraphs"]):
            context = (paragraph.get("context") or paragraph["context_text"]).strip()
            group = str(paragraph.get("id") or paragraph.get("context_id") or f"{article.get('id', '')}-{number}")
            for question in paragraph["qas"]:
                answers = [_text(answer) for answer in question["answers"]]
                if not answers:
                    continue
                text = question["question"] if "question" in question else question["query_text"]
                yield {"id": str(question.get("id") or question["query_id"]), "context": context, "group": group,
                       "question": text.strip(),
                       "answer": answers[0], "answers": answers}


def _text(answer: object) -> str:
    text = answer["text"] if isinstance(answer, dict) else answer
    if not isinstance(text, str):
        raise ValueError(f"an answer is no text but {text!r}")
    return text.strip()
