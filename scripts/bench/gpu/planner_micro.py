"""What the planner's cluster file needs of a GPU: rates of products by shape, of passes over memory, of collectives.

    python scripts/bench/gpu/planner_micro.py --output micro.json                # --nproc 2: collectives, messages too
    python scripts/bench/gpu/planner_micro.py --device cpu --small --output micro.json

Each is captured as a CUDA graph of several launches that rotate among copies of their operands, as a step finds them:
in no cache. A time is the median of five replays over the launches of the graph, in microseconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_aten = torch.ops.aten
_COLD = 120e6  # bytes of operands to rotate among: twice the second-level cache


class Timer:
    """Times launches on one device.

    Args:
        device: a GPU, or the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"

    def synchronized(self) -> float:
        """The time, once the device has nothing left to do."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def microseconds(self, calls: list[Callable[[], Any]], least: int = 10) -> float:
        """Of one call, when `calls` take turns."""
        for call in calls[:2]:
            call()
        count = max(least, len(calls))
        turns = list(itertools.islice(itertools.cycle(calls), count))
        if not self.cuda:
            begin = time.perf_counter()
            for call in turns:
                call()
            return 1e6 * (time.perf_counter() - begin) / count
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for call in turns:
                call()
        found = []
        for _ in range(6):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            found.append(1e3 * begin.elapsed_time(end) / count)
        return round(statistics.median(found[1:]), 3)


def products(timer: Timer, small: bool) -> list[list[Any]]:
    """[type, batch, m, n, k, left transposed, right transposed, microseconds] of products [m, k] x [k, n]."""
    found, limit = [], time.perf_counter() + 16
    for dtype, batch, m, n, k in product_shapes(small):
        for left, right in ((False, True), (False, False), (True, False)):  # forward, by the input, by the weight
            if time.perf_counter() > limit:
                return found
            a = (batch, k, m) if left else (batch, m, k)
            b = (batch, n, k) if right else (batch, k, n)
            size = (m * k + n * k) * batch * dtype.itemsize
            copies = []
            for _ in range(max(1, min(8, int(_COLD / size) + 1))):
                x, y = (torch.randn(shape, device=timer.device).to(dtype) for shape in (a, b))
                x, y = (x.transpose(1, 2) if left else x), (y.transpose(1, 2) if right else y)
                copies.append((lambda x=x[0], y=y[0]: x @ y) if batch == 1 else (lambda x=x, y=y: torch.bmm(x, y)))
            taken = timer.microseconds(copies, 4 if 2.0 * m * n * k * batch > 2e11 else 8)
            found.append([str(dtype)[6:], batch, m, n, k, left, right, taken])
    return found


def product_shapes(small: bool) -> list[tuple]:
    """(type, batch, m, n, k): those of wide layers, heads, per-token networks and pooling."""
    half, full = torch.bfloat16, torch.float32
    if small:
        return [(half, 1, 64, 64, 64), (half, 4, 32, 32, 32), (full, 1, 64, 8, 8)]
    found = [(half, 1, 8192, 8192, 8192), (half, 1, 8192, 1536, 1536), (half, 1, 8192, 6144, 1536),
             (half, 1, 8192, 1536, 6144), (half, 1, 8192, 40000, 1536), (half, 1, 16384, 2048, 2048),
             (half, 1, 16384, 8192, 2048), (half, 1, 16384, 2048, 8192), (half, 1, 8192, 40000, 1024),
             (half, 16, 1024, 2112, 768), (half, 16, 1024, 768, 2112), (half, 16, 1024, 1536, 768),
             (half, 16, 1024, 768, 1536), (half, 16, 512, 1536, 768), (half, 16, 512, 768, 2112),
             (half, 32, 512, 3072, 1536), (half, 32, 512, 1536, 3072), (half, 16, 2048, 2112, 768),
             (half, 16, 1024, 2048, 1024), (half, 16, 1024, 768, 304)]
    found += [(half, 1, m, n, k) for m in (4096, 8192, 16384) for n, k in ((1024, 1024), (4096, 1024), (1024, 4096))]
    found += [(half, 1, m, n, k) for m in (4096, 8192) for n, k in (
        (768, 1536), (1536, 768), (3072, 1536), (1536, 3072), (2048, 2048), (8192, 2048), (2048, 8192), (2560, 2560),
        (10240, 2560), (2560, 10240))]
    found += [(half, 1, 2048, 2048, 2048), (half, 1, 2048, 8192, 2048), (half, 1, 2048, 2048, 8192),
              (half, 1, 2048, 40000, 2048), (half, 1, 4096, 20000, 2048)]
    return [*found, (full, 1, 65536, 64, 256), (full, 1, 32768, 64, 256), (full, 1, 65536, 1, 64),
            (full, 1, 1024, 64, 768), (full, 16, 1024, 768, 304)]


def passes(timer: Timer, small: bool) -> dict[str, list[list[float]]]:
    """[bytes read and written, microseconds] of passes over memory, by what they do, at several sizes."""
    found: dict[str, list[list[float]]] = {}
    rows = [256] if small else [128, 1024, 4096, 16384, 65536]
    for count in rows:
        width = 1536 if not small else 64
        for name, (size, make) in pass_kinds(timer.device, count, width).items():
            calls = [make() for _ in range(max(1, min(6, int(_COLD / size) + 1)))]
            found.setdefault(name, []).append([size, timer.microseconds(calls, 12)])
            del calls
    return found


def pass_kinds(device: torch.device, rows: int, width: int) -> dict[str, tuple[float, Callable[[], Callable]]]:
    """name -> (bytes moved, a function that makes operands and gives the call) for [rows, width]."""
    half, full, n = torch.bfloat16, torch.float32, rows * width

    def of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.randn(shape or (rows, width), device=device).to(dtype)

    def add(dtype: torch.dtype) -> Callable:
        a, b = of(dtype), of(dtype)
        return lambda: a + b

    def cast(source: torch.dtype, target: torch.dtype) -> Callable:
        a = of(source)
        return lambda: a.to(target)

    def gelu(back: bool) -> Callable:
        a, g = of(half), of(half)
        return (lambda: _aten.gelu_backward(g, a)) if back else (lambda: torch.nn.functional.gelu(a))

    def norm(back: bool) -> Callable:
        x, gamma, beta, g = of(full), of(full, width), of(full, width), of(full)
        _, mean, inverse = torch.native_layer_norm(x, [width], gamma, beta, 1e-5)
        if not back:
            return lambda: torch.native_layer_norm(x, [width], gamma, beta, 1e-5)
        return lambda: _aten.native_layer_norm_backward(g, x, [width], mean, inverse, gamma, beta, [True, True, True])

    def plain(function: Callable, dtype: torch.dtype) -> Callable:
        a = of(dtype)
        return lambda: function(a)

    def spread() -> Callable:
        a, b = of(full), of(full, rows, 1)
        return lambda: a * b

    def transposed() -> Callable:
        a = of(half, rows // 128, 128, width // 64, 64).transpose(1, 2)
        return lambda: a.contiguous()

    def segments(table: int) -> Callable:
        g, ids = of(full), torch.randint(0, table, (rows,), device=device)
        return lambda: torch.zeros(table, width, device=device).index_add_(0, ids, g)

    def gather() -> Callable:
        table, ids = of(full, 4096, width), torch.randint(0, 4096, (rows,), device=device)
        return lambda: table.index_select(0, ids)

    def biased() -> Callable:
        a, b = of(half, 16, rows // 16, width), of(half, 16, 1, width)
        return lambda: a + b

    return {
        "copy_float32": (8 * n, lambda: plain(torch.clone, full)), "add_bfloat16": (6 * n, lambda: add(half)),
        "add_float32": (12 * n, lambda: add(full)), "widen": (6 * n, lambda: cast(half, full)),
        "narrow": (6 * n, lambda: cast(full, half)), "gelu": (4 * n, lambda: gelu(False)),
        "gelu_grad": (6 * n, lambda: gelu(True)), "layer_norm": (8 * n, lambda: norm(False)),
        "layer_norm_grad": (12 * n, lambda: norm(True)), "sum_rows": (2 * n, lambda: plain(lambda a: a.sum(0), half)),
        "sum_columns": (4 * n, lambda: plain(lambda a: a.sum(-1), full)), "times_column": (8 * n, spread),
        "square": (8 * n, lambda: plain(lambda a: a * a, full)), "sqrt": (8 * n, lambda: plain(torch.sqrt, full)),
        "sigmoid": (4 * n, lambda: plain(torch.sigmoid, half)), "transposed_copy": (4 * n, transposed),
        "bias_of_parts": (4 * n, biased), "gather": (8 * n, gather), "segment_sum": (12 * n, lambda: segments(4096)),
        "largest": (2 * n, lambda: plain(lambda a: a.amax(-1, keepdim=True), half)),
        "scale": (4 * n, lambda: plain(lambda a: a * 0.125, half)),
    }  # fmt: skip


def attention(timer: Timer, small: bool) -> list[list[Any]]:
    """[batch, heads, length, width of a head, microseconds forward, backward] of causal attention in bfloat16."""
    from parallel.torch_runtime.fusion.fused import fused_rules
    from parallel.torch_runtime.graph import Node

    rules, found = fused_rules(timer.device), []
    sizes = [(8, 12, 1024, 128), (16, 16, 1024, 128), (16, 16, 512, 64), (4, 12, 2048, 128), (8, 16, 1024, 64),
             (8, 20, 1024, 128), (8, 6, 1024, 128)]
    if small:
        sizes = [(2, 2, 32, 16)]
    node = Node("FusedAttention", [], [], {"causal": True, "dropout": False})
    for batch, heads, length, width in sizes:
        q, k, v, g = (torch.randn(batch, length, heads, width, device=timer.device).bfloat16().transpose(1, 2)
                      for _ in range(4))
        forward = rules["FusedAttention"](node, q, k, v)
        found.append([batch, heads, length, width,
                      timer.microseconds([lambda q=q, k=k, v=v: rules["FusedAttention"](node, q, k, v)]),
                      timer.microseconds([lambda q=q, k=k, v=v, g=g, f=forward: rules["FusedAttentionGrad"](
                          node, g, f, q, k, v)])])
    return found


def fused_kernels(timer: Timer, small: bool) -> dict[str, list[list[float]]]:
    """[elements, microseconds] of the sums of a row of logits, their gradient, and an update of AdamW."""
    from parallel.torch_runtime.fusion.fused import fused_rules
    from parallel.torch_runtime.graph import Kind, Node

    rules, device, found = fused_rules(timer.device), timer.device, {}
    for rows, columns in [(64, 512)] if small else [(4096, 40000), (8192, 40000), (8192, 20000)]:
        logits = torch.randn(rows, columns, device=device).bfloat16()
        largest = logits.float().amax(-1, keepdim=True)
        labels = torch.randint(0, columns, (rows,), device=device, dtype=torch.int32)
        by = torch.randn(rows, device=device)
        node = Node("RowSumsGrad", [], [Kind((rows, columns), "bfloat16")])
        found.setdefault("row_sums", []).append([rows * columns, timer.microseconds(
            [lambda a=logits, m=largest, y=labels: rules["RowSums"](None, a, m, y)])])
        found.setdefault("row_sums_grad", []).append([rows * columns, timer.microseconds(
            [lambda a=logits, m=largest, y=labels, s=by, n=node: rules["RowSumsGrad"](n, a, m, y, s, s)])])
    for count in [1000] if small else [1536, 1536 * 1536, 6144 * 1536, 40000 * 1536]:
        for name, dtype in (("adam", torch.float32), ("adam_half", torch.bfloat16)):
            p, m, v = (torch.rand(count, device=device) for _ in range(3))
            g = torch.rand(count, device=device).to(dtype)
            scalars = torch.tensor([1e-9, 0.9, 0.95, 1e-8, 0.1, 0.5, 0.0], device=device)
            found.setdefault(name, []).append([count, timer.microseconds(
                [lambda p=p, m=m, v=v, s=scalars, g=g: rules["FusedAdam"](None, p, m, v, s, g)])])
    return found


def gaps(timer: Timer) -> dict[str, float]:
    """Microseconds of a kernel that does nothing to speak of, one behind the other in a graph."""
    one = torch.zeros(1024, device=timer.device)
    return {"tiny": timer.microseconds([lambda: one.add_(1.0)], 300)}


def collectives(timer: Timer, world: int, rank: int, small: bool) -> list[list[Any]]:
    """[kind, type, bytes of the full tensor, microseconds], each behind the other."""
    found, group = [], dist.new_group(list(range(world)))
    sizes = [1 << 10] if small else [1 << 10, 1 << 16, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28]
    for dtype in (torch.float32, torch.bfloat16):
        for size in sizes:
            whole = torch.randn(size // dtype.itemsize, device=timer.device).to(dtype)
            part = whole[:whole.numel() // world].clone()
            calls = {"AllReduce": lambda w=whole: dist.all_reduce(w, group=group),
                     "AllGather": lambda w=whole, p=part: dist.all_gather_into_tensor(w, p, group=group),
                     "ReduceScatter": lambda w=whole, p=part: dist.reduce_scatter_tensor(p, w, group=group)}
            if timer.device.type == "cpu":
                calls.pop("ReduceScatter")
            for kind, call in calls.items():
                dist.barrier()
                found.append([kind, str(dtype)[6:], size, timer.microseconds([call], 6)])
            if dtype == torch.bfloat16 and rank < 2:
                found.append(["Send", "bfloat16", size, _messages(timer, whole, rank, group)])
    return found


def _messages(timer: Timer, tensor: torch.Tensor, rank: int, group: Any) -> float:
    """A message from rank 0 to rank 1, by host time over ten of them."""
    taken = []
    for _ in range(3):
        begin = timer.synchronized()
        for _ in range(10):
            (dist.send if rank == 0 else dist.recv)(tensor, 1 - rank, group=group)
        taken.append(1e5 * (timer.synchronized() - begin))
    return round(min(taken), 2)


def own(arguments: argparse.Namespace, rank: int) -> dict[str, Any]:
    """One process: rank 0 measures products, the last one passes over memory; collectives together."""
    device = torch.device(f"cuda:{rank}" if arguments.device == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timer, world, found = Timer(device), arguments.nproc, {"rank": rank}
    jobs: dict[str, Callable[[], Any]] = {}
    if rank == 0:
        jobs |= {"products": lambda: products(timer, arguments.small)}
    if rank == world - 1:
        jobs |= {"gaps": lambda: gaps(timer), "passes": lambda: passes(timer, arguments.small),
                 "fused": lambda: fused_kernels(timer, arguments.small),
                 "attention": lambda: attention(timer, arguments.small)}
    if world > 1:
        jobs["collectives"] = lambda: collectives(timer, world, rank, arguments.small)
        options = {"device_id": device} if device.type == "cuda" else {}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=f"tcp://{arguments.address}",
                                rank=rank, world_size=world, **options)
    for name, job in jobs.items():
        begin = time.perf_counter()
        try:
            found[name] = job()
        except Exception as error:  # the others are worth having all the same
            found[name] = f"failed: {error!r}"[:400]
        print(f"rank {rank} {name} {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
    return found


def main() -> int:
    """Measures; the last line of stdout is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--nproc", type=int, default=1, help="GPUs (processes)")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--output", default="micro.json")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.nproc == 1:
        found = own(arguments, 0)
        Path(arguments.output).write_text(json.dumps(found) + "\n", encoding="utf-8")
        print(json.dumps({"measured": [key for key in found if key != "rank"]}))
        return 0
    if arguments.rank is not None:
        print(json.dumps(own(arguments, arguments.rank)), flush=True)
        os._exit(0)  # captured graphs hold NCCL's communicators, which would wait for each other to be given up
    address = f"127.0.0.1:{29500 + os.getpid() % 5000}"
    processes = [subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--rank", str(rank), "--address", address],
                                  stdout=subprocess.PIPE, text=True) for rank in range(arguments.nproc)]
    found: dict[str, Any] = {}
    for process in processes:
        for line in process.stdout:
            if line.startswith("{"):
                found = {**json.loads(line), **found}
    codes = [process.wait() for process in processes]
    Path(arguments.output).write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(json.dumps({"codes": codes, "measured": [key for key in found if key != "rank"]}))
    return 0


sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

if __name__ == "__main__":
    sys.exit(main())
