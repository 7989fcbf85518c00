"""Who writes which slice of a checkpoint: each slice once a disk, spread evenly over the ranks that hold it.

Every rank computes the same answer from the layout alone, so nobody has to ask anybody.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from parallel.common.errors import UserError

Extent = tuple[tuple[int, int], ...]
Holders = Mapping[str, Mapping[Extent, Sequence[int]]]
"""For each parameter, who holds which part of it: extent -> ranks in rising order."""

_PARTS_OF_A_SHARE = 8


@dataclass(frozen=True)
class Disks:
    """Which ranks write to one disk.

    Args:
        ranks: how many there are.
        each: consecutive ranks that share a disk; `ranks` where all do.
    """

    ranks: int
    each: int

    def __post_init__(self) -> None:
        if self.each < 1 or self.ranks % self.each:
            raise UserError("machines without a shared disk must hold equally many ranks", where="output.shared_disk",
                            value=f"{self.each} of {self.ranks}")

    @classmethod
    def shared(cls, ranks: int) -> Disks:
        """One disk for all."""
        return cls(ranks, ranks)

    @property
    def count(self) -> int:
        """How many disks there are."""
        return self.ranks // self.each

    def of(self, rank: int) -> int:
        """Number of a rank's disk."""
        return rank // self.each

    def is_chief(self, rank: int) -> bool:
        """Whether a rank makes the folders and puts them in place: the first of its disk."""
        return rank % self.each == 0


@dataclass(frozen=True)
class OwnedSlice:
    """A slice of a tensor of a checkpoint, or a part of one, and who writes it."""

    name: str
    extent: Extent
    bytes: int
    rank: int


def owned_slices(tensors: Iterable[tuple[str, str, int]], holders: Holders, disks: Disks) -> Iterator[OwnedSlice]:
    """Every slice with its writer, once for each disk that has a rank which holds it.

    What one rank alone holds is its own to write. Of the rest the largest goes first, to the holder with the least to
    write so far (of equals the first); a slice that is large beside an even share is split along its first dim, for
    several of its holders.

    Args:
        tensors: (name, parameter whose layout it has, bytes of a number); moments are sharded as their parameters.
        holders: of these parameters.
        disks: where the ranks write.
    """
    loads, shared, writers = _Loads(disks), [], set()
    for name, owner, width in tensors:
        for extent, ranks in holders[owner].items():
            writers.update(ranks)
            for own in _by_disk(ranks, disks):
                size = width * volume(extent)
                if len(own) > 1:
                    shared.append((-size, name, extent, own))
                else:
                    loads.bytes[own[0]] += size
                    yield OwnedSlice(name, extent, size, own[0])
    share = (sum(loads.bytes) - sum(item[0] for item in shared)) / max(1, len(writers))
    largest = max(1.0, share / _PARTS_OF_A_SHARE)
    for size, name, extent, ranks in sorted(shared):
        parts, taken = _parts(extent, min(len(ranks), math.ceil(-size / largest))), set()
        for part in parts:
            bytes_ = -size * volume(part) // max(1, volume(extent))
            rank = loads.give(bytes_, ranks, taken)
            taken.add(rank)
            yield OwnedSlice(name, part, bytes_, rank)


def written_by(rank: int, tensors: Iterable[tuple[str, str, int]], holders: Holders, disks: Disks) -> dict[str, Extent]:
    """What `rank` writes of the tensors that it holds: which part of each; of a tensor that others write, nothing."""
    return {item.name: item.extent for item in owned_slices(tensors, holders, disks) if item.rank == rank}


def _parts(extent: Extent, count: int) -> list[Extent]:
    """An extent split along its first dim into at most `count` parts that differ by a row at most."""
    if not extent or count < 2:
        return [extent]
    (start, stop), *rest = extent
    count = max(1, min(count, stop - start))
    edges = [start + (stop - start) * number // count for number in range(count + 1)]
    return [((first, last), *rest) for first, last in itertools.pairwise(edges)]


def held_alike(extents: Iterable[tuple[int, Mapping[str, Extent]]], names: Iterable[str]) -> Holders:
    """`Holders` from what every rank holds.

    Args:
        extents: (rank, its extents by parameter), ranks rising.
        names: which parameters are wanted.
    """
    found: dict[str, dict[Extent, list[int]]] = {name: {} for name in names}
    for rank, own in extents:
        for name in found.keys() & own.keys():
            found[name].setdefault(own[name], []).append(rank)
    return found


def volume(extent: Sequence[tuple[int, int]]) -> int:
    """Elements in an extent."""
    return math.prod(stop - start for start, stop in extent)


class _Loads:
    """Bytes that each rank writes so far. Groups of ranks come again and again, so each keeps a heap of its own whose
    entries are brought up to date when they are looked at."""

    def __init__(self, disks: Disks) -> None:
        self.bytes = [0] * disks.ranks
        self.heaps: dict[tuple[int, ...], list[tuple[int, int]]] = {}

    def give(self, size: int, ranks: tuple[int, ...], taken: set[int]) -> int:
        """The rank that takes `size` bytes more; not one of `taken`."""
        if ranks not in self.heaps:
            self.heaps[ranks] = [(self.bytes[rank], rank) for rank in ranks]
            heapq.heapify(self.heaps[ranks])
        heap, aside = self.heaps[ranks], []
        while True:
            load, rank = heap[0]
            if load != self.bytes[rank]:
                heapq.heapreplace(heap, (self.bytes[rank], rank))
            elif rank in taken:
                aside.append(heapq.heappop(heap))
            else:
                break
        for entry in aside:
            heapq.heappush(heap, entry)
        self.bytes[rank] += size
        return rank


def _by_disk(ranks: Sequence[int], disks: Disks) -> list[tuple[int, ...]]:
    if disks.count == 1:
        return [tuple(ranks)]
    found: dict[int, list[int]] = {}
    for rank in ranks:
        found.setdefault(disks.of(rank), []).append(rank)
    return [tuple(own) for own in found.values()]
