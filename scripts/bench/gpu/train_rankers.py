"""Training steps of TokenMixer-Large on NVIDIA GPUs: exported programs beside the same network hand-written in torch.

    bash scripts/bench/gpu/rankers/export.sh programs                        # where MindSpore is
    python scripts/bench/gpu/train_rankers.py --programs programs --run train_500m --modes inductor,cuda_graph --peer
    python scripts/bench/gpu/train_rankers.py --programs programs --run train_7b,train_4b --modes cuda_graph --profile
    python scripts/bench/gpu/train_rankers.py --programs programs --run train_500m,train_500m_moe --modes cuda_graph
    python scripts/bench/gpu/train_rankers.py --programs programs --run train_500m_tokens,train_500m_width --nproc 2

Adagrad for both parts, bfloat16 products, float32 masters; start values and batches are made on the GPU, so a step
reads nothing of the host. The peer has the same weights at the start, batched matmuls, target attention as its paper
writes it, `torch.compile` for the loss with its gradient and for the update. MFU counts three times the forward pass'
products, as the network writes them (no recomputation), over the peak measured in this run and over 989 TFLOP/s. Beside
it stand the time of the written graph's products at the peak, and of the update's bytes at the copy rate.
`--device cpu` runs the same on small programs. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from parallel.torch_runtime.graph import COLLECTIVES  # noqa: E402
from parallel.torch_runtime.program import Program  # noqa: E402
from parallel.torch_runtime.step import measured_tflops  # noqa: E402
from scripts.bench.gpu import ranker_peers as peers  # noqa: E402
from scripts.bench.gpu.kernel_times import profiled  # noqa: E402
from scripts.bench.gpu.ranker_parts import (  # noqa: E402
    DATA_SHEET_TFLOPS,
    DrawnStep,
    flops,
    inputs_of,
    smallest_table,
    within,
)

STEPS = 4


class Ours:
    """A program's step on batches that are on the device."""

    def __init__(self, program: Program, rank: int, device: str, mode: str, address: str | None) -> None:
        torch.manual_seed(1)
        self.step = DrawnStep(program, rank, device=device, mode=mode, address=address)
        self.bound: Any = None

    def __call__(self, batch: list[Tensor]) -> Tensor:
        """The loss."""
        with torch.no_grad():
            if self.bound is None:
                self.bound = self.step._bound("step", [np.zeros((1, 1), np.int32)] * len(batch))
            return self.bound.run(batch)[0]


class Peer:
    """TokenMixer-Large in torch: compiled loss, gradient and Adagrad."""

    def __init__(self, program: Program, start: dict[str, Tensor]) -> None:
        settings, train = program.settings, program.settings["train"]
        self.model, graph = settings["model"], program.graph(0)
        self.weights = {tensor.name: start[tensor.name].clone().requires_grad_() for tensor in program.tensors
                        if tensor.kind == "parameter"}
        begin = train["optimizer"]["initial_accumulator"]
        self.sums = [torch.full_like(value, begin) for value in self.weights.values()]
        parts = ["sparse_optimizer" if name.startswith("embedding.tables.") else "optimizer" for name in self.weights]
        device = self.sums[0].device
        self.rates = [torch.tensor(train[part]["learning_rate"], device=device) for part in parts]
        self.epsilon = train["optimizer"]["epsilon"]
        missing = [int(graph.constant(node.inputs[1]).array().item()) for node in graph.nodes if node.op == "NotEqual"]
        self.lookups = peers.Lookups(settings["data"]["features"], missing, peers.attention)
        self.loss = torch.compile(self._loss, dynamic=False)
        self.update = torch.compile(_adagrad, dynamic=True)

    def _loss(self, weights: peers.Weights, ids: Tensor, labels: Tensor) -> Tensor:
        half = {name: value.to(torch.bfloat16) if _is_product(name) else value for name, value in weights.items()}
        groups = self.lookups(half, ids)
        return peers.tokenmixer_loss(half, groups, labels, self.model)

    def __call__(self, batch: list[Tensor]) -> Tensor:
        """The loss."""
        loss = self.loss(self.weights, batch[0], batch[2])
        loss.backward()
        with torch.no_grad():
            for value, total, rate in zip(self.weights.values(), self.sums, self.rates, strict=True):
                self.update(value.detach().view(-1), total.view(-1), value.grad.reshape(-1), rate, self.epsilon)
                value.grad = None
        return loss.detach()


def _adagrad(weight: Tensor, total: Tensor, gradient: Tensor, rate: Tensor, epsilon: float) -> None:
    total.add_(gradient * gradient)
    weight.sub_(rate * gradient / (total.sqrt() + epsilon))


def _is_product(name: str) -> bool:
    """Whether the network uses a parameter in the type of the products."""
    return not name.startswith(("embedding.tables.", "head.", "auxiliary.")) and not name.endswith("gamma")


# -- measuring --------------------------------------------------------------------------------------------------------


def contest(arguments: argparse.Namespace, name: str, rank: int, address: str | None) -> dict[str, Any]:
    """All modes of a program, and the peer; programs of one rank take turns, as far as the memory goes."""
    program = Program(Path(arguments.programs) / name)
    device = torch.device(f"cuda:{rank}" if arguments.device == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    batch = program.settings["train"]["global_batch_size"]
    data = int(program.parallel["data"])
    listed = [(item, (shape[0] // data, *shape[1:]), dtype) for item, shape, dtype in program.inputs]
    batches = [inputs_of(listed, {"ids": smallest_table(program)}, device, number) for number in range(STEPS)]
    makers: dict[str, Callable] = {mode: lambda mode=mode: Ours(program, rank, str(device), mode, address)
                                   for mode in arguments.modes.split(",")}
    entries: dict[str, dict] = {}
    if arguments.peer and program.world == 1:
        makers["peer"] = lambda: Peer(program, Ours(program, rank, str(device), "eager", None).step.state)
    for mode, make in makers.items():
        entry = _begun(f"{name} {mode}", make, batches, device, arguments.limit)
        if entry is not None:
            entries[mode] = entry
            if not arguments.together:
                _time(entries, [mode], batches, device, arguments.turns)
                entry["profile"] = profiled(entry["call"], batches[:2], device) if arguments.profile \
                    and device.type == "cuda" else None
                del entry["call"]
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    if arguments.together:
        _time(entries, list(entries), batches, device, arguments.turns)
    return _told(program, rank, device, entries, batch)


def _begun(title: str, make: Callable, batches: list, device: torch.device, limit: int) -> dict[str, Any] | None:
    """A callable after its first steps: when it was ready, its losses, its peak memory."""
    cuda, begin = device.type == "cuda", time.perf_counter()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else 0
    try:
        with within(limit):
            call = make()
            losses = [float(call(batch)) for batch in batches]
            if cuda:
                torch.cuda.synchronize(device)
    except Exception:
        print(f"{title} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return None
    peak = (torch.cuda.max_memory_allocated(device) - before) / 1e9 if cuda else None
    reserved = torch.cuda.memory_reserved(device) / 1e9 if cuda else None
    ready = round(time.perf_counter() - begin, 1)
    print(f"{title}: ready after {ready} s, losses {losses}", file=sys.stderr, flush=True)
    return {"call": call, "losses": [round(loss, 5) for loss in losses], "peak_gb": peak and round(peak, 2),
            "reserved_gb": reserved and round(reserved, 2), "ready_s": ready, "times": []}


def _time(entries: dict[str, dict], names: list[str], batches: list, device: torch.device, turns: int) -> None:
    for _ in range(turns):
        for name in names:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            for batch in batches:
                entries[name]["call"](batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            entries[name]["times"].append((time.perf_counter() - begin) / len(batches))


def _told(program: Program, rank: int, device: torch.device, entries: dict[str, dict], batch: int) -> dict[str, Any]:
    graph, world = program.graph(rank), program.world
    forward = flops(graph, lambda node: "Grad_" not in node.scope and not node.marks.get("duplicated"))
    run, wanted = flops(graph), 3.0 * forward
    peak = measured_tflops(device, torch.bfloat16)
    copied = _copy_rate(device)
    held = sum(int(np.prod(kind.shape)) for name, kind in graph.parameters if not name.startswith("adagrad"))
    found: dict[str, Any] = {
        "peak_tflops": round(peak, 1), "copy_gb_per_second": round(copied / 1e9), "model_gflops": round(wanted / 1e9),
        "graph_gflops": round(run / 1e9), "products_ms": round(1e3 * run / peak / 1e12, 2),
        # Parameter and sum of squares read and written, a gradient in half precision read.
        "update_ms": round(1e3 * held * 18 / copied, 2), "collectives": _collectives(graph),
    }  # fmt: skip
    for name, entry in entries.items():
        seconds = statistics.median(entry.pop("times"))
        entry.pop("call", None)
        rate = wanted / seconds / 1e12
        found[name] = entry | {"ms": round(1e3 * seconds, 3), "samples_per_second": round(batch / seconds),
                               "mfu": round(rate / peak, 4), "mfu_data_sheet": round(rate / DATA_SHEET_TFLOPS, 4),
                               "gpus": world}
    if "peer" in found:
        found["x_peer"] = {name: round(found["peer"]["ms"] / found[name]["ms"], 3) for name in entries}
    return found


def _collectives(graph: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.op in COLLECTIVES and len(set(graph.groups[node.attributes["group"]])) > 1:
            found[node.op] = found.get(node.op, 0) + 1
    return found


def _copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a copy on the device."""
    size = 1 << (31 if device.type == "cuda" else 24)
    one, other = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    times = []
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        other.copy_(one)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return 2 * size / min(times)


def spawn(arguments: argparse.Namespace, own: list[str]) -> None:
    """The ranks of programs as processes; rank 0 tells."""
    address = f"127.0.0.1:{29600 + os.getpid() % 5000}"
    processes = [subprocess.Popen([sys.executable, __file__, *own, "--rank", str(rank), "--address", address],
                                  stdout=None if rank == 0 else subprocess.DEVNULL) for rank in range(arguments.nproc)]
    codes = [process.wait() for process in processes]
    if any(codes):
        print(f"exit codes {codes}", file=sys.stderr)


def main() -> int:
    """Runs what the arguments say; the last line of stdout is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", required=True, help="folder with exported programs")
    parser.add_argument("--run", required=True, help="names of programs, with commas between")
    parser.add_argument("--modes", default="cuda_graph", help="exact, eager, cuda_graph, inductor")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--turns", type=int, default=5, help=f"of {STEPS} steps")
    parser.add_argument("--peer", action="store_true", help="also the hand-written network, compiled")
    parser.add_argument("--together", action="store_true", help="all modes (and the peer) in memory at once, in turns")
    parser.add_argument("--profile", action="store_true", help="also where the time goes, by kind of kernel")
    parser.add_argument("--nproc", type=int, default=1, help="more than 1: programs of several ranks")
    parser.add_argument("--limit", type=int, default=600, help="seconds until a callable is ready; then it is left out")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.nproc > 1 and arguments.rank is None:
        spawn(arguments, sys.argv[1:])
        return 0
    found = {}
    for name in arguments.run.split(","):
        try:
            found[name] = contest(arguments, name, arguments.rank or 0, arguments.address)
        except Exception:
            print(f"{name} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            found[name] = None
        if not arguments.rank:
            print(json.dumps({name: found[name]}), file=sys.stderr, flush=True)
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    if not arguments.rank:
        print(json.dumps({"device": torch.cuda.get_device_name(0) if arguments.device == "cuda" else "cpu",
                          "found": found}), flush=True)
    if arguments.rank is not None:
        os._exit(0)  # NCCL waits for captured graphs to be given up
    return 0


if __name__ == "__main__":
    sys.exit(main())
