"""Target attention's kernels on an NVIDIA GPU: every tile by the clock, and the error against float64.

    python scripts/bench/gpu/target_attention.py [--shapes 2048x890x64x460,2048x1024x128x1024]

A shape is samples x length x width x hidden units of one behaviour list. For each kernel a table of the tiles that run
on this GPU, in milliseconds, medians of turns: of "forward" the whole node of the forward pass, of "rows" and "columns"
that of the backward pass, the other kernel with its best tile so far. Errors are of values and gradients of 8 samples
in bfloat16 against float64, |difference| / |value|. Tiles that do not fit are left out. Tiles are compiled by as many
processes as there are cores first. `--device cpu` runs one small shape in Triton's interpreter.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are made
from parallel.torch_runtime.attention import target_attention as own  # noqa: E402
from parallel.torch_runtime.fusion import target_attention as node_form  # noqa: E402
from parallel.torch_runtime.graph import Node  # noqa: E402

SHAPES = "2048x890x64x460,2048x1024x128x1024"
TILES = {
    "forward": [(128, 64, 8), (128, 64, 4), (64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 128, 8), (128, 128, 4),
                (64, 256, 8), (128, 256, 8), (64, 256, 4)],
    "rows": [(128, 64, 8), (128, 64, 4), (64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 128, 8)],
    "columns": [(*tile, turned) for turned in (False, True) for tile in (
        (64, 64, 4), (64, 128, 8), (128, 64, 8), (128, 64, 4), (64, 128, 4), (32, 128, 4), (32, 64, 4))],
}  # fmt: skip


def inputs_of(shape: tuple[int, ...], device: torch.device, samples: int | None = None) -> list[Tensor]:
    """q, k, present, W1, b1, w2, b2 of a list, float32."""
    torch.manual_seed(0)
    count, length, width, hidden = shape
    count = samples or count
    return [torch.randn(count, width, device=device), torch.randn(count, length, width, device=device),
            (torch.rand(count, length, 1, device=device) > 0.1).float(),
            torch.randn(hidden, 4 * width, device=device) / (4 * width) ** 0.5, torch.randn(hidden, device=device) / 4,
            torch.randn(1, hidden, device=device) / hidden**0.5, torch.randn(1, device=device)]


def milliseconds(call: Callable[[], Any], device: torch.device, turns: int = 7) -> float:
    """Median of some turns of two calls; infinite where it does not run on this GPU."""
    times = []
    try:
        call()
    except Exception as error:  # noqa: BLE001  too much shared memory, say
        print(f"left out: {str(error).splitlines()[0][:100]}", file=sys.stderr)
        return float("inf")
    for _ in range(turns):
        if device.type != "cuda":
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 2)
    return statistics.median(times)


def swept(shape: tuple[int, ...], tiles: dict[str, list], device: torch.device, only: tuple | None = None) -> dict:
    """Milliseconds by kernel and tile; the best stay chosen. `only` = (kernel, tile): run this one once instead."""
    node = Node("FusedTargetAttention", [], [], {"dtype": "bfloat16" if device.type == "cuda" else "float32"})
    inputs = inputs_of(shape, device, 4 if only else None)
    dout = torch.randn_like(inputs[0])
    for name in own.TILES:  # until its own turn a kernel runs with a tile that is compiled anyway
        own.TILES[name] = (tiles[name][0],)
    found: dict[str, dict] = {}
    scores = None
    for name in ("forward", "rows", "columns"):
        if only and name not in ("forward", only[0]):
            continue
        found[name] = {}
        for tile in [only[1]] if only and only[0] == name else tiles[name][:1] if only else tiles[name]:
            if (shape[3] + -shape[3] % own.UNITS) % tile[1]:
                continue
            own.TILES[name] = (tile,)
            own._chosen.clear()
            call = partial(node_form.forward, node, *inputs)
            if name != "forward":
                call = partial(node_form.backward, node, dout, scores, *inputs)
            value = milliseconds(call, device, 1 if only else 7)
            if name == "forward" and value < float("inf"):
                scores = call()[1]
            if value < float("inf"):
                found[name][tile] = value
        if found[name]:
            own.TILES[name] = (min(found[name], key=found[name].get),)
    return found


def compiled(task: tuple) -> None:
    """Compiles one tile of a kernel into Triton's cache, in a process of its own."""
    shape, tiles, name, tile, kind = task
    try:
        swept(shape, tiles, torch.device(kind), (name, tile))
    except Exception as error:  # noqa: BLE001  it is tried again, and told, in its turn
        print(f"{name} {tile}: {str(error).splitlines()[0][:80]}", file=sys.stderr)


def errors(shape: tuple[int, ...], device: torch.device) -> float:
    """The largest error of values and gradients of a few samples."""
    inputs = inputs_of(shape, device, 8)
    dout = torch.randn_like(inputs[0])
    leaves = [item.double().requires_grad_() for item in inputs]
    q, k, present, w1, b1, w2, b2 = leaves
    spread = q[:, None].expand(k.shape)
    h = torch.cat([spread, k, spread - k, spread * k], -1) @ w1.t() + b1
    out = ((torch.nn.functional.silu(h) @ w2.t() + b2) * present * k).sum(1)
    out.backward(dout.double())
    worst = 0.0
    node = Node("FusedTargetAttention", [], [], {"dtype": "bfloat16" if device.type == "cuda" else "float32"})
    values, scores = node_form.forward(node, *inputs)
    gradients = node_form.backward(node, dout, scores, *inputs)
    wanted = [out.detach(), *(leaf.grad for leaf in (q, k, w1, b1, w2, b2))]
    for got, right in zip((values, *gradients), wanted, strict=True):
        worst = max(worst, float((got.double().reshape(right.shape) - right).norm() / right.norm()))
    return worst


def main() -> int:
    """Runs what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="samples x length x width x hidden units, commas between")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile")
    arguments = parser.parse_args()
    device, tiles, result = torch.device(arguments.device), TILES, {}
    if device.type == "cpu":
        arguments.shapes = "3x70x16x70"
        tiles = {name: [tile for tile in listed if tile[:3] == (64, 64, 4)] for name, listed in TILES.items()}
        node_form._own_kernels = lambda k, dtype: True
    for text in arguments.shapes.split(","):
        shape = tuple(int(item) for item in text.split("x"))
        if device.type == "cuda" and arguments.processes > 1:
            tasks = [(shape, tiles, name, tile, device.type) for name in tiles for tile in tiles[name]]
            with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
                pool.map(compiled, tasks, chunksize=1)
        found = swept(shape, tiles, device)
        for name, times in found.items():
            print(text, name, {str(tile): round(value, 3) for tile, value in sorted(times.items(), key=lambda x: x[1])},
                  file=sys.stderr, flush=True)
        worst = errors(shape, device)
        result[text] = {"tiles_ms": {name: {str(tile): round(value, 4) for tile, value in times.items()}
                                     for name, times in found.items()}, "error": worst}
    print(json.dumps({"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "shapes": result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
