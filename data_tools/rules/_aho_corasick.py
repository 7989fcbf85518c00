"""Many keywords found in one pass over a text (Aho-Corasick)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError
from parallel.common.lines import text_lines

_MAX_LIST_BYTES = 64 << 20


class KeywordFinder:
    """Finds any of `words` in texts; case does not matter (characters are lower-cased one by one).

    Raises:
        UserError: the package pyahocorasick is missing, or there is no word.
    """

    def __init__(self, words: list[str]) -> None:
        try:
            import ahocorasick
        except ImportError:
            raise UserError("the package pyahocorasick is not installed", hint="pip install the extra 'data'") from None
        self.words = sorted({word.strip().lower() for word in words if word.strip()})
        if not self.words:
            raise UserError("the list of keywords is empty", where="keywords")
        self._automaton: Any = ahocorasick.Automaton()
        for word in self.words:
            self._automaton.add_word(word, word)
        self._automaton.make_automaton()

    @staticmethod
    def of(path: str | None, default: list[str], further: list[str]) -> KeywordFinder:
        """The finder for the words in the file `path` (else `default`) and `further`; kept for the next document."""
        return _cached_finder(path, tuple(default), tuple(further))

    def distinct(self, text: str, enough: int | None = None) -> set[str]:
        """The different words in `text`; stops early once there are `enough`."""
        found: set[str] = set()
        for _, word in self._automaton.iter(text.lower()):
            found.add(word)
            if enough is not None and len(found) >= enough:
                break
        return found

    def count(self, text: str) -> tuple[int, set[str]]:
        """(hits counted with repetition, the different words)."""
        hits = [word for _, word in self._automaton.iter(text.lower())]
        return len(hits), set(hits)


@functools.lru_cache(maxsize=16)
def _cached_finder(path: str | None, default: tuple[str, ...], further: tuple[str, ...]) -> KeywordFinder:
    words = read_word_list(path) if path is not None else list(default)
    return KeywordFinder([*words, *further])


def read_word_list(path: str) -> list[str]:
    """Words of a file, one a line; blank lines and lines that begin with # are left out.

    Raises:
        UserError: the file is missing, too large or not UTF-8.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError("no such word list", where=path, hint="check the path")
    if file.stat().st_size > _MAX_LIST_BYTES:
        raise UserError("word list is too large", where=path, value=file.stat().st_size)
    return [line.strip() for _, line in text_lines(file) if line.strip() and not line.startswith("#")]
