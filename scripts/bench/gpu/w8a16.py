"""Products of few rows with int8 weights (W8A16) on a GPU, against torch's own in bfloat16, weights out of cache.

    python scripts/bench/gpu/w8a16.py [--rows 1,4,16,32,64] [--output FILE] [--device cpu --small]
    python scripts/bench/gpu/w8a16.py --sweep --rows 1,16,32 --shapes 0,3,2,4,5

Each side runs as one CUDA graph of products with matrices that go round, so that more bytes are read than the second
level of cache holds before one is read again. The peer is the faster of `torch.matmul` / `torch.bmm` with weights
[T, K, O] and with [T, O, K]. Ours runs with every candidate tile of `fusion/tiles.py`; `int8` is the fastest, which
serving chooses by the same clock. With `--sweep` more tiles are tried, which as many processes as there are cores
compile first, and the four fastest of a shape are printed. Results are checked against float32 before they are timed.
Shapes are plain layers of PanGu-alpha 13B and others, and per-token layers of RankMixer-1B and TokenMixer-Large 500M
(T > 1).

Last line of stdout: JSON; `less` is how much less time int8 takes, 1 - geometric mean of ratios, by rows; `crossover`
the least number of rows at which any shape is not faster, null if all are.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are made
from parallel.torch_runtime.fusion import tiles  # noqa: E402
from parallel.torch_runtime.fusion.product_kernels import product, rows_of_block  # noqa: E402
from parallel.torch_runtime.fusion.served import widened  # noqa: E402
from parallel.torch_runtime.inference.weights import quantized  # noqa: E402

SHAPES = [(1, 4096, 4096), (1, 4096, 16384), (1, 5120, 15360), (1, 5120, 5120), (1, 5120, 20480), (1, 20480, 5120),
          (16, 1536, 5568), (16, 5568, 1536), (16, 768, 1608), (16, 1608, 768)]
SMALL = [(1, 256, 64), (3, 200, 48)]
GROUPED = (16, 1536, 5568)
_ONE = [(8, 512, 1, 4, 3), (8, 1024, 1, 4, 3), (16, 512, 1, 4, 3), (16, 512, 1, 8, 3), (16, 256, 1, 4, 4),
        (2, 2048, 1, 4, 1), (4, 2048, 1, 4, 1), (4, 1024, 1, 4, 1), (8, 1024, 1, 4, 1), (2, 4096, 1, 8, 1),
        (4, 1024, 1, 2, 1), (8, 512, 1, 4, 1), (4, 1024, 1, 4, 2), (4, 2048, 1, 8, 2), (8, 512, 1, 2, 3)]
_MORE = [(32, 256, 1, 4, 4), (32, 256, 2, 4, 4), (32, 256, 4, 4, 3), (64, 128, 2, 2, 4), (32, 128, 1, 2, 6),
         (32, 128, 2, 2, 6), (16, 256, 1, 2, 5), (16, 512, 1, 4, 4), (32, 512, 1, 4, 3), (64, 256, 2, 4, 3),
         (16, 512, 1, 2, 4), (32, 512, 2, 4, 3), (16, 256, 1, 4, 5), (16, 256, 2, 2, 5), (64, 128, 4, 2, 4),
         (64, 256, 4, 2, 3), (128, 64, 4, 2, 4), (128, 128, 4, 2, 3), (128, 64, 8, 2, 4), (128, 128, 8, 4, 3)]
SWEPT = {1: [tiles.Tile(*tile, False, ahead) for tile in _ONE for ahead in (0, 512, 2048)]} | {
    block: [tiles.Tile(*tile) for tile in _MORE] for block in (16, 32, 64)}
"""By rows of a block, what `--sweep` tries."""
_COLD_BYTES = 192 << 20


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,4,16,32,64", help="rows of the activations")
    parser.add_argument("--shapes", help="numbers of some of SHAPES, with commas between")
    parser.add_argument("--device", default=None)
    parser.add_argument("--small", action="store_true", help="small shapes, one tile")
    parser.add_argument("--sweep", action="store_true", help="many tiles; with --small three")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile first, of --sweep")
    parser.add_argument("--output", help="JSON file for the times of all tiles")
    arguments = parser.parse_args()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # The interpreter's bfloat16 is no number type of NumPy's.
    dtype, cold = (torch.bfloat16, _COLD_BYTES) if device.type == "cuda" else (torch.float16, 1)
    tiles._COLD_BYTES = cold
    copied = copy_bandwidth(device, 1 << (31 if device.type == "cuda" else 22))
    print(f"copy {copied / 1e12:.3f} TB/s (read and written)", flush=True)
    found = []
    shapes = SMALL if arguments.small else SHAPES
    if arguments.sweep:
        blocks = sorted({rows_of_block(int(item)) for item in arguments.rows.split(",")})
        for block in blocks:
            tiles.CANDIDATES[True, block] = SWEPT[block][:3 if arguments.small else None]
        if device.type == "cuda":
            tasks = [(block, place, arguments.processes) for place in range(arguments.processes) for block in blocks]
            with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
                pool.map(compiled, tasks, chunksize=len(blocks))
            print("compiled", flush=True)
    for shape in [shapes[int(item)] for item in arguments.shapes.split(",")] if arguments.shapes else shapes:
        for rows in (int(item) for item in arguments.rows.split(",")):
            found.append(measured(shape, rows, device, dtype, cold, arguments.small))
            print(line(found[-1], copied), flush=True)
            if arguments.sweep:
                best = sorted(found[-1]["tiles_us"], key=lambda item: item[1])[:4]
                print("     ", *(f"{tile} {value:.2f}" for tile, value in best), sep="  ", flush=True)
    grouped = measured(SMALL[1] if arguments.small else GROUPED, 1, device, dtype, cold, arguments.small, group=128)
    print("a scale for each 128 inputs: " + line(grouped, copied))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps({"copy": copied, "products": found, "grouped": grouped}))
    rows = sorted({item["rows"] for item in found})
    less = {row: 1.0 - math.exp(sum(math.log(item["int8_us"] / item["bf16_us"]) for item in found
                                    if item["rows"] == row) / sum(item["rows"] == row for item in found))
            for row in rows}
    slower = [item["rows"] for item in found if item["int8_us"] >= item["bf16_us"]]
    print(json.dumps({
        "less": {str(row): round(value, 3) for row, value in less.items()},
        "least_less": {str(row): round(min(1 - item["int8_us"] / item["bf16_us"] for item in found
                                           if item["rows"] == row), 3) for row in rows},
        "crossover": min(slower, default=None), "copy_tb_s": round(copied / 1e12, 3), "unit": "1 - int8 / bf16 time",
        "largest_error": max(item["error"] for item in found), "device": name_of(device)}))


def measured(shape: tuple[int, int, int], rows: int, device: torch.device, dtype: torch.dtype, cold: int, small: bool,
             group: int | None = None) -> dict:
    """Microseconds of a product of weights [T, K, O] by ours and torch, and ours' error."""
    tokens, inputs, outputs = shape
    torch.manual_seed(0)
    x = torch.randn(tokens, rows, inputs, device=device).to(dtype)
    w = (torch.randn(tokens, outputs, inputs, device=device) / math.sqrt(inputs)).to(dtype)
    eight, scale = quantized(w, group)
    listed = tiles.CANDIDATES[True, rows_of_block(rows)][:3 if small else None]
    wanted = x.float() @ widened(eight, scale).transpose(1, 2)
    errors = {tile: float((product(x, eight, scale, tile=tile).float() - wanted).norm() / wanted.norm())
              for tile in listed if fits(x, eight, scale, tile)}
    if max(errors.values()) > 1e-2 or any(math.isnan(value) for value in errors.values()):
        raise SystemExit(f"wrong result for {shape}, {rows} rows: {errors}")
    times = tiles.measured(x, eight, scale, list(errors))
    best = min(times, key=times.get)
    peers = {name: peer(x, w, turned, cold) for name, turned in (("KO", False), ("OK", True))}
    return {"shape": shape, "rows": rows, "int8_us": times[best] * 1e6, "bf16_us": min(peers.values()) * 1e6,
            "tile": list(vars(best).values()), "error": errors[best], "bytes": eight.numel(), "group": group,
            "peers_us": {name: value * 1e6 for name, value in peers.items()},
            "tiles_us": [[list(vars(tile).values()), value * 1e6] for tile, value in times.items()]}


def compiled(task: tuple[int, int, int]) -> None:
    """Compiles a share of the tiles that are swept, in a process of its own, for an even number of inputs."""
    block, place, processes = task
    x = torch.randn(1, block, 8192, device="cuda").bfloat16()
    w, scale = quantized(torch.randn(1, 8192, 8192, device="cuda"))
    for tile in SWEPT[block][place::processes]:
        fits(x, w, scale, tile)


def fits(x: Tensor, w: Tensor, scale: Tensor, tile: tiles.Tile) -> bool:
    """Whether a tile runs on this GPU at all."""
    try:
        product(x, w, scale, tile=tile)
    except Exception as error:  # noqa: BLE001  too much shared memory for this GPU
        if "out of resource" not in str(error):
            raise
        return False
    return True


def peer(x: Tensor, w_TOK: Tensor, turned: bool, cold: int) -> float:
    """Seconds of torch's product with weights [T, O, K] (turned) or [T, K, O]."""
    w = w_TOK if turned else w_TOK.transpose(1, 2).contiguous()
    weights = [w] + [w.clone() for _ in range(math.ceil(cold / (w.numel() * w.element_size())))]

    def call(own: Tensor) -> Tensor:
        if own.shape[0] == 1:
            return x[0] @ (own[0].t() if turned else own[0])
        return torch.bmm(x, own.transpose(1, 2) if turned else own)

    return tiles.seconds([lambda own=own: call(own) for own in weights], x.device)


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second of a copy on the device, read and written: the fastest of some copies of float32s."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(6):
        if device.type != "cuda":
            begin = time.perf_counter()
            target.copy_(source)
            times.append(time.perf_counter() - begin)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(3):
            target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 3e3)
        begin.record()
        torch.add(source, 1.0, out=target)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2.0 * size / min(times)


def name_of(device: torch.device) -> str:
    """What it is."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def line(item: dict, copied: float) -> str:
    """One row of the table."""
    tokens, inputs, outputs = item["shape"]
    share = item["bytes"] / item["int8_us"] * 1e6 / copied
    return (f"{tokens:3d} x {inputs} x {outputs:6d}  M {item['rows']:3d}  int8 {item['int8_us']:8.2f} us  bf16 "
            f"{item['bf16_us']:8.2f} us  ratio {item['int8_us'] / item['bf16_us']:.3f}  {share:.1%} of the copy  "
            f"error {item['error']:.1e}  {item['tile']}")


if __name__ == "__main__":
    main()
