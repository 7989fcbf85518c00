"""Lines of any length out of files in any state; shared by the readers of line formats."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from data_tools import readers
from data_tools.records import ReadLog, Split
from parallel.common.files import open_binary

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
    with open_binary(path) as file:
        offset = split.start
        try:
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


def _skip_line(file: BinaryIO) -> int:
    """Reads to the end of the line without keeping it; returns the bytes passed."""
    passed = 0
    while True:
        piece = file.readline(_CHUNK)
        passed += len(piece)
        if not piece or piece.endswith(b"\n"):
            return passed


def decode(data: bytes, log: ReadLog) -> str:
    """UTF-8, else GB18030 if all of it decodes so and looks Chinese, else UTF-8 with U+FFFD for what is broken."""
    try:
        return data.decode("utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError:
        pass
    repaired = data.decode("utf-8", "replace")
    # A few broken bytes in UTF-8 leave most characters whole; GB text read as UTF-8 leaves hardly any.
    if repaired.count("\ufffd") > len(repaired) // 8:
        try:
            text = data.decode("gb18030")
        except UnicodeDecodeError:
            pass
        else:
            log.repair("gb18030")
            return text
    log.repair("broken_utf8")
    return repaired
