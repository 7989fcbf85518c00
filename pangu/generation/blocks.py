"""Blocks of the key and value cache: who holds which, and which hold a prefix that may come again.

A block keeps some tokens of one sequence in all layers. A full one is found again by the digest of all ids up to its
end, so sequences that begin alike hold the same blocks; it is counted how many do. A block that nobody holds keeps its
content until it is needed for something else, the one unused for longest first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np


class BlockPool:
    """All blocks of a cache.

    Args:
        blocks: how many.
        block_size: tokens of one.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks, self.block_size = blocks, block_size
        self._empty = list(range(blocks - 1, -1, -1))
        self._holders = [0] * blocks
        self._digests: list[bytes | None] = [None] * blocks
        self._found: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()
        self.notes: list[Any] = [None] * blocks
        """What the owner of the pool wants to remember of a full block's content; gone when the content is."""

    @property
    def available(self) -> int:
        """Blocks that can be had."""
        return len(self._empty) + len(self._kept)

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self.blocks - self.available

    @property
    def kept(self) -> int:
        """Blocks that nobody holds and whose content can be found."""
        return len(self._kept)

    def take(self) -> int:
        """An empty block, held once.

        Raises:
            IndexError: none is available.
        """
        if self._empty:
            block = self._empty.pop()
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            self._forget(block)
        else:
            raise IndexError("no block is available")
        self._holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        """Another sequence holds a block that was found."""
        self._kept.pop(block, None)
        self._holders[block] += 1

    def give_back(self, blocks: Sequence[int]) -> None:
        """A sequence lets its blocks go; of those that nobody holds then, its last ones are the first to be reused."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if self._digests[block] is None:
                    self._empty.append(block)
                else:
                    self._kept[block] = None

    def register(self, block: int, digest: bytes) -> None:
        """A held block is full; where its content is known already, that one stays the one to be found."""
        if digest not in self._found:
            self._found[digest], self._digests[block] = block, digest

    def is_kept(self, block: int) -> bool:
        """Whether nobody holds it, so that to hold it makes one block fewer available."""
        return block in self._kept

    def find(self, digest: bytes) -> int | None:
        """The block with this content."""
        return self._found.get(digest)

    def _forget(self, block: int) -> None:
        digest = self._digests[block]
        if digest is not None:
            del self._found[digest]
        self._digests[block] = self.notes[block] = None


def digests(ids: Sequence[int], block_size: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """The digest of each full block of `ids`, of all ids up to its end; the first ones may be known."""
    found = list(known)
    for begin in range(len(found) * block_size, len(ids) - block_size + 1, block_size):
        part = np.asarray(ids[begin:begin + block_size], "<i4").tobytes()
        found.append(hashlib.blake2b((found[-1] if found else b"") + part, digest_size=16).digest())
    return found
