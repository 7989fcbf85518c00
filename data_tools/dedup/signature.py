"""MinHash signatures of character n-grams, vectorised over code points.

MinHash: Broder, "On the resemblance and containment of documents" (1997). The share of equal entries of two signatures
estimates the Jaccard similarity of the two sets of n-grams. The PanGu-alpha paper (section 3.1.2) does not disclose
its own algorithm, n-gram size or number of hashes: all of these were chosen here and are settings.
Legend: N documents, P hashes, L n-grams.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

_BLOCK = 16384  # n-grams worked on at a time: 64 kB of uint32, which stay in the cache through all P hashes
_EMPTY = np.uint32(0xFFFFFFFF)
_MULTIPLIER = 0x9E3779B97F4A7C15
_WRAP = 1 << 64


def shingle_hashes(codes: np.ndarray, n: int) -> np.ndarray:
    """64-bit hashes of all character n-grams, in order, repeated ones too: uint64 [max(0, len(codes) - n + 1)]."""
    count = len(codes) - n + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    wide = codes.astype(np.uint64)
    hashes = wide[:count] * np.uint64(pow(_MULTIPLIER, n - 1, _WRAP))
    for place in range(1, n):
        hashes += wide[place:place + count] * np.uint64(pow(_MULTIPLIER, n - 1 - place, _WRAP))
    return mix(hashes)


def mix(values: np.ndarray) -> np.ndarray:
    """Spreads uint64 values over all bits (the finaliser of MurmurHash3); changes `values` in place."""
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        values ^= values >> np.uint64(33)
        values *= np.uint64(multiplier)
    values ^= values >> np.uint64(33)
    return values


def shingle_set(codes: np.ndarray, n: int) -> np.ndarray:
    """The set of character n-grams as sorted distinct 64-bit hashes: uint64 [distinct n-grams]."""
    return np.unique(shingle_hashes(codes, n))


def text_digest(data: bytes, kind: bytes) -> bytes:
    """16 bytes that stand for a text; `kind` keeps apart the digests of different normal forms."""
    return hashlib.blake2b(data, digest_size=16, person=kind).digest()


@dataclass(frozen=True)
class Bands:
    """How a signature is split for locality-sensitive hashing: `count` bands of `rows` hashes."""

    count: int
    rows: int

    def recall(self, similarity: float) -> float:
        """Chance that two texts of this Jaccard similarity share a band: 1 - (1 - s^rows)^count."""
        return 1.0 - (1.0 - similarity**self.rows) ** self.count


def plan_bands(threshold: float, hashes: int, recall: float = 0.998, margin: float = 0.05) -> Bands:
    """The most selective bands within `hashes` that find `recall` of the pairs at `threshold + margin`.

    More rows mean fewer false candidates, so the largest number of rows that reaches the recall is taken; all
    candidates are verified afterwards, so a false one costs time and never a document.
    """
    similarity = min(1.0, threshold + margin)
    best = Bands(count=hashes, rows=1)
    for rows in range(1, hashes + 1):
        bands = Bands(count=hashes // rows, rows=rows)
        if bands.recall(similarity) >= recall:
            best = bands
    return best


class Signer:
    """Computes signatures and their band keys.

    Args:
        n: characters in an n-gram.
        hashes: P, entries of a signature.
        seed: of the hash functions; signatures of different seeds cannot be compared.
    """

    def __init__(self, n: int, hashes: int, seed: int = 1) -> None:
        self.n, self.hashes, self.seed = n, hashes, seed
        generator = np.random.Generator(np.random.PCG64(seed))
        # h_p(x) = a_p * x mod 2^32 with odd a_p: a permutation of the 32-bit numbers, one instruction an n-gram.
        self.multipliers = generator.integers(0, 1 << 31, hashes, dtype=np.uint32) * np.uint32(2) + np.uint32(1)

    def sign(self, texts: list[np.ndarray]) -> np.ndarray:
        """Signatures of normalised texts: uint32 [N, P]; a text shorter than n gives a row of 2^32 - 1.

        The n-grams of all texts are in one row and are worked on block by block, so that one giant text needs no more
        memory than many short ones, and short ones share the cost of a call.
        """
        signatures_PN = np.full((self.hashes, len(texts)), _EMPTY, dtype=np.uint32)
        pending: list[np.ndarray] = []
        owners: list[int] = []
        room = _BLOCK
        for index, codes in enumerate(texts):
            total = max(0, len(codes) - self.n + 1)
            start = 0
            while start < total:
                stop = min(total, start + room)
                pending.append(shingle_hashes(codes[start:stop + self.n - 1], self.n))
                owners.append(index)
                room -= stop - start
                start = stop
                if room == 0:
                    self._fold(pending, owners, signatures_PN)
                    pending, owners, room = [], [], _BLOCK
        if pending:
            self._fold(pending, owners, signatures_PN)
        return np.ascontiguousarray(signatures_PN.T)

    def _fold(self, pending: list[np.ndarray], owners: list[int], signatures_PN: np.ndarray) -> None:
        """Takes the minima of one block into the signatures of the texts that own its n-grams."""
        hashes_L = (np.concatenate(pending) >> np.uint64(32)).astype(np.uint32)
        starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pending])[:-1]])
        product_L = np.empty_like(hashes_L)
        for row, multiplier in enumerate(self.multipliers):
            np.multiply(hashes_L, multiplier, out=product_L)
            minima = np.minimum.reduceat(product_L, starts)
            # A text is at most once in a block, so plain indexing is safe.
            signatures_PN[row, owners] = np.minimum(signatures_PN[row, owners], minima)


def band_keys(signatures: np.ndarray, bands: Bands) -> np.ndarray:
    """One 64-bit key a band: uint64 [N, bands]. Texts that share a key in the same band become candidates."""
    used = signatures[:, :bands.count * bands.rows].reshape(len(signatures), bands.count, bands.rows)
    keys = np.full((len(signatures), bands.count), 0x51ED270B0F4A7C15, dtype=np.uint64)
    for row in range(bands.rows):
        keys = (keys ^ used[:, :, row].astype(np.uint64)) * np.uint64(_MULTIPLIER)
        keys ^= keys >> np.uint64(29)
    keys += np.arange(bands.count, dtype=np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
    return mix(keys)
