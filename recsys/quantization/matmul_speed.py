"""Time of products with int8 weights against MindSpore's float32 MatMul, both as graphs, on weights out of cache."""

from __future__ import annotations

import math
import statistics
import time

import numpy as np
from mindspore import Tensor, nn, ops

from parallel.common.errors import UserError
from parallel.layers.int8 import Int8Product

SHAPES = ((4096, 4096), (4096, 16384))
_COLD_BYTES = 256 << 20  # int8 weights that are gone through before one is used again: more than a last-level cache


class _MatMul(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.matmul = ops.MatMul()

    def construct(self, x: Tensor, w: Tensor) -> Tensor:
        return self.matmul(x, w)


class _Int8MatMul(nn.Cell):
    """The kernel of an `Int8Product` on weights that are inputs, so that they can take turns."""

    def __init__(self, product: Int8Product) -> None:
        super().__init__()
        self.product = product.product

    def construct(self, x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return self.product(x, w, scale)


def measure(rows: tuple[int, ...], shapes: tuple[tuple[int, int], ...] = SHAPES, rounds: int = 15,
            most_seconds: float = 6.0) -> list[dict]:
    """A dict for each M and (K, O): milliseconds of int8 and float32 (medians of turns taken one by one), ratio.

    Raises:
        UserError: there is no kernel to measure.
    """
    found = []
    generator = np.random.default_rng(0)
    for inputs, outputs in shapes:
        count = max(2, -(-_COLD_BYTES // (4 * inputs * outputs)) + 1)
        weights = [generator.standard_normal((inputs, outputs), dtype=np.float32) for _ in range(count)]
        eights = []
        for weight in weights:
            product = Int8Product((1, inputs, outputs), 1, "weight")
            product.fill(weight[None])
            product.prepare()
            eights.append(product)
        if eights[0].mode != "kernel":
            raise UserError("there is no kernel for int8 weights here", where="bench", hint="install g++")
        # The int8 copies of few large matrices would stay in the cache: more of the same bytes.
        panels = [product.weight.asnumpy() for product in eights]
        copies = [Tensor(panels[i % count].copy()) for i in range(max(count, -(-_COLD_BYTES // (inputs * outputs))))]
        floats, scale = [Tensor(weight) for weight in weights], Tensor(eights[0].scale.asnumpy())
        plain, eight = _MatMul(), _Int8MatMul(eights[0])
        for count_rows in rows:
            x = generator.standard_normal((count_rows, inputs), dtype=np.float32)
            found.append(_turns(eight, plain, Tensor(x), copies, floats, scale, rounds, most_seconds)
                         | {"rows": count_rows, "inputs": inputs, "outputs": outputs})
    return found


def _turns(eight: nn.Cell, plain: nn.Cell, x: Tensor, copies: list, floats: list, scale: Tensor, rounds: int,
           most_seconds: float) -> dict:
    x3, times = Tensor(x.asnumpy()[None]), {"int8_ms": [], "float32_ms": []}
    eight(x3, copies[0], scale).asnumpy(), plain(x, floats[0]).asnumpy()
    begun = time.perf_counter()
    for index in range(1, rounds + 1):
        start = time.perf_counter()
        eight(x3, copies[index % len(copies)], scale).asnumpy()
        middle = time.perf_counter()
        plain(x, floats[index % len(floats)]).asnumpy()
        end = time.perf_counter()
        times["int8_ms"].append(1e3 * (middle - start))
        times["float32_ms"].append(1e3 * (end - middle))
        if index >= 3 and end - begun > most_seconds:
            break
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {**medians, "int8_min_ms": min(times["int8_ms"]), "float32_min_ms": min(times["float32_ms"]),
            "ratio": medians["int8_ms"] / medians["float32_ms"]}


def geometric_mean(ratios: list[float]) -> float:
    """Of ratios."""
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
