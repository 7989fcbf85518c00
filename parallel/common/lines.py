"""Lines of text files: a line ends in a line feed and nowhere else, and whatever is wrong is one error with its number.

`str.splitlines` also breaks at U+2028, U+0085, form feeds and others, which are characters of a text like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from parallel.common.errors import UserError
from parallel.common.files import open_utf8
from parallel.common.structured import BadText, parse_object

MAX_LINE_BYTES = 64 << 20


def split_lines(text: str) -> list[str]:
    """The lines of a text without their line ends (line feed, or carriage return and line feed)."""
    lines = text.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def text_lines(path: str | Path, max_bytes: int = MAX_LINE_BYTES) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) of a text file, decompressed by its suffix; it is UTF-8, or what its byte
    order mark says.

    Raises:
        UserError: missing, damaged, not UTF-8, or a line of more than `max_bytes`; names the line.
    """
    with open_utf8(path) as stream:
        for number, data in _byte_lines(stream, path, max_bytes):
            try:
                yield number, data.decode()
            except UnicodeDecodeError as error:
                raise UserError(f"not UTF-8 (byte {error.start + 1} of the line)", where=f"{path}, line {number}",
                                value=data[error.start:error.start + 4], hint="convert the file to UTF-8") from None


def _byte_lines(stream: BinaryIO, path: str | Path, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    number = 0
    while data := stream.readline(max_bytes + 1):
        number += 1
        if len(data) > max_bytes:
            raise UserError(f"line is longer than the {max_bytes} bytes allowed", where=f"{path}, line {number}")
        yield number, data.removesuffix(b"\n").removesuffix(b"\r")


def json_lines(path: str | Path, max_bytes: int = MAX_LINE_BYTES) -> Iterator[tuple[int, dict]]:
    """(number from 1, object) for each line of a jsonl file that is not blank.

    Raises:
        UserError: as `text_lines`, or a line is no JSON object; names the line.
    """
    for number, line in text_lines(path, max_bytes):
        if line.strip():
            try:
                yield number, parse_object(line)
            except BadText as error:
                raise UserError(f"not a JSON object: {error}", where=f"{path}, line {number}", value=line.strip(),
                                hint="one object a line is expected") from None
