"""DuReader (Zhidao): JSON lines with documents and free answers; the passage is the first paragraph of the documents
that were selected, as in the released evaluation code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pangu.evaluation.task import read_json_lines


def read(path: Path) -> Iterator[dict]:
    """Yields `id`, `context`, `question`, `answer` (the first), `answers`."""
    for number, row in enumerate(read_json_lines(path)):
        documents = row["documents"]
        chosen = [document for document in documents if document.get("is_selected")] or documents[:1]
        context = "".join(document["paragraphs"][0].strip() for document in chosen if document["paragraphs"])
        answers = [text.strip() for text in row["answers"] if text.strip()]
        if context and answers:
            yield {"id": str(row.get("question_id", number)), "context": context, "question": row["question"].strip(),
                   "answer": answers[0], "answers": answers}
