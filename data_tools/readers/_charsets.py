"""Which charset bytes are written in, judged by the characters that come out."""

from __future__ import annotations

from functools import cache

CHINESE = ("gb18030", "big5hkscs")
LIKELY = 0.8
_LOOKED_AT = 20_000


# Characters of GBK and GB18030 that had no code points when the standard of 2000 gave them private ones, which Python's
# decoder gives still; those that GB18030-2005 and -2022 write.
_CODED_LATER = {ord(old): new for old, new in {
    "\ue7c7": "\u1e3f", "\ue816": "\U00020087", "\ue817": "\U00020089", "\ue818": "\U000200cc", "\ue81e": "\u9fb4",
    "\ue826": "\u9fb5", "\ue82b": "\u9fb6", "\ue82c": "\u9fb7", "\ue831": "\U000215d7", "\ue832": "\u9fb8",
    "\ue83b": "\U0002298f", "\ue843": "\u9fb9", "\ue854": "\u9fba", "\ue855": "\U000241fe", "\ue864": "\u9fbb",
}.items()}


def strict(data: bytes, name: str) -> str | None:
    """`data` in a charset, None where it is not."""
    try:
        text = data.decode(name)
    except (UnicodeDecodeError, LookupError):
        return None
    return text.translate(_CODED_LATER) if name == "gb18030" and not text.isascii() else text


def everyday_share(text: str) -> float:
    """Share of the characters beyond ASCII that everyday Chinese text is written in, simplified or traditional: those
    of GB2312 and of the first level of Big5. Text of another charset read as one of these comes out in rare ones."""
    known, seen, beyond = _everyday(), 0, 0
    for character in text:
        if character > "\x7f":
            beyond += 1
            seen += character in known
            if beyond == _LOOKED_AT:
                break
    return seen / beyond if beyond else 0.0


@cache
def _everyday() -> frozenset[str]:
    pairs = [bytes([lead, trail]) for lead in range(0xA1, 0xFF) for trail in range(0x40, 0xFF)]
    found = [strict(pair, "gb2312") for pair in pairs] + [strict(pair, "big5") for pair in pairs if pair[0] < 0xC7]
    return frozenset(character for character in found if character is not None)


def likeliest(data: bytes) -> tuple[str, str] | None:
    """(charset, text) of the Chinese charset that `data` is most likely written in; None where none is likely."""
    texts = [(name, text) for name in CHINESE if (text := strict(data, name)) is not None]
    shares = {name: everyday_share(text) for name, text in texts}
    best = max(texts, key=lambda pair: shares[pair[0]], default=None)  # the first of equal ones
    return best if best is not None and shares[best[0]] >= LIKELY else None
