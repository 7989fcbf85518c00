"""Text normalisation for signatures, as arrays of code points.

The normal form of a text is: NFKC, each character lower-cased where that gives one character, each traditional Chinese
character replaced by its simplified twin (the character table of OpenCC t2s, characters one by one), and whitespace,
control and format characters (zero width ones too) dropped. Punctuation stays. Chosen here: the PanGu-alpha
paper (section 3.1.2) does not say what it compares.
"""

from __future__ import annotations

import functools
import unicodedata

import numpy as np

from parallel.common.errors import UserError

_CODE_POINTS = 0x110000
_DROPPED = np.uint32(0xFFFFFFFF)
_SLOW = 255  # marks a character whose NFKC form depends on its neighbours
# Every block in which NFKC changes a character, or a character can be changed by its neighbours.
_NFKC_BLOCKS = ((0x0, 0x3400), (0x4DC0, 0x4E00), (0xA000, 0xAC00), (0xD7A4, 0x20000), (0x2F800, 0x2FA20),
                (0xE0000, 0xE0200))
_HAN_BLOCKS = ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x33480))


def code_points(text: str) -> np.ndarray:
    """The characters of `text` as uint32 [characters]; a lone surrogate becomes U+FFFD."""
    try:
        data = text.encode("utf-32-le")
    except UnicodeEncodeError:
        data = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode("utf-32-le")
    return np.frombuffer(data, dtype="<u4")


def normalise(text: str) -> np.ndarray:
    """The normal form of `text` (module docstring) as uint32 code points [characters].

    Vectorised: one table look-up a character. Texts with combining marks take the way over `unicodedata`.
    """
    tables = _tables()
    codes = code_points(text)
    lengths = tables.lengths[codes]
    if lengths.size == 0:
        return codes
    longest = int(lengths.max())
    if longest == _SLOW:
        return _normalise_slowly(codes)
    if longest <= 1:
        mapped = tables.single[codes]
        return mapped if int(lengths.min()) == 1 else mapped[lengths == 1]
    return _expand(codes, lengths.astype(np.int64), tables)


def _normalise_slowly(codes: np.ndarray) -> np.ndarray:
    tables = _tables()
    text = unicodedata.normalize("NFKC", codes.tobytes().decode("utf-32-le"))
    mapped = tables.final[code_points(text)]
    return mapped[mapped != _DROPPED]


def _expand(codes: np.ndarray, lengths: np.ndarray, tables: _Tables) -> np.ndarray:
    """Replaces every character by its `lengths` characters out of the flat table."""
    ends = np.cumsum(lengths)
    first = np.repeat(tables.offsets[codes] - (ends - lengths), lengths)
    return tables.flat[first + np.arange(int(ends[-1]))]


class _Tables:
    """Look-up tables over all code points; about 20 MB, built once a process in about 0.2 s."""

    def __init__(self) -> None:
        self.final = _final_table()
        self.single = self.final.copy()
        self.lengths = (self.final != _DROPPED).astype(np.uint8)
        self.offsets = np.zeros(_CODE_POINTS, dtype=np.int64)
        flat: list[int] = []
        for first, last in _NFKC_BLOCKS:
            for code in range(first, last):
                self._set_composed(code, flat)
        # Characters of length 1 read the flat table too when a text has any longer one.
        base = len(flat)
        self.flat = np.concatenate([np.array(flat, dtype=np.uint32), self.single])
        plain = self.lengths <= 1
        self.offsets[plain] = base + np.arange(_CODE_POINTS)[plain]

    def _set_composed(self, code: int, flat: list[int]) -> None:
        character = chr(code)
        if _depends_on_neighbours(character):
            self.lengths[code] = _SLOW
            return
        composed = unicodedata.normalize("NFKC", character)
        if composed == character:
            return
        if any(_depends_on_neighbours(part) for part in composed):
            self.lengths[code] = _SLOW
            return
        codes = [int(self.final[ord(part)]) for part in composed if self.final[ord(part)] != _DROPPED]
        self.lengths[code] = len(codes)
        if len(codes) == 1:
            self.single[code] = codes[0]
        elif codes:
            self.offsets[code] = len(flat)
            flat.extend(codes)


@functools.lru_cache(maxsize=1)
def _tables() -> _Tables:
    return _Tables()


def _depends_on_neighbours(character: str) -> bool:
    """Whether NFKC of a text may join or move this character (a superset of the true ones)."""
    code = ord(character)
    jamo = 0x1100 <= code < 0x1200 or 0xA960 <= code < 0xA980 or 0xD7B0 <= code < 0xD800
    return jamo or unicodedata.category(character)[0] == "M"


def _final_table() -> np.ndarray:
    """What becomes of each character after NFKC: lower case, simplified, or dropped."""
    table = np.arange(_CODE_POINTS, dtype=np.uint32)
    for first, last in ((0, 0x3400), (0xA000, 0xAC00), (0xFB00, 0x20000)):
        for code in range(first, last):
            lower = chr(code).lower()
            if len(lower) == 1:
                table[code] = ord(lower)
            if unicodedata.category(chr(code)) in ("Cc", "Cf", "Zs", "Zl", "Zp"):
                table[code] = _DROPPED
    table[0xE0000:0xE0080] = _DROPPED
    table[0xD800:0xE000] = 0xFFFD
    for code, simplified in _simplified_twins():
        table[code] = simplified
    return table


def _simplified_twins() -> list[tuple[int, int]]:
    try:
        import opencc
    except ImportError:
        raise UserError("the package opencc is not installed", hint="pip install the extra 'data'") from None
    characters = [chr(code) for first, last in _HAN_BLOCKS for code in range(first, last)]
    # One line a character, so that the phrase tables of OpenCC never see two together.
    converted = opencc.OpenCC("t2s").convert("\n".join(characters)).split("\n")
    pairs = zip(characters, converted, strict=True)
    return [(ord(old), ord(new)) for old, new in pairs if old != new and len(new) == 1]
