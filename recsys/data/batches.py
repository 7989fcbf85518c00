"""Batches of encoded rows: batch i is a function of (seed, i), so that a run can resume at any step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from parallel.common.errors import UserError
from parallel.training.data_source import DataSource
from recsys.data.encode import Encoded
from recsys.data.features import UNSEEN, FeatureSpec
from recsys.tables.keys import MISSING_KEY, UNSEEN_KEY

_WINDOW = 1 << 22


class Batches(DataSource):
    """Batches of encoded rows for the trainer: (ids, numbers, labels).

    Args:
        rows: a part of a log.
        batch: samples of one global batch.
        seed: of the order; None keeps the rows' order.
        rank, ranks: this data-parallel process's share of every batch.
        spec: columns of the features, for those with an unseen_rate.
        together: up to this many samples of a user follow each other in a drawn order.
        groups: whether the labels end in a column that says which samples are of one user.
        shards: parts of consecutive rows that give every batch equally many samples, in the order of the parts; a rank
            then reads its own parts alone. The batches do not depend on how many ranks read them.

    Raises:
        UserError: too few rows for a batch, or shards that do not divide it or are not divided by the ranks.
    """

    columns = ("ids", "numbers", "labels")

    def __init__(self, rows: Encoded, batch: int, seed: int | None, rank: int = 0, ranks: int = 1,
                 spec: FeatureSpec | None = None, together: int = 1, groups: bool = False, shards: int = 1) -> None:
        if batch % shards or (shards > 1 and shards % ranks):
            raise UserError(f"shards divide the batch of {batch} evenly, and {ranks} ranks divide the shards",
                            where="data.shards", value=shards)
        if len(rows) // shards * shards < batch:
            raise UserError(f"there are only {len(rows)} rows for a batch", where="train.global_batch_size",
                            value=batch, hint="make it smaller")
        self.rows, self.batch, self.seed, self.together, self.groups = rows, batch, seed, together, groups
        self.hidden = [slot for slot in spec.slots.values() if slot.feature.unseen_rate] if spec is not None else []
        self.share, self.part = batch // shards, len(rows) // shards  # samples of a batch and rows of a shard
        self.steps_per_epoch = self.part // self.share
        share = batch // ranks
        self.mine = slice(rank * share, (rank + 1) * share)
        self.cut = self.mine if shards == 1 else slice(None)
        self.shards = range(1) if shards == 1 else range(rank * shards // ranks, (rank + 1) * shards // ranks)

    def batches(self, start_step: int) -> Iterator[tuple[np.ndarray, ...]]:
        """Batches start_step, start_step + 1, ... without end."""
        epoch, first = divmod(start_step, self.steps_per_epoch)
        step = start_step
        while True:
            for index in self._orders(epoch, first):
                ids, numbers_, labels = gather(self.rows, index)
                self._hide(ids, step)
                if self.groups:
                    # Numbers that float32 holds exactly.
                    users = np.asarray(self.rows.users[index]) & (2**24 - 1)
                    labels = np.concatenate([labels, users[:, None].astype(np.float32)], 1)
                yield ids, numbers_, labels
                step += 1
            epoch, first = epoch + 1, 0

    def _hide(self, ids: np.ndarray, step: int) -> None:
        """Shows some values as unseen; which ones depends on (seed, step, row in the global batch)."""
        for number, slot in enumerate(self.hidden):
            generator = np.random.default_rng((self.seed or 0, 1, step, number))
            chosen = generator.random(self.batch)[self.mine] < slot.feature.unseen_rate
            missing, unseen = ((MISSING_KEY, UNSEEN_KEY) if slot.feature.is_dynamic
                               else (slot.offset, slot.offset + UNSEEN))
            ids[chosen & (ids[:, slot.start] != missing), slot.start] = unseen

    def _orders(self, epoch: int, first: int) -> Iterator[np.ndarray]:
        """Row numbers of this rank's share of each batch of an epoch from batch `first` on."""
        for pieces in zip(*(self._order(shard, epoch, first) for shard in self.shards), strict=True):
            yield np.concatenate(pieces)[self.cut]

    def _order(self, shard: int, epoch: int, first: int) -> Iterator[np.ndarray]:
        """Row numbers of a shard in each batch of an epoch from batch `first` on.

        The rows are permuted within windows of 4M rows, and the windows among themselves, so that the order of a long
        log costs little memory.
        """
        batch, begin = self.share, shard * self.part
        usable = self.steps_per_epoch * batch
        window = max(batch, _WINDOW // batch * batch)
        starts = np.arange(0, usable, window)
        if self.seed is not None:
            starts = np.random.default_rng((self.seed, epoch)).permutation(starts)
        # The remainder of rows that fill no batch moves on from epoch to epoch.
        turn = 0 if self.seed is None else (epoch * batch) % max(1, self.part)
        for start in starts:
            size = min(window, usable - start)
            steps = size // batch
            if first >= steps:
                first -= steps
                continue
            order = np.arange(size)
            if self.seed is not None:
                generator = np.random.default_rng((self.seed, epoch, int(begin + start)))
                order = generator.permutation(size)
                if self.together > 1:
                    users = np.asarray(self.rows.users[begin + (order + start + turn) % self.part])
                    order = order[_together(users, self.together, generator)]
            for step in range(first, steps):
                yield begin + (order[step * batch:(step + 1) * batch] + start + turn) % self.part
            first = 0


def _together(users: np.ndarray, most: int, generator: np.random.Generator) -> np.ndarray:
    """An order of shuffled samples in which each user's are together in runs of up to `most`, the runs shuffled."""
    order = np.argsort(users, kind="stable")
    sorted_ = users[order]
    begin = np.flatnonzero(np.r_[True, sorted_[1:] != sorted_[:-1]])
    number = np.arange(len(users)) - np.repeat(begin, np.diff(np.r_[begin, len(users)]))
    run = np.cumsum(number % most == 0) - 1
    return order[np.argsort(generator.permutation(run[-1] + 1)[run], kind="stable")]


def gather(rows: Encoded, index: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, numbers, labels) of chosen rows, as arrays of their own."""
    ids = np.asarray(rows.ids[index])
    if rows.shift is not None:
        ids = ids + rows.shift
    return np.ascontiguousarray(ids), np.asarray(rows.numbers[index]).copy(), np.asarray(rows.labels[index]).copy()


def in_order(rows: Encoded, batch: int) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray, int]]:
    """Every row once, in order: ((ids, numbers, labels) filled up to `batch` rows, users, how many are real)."""
    for begin in range(0, len(rows), batch):
        yield filled_batch(rows, begin, batch)


def filled_batch(rows: Encoded, begin: int, batch: int) -> tuple[tuple[np.ndarray, ...], np.ndarray, int]:
    """The batch that begins at a row; see `in_order`."""
    part = slice(begin, min(begin + batch, len(rows)))
    real = part.stop - begin
    arrays = gather(rows, part)
    if real < batch:
        arrays = tuple(np.concatenate([array, np.repeat(array[-1:], batch - real, 0)]) for array in arrays)
    return arrays, np.asarray(rows.users[part]), real
