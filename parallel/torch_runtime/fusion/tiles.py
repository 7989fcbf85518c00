"""Which tile a product of few rows runs with: the fastest of a few, by the clock, on weights out of cache.

A serving graph's products are measured once before it is captured (`choose`), a second for each sort of them the first
time on a machine, since Triton keeps what it compiled. `scripts/bench/gpu/w8a16.py` measures all candidates.

Shapes: as in `product_kernels`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor

from parallel.torch_runtime.fusion.product_kernels import CHOSEN, Tile, key_of, product, rows_of_block

_COLD_BYTES = 192 << 20  # gone through before a weight is used again: more than a second-level cache
_FEW_ROWS = [Tile(32, 256, 1, 4, 4), Tile(32, 256, 2, 4, 4), Tile(32, 256, 4, 4, 3), Tile(16, 256, 1, 2, 5),
             Tile(64, 128, 1, 2, 4), Tile(64, 128, 2, 2, 4), Tile(32, 128, 1, 2, 6), Tile(32, 128, 2, 2, 6),
             Tile(64, 256, 1, 4, 3)]
CANDIDATES: dict[tuple[bool, int], list[Tile]] = {
    (True, 1): [Tile(8, 512, 1, 4, 3, ahead=512), Tile(8, 512, 1, 4, 3, ahead=0), Tile(8, 1024, 1, 4, 3, ahead=512),
                Tile(8, 512, 1, 2, 3, ahead=512), Tile(8, 512, 1, 2, 3, ahead=0), Tile(16, 256, 1, 4, 4, ahead=0),
                Tile(16, 512, 1, 4, 3, ahead=512), Tile(4, 2048, 1, 4, 1), Tile(64, 128, 1, 2, 4, True),
                Tile(32, 256, 1, 4, 4, True)],
    (False, 1): [Tile(4, 512, 1, 4, 3), Tile(8, 512, 1, 8, 3), Tile(8, 512, 4, 4, 3), Tile(4, 1024, 1, 4, 1),
                 Tile(2, 1024, 1, 4, 1), Tile(1, 2048, 1, 4, 1), Tile(8, 256, 1, 4, 5), Tile(32, 128, 1, 4, 4, True),
                 Tile(32, 128, 2, 4, 4, True)],
    (True, 16): _FEW_ROWS, (True, 32): _FEW_ROWS,
    (True, 64): [Tile(64, 128, 1, 2, 4), Tile(64, 128, 2, 2, 4), Tile(32, 256, 1, 4, 3), Tile(32, 128, 2, 2, 4),
                 Tile(64, 128, 1, 4, 4), Tile(128, 128, 1, 4, 3), Tile(128, 64, 1, 8, 4), Tile(64, 128, 1, 8, 4)],
}
"""By whether weights are int8 and the rows of a block (`rows_of_block`)."""


def choose(x: Tensor, w: Tensor, scale: Tensor | None) -> None:
    """Finds the tile for a product of this shape, unless it is known; kept in CHOSEN.

    Args:
        x: [T, M, K].
        w: [T, O, K] as the product takes it.
        scale: of int8 weights.
    """
    key = key_of(x, w)
    if key not in CHOSEN:
        times = measured(x, w, scale)
        CHOSEN[key] = min(times, key=times.get)


def measured(x: Tensor, w: Tensor, scale: Tensor | None,
             tiles: Sequence[Tile] | None = None) -> dict[Tile | None, float]:
    """Seconds of one product by tile; by None those of torch's own where the weights are floating."""
    weights = [w] + [w.clone() for _ in range(math.ceil(_COLD_BYTES / (w.numel() * w.element_size())))]
    if tiles is None:
        tiles = CANDIDATES.get((w.dtype == torch.int8, rows_of_block(x.shape[1])), [])
    found: dict[Tile | None, float] = {}
    for tile in tiles:
        try:
            found[tile] = seconds([lambda own=own, tile=tile: product(x, own, scale, tile=tile) for own in weights],
                                  x.device)
        except Exception as error:  # noqa: BLE001  a tile that does not fit this GPU's shared memory
            if "out of resource" not in str(error):
                raise
    if scale is None:
        found[None] = seconds([lambda own=own: plain(x, own) for own in weights], x.device)
    return found


def plain(x: Tensor, w: Tensor) -> Tensor:
    """torch's product of x [T, M, K] with floating weights [T, O, K]."""
    return nnf.linear(x[0], w[0])[None] if w.shape[0] == 1 else torch.bmm(x, w.transpose(1, 2))


def seconds(calls: Sequence[Callable[[], Tensor]], device: torch.device, turns: int = 5) -> float:
    """Of one of some calls that follow each other, as one CUDA graph on GPUs: the median of several turns."""
    calls[0]()
    if device.type != "cuda":
        begin = time.perf_counter()
        calls[-1]()
        return time.perf_counter() - begin
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(turns):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)
