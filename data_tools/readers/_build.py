"""Documents out of records: characters repaired, ids and sources filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_tools.readers._lines import decode
from data_tools.records import Document, ReadLog, ReadSettings, Split
from parallel.common.json_text import has_surrogates, plain, without_surrogates


def build_document(record: dict[str, Any], fallback_id: str, split: Split, settings: ReadSettings,
                   log: ReadLog) -> Document | None:
    """A document out of a record with a text, repaired where the characters ask for it; None if it was dropped."""
    other = dict(record)
    text = other.pop(settings.text_key, None)
    identity = other.pop(settings.id_key, None)
    source = other.pop(settings.source_key, None)
    document_id = clean_characters(str(plain(identity)), None) if identity not in (None, "") else fallback_id
    source = clean_characters(str(plain(source)), None) if source not in (None, "") else default_source(split, settings)
    if isinstance(text, bytes):
        text = decode(text, log)
    if not isinstance(text, str):
        log.drop("no_text", document_id, source, f"key '{settings.text_key}' holds {type(text).__name__}")
        return None
    text = clean_characters(text, log)
    other = _clean_other(other, log)
    limit = settings.maximum_document_bytes
    if len(text) > limit // 4 and len(text.encode()) > limit:  # a character takes at most four bytes
        log.drop("too_long", document_id, source, f"{len(text)} characters")
        return None
    if text.count("\ufffd") > settings.maximum_broken_share * len(text):
        log.drop("broken_text", document_id, source, f"{text.count(chr(0xFFFD))} of {len(text)} characters undecodable")
        return None
    return Document(document_id, text, source, other)


def _clean_other(other: dict[str, Any], log: ReadLog) -> dict[str, Any]:
    """The further keys as values that JSON has, so that they can be written whatever the source was typed as."""
    if not other:
        return other
    if has_surrogates(other):
        log.repair("lone_surrogates")
    return plain(other)


def default_source(split: Split, settings: ReadSettings) -> str:
    """Source of documents that name none: the setting, else the name of the file without its suffixes."""
    return settings.source or Path(split.name).name.split(".")[0]


def clean_characters(text: str, log: ReadLog | None) -> str:
    """`text` without null characters and with lone surrogates as U+FFFD, so that it can be written as UTF-8."""
    if "\x00" in text:
        text = text.replace("\x00", "")
        if log is not None:
            log.repair("null_bytes")
    repaired = without_surrogates(text)
    if repaired is not text and repaired != text and log is not None:
        log.repair("lone_surrogates")
    return repaired
