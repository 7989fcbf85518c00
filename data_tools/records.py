"""What readers take and give: settings, parts of the input, documents and the log of what was wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from parallel.common.settings import Settings


class ReadSettings(Settings):
    """How inputs are read."""

    text_key: str = "text"
    """Key (jsonl) or column (parquet) that holds the text."""
    id_key: str = "id"
    """Key or column that holds the id; a document without one gets `file:offset`."""
    source_key: str = "source"
    """Key or column that holds the source; a document without one gets `source`."""
    source: str | None = None
    """Source of documents that name none; null = the name of the file without its suffixes."""
    text_unit: Literal["file", "line", "blank_line"] = "file"
    """What one document is in a plain text file: the file, a line, or the lines up to a blank one."""
    maximum_document_bytes: int = 32 << 20
    """Larger documents are dropped and counted (rule read_too_long)."""
    maximum_broken_share: float = 0.01
    """Documents of which more than this share of the characters cannot be decoded are dropped (read_broken_text)."""
    split_bytes: int = 32 << 20
    """Plain jsonl and parquet files are split into parts of about this size, so that several workers can share one."""


@dataclass(frozen=True)
class Split:
    """Part `index` of the input: `reader` reads `path` from `start` to `end` (None = the end)."""

    index: int
    path: str
    name: str
    reader: str
    start: int = 0
    end: int | None = None


@dataclass
class Document:
    """One text. `other` holds further keys of the record (title, url, ...), which are written back."""

    id: str
    text: str
    source: str
    other: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        title = self.other.get("title")
        return title if isinstance(title, str) else ""

    def record(self) -> dict[str, Any]:
        return {"id": self.id, "text": self.text, "source": self.source, **self.other}


@dataclass
class ReadLog:
    """What went wrong while reading: dropped documents, repaired documents by kind, damaged files."""

    dropped: list[dict[str, Any]] = field(default_factory=list)
    repaired: Counter = field(default_factory=Counter)
    damaged_files: list[dict[str, str]] = field(default_factory=list)

    def drop(self, kind: str, document_id: str, source: str, evidence: str) -> None:
        self.dropped.append({"id": document_id, "source": source, "step": "read", "rule": f"read_{kind}",
                             "evidence": evidence[:200]})

    def repair(self, kind: str) -> None:
        self.repaired[kind] += 1

    def damaged(self, kind: str, path: str, evidence: str) -> None:
        self.damaged_files.append({"path": path, "kind": kind, "evidence": evidence[:200]})
