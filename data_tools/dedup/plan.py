"""What is to be deduplicated and how: settings, and the paths of the files in between."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pydantic

from data_tools.dedup.signature import Bands, Signer, plan_bands
from data_tools.records import ReadSettings, Split
from parallel.common.settings import Settings


class DedupSettings(Settings):
    """Exact and near duplicates; all numbers were chosen here (the PanGu-alpha paper does not disclose its own)."""

    threshold: float = pydantic.Field(0.8, gt=0, le=1)
    """Jaccard similarity of the sets of character n-grams from which two documents are near duplicates."""
    ngram: int = pydantic.Field(5, ge=1, le=64)
    """Characters in an n-gram. Shorter documents have no n-gram: only their exact copies are removed."""
    hashes: int = pydantic.Field(128, ge=1, le=4096)
    """Entries of a MinHash signature; more allow more selective bands and cost time in proportion."""
    recall: float = pydantic.Field(0.998, gt=0, lt=1)
    """Share of the pairs at `threshold + margin` that must become candidates; decides the bands."""
    margin: float = pydantic.Field(0.05, ge=0, lt=1)
    """See `recall`."""
    seed: int = 1
    """Of the hash functions."""
    bucket_limit: int = pydantic.Field(2048, ge=2)
    """Documents in one bucket up to which all of them are compared by their signatures; larger buckets are split."""
    neighbours: int = pydantic.Field(32, ge=1)
    """In a bucket above 64 documents each is verified against this many of the most similar by signature."""
    sources: list[str] = []
    """Sources in order of preference: of duplicates the one whose source comes first is kept; others rank last."""


@dataclass(frozen=True)
class DedupPlan:
    """One deduplication: the parts, the settings, and the folder for the files in between.

    The rule by which one of the duplicates is kept: source preferred (`sources`), then the longest normalised text,
    then the smallest id, then the smallest digest of the whole record; only for equal records the first in the input.
    """

    settings: DedupSettings
    read: ReadSettings
    splits: tuple[Split, ...]
    work: str

    @property
    def bands(self) -> Bands:
        settings = self.settings
        return plan_bands(settings.threshold, settings.hashes, settings.recall, settings.margin)

    def signer(self) -> Signer:
        return Signer(self.settings.ngram, self.bands.count * self.bands.rows, self.settings.seed)

    def estimate_floor(self) -> float:
        """Share of equal signature entries below which a candidate pair is not worth verifying.

        Five standard deviations of the estimate below `threshold`, so that none of the pairs above is lost.
        """
        threshold, entries = self.settings.threshold, self.bands.count * self.bands.rows
        return max(0.0, threshold - 5.0 * math.sqrt(threshold * (1.0 - threshold) / entries))

    def without_splits(self) -> DedupPlan:
        """For tasks of one part: the list of all parts would make them large."""
        return replace(self, splits=())

    def source_rank(self, source: str) -> int:
        order = self.settings.sources
        return order.index(source) if source in order else len(order)

    def signature_path(self, part: int) -> Path:
        return Path(self.work) / "signatures" / f"part-{part:05d}.parquet"

    def shingle_path(self, part: int) -> Path:
        return Path(self.work) / "shingles" / f"part-{part:05d}"

    def decision_path(self, part: int) -> Path:
        """JSON lines {row, kept_id, similarity, kind}: the rows of the part that go."""
        return Path(self.work) / "decisions" / f"part-{part:05d}.jsonl"
