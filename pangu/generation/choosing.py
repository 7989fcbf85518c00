"""Drawing of tokens and log-probabilities by the C++ kernels (`pangu/kernels/paged.cpp`), for runners on the host."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pangu.generation.runner import LogProbabilities
from pangu.generation.sampling import Draw


class LibraryChoice:
    """Args:
        library: the shared object (`pangu.native.kernel_library`).
    """

    def __init__(self, library: Path) -> None:
        self._library = entries(library)

    def log_probabilities(self, logits_MV: np.ndarray, targets_M: np.ndarray, k: int) -> LogProbabilities:
        """See `pangu.generation.runner.Runner`."""
        rows, vocabulary = logits_MV.shape
        k = min(k, vocabulary)
        logits_MV = np.ascontiguousarray(logits_MV, np.float32)
        targets_M = np.ascontiguousarray(targets_M, np.int32)
        found = LogProbabilities(np.empty(rows, np.float32), np.empty(rows, np.int32), np.empty((rows, k), np.int32),
                                 np.empty((rows, k), np.float32))
        self._library.paged_log_p(at(logits_MV), rows, vocabulary, at(targets_M), k, at(found.target),
                                  at(found.above), at(found.top_ids), at(found.top))
        return found

    def choose(self, logits_MV: np.ndarray, rows: Sequence[int], draws: Sequence[Draw]) -> list[int]:
        """See `Runner`. Weights are float32 here and float64 in Python: one draw in a million may differ."""
        rules = np.array([(draw.rule.temperature, draw.rule.top_k, draw.rule.top_p, draw.uniform) for draw in draws])
        first = np.cumsum([0, *(len(draw.ids) for draw in draws)], dtype=np.int64)
        ids = np.concatenate([draw.ids for draw in draws]).astype(np.int32)
        values = np.concatenate([draw.values for draw in draws]).astype(np.float32)
        places, chosen = np.array(rows, np.int32), np.empty(len(draws), np.int32)
        self._library.paged_choose(at(logits_MV), logits_MV.shape[1], len(draws), at(places), at(rules), at(first),
                                   at(ids), at(values), at(chosen))
        return chosen.tolist()


def at(array: np.ndarray) -> int:
    """Where an array's elements begin."""
    return array.ctypes.data


def entries(path: Path) -> ctypes.CDLL:
    """The library with the types of its entries."""
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.paged_create.restype, library.paged_create.argtypes = pointer, [pointer] * 3
    library.paged_destroy.restype, library.paged_destroy.argtypes = None, [pointer]
    library.paged_run.argtypes = [pointer, number, *[pointer] * 5]
    library.paged_log_p.restype = None
    library.paged_log_p.argtypes = [pointer, number, number, pointer, number, *[pointer] * 4]
    library.paged_choose.restype = None
    library.paged_choose.argtypes = [pointer, number, number, *[pointer] * 6]
    return library
