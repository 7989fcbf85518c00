"""Packed records as batches: which record is where in which batch, positions and documents.

Shapes: B batch (of one rank), S sequence. Batch number i depends only on (seed, i): a run resumes at any step without
reading what came before, and the contiguous slices of N ranks make up the batch of a single process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pangu.data.flat import FlatRecords
from pangu.data.mind_records import REPAIR, MindRecords
from pangu.data.packing import SPLITS, read_index
from parallel.common.errors import UserError
from parallel.training.data_source import DataSource

_GOLDEN = 0x9E3779B97F4A7C15
_RECORDS_PER_WINDOW = 1 << 22  # records asked for at once, each time opening MindRecord files: bounds memory only


# ---------------------------------------------------------------- positions and documents

def document_positions(ids_BS: np.ndarray, eod_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions that start anew after every end-of-document id, and which document each position belongs to.

    A position sees those of its own document up to itself (`parallel.layers.attention.AttentionBias`); the end belongs
    to its own document. Source: the release's `dataset.py` (`eod_reset`), which makes masks of the same meaning.

    Args:
        ids_BS: input ids, without the last column of the record.
        eod_id: end of document, 9 in the published vocabulary.

    Returns:
        position_ids_BS and documents_BS, both int32.
    """
    batch, length = ids_BS.shape
    ends_BS = ids_BS == eod_id
    # Number of ends strictly before each position: equal numbers, same document.
    documents_BS = np.cumsum(ends_BS, axis=1, dtype=np.int32) - ends_BS
    places_S = np.arange(length, dtype=np.int32)
    starts_BS = np.zeros((batch, length), np.int32)
    starts_BS[:, 1:] = np.where(ends_BS[:, :-1], places_S[1:], 0)
    return places_S - np.maximum.accumulate(starts_BS, axis=1), documents_BS.astype(np.int32)


def check_documents(documents_BS: np.ndarray, most: int | None, where: Path) -> None:
    """Raises a UserError if a record holds more than `most` documents (None: any number will do)."""
    if most is None or not documents_BS.size or documents_BS.max() < most:
        return
    raise UserError(f"a record holds {documents_BS.max() + 1} documents, and attention is told where {most} end",
                    where=where, hint="raise model.most_documents, or take model.attention=written_out")


def plain_positions(ids_BS: np.ndarray, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions 0..S-1 and a single document: `eod_reset` off.

    Padding is numbered apart. It is at the end of a record, so no token sees it, and it carries no loss; what it
    sees itself does not matter.

    Returns:
        position_ids_BS and documents_BS (0, padding 1), both int32.
    """
    batch, length = ids_BS.shape
    return np.tile(np.arange(length, dtype=np.int32), (batch, 1)), (ids_BS == pad_id).astype(np.int32)


# ---------------------------------------------------------------- order

def shuffled(positions: np.ndarray, count: int, key: int) -> np.ndarray:
    """Where a shuffle of `range(count)` puts `positions`, computed without making all of the shuffle.

    A Feistel network of six rounds over the next even number of bits, walked along its cycle until it lands below
    `count`: a permutation chosen by `key`, at the cost of the positions asked for (chosen here; a list of all records
    of a large corpus would fill the memory of every rank).

    Args:
        positions: int64 array, values in [0, count).
        key: any integer; another key, another order.
    """
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    keys = np.random.default_rng(key % 2**64).integers(0, 2**63, 6, dtype=np.uint64)
    low_mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    values = positions.astype(np.uint64)
    outside = np.ones(values.shape, bool)
    while outside.any():
        walking = values[outside]
        left, right = walking >> shift, walking & low_mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & low_mask)
        values[outside] = (left << shift) | right
        outside = values >= count
    return values.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Lanes:
    """Which rows of the batches come from which files: equal shares of rows and of files, in order.

    Args:
        counts, starts: records of each lane, and the number of its first among all.
        width: rows of a lane in a batch.
        each: files of a lane.
    """

    counts: list[int]
    starts: list[int]
    width: int
    each: int

    @classmethod
    def of(cls, records: list[int], batch: int, by_file: bool) -> Lanes:
        """As many lanes as divide both the batch and the files (one without `by_file`): they depend on these alone, not
        on how many processes read.

        Raises:
            UserError: a lane without records.
        """
        lanes = math.gcd(batch, len(records)) if by_file else 1
        each = len(records) // lanes
        counts = [sum(records[lane * each:(lane + 1) * each]) for lane in range(lanes)]
        if min(counts) == 0:
            raise UserError("a file holds no records, and rows of the batches come from it alone", where="data.by_file",
                            value=True, hint="pack into fewer shards, or set it to false")
        starts = [sum(counts[:lane]) for lane in range(lanes)]
        return cls(counts, starts, batch // lanes, each)

    @property
    def records(self) -> int:
        """Of all lanes."""
        return sum(self.counts)

    @property
    def steps(self) -> int:
        """Batches in which every lane shows all its records."""
        return max(-(-count // self.width) for count in self.counts)

    def rows(self, part: slice) -> Iterator[tuple[int, slice]]:
        """(lane, rows within it) of a share of the batch's rows."""
        for lane in range(part.start // self.width, -(-part.stop // self.width)):
            first = lane * self.width
            yield lane, slice(max(part.start - first, 0), min(part.stop - first, self.width))

    def files(self, part: slice) -> slice:
        """Numbers of the files from which a share of the rows comes."""
        return slice(part.start // self.width * self.each, -(-part.stop // self.width) * self.each)


# ---------------------------------------------------------------- the data set

class PackedDataset(DataSource):
    """Batches of packed records for the trainer.

    Args:
        directory: folder that `python -m pangu pack` wrote.
        batch_size: sequences of one step over all ranks.
        seed: chooses the order of the records; each epoch has its own.
        sequence_length, vocabulary_size: of the model; checked against the index.
        shard: (index, count) of this rank; it gets the index-th of `count` equal slices of every batch.
        shuffle: off, records come in the order of the files.
        eod_reset: attention and positions start anew after every document end.
        split: "train" or "validation".
        repeat: on, epochs follow each other without end, and a batch may reach over the border of two. Off, one pass;
            the last batch is filled with records of padding, which carry no loss.
        tokenizer_fingerprint: SHA-256 of the tokenizer in use; checked against the index when given.
        reader: which files are read, with the same batches; auto = the flat ones where there are any, so that no
            MindSpore is needed.
        by_file: each row of the batches comes from files of its own, so that a rank reads only those of its rows.
        most_documents: in a record; None = any number.

    Raises:
        UserError: no records, another sequence length, vocabulary or tokenizer, a batch that the ranks cannot share
            equally, files missing, truncated or damaged.
    """

    columns = ("input_ids", "position_ids", "documents")

    def __init__(self, directory: str | Path, *, batch_size: int, seed: int, sequence_length: int, vocabulary_size: int,
                 shard: tuple[int, int] = (0, 1), shuffle: bool = True, eod_reset: bool = True, split: str = "train",
                 repeat: bool = True, tokenizer_fingerprint: str | None = None,
                 reader: Literal["auto", "flat", "mindrecord"] = "auto", by_file: bool = False,
                 most_documents: int | None = None) -> None:
        self.most_documents = most_documents
        self.directory, self.index = Path(directory), read_index(directory)
        self._check("sequence_length", self.index.sequence_length, sequence_length)
        self._check("vocabulary_size", self.index.vocabulary_size, vocabulary_size)
        if tokenizer_fingerprint is not None:
            self._check("tokenizer", self.index.tokenizer_sha256, tokenizer_fingerprint)
        rank, ranks = shard
        if not 0 <= rank < ranks or batch_size < 1 or batch_size % ranks:
            raise UserError("the batch cannot be shared equally", where="global_batch_size", value=batch_size,
                            hint=f"choose a multiple of the {ranks} data-parallel ranks")
        self.batch_size, self.seed, self.shuffle, self.repeat = batch_size, seed, shuffle, repeat
        self.eod_reset = eod_reset
        self.sequence_length, self.vocabulary_size = sequence_length, vocabulary_size
        self._slice = slice(rank * batch_size // ranks, (rank + 1) * batch_size // ranks)
        self._lanes = Lanes.of([entry.records for entry in self._part(split).files], batch_size, by_file)
        if by_file and split == "train" and len(self._lanes.counts) % ranks:
            raise UserError(f"{len(self._part(split).files)} files and a batch of {batch_size} do not divide among "
                            f"{ranks} data-parallel ranks", where="data.by_file", value=True,
                            hint=f"pack with pack.shards a multiple of {ranks}, or set it to false")
        own = self._lanes.files(self._slice)
        self._first = sum(entry.records for entry in self._part(split).files[:own.start])
        self._records = self._open(split, reader, own)
        self.records = self._lanes.records

    @property
    def steps_per_epoch(self) -> int:
        """Batches that show every record at least once."""
        return self._lanes.steps

    def batches(self, start_step: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields the batches from number `start_step` on, as `columns`: int32 [B, S+1], [B, S], [B, S].

        Without end when `repeat`, else up to `steps_per_epoch`.

        Raises:
            UserError: a file is damaged, or a record holds more documents than `most_documents`.
        """
        for ids in self._ids(start_step):
            yield (ids, *self._positions_and_documents(ids[:, :-1]))

    def mindspore_dataset(self, start_step: int, steps: int) -> Any:
        """The same batches, `steps` of them from `start_step` on, as a `mindspore.dataset` pipeline (for data sink)."""
        import mindspore.dataset as ds

        return ds.GeneratorDataset(_Stretch(self, start_step, steps), list(self.columns), shuffle=False,
                                   num_parallel_workers=1, python_multiprocessing=False)

    def record_numbers(self, first: int, last: int) -> np.ndarray:
        """Which records this rank's part of the batches first..last-1 holds, by their number in the files.

        Returns:
            int64 array [batches, B]; -1 is padding.
        """
        steps = np.arange(first, last, dtype=np.int64)[:, None]
        found = []
        for lane, rows in self._lanes.rows(self._slice):
            count, start = self._lanes.counts[lane], self._lanes.starts[lane]
            places = steps * self._lanes.width + np.arange(rows.start, rows.stop)
            epochs, numbers = places // count, places % count
            if not self.repeat:
                found.append(np.where(epochs > 0, -1, start + self._order(numbers, lane, 0)))
                continue
            for epoch in np.unique(epochs):
                numbers[epochs == epoch] = self._order(numbers[epochs == epoch], lane, int(epoch))
            found.append(start + numbers)
        return np.concatenate(found, axis=1)

    def _order(self, numbers: np.ndarray, lane: int, epoch: int) -> np.ndarray:
        key = (self.seed << 32) + epoch + lane * _GOLDEN
        return shuffled(numbers, self._lanes.counts[lane], key) if self.shuffle else numbers

    def _positions_and_documents(self, ids_BS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.eod_reset:
            positions_BS, documents_BS = document_positions(ids_BS, self.index.eot_id)
            check_documents(documents_BS, self.most_documents, self.directory)
            return positions_BS, documents_BS
        return plain_positions(ids_BS, self.index.pad_id)

    def _check(self, name: str, packed: Any, wanted: Any) -> None:
        if packed != wanted:
            raise UserError(f"the records were packed with {name} {packed}", where=self.directory, value=wanted,
                            hint=f"use that {name} or pack the corpus again")

    def _part(self, split: str) -> Any:
        """The split's part of the index."""
        if split not in SPLITS:
            raise UserError(f"no such split; known: {', '.join(SPLITS)}", where="split", value=split)
        part = getattr(self.index, split)
        if not part.records:
            raise UserError(f"there are no {split} records", where=self.directory,
                            hint="pack a larger corpus or change pack.validation_fraction")
        return part

    def _open(self, split: str, reader: str, own: slice) -> FlatRecords | MindRecords:
        files = self._part(split).files[own]
        flat = all(entry.flat is not None for entry in files)
        if reader == "flat" and not flat:
            raise UserError("the records have no flat files", where=self.directory, hint="`python -m pangu flatten`")
        kind = FlatRecords if reader == "flat" or (reader == "auto" and flat) else MindRecords
        return kind(self.directory, files, self.sequence_length + 1)

    # ------------------------------------------------------------ reading

    def _ids(self, start_step: int) -> Iterator[np.ndarray]:
        """Ids [B, S+1] of the batches from `start_step` on, read in windows."""
        rows = self._slice.stop - self._slice.start
        stop = None if self.repeat else self.steps_per_epoch
        # MindRecord's reader takes no more numbers than there are records, so its files are opened once in so many.
        window = max(1, min(_RECORDS_PER_WINDOW, len(self._records)) // rows)
        step = start_step
        while stop is None or step < stop:
            end = step + window if stop is None else min(step + window, stop)
            numbers = self.record_numbers(step, end)
            full = int((numbers >= 0).all(axis=1).sum())  # only the last batch of a pass can hold padding
            yield from self._read(numbers[:full].reshape(-1), rows)
            for partly in numbers[full:]:
                ids = np.full((rows, self.sequence_length + 1), self.index.pad_id, np.int32)
                real = partly[partly >= 0]
                if real.size:
                    ids[: real.size] = next(self._read(real, rows))
                yield ids
            step = end

    def _read(self, numbers: np.ndarray, rows: int) -> Iterator[np.ndarray]:
        """The records `numbers` in this order, `rows` at a time."""
        for ids in self._records.read(numbers - self._first, rows):
            self._check_ids(ids)
            yield ids

    def _check_ids(self, ids: np.ndarray) -> None:
        if ids.ndim != 2 or ids.shape[1] != self.sequence_length + 1:
            raise UserError("files are damaged: a record has another length", where=self.directory,
                            value=list(ids.shape), hint=REPAIR)
        if ids.min() < 0 or ids.max() >= self.vocabulary_size:
            raise UserError("files are damaged: an id is outside the vocabulary", where=self.directory,
                            value=int(ids.max()), hint=REPAIR)


class _Stretch:
    """Some batches of a data set as an iterable with a length, as `GeneratorDataset` wants its source."""

    def __init__(self, dataset: PackedDataset, start_step: int, steps: int) -> None:
        self.dataset, self.start_step, self.steps = dataset, start_step, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        batches = self.dataset.batches(self.start_step)
        try:
            for _ in range(self.steps):
                yield next(batches)
        finally:
            batches.close()
