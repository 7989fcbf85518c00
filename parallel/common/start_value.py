"""Start values of parameters, from their names and the seed alone: the same numbers whoever asks for them."""

from __future__ import annotations

import zlib

import numpy as np

ROW_SLOTS = "row_slots."
NOT_KEPT = ("accu_grads.", ROW_SLOTS)
"""Beginnings of the names of what a training step holds beside parameters, states and counters: gradients of its
micro-batches and of the rows of tables. It starts at 0 and no checkpoint has it."""
_ROWS_AT_ONCE = 4 << 20


def draw(array: np.ndarray, kind: str, scale: float, generator: np.random.Generator) -> None:
    """Fills `array` in place, in pieces, so that the memory needed beside it stays small."""
    if kind in ("zeros", "ones", "fill"):
        array.fill({"zeros": 0.0, "ones": 1.0}.get(kind, scale))
        return
    flat = array.reshape(-1)
    for begin in range(0, flat.size, _ROWS_AT_ONCE):
        part = flat[begin:begin + _ROWS_AT_ONCE]
        if kind == "uniform":
            part[:] = generator.uniform(-scale, scale, part.size)
            continue
        values = generator.standard_normal(part.size, dtype=np.float32)
        while kind == "truncated_normal" and (far := np.abs(values) > 2.0).any():
            values[far] = generator.standard_normal(int(far.sum()), dtype=np.float32)
        part[:] = values * scale


def start_value(name: str, shape: tuple[int, ...], start: tuple[str, float], seed: int) -> np.ndarray:
    """Start value of one parameter: float32 array of `shape`; equal wherever and in whatever order it is asked for."""
    array = np.empty(shape, np.float32)
    draw(array, *start, np.random.default_rng((seed, zlib.crc32(name.encode()))))
    return array
