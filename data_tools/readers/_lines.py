"""Lines of any length out of files in any state; shared by the readers of line formats."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from data_tools import readers
from data_tools.readers._charsets import likeliest, strict
from parallel.common.files import as_utf8, by_mark, open_binary

if TYPE_CHECKING:
    from data_tools.records import ReadLog, Split

_CHUNK = 1 << 20


def read_lines(split: Split, limit: int, log: ReadLog) -> Iterator[tuple[int, bytes | int]]:
    """(offset, line) for every line that begins in the split; a line above `limit` bytes comes as its length.

    A file that is empty or cannot be decompressed to its end goes to the log; the lines before the damage are given.
    """
    path = Path(split.path)
    if os.path.getsize(path) == 0:
        log.damaged("empty_file", split.path, "0 bytes")
        return
    with open_binary(path) as opened:
        offset = split.start
        try:
            file = as_utf8(opened, path, errors="replace") if offset == 0 else opened
            if offset > 0:
                file.seek(offset - 1)
                offset = offset - 1 + _skip_line(file)
            while split.end is None or offset < split.end:
                line = file.readline(limit + 1)
                if not line:
                    return
                start, length = offset, len(line)
                if length > limit and not line.endswith(b"\n"):
                    length += _skip_line(file)
                    line = b""
                offset += length
                yield start, (line if line else length)
        except readers.damage_errors() as error:
            log.damaged("truncated", split.path, f"after {offset} bytes of text: {type(error).__name__}: {error}")


def is_wide(path: Path) -> bool:
    """Whether a plain file begins with the byte order mark of UTF-16 or UTF-32, so that it cannot be cut at bytes."""
    with path.open("rb") as file:
        return by_mark(file.read(4)) not in (None, "utf-8-sig")


def _skip_line(file: BinaryIO) -> int:
    """Reads to the end of the line without keeping it; returns the bytes passed."""
    passed = 0
    while True:
        piece = file.readline(_CHUNK)
        passed += len(piece)
        if not piece or piece.endswith(b"\n"):
            return passed


def decode(data: bytes, log: ReadLog) -> str:
    """By BOM or valid UTF-8, else GB18030 or Big5 if all of it decodes so and looks Chinese, else UTF-8 with U+FFFD for
    what is broken."""
    if mark := by_mark(data):
        return data.decode(mark, "replace")
    if (text := strict(data, "utf-8")) is not None:
        return text
    repaired = data.decode("utf-8", "replace")
    # A few broken bytes in UTF-8 leave most characters whole; GB text read as UTF-8 leaves hardly any.
    if repaired.count("\ufffd") > len(repaired) // 8 and (found := likeliest(data)) is not None:
        log.repair(found[0])
        return found[1]
    log.repair("broken_utf8")
    return repaired
