"""Rule 1: documents with less than 60 % Chinese characters are removed."""

from __future__ import annotations

import re
from typing import ClassVar

from data_tools.rules import Removal, Rule

_NOT_HAN = re.compile("[^\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3007\U00020000-\U0003347f]+")
_SPACE = re.compile(r"\s+")
_CHINESE_PUNCTUATION = re.compile("[\u3001-\u3003\u3008-\u3011\u3014-\u301b\u2018\u2019\u201c\u201d\u2014\u2026\u00b7"
                                  "\uff01\uff08\uff09\uff0c\uff0e\uff1a\uff1b\uff1f\uff5e]+")


class ChineseShare(Rule):
    """Removes documents with too few Chinese characters."""

    order: ClassVar[int] = 70

    minimum: float = 0.6
    """Smallest share of Han characters among the characters that are not white space (0.6 in the paper)."""
    count_punctuation: bool = True
    """Whether Chinese punctuation counts in the denominator; the paper does not say."""

    def apply(self, text: str, title: str) -> str:
        han = len(_NOT_HAN.sub("", text))
        rest = _SPACE.sub("", text)
        total = len(rest if self.count_punctuation else _CHINESE_PUNCTUATION.sub("", rest))
        share = han / total if total else 0.0
        if share < self.minimum:
            raise Removal(f"{share:.3f} of {total} characters are Chinese")
        return text
