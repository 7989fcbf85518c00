"""CMRC2019: a passage with blanks [BLANK1], [BLANK2], ... and sentences to put into them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from parallel.common.files import read_json

_BLANK = re.compile(r"\[BLANK\s*\d+\]")
LEFT, RIGHT = 300, 200  # characters of context, as in the released evaluation code


def read(path: Path) -> Iterator[dict]:
    """Yields one record a blank: `id`, `before`, `after`, `candidates`, `answer` (index), `group` (the passage)."""
    for passage in read_json(path)["data"]:
        text, name = passage["context"], str(passage["context_id"])
        for number, match in enumerate(_BLANK.finditer(text)):
            before, after = _BLANK.sub("", text[:match.start()]), _BLANK.sub("", text[match.end():])
            yield {"id": f"{name}-{number + 1}", "before": before[-LEFT:], "after": after[:RIGHT], "group": name,
                   "candidates": list(passage["choices"]), "answer": int(passage["answers"][number])}
