"""JSON lines: one object a line with `id`, `text`, `source` and whatever else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools import readers
from data_tools.readers._lines import decode, is_wide, read_lines
from parallel.common.structured import BadText, parse_object

if TYPE_CHECKING:
    from data_tools.records import Document, ReadLog, ReadSettings, Split

SUFFIXES = (".jsonl", ".json", ".ndjson")
_ESCAPE_ROOM = 2  # a text may be longer as JSON than as UTF-8


def ranges(path: Path, settings: ReadSettings) -> list[tuple[int, int | None]]:
    """Byte ranges of about `split_bytes` of a plain file; a compressed one and UTF-16 cannot be split."""
    size = path.stat().st_size
    if readers.is_compressed(path) or size <= settings.split_bytes or is_wide(path):
        return [(0, None)]
    starts = list(range(0, size, settings.split_bytes))
    return list(zip(starts, [*starts[1:], None], strict=True))


def read(split: Split, settings: ReadSettings, log: ReadLog) -> Iterator[Document]:
    """The documents of the lines that begin in the split."""
    from data_tools.readers._build import build_document, default_source

    source = default_source(split, settings)
    for offset, line in read_lines(split, _ESCAPE_ROOM * settings.maximum_document_bytes, log):
        name = f"{split.name}:{offset}"
        if isinstance(line, int):
            log.drop("too_long", name, source, f"a line of {line} bytes")
            continue
        if not line.strip():
            continue
        if b"\x00" in line:
            line = line.replace(b"\x00", b"")
            log.repair("null_bytes")
        try:
            # Control characters in a text are repaired later, and so are lone surrogates.
            record = parse_object(decode(line, log), strict=False, surrogates="keep", foreign_numbers="null")
        except BadText as error:
            log.drop("invalid_json", name, source, str(error))
            continue
        document = build_document(record, name, split, settings, log)
        if document is not None:
            yield document
