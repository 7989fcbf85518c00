"""The functions of parallel/kernels/tables.cpp, found by ctypes. Needs no MindSpore."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np

from parallel.common.errors import UserError
from parallel.common.native import HEADERS, build_library

SOURCE = HEADERS / "tables.cpp"

_LONG, _INT, _UNSIGNED, _DOUBLE, _FLOAT, _TEXT, _POINTER = (
    ctypes.c_int64, ctypes.c_int32, ctypes.c_uint32, ctypes.c_double, ctypes.c_float, ctypes.c_char_p, ctypes.c_void_p)

_SIGNATURES = {
    "table_new": (_POINTER, [_LONG] * 4 + [ctypes.c_uint64, _DOUBLE, _FLOAT, _TEXT]),
    "table_free": (None, [_POINTER]),
    "table_sizes": (None, [_POINTER] * 2),
    "keys_unique": (_LONG, [_POINTER, _LONG] + [_POINTER] * 3),
    "rows_add": (None, [_POINTER] * 2 + [_LONG] * 2 + [_POINTER]),
    "table_find": (None, [_POINTER] * 2 + [_LONG, _POINTER]),
    "table_meet": (_LONG, [_POINTER] * 3 + [_LONG, _UNSIGNED, _DOUBLE, _DOUBLE, _LONG, _POINTER]),
    "table_gather": (None, [_POINTER] * 3 + [_LONG, _POINTER]),
    "table_update": (None, [_POINTER] * 3 + [_LONG, _POINTER, _INT] + [_DOUBLE] * 6),
    "table_sweep": (_LONG, [_POINTER, _UNSIGNED, _DOUBLE, _DOUBLE, _LONG]),
    "table_expires": (None, [_POINTER] * 2 + [_LONG, _UNSIGNED, _DOUBLE, _POINTER]),
    "table_entries": (_LONG, [_POINTER, _UNSIGNED] + [_POINTER] * 4),
    "table_states": (None, [_POINTER] * 2 + [_LONG, _POINTER]),
    "table_set": (None, [_POINTER] * 2 + [_LONG] + [_POINTER] * 2),
    "table_put": (_LONG, [_POINTER] * 7 + [_LONG, _INT]),
    "table_close_gaps": (_LONG, [_POINTER]),
}


@cache
def library() -> ctypes.CDLL:
    """The built kernels.

    Raises:
        UserError: they cannot be built here.
    """
    # Without -ffast-math: what a table starts from and becomes must not depend on how the compiler orders sums.
    path = build_library(SOURCE, does="tables are kept in the graph", flags=("-march=native", "-ffp-contract=off"))
    if path is None:
        raise UserError("tables on the host need a C++ compiler", where="data.tables.place", value="host",
                        hint="install g++, or set it to graph")
    loaded = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def address(array: np.ndarray | None) -> int | None:
    """Address of a contiguous array; None for none."""
    return None if array is None else array.ctypes.data


def unique(keys_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(distinct keys in the order of their first appearance int64 [U], which of them each key is int32 [N], how often
    each came float32 [U])."""
    keys_N = np.ascontiguousarray(keys_N, np.int64)
    distinct, which = np.empty(len(keys_N), np.int64), np.empty(len(keys_N), np.int32)
    times = np.empty(len(keys_N), np.float32)
    count = library().keys_unique(address(keys_N), len(keys_N), address(distinct), address(which), address(times))
    return distinct[:count], which, times[:count]


def add_rows(gradients_NW: np.ndarray, which_N: np.ndarray, count: int) -> np.ndarray:
    """float32 [count, W]: gradients added by `which_N` (int32), in their order."""
    gradients_NW = np.ascontiguousarray(gradients_NW, np.float32)
    which_N = np.ascontiguousarray(which_N, np.int32)
    out = np.zeros((count, gradients_NW.shape[1]), np.float32)
    library().rows_add(address(gradients_NW), address(which_N), len(which_N), out.shape[1], address(out))
    return out
