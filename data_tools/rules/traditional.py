"""Rule 7: traditional Chinese becomes simplified Chinese."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Literal

from data_tools.rules import Rule
from parallel.common.errors import UserError


class Traditional(Rule):
    """Converts traditional to simplified Chinese with OpenCC, phrases before characters."""

    order: ClassVar[int] = 30

    conversion: Literal["t2s", "tw2s", "tw2sp", "hk2s"] = "t2s"
    """OpenCC conversion: t2s; tw2s or hk2s for the variants of Taiwan or Hong Kong, tw2sp with their words too."""

    def apply(self, text: str, title: str) -> str:
        return _converter(self.conversion).convert(text)


@functools.lru_cache(maxsize=4)
def _converter(conversion: str) -> Any:
    try:
        import opencc
    except ImportError:
        raise UserError("the package opencc is not installed", hint="pip install the extra 'data'") from None
    return opencc.OpenCC(conversion)
