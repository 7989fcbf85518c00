"""A step over all parts of the input: one output file a part, a marker when it is done, nothing done twice.

A step writes to the folder of its documents (`part-00000.jsonl`), of those removed (with step, rule and evidence) and
of its markers (`part-00000.json`: what was done, and its figures): for a verb DIR, DIR/removed and DIR/.state/<step>. A
part whose marker carries the digest of the same input, settings and step is not done again. Files take their names
only when they are complete, so a worker may die at any moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_tools.documents import OutputFormat, RecordWriter, read_split
from data_tools.engines.base import Engine
from data_tools.records import Document, ReadLog, ReadSettings, Split
from parallel.common.digests import file_crc32
from parallel.common.errors import UserError
from parallel.common.files import read_json, write_json
from parallel.common.progress import info

_FORMAT_VERSION = 1  # part of every digest: raised when the output of a step changes with the same settings
_PART = re.compile(r"^part-\d{5,}\.(jsonl|jsonl\.gz|jsonl\.zst|parquet)$")


class Drop(Exception):
    """Raised by a step: the document goes, by this rule, on this evidence; `more` is written beside it."""

    def __init__(self, rule: str, evidence: str, **more: Any) -> None:
        super().__init__(rule)
        self.rule, self.evidence, self.more = rule, evidence, more


class Step:
    """What is done to each document of a part. Subclasses are sent to workers: keep them small."""

    name: str = "step"

    def digest_source(self, split: Split) -> Any:
        """JSON value on which the output of a part depends besides the input (settings, digests of model files)."""
        raise NotImplementedError

    def begin_part(self, split: Split) -> None:
        """Called in the worker before the first document of a part."""

    def process(self, document: Document, row: int, figures: PartFigures) -> Iterator[Document]:
        """The documents that come out for the one that goes in (most often one).

        Raises:
            Drop: the document is removed.
        """
        raise NotImplementedError


@dataclass
class PartFigures:
    """Counts of one part, and of a step when added up. Bytes are UTF-8 bytes of the texts."""

    documents_in: int = 0
    documents_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    by_rule: Counter = field(default_factory=Counter)
    bytes_by_rule: Counter = field(default_factory=Counter)
    changed_by_rule: Counter = field(default_factory=Counter)
    repaired: Counter = field(default_factory=Counter)
    damaged_files: list = field(default_factory=list)
    characters_in: Counter = field(default_factory=Counter)
    characters_out: Counter = field(default_factory=Counter)
    by_source: Counter = field(default_factory=Counter)
    copies_by_category: Counter = field(default_factory=Counter)
    worker_seconds: float = 0.0
    parts_reused: int = 0

    def add(self, other: PartFigures) -> None:
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
            else:
                setattr(self, name, getattr(self, name) + value)

    def to_json(self) -> dict[str, Any]:
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    @staticmethod
    def from_json(tree: dict[str, Any]) -> PartFigures:
        blank = PartFigures()
        return PartFigures(**{name: Counter(tree[name]) if isinstance(value, Counter) else tree[name]
                              for name, value in vars(blank).items() if name in tree})

    def summary(self) -> dict[str, Any]:
        """The figures of the verb's JSON line."""
        damaged = Counter(entry["kind"] for entry in self.damaged_files)
        return {"documents_in": self.documents_in, "documents_out": self.documents_out, "bytes_in": self.bytes_in,
                "bytes_out": self.bytes_out, "by_rule": dict(sorted(self.by_rule.items())),
                "changed_by_rule": dict(sorted(self.changed_by_rule.items())),
                "repaired": dict(sorted(self.repaired.items())), "damaged_files": dict(sorted(damaged.items()))}


def histogram_bin(characters: int) -> str:
    """Lower edge of the bin (powers of two) in which a text of this length is counted."""
    return str(0 if characters < 16 else 1 << (characters.bit_length() - 1))


@dataclass(frozen=True)
class OutputLayout:
    """Where a step writes documents, removed documents and markers."""

    documents: str
    removed: str
    state: str

    @staticmethod
    def under(output: str | Path, step: str) -> OutputLayout:
        """The output folders of a verb of one step."""
        output = Path(output).absolute()  # workers may run in another folder
        return OutputLayout(str(output), f"{output}/removed", f"{output}/.state/{step}")


@dataclass(frozen=True)
class PartTask:
    """One part through one step; callable, so that an engine can send it to a worker."""

    step: Step
    split: Split
    layout: OutputLayout
    format: OutputFormat
    read: ReadSettings

    def __call__(self) -> PartFigures:
        digest = self.digest()
        done = self._already_done(digest)
        if done is not None:
            return done
        started = time.perf_counter()
        figures, log = PartFigures(), ReadLog()
        self.step.begin_part(self.split)
        with RecordWriter(self.path) as kept, RecordWriter(self.removed_path) as removed:
            for row, document in enumerate(read_split(self.split, self.read, log)):
                self._write_dropped(log, figures, removed)
                self._one(document, row, figures, kept, removed)
            self._write_dropped(log, figures, removed)
        figures.repaired.update(log.repaired)
        figures.damaged_files += log.damaged_files
        figures.worker_seconds = time.perf_counter() - started
        write_json(self.marker, {"digest": digest, "step": self.step.name, "figures": figures.to_json(),
                                 "crc32": [file_crc32(path) for path in (self.path, self.removed_path)]})
        return figures

    def _one(self, document: Document, row: int, figures: PartFigures, kept: RecordWriter,
             removed: RecordWriter) -> None:
        before, size = document.record(), len(document.text.encode())
        figures.documents_in += 1
        figures.bytes_in += size
        figures.characters_in[histogram_bin(len(document.text))] += 1
        try:
            for stays in self.step.process(document, row, figures):
                figures.documents_out += 1
                figures.bytes_out += len(stays.text.encode())
                figures.characters_out[histogram_bin(len(stays.text))] += 1
                figures.by_source[stays.source] += 1
                kept.write(stays.record())
        except Drop as drop:
            figures.by_rule[drop.rule] += 1
            figures.bytes_by_rule[drop.rule] += size
            removed.write({"id": before["id"], "source": before["source"], "step": self.step.name, "rule": drop.rule,
                           "evidence": drop.evidence, **drop.more, "text": before["text"]})

    @staticmethod
    def _write_dropped(log: ReadLog, figures: PartFigures, removed: RecordWriter) -> None:
        """Writes what the reader dropped; its size is not known, so it counts no bytes."""
        for record in log.dropped:
            figures.documents_in += 1
            figures.by_rule[record["rule"]] += 1
            removed.write(record)
        log.dropped.clear()

    @property
    def stem(self) -> str:
        return f"part-{self.split.index:05d}"

    @property
    def path(self) -> Path:
        return Path(self.layout.documents) / f"{self.stem}.{self.format}"

    @property
    def removed_path(self) -> Path:
        return Path(self.layout.removed) / f"{self.stem}.jsonl"

    @property
    def marker(self) -> Path:
        return Path(self.layout.state) / f"{self.stem}.json"

    def digest(self) -> str:
        """Stands for everything on which the output of this part depends."""
        return digest_of([_FORMAT_VERSION, self.step.name, self.step.digest_source(self.split),
                          split_identity(self.split), self.format, self.read.model_dump(mode="json")])

    def _already_done(self, digest: str) -> PartFigures | None:
        try:
            marker = read_json(self.marker, dict)
        except UserError:  # none, or damaged: the part is made anew
            return None
        if marker.get("digest") != digest or not self.path.is_file() or not self.removed_path.is_file():
            return None
        for path, crc32 in zip((self.path, self.removed_path), marker.get("crc32", ()), strict=False):
            if file_crc32(path) != crc32:
                info(f"{path} has changed since it was written: the part is made anew")
                return None
        figures = PartFigures.from_json(marker["figures"])
        figures.parts_reused = 1
        return figures


def digest_of(value: Any) -> str:
    """A digest of a JSON value: equal values, equal digests."""
    # Names of files need not be UTF-8.
    text = json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def split_identity(split: Split) -> list[Any]:
    """Identity of this part of this state of the file."""
    status = os.stat(split.path)
    return [*asdict(split).values(), status.st_size, status.st_mtime_ns]


def run_step(step: Step, splits: list[Split], layout: OutputLayout, engine: Engine, format: OutputFormat,
             read: ReadSettings) -> PartFigures:
    """Runs `step` over all parts with `engine` and adds up their figures.

    Raises:
        UserError: a folder holds files that did not come from here, or cannot be written.
    """
    tasks = [PartTask(step, split, layout, format, read) for split in splits]
    clear_stale(layout, {task.path.name for task in tasks})
    total = PartFigures()
    for figures in engine.map(_run, tasks, step.name):
        total.add(figures)
    if total.parts_reused:
        info(f"{step.name}: {total.parts_reused} of {len(tasks)} parts were done already")
    return total


def _run(task: PartTask) -> PartFigures:
    return task()


def clear_stale(layout: OutputLayout, expected: set[str]) -> None:
    """Makes the folders and clears what an earlier run with more parts left; other people's files are left alone.

    Raises:
        UserError: the folder of the documents holds files and no state of these tools.
    """
    documents = Path(layout.documents)
    if documents.exists() and not documents.is_dir():
        raise UserError("the output is a file", where=documents, hint="give a folder")
    foreign = next((path for path in documents.iterdir() if path.is_file()), None) if documents.is_dir() else None
    if foreign is not None and not Path(layout.state).parent.is_dir():
        raise UserError("the output folder holds other files", where=documents, value=foreign.name,
                        hint="give a new folder")
    stems = {name.split(".")[0] for name in expected}
    for folder in (documents, Path(layout.removed)):
        for path in folder.iterdir() if folder.is_dir() else []:
            stale = path.name not in expected if folder == documents else path.name.split(".")[0] not in stems
            if (_PART.match(path.name) and stale) or path.name.startswith(".part-"):
                path.unlink()
    try:
        Path(layout.state).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write here: {error.strerror}", where=documents, hint="choose another folder") from None
