"""Candidate pairs out of buckets, the same for every engine.

A bucket holds the nodes that share the key of a band. Up to `ALL_PAIRS` members, every pair is taken whose signatures
agree often enough; in a larger one each member is taken with its most similar ones only, so that the pairs grow
linearly; one above `bucket_limit` is first split by the keys of the other bands, then by digest. Pairs are verified
afterwards, so splitting can lose a pair (which another band most often finds) and never make a wrong one.
Legend: M members, P signature entries, B bands.
"""

from __future__ import annotations

import numpy as np

ALL_PAIRS = 64
_BLOCK_BYTES = 8 << 20


def agreeing_pairs(signatures: np.ndarray, left: np.ndarray, right: np.ndarray, floor: float) -> np.ndarray:
    """Which of the pairs (left[i], right[i]) agree in at least the share `floor` of their signatures: bool [pairs]."""
    entries = signatures.shape[1]
    needed = int(np.ceil(floor * entries - 1e-9))
    agree = np.empty(len(left), dtype=bool)
    step = max(1, _BLOCK_BYTES // (entries * 4))
    for start in range(0, len(left), step):
        here = slice(start, start + step)
        equal = signatures[left[here]] == signatures[right[here]]
        agree[here] = np.count_nonzero(equal, axis=1) >= needed
    return agree


def bucket_pairs(signatures: np.ndarray, floor: float, neighbours: int) -> np.ndarray:
    """Pairs of member numbers of one bucket that are worth verifying: int64 [pairs, 2], first < second, sorted.

    Args:
        signatures: uint32 [M, P], the members in the order of their digests.
        floor: share of equal entries that a pair must reach.
        neighbours: most pairs a member of a large bucket begins.
    """
    count = len(signatures)
    if count < 2:
        return np.empty((0, 2), dtype=np.int64)
    if count <= ALL_PAIRS:
        left, right = np.triu_indices(count, 1)
        agree = agreeing_pairs(signatures, left, right, floor)
        return np.stack([left[agree], right[agree]], axis=1)
    return _nearest_pairs(signatures, floor, neighbours)


def _nearest_pairs(signatures: np.ndarray, floor: float, neighbours: int) -> np.ndarray:
    """Each member with its `neighbours` most similar ones; ties go to the smaller number, which makes one hub."""
    count, entries = signatures.shape
    needed = int(np.ceil(floor * entries - 1e-9))
    found = []
    step = max(1, _BLOCK_BYTES // (count * entries))
    for start in range(0, count, step):
        block = signatures[start:start + step]
        agreement = np.count_nonzero(block[:, None, :] == signatures[None, :, :], axis=2)
        agreement[np.arange(len(block)), start + np.arange(len(block))] = -1
        for offset, row in enumerate(agreement):
            partners = np.flatnonzero(row >= needed)
            if len(partners) > neighbours:
                nearest = np.argsort(-row[partners], kind="stable")[:neighbours]
                # The first partner too: it ties groups of like members together.
                partners = np.unique(np.append(partners[nearest], partners[0]))
            own = np.full(len(partners), start + offset)
            found.append(np.stack([np.minimum(own, partners), np.maximum(own, partners)], axis=1))
    return np.unique(np.concatenate(found), axis=0) if found else np.empty((0, 2), dtype=np.int64)


def shard_of(digest_low: np.ndarray, members: int, limit: int) -> np.ndarray:
    """Shards of a bucket that is too large even after the split by other bands: by the low half of the digest."""
    return digest_low % np.uint64(-(-members // limit))


def _runs(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(order, starts, lengths) of the runs of equal keys, members in rising order inside a run."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(ordered) else \
        np.empty(0, dtype=np.int64)
    return order, starts, np.diff(np.append(starts, len(ordered)))


class Bucketer:
    """Finds all candidate pairs among nodes held in memory.

    Args:
        keys: uint64 [N, B] band keys of the nodes, nodes in the order of their digests.
        digest_low: uint64 [N], low half of the digests.
        signatures: uint32 [N, P].
    """

    def __init__(self, keys: np.ndarray, digest_low: np.ndarray, signatures: np.ndarray, floor: float, neighbours: int,
                 limit: int) -> None:
        self.keys, self.digest_low, self.signatures = keys, digest_low, signatures
        self.floor, self.neighbours, self.limit = floor, neighbours, limit
        self.split_buckets = 0
        self._pairs: list[np.ndarray] = []

    def pairs(self) -> np.ndarray:
        """Sorted distinct pairs of node numbers: int64 [pairs, 2]."""
        for band in range(self.keys.shape[1]):
            self._band(band)
        if not self._pairs:
            return np.empty((0, 2), dtype=np.int64)
        return np.unique(np.concatenate(self._pairs), axis=0)

    def _band(self, band: int) -> None:
        order, starts, lengths = _runs(self.keys[:, band])
        self._equal_runs(order, starts, lengths)
        for start, length in zip(starts[lengths > self.limit], lengths[lengths > self.limit], strict=True):
            self._split_bucket(order[start:start + length], band)

    def _equal_runs(self, order: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> None:
        """All runs within the limit; those of one length are worked on together."""
        for length in np.unique(lengths[(lengths > 1) & (lengths <= ALL_PAIRS)]):
            first, second = np.triu_indices(length, 1)
            members = order[starts[lengths == length][:, None] + np.arange(length)]
            left, right = members[:, first].ravel(), members[:, second].ravel()
            agree = agreeing_pairs(self.signatures, left, right, self.floor)
            self._pairs.append(np.stack([left[agree], right[agree]], axis=1))
        large = (lengths > ALL_PAIRS) & (lengths <= self.limit)
        for start, length in zip(starts[large], lengths[large], strict=True):
            self._bucket(order[start:start + length])

    def _bucket(self, members: np.ndarray) -> None:
        pairs = bucket_pairs(self.signatures[members], self.floor, self.neighbours)
        self._pairs.append(members[pairs])

    def _split_bucket(self, members: np.ndarray, band: int) -> None:
        """A bucket above the limit: its members that share another band too, each such group a bucket of its own."""
        self.split_buckets += 1
        for other in range(self.keys.shape[1]):
            if other == band:
                continue
            order, starts, lengths = _runs(self.keys[members, other])
            self._equal_runs(members[order], starts, lengths)
            for start, length in zip(starts[lengths > self.limit], lengths[lengths > self.limit], strict=True):
                group = members[order[start:start + length]]
                shards = shard_of(self.digest_low[group], length, self.limit)
                for shard in np.unique(shards):
                    # The first member is in every shard, so that groups of like members stay tied together.
                    self._bucket(np.unique(np.append(group[shards == shard], group[0])))
