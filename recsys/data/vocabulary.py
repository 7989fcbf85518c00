"""The statistics pass: which values a feature takes, where its quantiles are. Streaming, memory bounded.

What it finds is written as one JSON file beside the data and travels with every checkpoint, so that training,
evaluation and serving read a value the same way.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from parallel.common.errors import UserError
from parallel.common.files import read_json, write_json
from parallel.common.progress import info
from parallel.common.structured import typed
from recsys.data.features import FIRST_KNOWN, UNSEEN, Feature

VOCABULARY = "vocabulary.json"
"""Name of the vocabulary's file beside encoded rows, checkpoints and published versions."""
RESERVOIR = 100_000
MAX_VOCABULARY_BYTES = 4 << 30
_SHAPES = {"values": dict[str, list[str]], "counts": dict[str, list[float]], "boundaries": dict[str, list[float]],
           "moments": dict[str, tuple[float, float]]}


@dataclass
class Vocabulary:
    """What is known about the features' values.

    Args:
        values: for each vocabulary feature its admitted values, the most frequent first; value i has row i + 2.
        counts: how often each was seen (decayed by `refresh`).
        boundaries: upper edges of the buckets of numeric features.
        moments: mean and standard deviation (after the transform) of numeric features that scale a vector.
    """

    values: dict[str, list[str]] = field(default_factory=dict)
    counts: dict[str, list[float]] = field(default_factory=dict)
    boundaries: dict[str, list[float]] = field(default_factory=dict)
    moments: dict[str, tuple[float, float]] = field(default_factory=dict)

    def sizes(self) -> dict[str, int]:
        """Known values of each vocabulary feature (a list as long as the table when rows are free: see refresh)."""
        return {name: len(values) for name, values in self.values.items()}

    def save(self, path: str | Path) -> None:
        """Writes JSON, atomically."""
        write_json(path, {"values": self.values, "counts": self.counts, "boundaries": self.boundaries,
                          "moments": {name: list(pair) for name, pair in self.moments.items()}})

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Reads what `save` wrote.

        Raises:
            UserError: missing, too large, damaged or not a vocabulary.
        """
        tree = read_json(path, max_bytes=MAX_VOCABULARY_BYTES)
        if not isinstance(tree, dict) or set(tree) != {"values", "counts", "boundaries", "moments"}:
            raise UserError("file is damaged: not a vocabulary", where=path, hint="run train again")
        made = cls(**{name: typed(tree[name], shape, where=f"{path}, {name}", hint="run train again")
                      for name, shape in _SHAPES.items()})
        for name, values in made.values.items():
            if name in made.counts and len(made.counts[name]) != len(values):
                raise UserError(f"there are not as many counts as values of '{name}'", where=path,
                                hint="run train again")
        return made

    def rows_of(self, feature: Feature, values: pa.Array) -> np.ndarray:
        """Rows of string values; null = missing = 0, not in the vocabulary = unseen = 1."""
        name = feature.target or feature.name
        known = self._lookup(name)
        rows = pc.fill_null(pc.add(pc.index_in(values, value_set=known), FIRST_KNOWN), UNSEEN)
        return pc.if_else(pc.is_valid(values), rows, 0).to_numpy(zero_copy_only=False).astype(np.int32)

    def _lookup(self, name: str) -> pa.Array:
        cache = self.__dict__.setdefault("_arrays", {})
        if name not in cache:
            cache[name] = pa.array(self.values[name], pa.string())
        return cache[name]

    def refresh(self, name: str, counts: dict[str, float], rows: int, *, decay: float = 0.5,
                minimum_count: float = 1.0) -> list[int]:
        """Admits and evicts values of an open vocabulary after new data; returns the rows to start anew.

        Old counts are multiplied by `decay` and the new ones added. A value below `minimum_count` is evicted; among
        the rest the `rows` most frequent are kept. Values that stay keep their row; a newcomer takes the row of an
        evicted one (its row is returned: reset the embedding and its optimizer state there) or a row never used.
        `rows` must be the feature's, so that the table is large enough from the start.
        """
        merged = {value: count * decay for value, count in zip(self.values[name], self.counts[name], strict=True)}
        for value, count in counts.items():
            merged[value] = merged.get(value, 0.0) + count
        ranked = sorted((-count, value) for value, count in merged.items() if count >= minimum_count)[:rows]
        kept = {value for _, value in ranked}
        places = [value if value in kept else None for value in self.values[name]]
        free = [index for index, value in enumerate(places) if value is None]
        present, reset = set(self.values[name]), []
        for newcomer in (value for _, value in ranked if value not in present):
            if free:
                index = free.pop(0)
                places[index] = newcomer
                reset.append(FIRST_KNOWN + index)
            else:
                places.append(newcomer)
        # An empty row keeps its number under a value that no text can be, so that later rows do not move.
        self.values[name] = [f"\x00{index}" if value is None else value for index, value in enumerate(places)]
        self.counts[name] = [merged.get(value, 0.0) for value in self.values[name]]
        self.__dict__.pop("_arrays", None)
        return reset


def hash_rows(feature: Feature, values: pa.Array) -> np.ndarray:
    """Row of each string value: 2 + 64-bit BLAKE2b of the value (keyed by the feature) modulo rows; null = 0."""
    encoded = values.dictionary_encode() if not pa.types.is_dictionary(values.type) else values
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    key = (feature.target or feature.name).encode()[:64]
    uniques = np.array([int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8, key=key).digest(), "little")
                        for value in encoded.dictionary.to_pylist()], np.uint64)
    rows = np.append((uniques % np.uint64(max(1, feature.rows or 1))).astype(np.int64) + FIRST_KNOWN, 0)
    index = pc.fill_null(encoded.indices, len(uniques)).to_numpy(zero_copy_only=False)
    return rows[index].astype(np.int32)


def transformed(feature: Feature, numbers: np.ndarray) -> np.ndarray:
    """float64 values after the feature's transform, before standardising."""
    return np.sign(numbers) * np.log1p(np.abs(numbers)) if feature.transform == "log" else numbers


class Statistics:
    """Collects counts, quantiles and moments chunk by chunk; `vocabulary()` closes the pass.

    Args:
        features: as `expand` gives them.
        tracked: distinct values counted per feature at most. Beyond it the rarest are forgotten (lossy counting): the
            counts of the frequent ones stay right to within the count that was forgotten.
    """

    def __init__(self, features: list[Feature], tracked: int = 20_000_000) -> None:
        self.features, self.tracked = features, tracked
        self.counters: dict[str, Counter] = {}
        self.forgotten: dict[str, int] = {}
        self.samples: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.sums: dict[str, list[tuple[float, float, float]]] = {}
        self.position = (0, 0)

    def begin(self, where: str, first_row: int) -> None:
        """What is added next comes from here: the sample depends on it, and not on what was added before."""
        self.position = zlib.crc32(Path(where).name.encode()), first_row

    def merge(self, other: Statistics) -> None:
        """Adds what was found in rows that follow."""
        for name, counter in other.counters.items():
            own = self.counters.setdefault(name, Counter())
            own.update(counter)
            self._forget(name)
        for name, least in other.forgotten.items():
            self.forgotten[name] = max(least, self.forgotten.get(name, 0))
        for name, (keys, numbers) in other.samples.items():
            self._sample(name, keys, numbers)
        for name, sums in other.sums.items():
            self.sums.setdefault(name, []).extend(sums)

    @staticmethod
    def needed(features: list[Feature]) -> bool:
        """Whether any feature waits for what the pass finds."""
        return any(Statistics._counts(f) or f.is_value or (f.type == "numeric" and f.boundaries is None)
                   for f in features)

    @staticmethod
    def _counts(feature: Feature) -> bool:
        return feature.type != "numeric" and feature.values == "vocabulary" and feature.target is None

    def add_values(self, feature: Feature, values: pa.Array) -> None:
        """Counts string values (flattened lists for multi and sequence)."""
        counter = self.counters.setdefault(feature.name, Counter())
        for entry in pc.value_counts(pc.drop_null(values)).to_pylist():
            counter[entry["values"]] += entry["counts"]
        self._forget(feature.name)

    def _forget(self, name: str) -> None:
        if len(self.counters[name]) > self.tracked:
            kept = self.counters[name].most_common(self.tracked // 2)
            self.forgotten[name] = kept[-1][1]
            self.counters[name] = Counter(dict(kept))

    def add_numbers(self, feature: Feature, numbers: np.ndarray) -> None:
        """Adds finite float64 numbers to the quantile sample and the moments."""
        numbers = transformed(feature, numbers[np.isfinite(numbers)])
        self.sums.setdefault(feature.name, []).append(
            (float(len(numbers)), float(numbers.sum()), float(np.square(numbers).sum())))
        # Each number draws a key; the smallest keys are a uniform sample of everything seen.
        generator = np.random.default_rng((zlib.crc32(feature.name.encode()), *self.position))
        self._sample(feature.name, generator.random(len(numbers)), numbers)

    def _sample(self, name: str, keys: np.ndarray, numbers: np.ndarray) -> None:
        old_keys, old = self.samples.get(name, (np.zeros(0), np.zeros(0)))
        keys, numbers = np.concatenate([old_keys, keys]), np.concatenate([old, numbers])
        if len(keys) > RESERVOIR:
            smallest = np.argpartition(keys, RESERVOIR)[:RESERVOIR]
            keys, numbers = keys[smallest], numbers[smallest]
        self.samples[name] = (keys, numbers)

    def vocabulary(self) -> Vocabulary:
        """The finished vocabulary: frequency order, ties by value, admission by minimum_count and rows."""
        result = Vocabulary()
        for feature in self.features:
            if self._counts(feature):
                self._close_counts(feature, result)
            elif feature.is_value:
                count = total = squares = 0.0
                for one, two, three in self.sums.get(feature.name, []):
                    count, total, squares = count + one, total + two, squares + three
                mean = total / count if count else 0.0
                variance = squares / count - mean * mean if count else 1.0
                result.moments[feature.name] = (float(mean), math.sqrt(variance) if variance > 1e-12 else 1.0)
            elif feature.type == "numeric":
                result.boundaries[feature.name] = self._edges(feature)
        return result

    def _close_counts(self, feature: Feature, result: Vocabulary) -> None:
        counter = self.counters.get(feature.name, Counter())
        admitted = sorted((-count, value) for value, count in counter.items() if count >= feature.minimum_count)
        admitted = admitted[: feature.rows]
        result.values[feature.name] = [value for _, value in admitted]
        result.counts[feature.name] = [float(-count) for count, _ in admitted]
        if feature.name in self.forgotten:
            info(f"{feature.name}: more than {self.tracked} distinct values; those seen at most about "
                 f"{self.forgotten[feature.name]} times may be missing from the vocabulary")

    def _edges(self, feature: Feature) -> list[float]:
        if feature.boundaries is not None:
            return list(feature.boundaries)
        _, sample = self.samples.get(feature.name, (None, np.zeros(0)))
        if len(sample) == 0:
            return []
        edges = np.unique(np.quantile(sample, np.arange(1, feature.buckets) / feature.buckets))
        return [float(edge) for edge in edges]
