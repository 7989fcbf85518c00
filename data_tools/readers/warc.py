"""WARC and WET of a web crawl: HTML responses are extracted, conversion records are taken as text."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from data_tools import readers
from data_tools.readers._html import extract_html
from data_tools.readers._lines import decode
from parallel.common.errors import UserError
from parallel.common.files import open_binary

if TYPE_CHECKING:
    from data_tools.records import Document, ReadLog, ReadSettings, Split

SUFFIXES = (".warc", ".wet")
_UNTYPED = "untyped"
_BEFORE_FIRST = b"\xef\xbb\xbf\r\n\t "
_HTML_START = re.compile(rb"\s*(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body|title|meta)\b", re.I | re.S)


def ranges(path: Path, settings: ReadSettings) -> list[tuple[int, int | None]]:
    """An archive is one part: its records can only be found one after the other."""
    return [(0, None)]


def read(split: Split, settings: ReadSettings, log: ReadLog) -> Iterator[Document]:
    """The documents of all HTML and text records."""
    from data_tools.readers._build import build_document

    if os.path.getsize(split.path) == 0:
        log.damaged("empty_file", split.path, "0 bytes")
        return
    for number, (record, whole) in enumerate(_records(split, log)):
        try:
            made = _document_record(record, number, whole, split, settings, log)
        except readers.damage_errors() as error:
            log.damaged("truncated", split.path, f"record {number}: {type(error).__name__}: {error}")
            return
        if made is not None:
            document = build_document(made, f"{split.name}:{number}", split, settings, log)
            if document is not None:
                yield document


def _records(split: Split, log: ReadLog) -> Iterator[tuple[Any, Callable[[], bool]]]:
    """The records of the archive up to its end or to the first that is damaged.

    With each a function that reads it to its end: whether what follows is what may follow a record.
    """
    try:
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed
    except ImportError:
        raise UserError("the package warcio is not installed", hint="pip install the extra 'data'") from None
    # Compression is taken off here: warcio reads gzip only where each record is a member of its own.
    with open_binary(split.path) as stream:
        count = 0
        try:
            archive = ArchiveIterator(_Available(stream))
            archive.INC_RECORD = ""  # it counts what it would write to stderr

            behind: list[Exception] = []

            def whole() -> bool:
                before = archive.err_count
                try:
                    archive.read_to_end()
                except readers.damage_errors() as error:  # of what follows, told when it is this record's turn to end
                    behind.append(error)
                return archive.err_count == before

            for record in archive:
                yield record, whole
                count += 1
                if behind:
                    raise behind[0]
        except (ArchiveLoadFailed, ValueError, LookupError, AttributeError, TypeError,
                *readers.damage_errors()) as error:
            log.damaged("truncated", split.path, f"after {count} records: {type(error).__name__}: {error}")


class _Available:
    """A stream whose `read` gives what is there at once, so that what precedes the damage is not lost; without a byte
    order mark and blank lines before the first record, which would pass for the end of the archive."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._begun = stream, False

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read1(size)
        while data and not self._begun:
            data = data.lstrip(_BEFORE_FIRST)
            self._begun = bool(data)
            data = data or self._stream.read1(size)
        return data


def _document_record(record: Any, number: int, whole: Callable[[], bool], split: Split, settings: ReadSettings,
                     log: ReadLog) -> dict | None:
    """The record as a document's keys; None for requests, metadata, images and the like."""
    headers, kind = record.rec_headers, record.rec_type
    content_type = _content_type(record)
    if kind not in ("response", "resource", "conversion") or not content_type.startswith(
            ("text/html", "text/plain", "application/xhtml", _UNTYPED)):
        _check_length(record, number)
        return None
    identity = headers.get_header("WARC-Record-ID") or f"{split.name}:{number}"
    body = _body(record)
    data = body.read(settings.maximum_document_bytes + 1)
    if len(data) > settings.maximum_document_bytes:
        log.drop("too_long", identity, settings.source or split.name,
                 f"more than {settings.maximum_document_bytes} bytes")
        return None
    _check_length(record, number)
    if record.rec_headers.get_header("WARC-Truncated") or _ends_early(record, body):
        log.drop("cut_page", identity, settings.source or split.name, "the crawl got a part of the page only")
        return None
    if not whole():
        log.drop("cut_page", identity, settings.source or split.name, "the record is longer than its header says")
        return None
    if content_type == _UNTYPED and not _HTML_START.match(data[:1024]):
        return None
    made = {settings.id_key: identity, "url": headers.get_header("WARC-Target-URI") or "",
            "date": headers.get_header("WARC-Date") or ""}
    if "html" in content_type or content_type == _UNTYPED:
        page = extract_html(data, content_type)
        made["title"], made[settings.text_key] = page.title, page.text
        if page.recoded:
            log.repair(page.recoded)
    else:
        made[settings.text_key] = decode(data, log)
    return made


def _check_length(record: Any, number: int) -> None:
    """Raises `EOFError` where the archive ends inside the record, or nobody knows where: what is there is no page."""
    if record.length is None:
        raise EOFError("a record without Content-Length")
    while record.raw_stream.read(1 << 20):
        pass
    missing = getattr(record.raw_stream, "limit", 0)
    if missing > 0:
        raise EOFError(f"the file ends {missing} bytes before the record does")


def _body(record: Any) -> Any:
    """The stream of a record's body, without its chunks and its compression."""
    headers = record.http_headers
    if headers is None or (headers.get_header("Transfer-Encoding") or "").strip().lower() != "chunked":
        return record.content_stream()
    from warcio.bufferedreaders import BufferedReader, ChunkedDataReader

    class Chunks(ChunkedDataReader):
        """Knows whether the last chunk, which is empty, has come; there may be lines of headers behind it."""

        ends_early = False

        def _try_decode(self, length_header: bytes) -> None:
            if re.fullmatch(rb"0+(;.*)?\r?\n?", length_header):
                self.all_chunks_read, self.ends_early = True, False
                self._process_read(b"")
                return
            super()._try_decode(length_header)
            self.ends_early = True

    packed = (headers.get_header("Content-Encoding") or "").strip().lower()
    return Chunks(record.raw_stream, decomp_type=packed if packed in BufferedReader.get_supported_decompressors()
                  else None)


def _ends_early(record: Any, body: Any) -> bool:
    """Whether a body ends before its last chunk, its length or its compression does; warcio gives what was there."""
    if getattr(body, "ends_early", False):
        return True
    decompressor = getattr(body, "decompressor", None)
    if decompressor is not None:
        return not getattr(decompressor, "eof", True)
    length = record.http_headers.get_header("Content-Length") if record.http_headers is not None else None
    return body is record.raw_stream and bool(length) and length.strip().isdecimal() and (
        0 <= record.payload_length < int(length[:18]))


def _content_type(record: Any) -> str:
    if record.http_headers is not None:
        # Servers that say nothing mostly mean HTML; its first bytes decide.
        return (record.http_headers.get_header("Content-Type") or _UNTYPED).lower()
    return (record.rec_headers.get_header("Content-Type") or "").lower()
