"""Paragraphs that stand in several documents are left in one of them.

Three passes, each over parts or buckets alone, so that memory is bounded and every engine can carry them: (1) each part
writes the digests of its paragraphs into buckets by digest; (2) each bucket finds the digests with several owners and
writes, for each part, which document must give which paragraph up; (3) each part is written without them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from data_tools.dedup.normalise import normalise
from data_tools.dedup.sign_part import record_digest
from data_tools.documents import OutputFormat, read_split
from data_tools.engines.base import Engine
from data_tools.parts import Drop, OutputLayout, PartFigures, Step, digest_of, run_step, split_identity
from data_tools.records import Document, ReadLog, ReadSettings, Split
from parallel.common.digests import check_summed, load_array, save_array
from parallel.common.errors import UserError
from parallel.common.files import atomic_write
from parallel.common.settings import Settings

_ENTRY = np.dtype([("digest", "<u8"), ("rank", "<u4"), ("owner", "<u8"), ("part", "<u4"), ("row", "<u8")])
_PARTS_A_BUCKET = 16


class ParagraphSettings(Settings):
    """Paragraphs (lines) repeated across documents."""

    enabled: bool = False
    """Off by default: the PanGu-alpha paper removes repeated paragraphs inside a document only."""
    minimum_characters: int = pydantic.Field(40, ge=1)
    """Shorter paragraphs, in their normal form, may repeat."""
    sources: list[str] = []
    """Sources in order of preference: the paragraph stays in a document of the first; among these in the one with the
    smallest digest, which is arbitrary and depends on nothing else."""


@dataclass(frozen=True)
class ParagraphPlan:
    """Settings, folder for the files in between, and number of buckets."""

    settings: ParagraphSettings
    read: ReadSettings
    work: str
    buckets: int

    def entries_path(self, part: int, bucket: int) -> Path:
        return Path(self.work) / "entries" / f"bucket-{bucket:05d}" / f"part-{part:05d}.npy"

    def losers_path(self, part: int) -> Path:
        return Path(self.work) / "losers" / f"part-{part:05d}"

    def rank(self, source: str) -> int:
        sources = self.settings.sources
        return sources.index(source) if source in sources else len(sources)


def paragraph_digests(text: str, minimum: int) -> list[int | None]:
    """For each line a 64-bit digest of its normal form, None for short ones."""
    digests: list[int | None] = []
    for line in text.split("\n"):
        codes = normalise(line) if len(line) >= minimum // 4 else np.empty(0, np.uint32)
        long = len(codes) >= minimum
        digest = hashlib.blake2b(codes.tobytes(), digest_size=8).digest()
        digests.append(int.from_bytes(digest, "little") if long else None)
    return digests


@dataclass(frozen=True)
class _CollectTask:
    plan: ParagraphPlan
    split: Split

    def __call__(self) -> None:
        entries = []
        for row, document in enumerate(read_split(self.split, self.plan.read, ReadLog())):
            owner = int.from_bytes(record_digest(document)[:8], "little")
            rank = self.plan.rank(document.source)
            entries += [(digest, rank, owner, self.split.index, row)
                        for digest in paragraph_digests(document.text, self.plan.settings.minimum_characters)
                        if digest is not None]
        table = np.array(entries, dtype=_ENTRY)
        bucket_of = table["digest"] % np.uint64(self.plan.buckets)
        for bucket in range(self.plan.buckets):
            save_array(self.plan.entries_path(self.split.index, bucket), table[bucket_of == bucket])


@dataclass(frozen=True)
class _DecideTask:
    plan: ParagraphPlan
    bucket: int
    parts: tuple[int, ...]

    def __call__(self) -> None:
        table = np.concatenate([load_array(self.plan.entries_path(part, self.bucket)) for part in self.parts])
        table.sort(order=["digest", "rank", "owner", "part", "row"])
        first = np.ones(len(table), dtype=bool)
        first[1:] = table["digest"][1:] != table["digest"][:-1]
        # All of the first document keeps the paragraph, however often it has it.
        winner = np.flatnonzero(first)[np.cumsum(first) - 1] if len(table) else np.empty(0, np.int64)
        same = (table["part"] == table["part"][winner]) & (table["row"] == table["row"][winner])
        losers = table[~same]
        for part in self.parts:
            mine = losers[losers["part"] == part]
            save_array(self.plan.losers_path(part) / f"bucket-{self.bucket:05d}.npy",
                       np.stack([mine["row"], mine["digest"]], axis=1))


class ParagraphStep(Step):
    """Takes the paragraphs out that other documents keep."""

    name = "paragraphs"

    def __init__(self, plan: ParagraphPlan) -> None:
        self.plan = plan
        self._losers: dict[int, set[int]] = {}

    def _load(self, split: Split) -> np.ndarray:
        files = sorted(self.plan.losers_path(split.index).glob("*.npy"))
        return np.concatenate([np.empty((0, 2), np.uint64), *map(load_array, files)])

    def digest_source(self, split: Split) -> Any:
        return [self.plan.settings.model_dump(mode="json"), hashlib.blake2b(self._load(split).tobytes()).hexdigest()]

    def begin_part(self, split: Split) -> None:
        self._losers = {}
        for row, digest in self._load(split).tolist():
            self._losers.setdefault(row, set()).add(digest)

    def process(self, document: Document, row: int, figures: PartFigures) -> Iterator[Document]:
        losers = self._losers.get(row)
        if losers:
            lines = document.text.split("\n")
            digests = paragraph_digests(document.text, self.plan.settings.minimum_characters)
            document.text = "\n".join(line for line, digest in zip(lines, digests, strict=True) if digest not in losers)
            figures.changed_by_rule["paragraphs"] += 1
            if not document.text.strip():
                raise Drop("repeated_paragraphs", f"all {len(lines)} paragraphs occur in other documents")
        yield document


def run_paragraphs(settings: ParagraphSettings, read: ReadSettings, splits: list[Split], layout: OutputLayout,
                   work: str | Path, engine: Engine, format: OutputFormat) -> PartFigures:
    """The three passes."""
    digest = digest_of([settings.model_dump(mode="json"), [split_identity(split) for split in splits]])
    folder = str(Path(work) / f"paragraphs-{digest[:12]}")
    plan = ParagraphPlan(settings, read, folder, len(splits) // _PARTS_A_BUCKET + 1)
    marker = Path(plan.work) / "decided"
    if not (marker.is_file() and _whole(plan, splits)):
        list(engine.map(_call, [_CollectTask(plan, split) for split in splits], "paragraphs: digests"))
        parts = tuple(split.index for split in splits)
        tasks = [_DecideTask(plan, bucket, parts) for bucket in range(plan.buckets)]
        list(engine.map(_call, tasks, "paragraphs: repeated ones"))
        with atomic_write(marker) as file:
            file.write("done\n")
    return run_step(ParagraphStep(plan), splits, layout, engine, format, read)


def _whole(plan: ParagraphPlan, splits: list[Split]) -> bool:
    """Whether what an earlier run decided is unchanged."""
    try:
        for split in splits:
            for file in plan.losers_path(split.index).glob("*.npy"):
                check_summed(file)
    except UserError:
        return False
    return True


def _call(task: Any) -> Any:
    return task()
