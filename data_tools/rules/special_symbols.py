"""Rule 4: special symbols are taken out of the text."""

from __future__ import annotations

import re
import unicodedata
from typing import ClassVar

from data_tools.rules import Rule

# Letters, marks, numbers, ordinary punctuation, currency and mathematics stay, and symbols that stand for letters or
# numbers; everything else is a special symbol.
_SPECIAL_CATEGORIES = ("Cc", "Cf", "Co", "Cs", "Cn", "So", "Sk")
_KEPT = "\n\t °℃℉№℡©®™^`¨＾｀￣˙゛゜"
# Of category So, Cn or Co by the table, but read as what they stand for: radicals that text out of PDF files has in
# place of characters, strokes and parts of characters, the circle that is the zero of years, characters newer than the
# table of this Python.
_WRITING = ((0x2E80, 0x2FFF), (0x31C0, 0x31EF), (0x20000, 0x2FFFD), (0x30000, 0x3FFFD), (0x25CB, 0x25CB))
_RADICALS = range(0x2E80, 0x2FE0)
_SPACES = (("\r\n", "\n"), ("\r", "\n"), ("\u3000", " "), ("\xa0", " "))


class SpecialSymbols(Rule):
    """Removes control, private and decorative characters, shortens long runs of one punctuation mark, and writes Kangxi
    radicals as the characters that they stand for."""

    order: ClassVar[int] = 20

    keep: str = ""
    """Characters to keep that the rule would remove."""
    longest_run: int = 6
    """A run of one and the same punctuation mark is shortened to this length."""

    def apply(self, text: str, title: str) -> str:
        for old, new in _SPACES:
            text = text.replace(old, new)
        # A text has few distinct characters, so they are judged instead of the text.
        distinct = set(text)
        _KINDS.learn(distinct)
        radicals = {ord(character): _KINDS.radicals[character] for character in distinct & _KINDS.radicals.keys()}
        if radicals:
            text = text.translate(radicals)
        special = (distinct & _KINDS.special).difference(self.keep)
        if special:
            text = text.translate(dict.fromkeys(map(ord, special)))
        for mark in distinct & _KINDS.marks:
            if mark * (self.longest_run + 1) in text:
                text = re.sub(re.escape(mark) + f"{{{self.longest_run + 1},}}", mark * self.longest_run, text)
        return text


class _Kinds:
    """The characters met so far, sorted into sets, so that each is judged once in the life of the process."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.special: set[str] = set()
        self.marks: set[str] = set()
        self.radicals: dict[str, str] = {}

    def learn(self, characters: set[str]) -> None:
        for character in characters - self.known:
            self.known.add(character)
            if ord(character) in _RADICALS and (written := unicodedata.normalize("NFKC", character)) != character:
                self.radicals[character] = written
            if is_special(character):
                self.special.add(character)
            elif not (character.isalnum() or character.isspace()):
                self.marks.add(character)


_KINDS = _Kinds()


def is_special(character: str) -> bool:
    """Whether the rule takes the character out."""
    if character in "\ufffd\ufffc":
        return True
    if unicodedata.category(character) not in _SPECIAL_CATEGORIES or character in _KEPT:
        return False
    if any(first <= ord(character) <= last for first, last in _WRITING):
        return False
    # Units, enclosed characters and abbreviations (㎡, ㈱, ㏄) say what letters and digits say.
    return not any(map(str.isalnum, unicodedata.normalize("NFKC", character)))
