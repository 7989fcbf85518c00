"""DRCD: SQuAD-like, in traditional Chinese, which the model has hardly seen; passages become simplified Chinese."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pangu.tasks import squad
from parallel.common.errors import UserError


def read(path: Path) -> Iterator[dict]:
    """As `squad.read`, in simplified characters.

    Raises:
        UserError: the package OpenCC is not installed.
    """
    simplified = _converter().convert
    for record in squad.read(path):
        yield {key: [simplified(text) for text in value] if key == "answers" else
               value if key in ("id", "group") else simplified(value) for key, value in record.items()}


@cache
def _converter():
    try:
        from opencc import OpenCC
    except ImportError:
        raise UserError("DRCD is in traditional Chinese; its conversion needs the package OpenCC",
                        hint="pip install 'pangu-rankers[evaluate]'") from None
    return OpenCC("t2s")
