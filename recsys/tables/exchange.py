"""AlltoAll between processes on the host: what each has for each other one, in rounds of a fixed size.

A round carries at most `capacity` bytes from one process to another. What does not fit follows in the next round, so
nothing is ever dropped; rounds go on until every process has handed over everything. Needs no MindSpore unless
processes of MindSpore are meant.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

_HEADER = 8


class Exchange(Protocol):
    """What tables need of a process group."""

    rank: int
    ranks: int

    def all_to_all(self, parts: Sequence[bytes]) -> list[bytes]:
        """parts[r] goes to rank r; returns what each rank had for this one. All ranks call it."""
        ...


class Alone:
    """One process."""

    rank, ranks = 0, 1

    def all_to_all(self, parts: Sequence[bytes]) -> list[bytes]:
        """See `Exchange`."""
        return list(parts)


class Rounds:
    """`Exchange` over a collective of fixed size.

    Args:
        rank, ranks: this process among all.
        capacity: bytes between a pair of processes in one round; a multiple of 8.
        swap: `swap(uint8 [ranks, _HEADER + capacity]) -> the same`: row r goes to rank r, row r comes from rank r.

    Attributes:
        rounds: how many the last call took.
        most_rounds: how many any call took.
    """

    def __init__(self, rank: int, ranks: int, capacity: int, swap: Callable[[np.ndarray], np.ndarray]) -> None:
        self.rank, self.ranks, self.capacity, self.swap = rank, ranks, capacity, swap
        self.rounds = self.most_rounds = 0

    def all_to_all(self, parts: Sequence[bytes]) -> list[bytes]:
        """See `Exchange`."""
        sizes = [len(part) for part in parts]
        received: list[list[bytes]] = [[] for _ in range(self.ranks)]
        wanted, self.rounds = 1, 0
        left = np.zeros(self.ranks, np.int64)
        while self.rounds < wanted:
            begin = self.rounds * self.capacity
            out = np.zeros((self.ranks, _HEADER + self.capacity), np.uint8)
            # Every process sends all others the number of rounds it needs, so that all of them make the same number.
            need = max(1, -(-max(sizes) // self.capacity))
            for rank, part in enumerate(parts):
                piece = np.frombuffer(part[begin:begin + self.capacity], np.uint8)
                out[rank, :_HEADER].view(np.uint32)[:] = need, sizes[rank]
                out[rank, _HEADER:_HEADER + len(piece)] = piece
            found = np.ascontiguousarray(self.swap(out))
            heads = found[:, :_HEADER].copy().view(np.uint32)
            wanted = int(heads[:, 0].max())
            if self.rounds == 0:
                left = heads[:, 1].astype(np.int64)
            for rank in range(self.ranks):
                count = int(min(max(left[rank] - begin, 0), self.capacity))
                received[rank].append(found[rank, _HEADER:_HEADER + count].tobytes())
            self.rounds += 1
        self.most_rounds = max(self.most_rounds, self.rounds)
        return [b"".join(pieces) for pieces in received]


class Threads:
    """Several ranks as threads of one process, for tests: `world.of(rank)` is each one's `Rounds`.

    Args:
        ranks: how many.
        capacity: see `Rounds`.
    """

    def __init__(self, ranks: int, capacity: int = 1 << 16) -> None:
        self.ranks, self.capacity = ranks, capacity
        self.shelf: list[np.ndarray | None] = [None] * ranks
        self.barrier = threading.Barrier(ranks)

    def of(self, rank: int) -> Rounds:
        """The exchange of one rank."""
        return Rounds(rank, self.ranks, self.capacity, lambda out: self._swap(rank, out))

    def _swap(self, rank: int, out: np.ndarray) -> np.ndarray:
        self.shelf[rank] = out
        self.barrier.wait()
        found = np.stack([self.shelf[other][rank] for other in range(self.ranks)])
        self.barrier.wait()
        return found


def exchange_of(processes: object, capacity: int) -> Exchange:
    """The exchange of `parallel.training.device.Processes`."""
    if processes.ranks == 1:
        return Alone()
    from parallel.training.device import DeviceSwap

    return Rounds(processes.rank, processes.ranks, -(-capacity // 8) * 8, DeviceSwap(processes))
