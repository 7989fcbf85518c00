"""Plain text: a document is the file, a line, or a run of lines up to a blank one (`text_unit`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools import readers
from data_tools.readers._lines import decode, read_lines
from parallel.common.files import open_binary

if TYPE_CHECKING:
    from data_tools.records import Document, ReadLog, ReadSettings, Split

SUFFIXES = (".txt", ".text")


def ranges(path: Path, settings: ReadSettings) -> list[tuple[int, int | None]]:
    """A text file is one part."""
    return [(0, None)]


def read(split: Split, settings: ReadSettings, log: ReadLog) -> Iterator[Document]:
    """The documents of the file, empty ones left out."""
    from data_tools.readers._build import build_document, default_source

    pieces = _whole(split, settings, log) if settings.text_unit == "file" else _lines_or_runs(split, settings, log)
    for offset, data in pieces:
        name = f"{split.name}:{offset}"
        if isinstance(data, int):
            log.drop("too_long", name, default_source(split, settings), f"{data} bytes")
            continue
        text = decode(data, log).strip("\r\n")
        if text.strip():
            document = build_document({settings.text_key: text}, name, split, settings, log)
            if document is not None:
                yield document


def _whole(split: Split, settings: ReadSettings, log: ReadLog) -> Iterator[tuple[int, bytes | int]]:
    if os.path.getsize(split.path) == 0:
        log.damaged("empty_file", split.path, "0 bytes")
        return
    chunks, total = [], 0
    with open_binary(split.path) as file:
        try:
            while chunk := file.read(1 << 20):
                total += len(chunk)
                if total <= settings.maximum_document_bytes:
                    chunks.append(chunk)
        except readers.damage_errors() as error:
            log.damaged("truncated", split.path, f"after {total} bytes of text: {type(error).__name__}: {error}")
    yield 0, (total if total > settings.maximum_document_bytes else b"".join(chunks))


def _lines_or_runs(split: Split, settings: ReadSettings, log: ReadLog) -> Iterator[tuple[int, bytes | int]]:
    """Lines, or runs of lines; a run above the size limit comes as its length."""
    first, run, size = 0, [], 0
    for offset, line in read_lines(split, settings.maximum_document_bytes, log):
        if settings.text_unit == "line":
            yield offset, line
            continue
        length = line if isinstance(line, int) else len(line)
        blank = not isinstance(line, int) and not line.strip()
        if not blank:
            first = offset if size == 0 else first
            size += length
            if size <= settings.maximum_document_bytes:
                run.append(line)
        elif size:
            yield first, (b"".join(run) if size <= settings.maximum_document_bytes else size)
            run, size = [], 0
    if size:
        yield first, (b"".join(run) if size <= settings.maximum_document_bytes else size)
