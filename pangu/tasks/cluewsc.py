"""CLUEWSC2020: does the pronoun stand for the name? The text with the pronoun replaced by the name against the text
as it is. The paper does not say how it makes choices of the task; this was chosen here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pangu.evaluation.task import read_json_lines


def read(path: Path) -> Iterator[dict]:
    """Yields `id`, `before`, `after` (text around the pronoun), `candidates` [pronoun, name], `answer`."""
    for number, row in enumerate(read_json_lines(path)):
        target, text = row["target"], row["text"]
        begin, pronoun = int(target["span2_index"]), target["span2_text"]
        if text[begin:begin + len(pronoun)] != pronoun:
            # Some rows count otherwise; the position nearest to the given one is meant.
            places = [index for index in range(len(text)) if text.startswith(pronoun, index)]
            if not places:
                raise ValueError(f"record {row['id']}: the pronoun is not in the text")
            begin = min(places, key=lambda index: abs(index - begin))
        label = str(row["label"]).lower()
        if label not in ("true", "false"):
            raise ValueError(f"record {row['id']}: the label is neither true nor false")
        yield {"id": f"{row['id']}-{number}", "before": text[:begin], "after": text[begin + len(pronoun):],
               "candidates": [pronoun, target["span1_text"]], "answer": int(label == "true")}
