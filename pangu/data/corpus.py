"""The user's corpus: text files, JSON lines, compressed or in folders, read as a stream of documents."""

from __future__ import annotations

import hashlib
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from parallel.common.errors import UserError
from parallel.common.files import COMPRESSED_SUFFIXES, open_utf8
from parallel.common.structured import BadText, parse_object

TEXT_SUFFIXES = (".txt", ".text")
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
MAX_LINE_BYTES = 64 << 20
"""A longer line is refused: reading is by line, so this bounds the memory."""
MAX_TEXT_DOCUMENT_BYTES = 1 << 20
"""A text document (lines without a blank one between) is split after the line that passes this size."""

_KINDS = " ".join((*TEXT_SUFFIXES, *JSON_SUFFIXES)) + " and " + " ".join(COMPRESSED_SUFFIXES) + " of them"
_FOREIGN = {b"%PDF": "PDF", b"PK\x03\x04": "a zip file",
            b"\x1f\x8b": "a gzip file without .gz", b"\xfd7zXZ": "an xz file without .xz"}


def documents(
    path: str | Path, *, text_key: str = "text", whole_file: bool = False, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[str]:
    """Yields the texts of the documents under `path`, in a fixed order, with memory independent of the corpus size.

    Args:
        path: a `.txt` file (documents are parted by blank lines), a `.jsonl` file (one object a line), one of them
            compressed (`.xz`, `.gz`, `.zst`, `.bz2`), or a folder of such files (read in order of their
            relative paths).
        text_key: key of the text in a JSON object.
        whole_file: a text file is one document, its blank lines kept.
        max_line_bytes: longest line allowed, and longest file when `whole_file`.

    Raises:
        UserError: nothing there or nothing in it; not UTF-8, binary or damaged; a line too long; JSON without the text
            key. The message names the file and the line.
    """
    found = False
    for file in corpus_files(path):
        kind = _kind(file)
        try:
            with open_utf8(file) as stream:
                reader = _Lines(file, stream, max_line_bytes)
                if kind == "json":
                    texts = _json_documents(reader, text_key)
                else:
                    texts = _whole_text(reader, max_line_bytes) if whole_file else _text_documents(reader)
                for text in texts:
                    found = True
                    yield text
        except (EOFError, lzma.LZMAError, zlib.error) as error:
            raise _damaged(file, error) from None
        except OSError as error:
            if error.errno is not None:  # a real input/output error, not gzip's complaint
                raise UserError(f"cannot read: {error.strerror}", where=file) from None
            raise _damaged(file, error) from None
    if not found:
        raise UserError("the corpus is empty: no document with text in it", where=path)


def corpus_files(path: str | Path) -> list[Path]:
    """The files that `documents` reads, in its order.

    Raises:
        UserError: missing, of an unknown kind, or a folder without a file of a known kind.
    """
    path = Path(path)
    if path.is_file():
        if _kind(path) is None:
            raise UserError("unknown kind of corpus file", where=path, value=path.suffix, hint=f"known are {_KINDS}")
        return [path]
    if not path.is_dir():
        raise UserError("no such corpus", where=path, hint="check the path")
    files = []
    for folder, folders, names in os.walk(path):
        # `removed` is where the data tools keep the documents that they took out.
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "removed")
        files += [Path(folder, name) for name in names if not name.startswith(".") and _kind(Path(name)) is not None]
    if not files:
        raise UserError("no corpus file in this folder", where=path, hint=f"known are {_KINDS}")
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def corpus_bytes(path: str | Path) -> int:
    """Size of the corpus on the disk in bytes, as compressed as it is."""
    return sum(file.stat().st_size for file in corpus_files(path))


def in_validation(text: str, fraction: float) -> bool:
    """True for the documents held out for validation: a fixed hash of the text decides.

    A document falls on the same side in every run, wherever it is, and equal documents fall on the same side.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"damaged compressed file: {error}", where=file, hint="fetch or compress it again")


def _kind(path: Path) -> str | None:
    name = Path(path.name.lower())
    suffix = (name.with_suffix("") if name.suffix in COMPRESSED_SUFFIXES else name).suffix
    return "json" if suffix in JSON_SUFFIXES else "text" if suffix in TEXT_SUFFIXES else None


class _Lines:
    """Decoded lines of a stream with their numbers; line ends removed."""

    def __init__(self, path: Path, stream: BinaryIO, max_line_bytes: int) -> None:
        self.path, self.stream, self.limit, self.number = path, stream, max_line_bytes, 0

    def __iter__(self) -> Iterator[str]:
        while line := self.stream.readline(self.limit + 1):
            self.number += 1
            if len(line) > self.limit:
                raise self.error(f"line is longer than the {self.limit} bytes allowed", hint="break it into documents")
            if self.number == 1:
                self._refuse_foreign(line)
            yield self._decode(line).rstrip("\r\n")

    def _refuse_foreign(self, line: bytes) -> None:
        for start, name in _FOREIGN.items():
            if line.startswith(start):
                raise self.error(f"this is {name}, not UTF-8 text", hint="convert it to UTF-8 text")

    def _decode(self, line: bytes) -> str:
        if b"\0" in line:
            raise self.error("binary data, not text", hint="give UTF-8 text")
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"not UTF-8 (byte {error.start + 1} of the line)", hint="convert the file to UTF-8",
                             value=line[error.start : error.start + 4]) from None

    def error(self, what: str, **details: object) -> UserError:
        return UserError(what, where=f"{self.path}, line {self.number}", **details)  # type: ignore[arg-type]


def _json_documents(lines: _Lines, text_key: str) -> Iterator[str]:
    for line in lines:
        if not line.strip():
            continue
        try:
            value = parse_object(line, surrogates="keep", foreign_numbers="null")
        except BadText as error:
            raise lines.error(f"not a JSON object: {error}", value=line[:40],
                              hint="one object a line is expected") from None
        if text_key not in value:
            raise lines.error(f"no key '{text_key}'", value=list(value)[:8], hint="name the key that holds the text")
        text = value[text_key]
        if not isinstance(text, str):
            raise lines.error(f"'{text_key}' is not a string", value=text)
        if "\\u" in line and any("\ud800" <= char <= "\udfff" for char in text):
            raise lines.error(f"half a surrogate pair in '{text_key}'", hint="repair the escapes of this line")
        if text.strip():
            yield text


def _text_documents(lines: _Lines) -> Iterator[str]:
    pending: list[str] = []
    size = 0
    for line in lines:
        if line.strip():
            pending.append(line)
            size += len(line.encode())
        if pending and (not line.strip() or size >= MAX_TEXT_DOCUMENT_BYTES):
            yield "\n".join(pending)
            pending, size = [], 0
    if pending:
        yield "\n".join(pending)


def _whole_text(lines: _Lines, max_bytes: int) -> Iterator[str]:
    kept: list[str] = []
    size = 0
    for line in lines:
        kept.append(line)
        size += len(line.encode()) + 1
        if size > max_bytes:
            raise lines.error(f"file is longer than the {max_bytes} bytes allowed for one document",
                              hint="part it by blank lines and turn whole_file off")
    text = "\n".join(kept).strip("\n")
    if text.strip():
        yield text
