"""The 64-bit keys by which ids are found in a table, the same in training, evaluation and serving. Needs no MindSpore.

Whole numbers from -2^61 to 2^61 - 1, written in plain decimal, are keys as they are, so that no two of them collide.
Any other id (text of any length, numbers beyond) is a 62-bit BLAKE2b of its text, keyed by the feature, in a range of
its own: two of them collide with a probability of n^2 / 2^63 (10^8 ids of text: 0.1 %).
"""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MISSING_KEY, UNSEEN_KEY = -(2**63), -(2**63) + 1
"""Keys of the rows for a missing value and for an id without a row of its own."""
ALWAYS_BELOW = -(2**63) + 2
"""Keys below this are never counted, admitted or evicted: they are always there."""
_EXACT = 2**61
_PLAIN = r"^(0|-?[1-9]\d{0,18})$"


def key_of_text(text: str, feature: str) -> int:
    """Key of one id; see the top of this file."""
    body = text.removeprefix("-")
    if body.isascii() and body.isdigit() and len(body) <= 19 and text != "-0" and (body == "0" or body[0] != "0"):
        number = int(text)
        if -_EXACT <= number < _EXACT:
            return number
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=feature.encode()[:64]).digest()
    # Bit 62 set and bit 63 clear: from 2^62 on, above all exact numbers.
    return int.from_bytes(digest, "little") & (2**62 - 1) | 2**62


def keys_of(values: pa.Array, feature: str) -> np.ndarray:
    """int64 keys of string values [n]; null gives MISSING_KEY."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    plain = pc.fill_null(pc.match_substring_regex(values, _PLAIN), False)
    # Numbers of 19 digits may be beyond int64; they are looked at one by one.
    short = pc.and_(plain, pc.less_equal(pc.fill_null(pc.utf8_length(values), 0), 18))
    numbers = pc.fill_null(pc.if_else(short, values, pa.scalar(None, pa.string())).cast(pa.int64()), 0)
    keys = numbers.to_numpy(zero_copy_only=False).astype(np.int64)
    keys[values.is_null().to_numpy(zero_copy_only=False)] = MISSING_KEY
    others = pc.and_(values.is_valid(), pc.invert(short)).to_numpy(zero_copy_only=False)
    if others.any():
        encoded = values.filter(pa.array(others)).dictionary_encode()
        own = np.array([key_of_text(text, feature) for text in encoded.dictionary.to_pylist()], np.int64)
        keys[others] = own[encoded.indices.to_numpy(zero_copy_only=False)]
    return keys


def owners(keys: np.ndarray, ranks: int) -> np.ndarray:
    """Rank that holds each key: SplitMix64's finaliser of the key, modulo the ranks, int64."""
    x = keys.astype(np.int64).view(np.uint64) + np.uint64(0x632BE59BD9B4E019)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(ranks)).astype(np.int64)
