"""Training steps of exported programs on NVIDIA GPUs, beside a hand-written torch GPT of the same sizes.

Make the programs where MindSpore is (any CPU machine), under one folder:

    B="model.dropout=0 train.precision=bf16 train.data_sink=false parallel.devices=null parallel.optimizer.shard=1"
    B="$B parallel.recompute.policy=none"
    E="python -m parallel export --config configs/pangu/350m.yaml --graphs step --output"
    $E programs/one16 $B parallel.data=1 train.global_batch_size=16
    $E programs/one16drop $B parallel.data=1 train.global_batch_size=16 model.dropout=0.1
    $E programs/one32 $B parallel.data=1 train.global_batch_size=32
    $E programs/data2 $B parallel.data=2 train.global_batch_size=32
    $E programs/shard2 $B parallel.data=2 parallel.optimizer.shard=-1 train.global_batch_size=32
    $E programs/op2 $B parallel.data=1 parallel.op=2 train.global_batch_size=32
    $E programs/op2i $B parallel.data=1 parallel.op=2 parallel.micro_batch_interleave=2 train.global_batch_size=32
    $E programs/stages2_2 $B parallel.data=1 parallel.pipeline.stages=2 parallel.pipeline.micro_batches=8 \\
        "parallel.pipeline.offsets=[2,-2]" train.global_batch_size=32

Then, on a machine with torch, NumPy and GPUs (no MindSpore), from the repository's root:

    python scripts/bench/gpu/train_350m.py --programs programs --check                 # kernels against plain torch
    python scripts/bench/gpu/train_350m.py --programs programs --run one16 --modes cuda_graph,inductor --peer
    python scripts/bench/gpu/train_350m.py --programs programs --run one16 --modes inductor --peer --causal
    python scripts/bench/gpu/train_350m.py --programs programs --run one16drop --modes inductor --peer
    python scripts/bench/gpu/train_350m.py --programs programs --run one32 --modes inductor
    python scripts/bench/gpu/train_350m.py --programs programs --run data2,shard2 --modes inductor --nproc 2 --profile
    python scripts/bench/gpu/train_350m.py --programs programs --run op2i --modes inductor --nproc 2 --profile
    python scripts/bench/gpu/train_350m.py --programs programs --run stages2_2 --modes cuda_graph --nproc 2
    python scripts/bench/gpu/train_350m.py --programs programs --run op2 --modes inductor+uncaptured,eager --nproc 2 \\
        --shared --steps 4

The last line is for a machine with one GPU: both ranks run there and talk through the host, so losses are all it tells.

`--device cpu` runs the same on small programs. Ours and the peer take turns; the table gives milliseconds of a step
back to back and read each step, tokens/s, MFU over the peak measured in this run and over 989 TFLOP/s, and peak memory.
MFU counts model FLOPs: 6 N + 12 L D S a token, N = 12 L D^2 + V D; no recomputation, causal attention not halved.
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
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from parallel.torch_runtime import buckets, captured, execute, groups  # noqa: E402
from parallel.torch_runtime.fusion import attention_pass  # noqa: E402
from parallel.torch_runtime.program import Program  # noqa: E402
from parallel.torch_runtime.step import TorchStep, measured_tflops  # noqa: E402
from scripts.bench.gpu.checks import check, time_attention  # noqa: E402
from scripts.bench.gpu.kernel_times import profiled  # noqa: E402
from scripts.bench.gpu.peer import PeerStep  # noqa: E402

DATA_SHEET_TFLOPS = 989.0
_ALONE, _CAPTURED = execute.Binder._alone, captured.Captured
TILES = {
    "forward": [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 128, 4, 2)],
    "rows": [(64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 3), (128, 32, 4, 3), (128, 64, 4, 2)],
    "columns": [(64, 64, 4, 2), (64, 128, 8, 2), (32, 64, 4, 3), (32, 128, 4, 3), (64, 128, 4, 2)],
}
"""Tiles of our own attention to be tried: (rows, columns, warps, stages)."""


def batch_of(program: Program, number: int, causal: bool) -> list[np.ndarray]:
    """A global batch: Zipf-distributed tokens, positions, documents (two in a sample unless causal)."""
    generator, found = np.random.default_rng(number), []
    vocabulary = program.settings["model"]["vocabulary_size"]
    for name, shape, dtype in program.inputs:
        if name == "records":
            array = np.minimum(7 + generator.zipf(1.2, shape), vocabulary - 1)
        elif name == "position_ids":
            array = np.broadcast_to(np.arange(shape[1]), shape)
        elif name == "documents":
            array = np.zeros(shape)
            if not causal:
                array[:, shape[1] // 2:] = 1
        else:  # numbers of the samples
            array = np.arange(shape[0]) + number * shape[0]
        found.append(np.ascontiguousarray(array).astype(dtype))
    return found


def flops_of_token(model: dict) -> float:
    """Model FLOPs of a token, forward and backward."""
    layers, width = model["layers"], model["hidden_size"]
    weights = 12 * layers * width**2 + model["vocabulary_size"] * width
    return 6.0 * weights + 12.0 * layers * width * model["sequence_length"]


class Ours:
    """A rank of a program in a mode, with the same call as the peer.

    Args:
        mode: of `TorchStep`; behind a + "alone" (no buckets of collectives), "bias" (attention tells documents apart by
            a mask of scores) "clone" or "uncaptured".
    """

    def __init__(self, program: Program, rank: int, device: str, mode: str, address: str | None) -> None:
        mode, *options = mode.split("+")
        buckets.FULL = 0 if "alone" in options else 48 << 20
        attention_pass.SPANS = "none" if "bias" in options else "all"
        # Ways to look for a mistake: sums over ranks that leave what they sum as it is, and no captured graph.
        execute.Binder._alone = (lambda binder, number: False) if "clone" in options else _ALONE
        captured.Captured = (lambda bound, _: bound) if "uncaptured" in options else _CAPTURED
        self.step = TorchStep(program, rank, device=device, mode=mode, address=address)
        self.norms: list[float] = []

    def __call__(self, batch: list[np.ndarray]) -> Tensor:
        part, parts = self.step.share
        rows = [item[part * len(item) // parts:(part + 1) * len(item) // parts] for item in batch]
        results = self.step.run("step", rows)
        if len(self.norms) < 4:
            self.norms.append(round(float(results[1]), 5))
        return results[0]


def synchronized(device: torch.device) -> float:
    """The time, once the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(call, batches: list, device: torch.device, read: bool) -> float:
    """Seconds of a step, back to back or with the loss read after each."""
    begin = synchronized(device)
    for batch in batches:
        loss = call(batch)
        if read:
            float(loss)
    return (synchronized(device) - begin) / len(batches)


class Contest:
    """Several callables that take turns on the same batches.

    Args:
        program: whose sizes count.
        device: where all run.
        steps: steps of a turn; there are three turns.
        causal: whether batches hold one document a sample.
        profile: also say where the time goes.
    """

    def __init__(self, program: Program, device: torch.device, steps: int, causal: bool, profile: bool) -> None:
        self.program, self.device, self.steps, self.profile = program, device, steps, profile
        self.batches = [batch_of(program, number, causal) for number in range(steps)]
        self.entries: dict[str, dict] = {}

    def add(self, name: str, make) -> None:
        """Builds one and runs its first steps: start time, losses and peak memory."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        before, begin = torch.cuda.memory_allocated(self.device) if cuda else 0, time.perf_counter()
        call = make()
        losses = [float(call(batch)) for batch in self.batches[:4]]
        start = synchronized(self.device) - begin
        # From the first steps, which are not replayed: what a captured step holds inside is not counted later.
        peak = (torch.cuda.max_memory_allocated(self.device) - before) / 1e9 if cuda else None
        reserved = torch.cuda.memory_reserved(self.device) / 1e9 if cuda else None
        self.entries[name] = {"call": call, "start_s": round(start, 1), "losses": [round(item, 5) for item in losses],
                              "peak_gb": peak and round(peak, 2), "reserved_gb": reserved and round(reserved, 2),
                              "norms": getattr(call, "norms", None), "back_to_back": [], "read": []}

    def run(self) -> dict[str, dict]:
        """Three turns each; figures by name."""
        for _ in range(3):
            for entry in self.entries.values():
                entry["back_to_back"].append(timed(entry["call"], self.batches, self.device, False))
                entry["read"].append(timed(entry["call"], self.batches, self.device, True))
        model = self.program.settings["model"]
        tokens = self.program.settings["train"]["global_batch_size"] * model["sequence_length"]
        flops, found = flops_of_token(model) * tokens, {}
        gpus = self.program.world
        peak = measured_tflops(self.device, torch.bfloat16)
        if self.profile and self.device.type == "cuda":
            for entry in self.entries.values():
                entry["profile"] = profiled(entry["call"], self.batches[:3], self.device)
        for name, entry in self.entries.items():
            seconds = statistics.median(entry["back_to_back"])
            found[name] = {key: value for key, value in entry.items() if key not in ("call", "back_to_back", "read")}
            found[name] |= {
                "ms": round(1e3 * seconds, 2), "ms_read": round(1e3 * statistics.median(entry["read"]), 2),
                "tokens_per_second": round(tokens / seconds), "mfu": round(flops / seconds / gpus / peak / 1e12, 4),
                "mfu_data_sheet": round(flops / seconds / gpus / DATA_SHEET_TFLOPS / 1e12, 4),
                "peak_tflops": round(peak, 1), "gpus": gpus,
            }  # fmt: skip
        return found


def contest(arguments: argparse.Namespace, name: str, rank: int, address: str | None) -> dict[str, dict]:
    """All modes (and the peer) of one program; those of several ranks one after the other."""
    program = Program(Path(arguments.programs) / name)
    device = torch.device(f"cuda:{arguments.gpu if arguments.shared else rank or arguments.gpu}"
                          if arguments.device == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    modes, found = arguments.modes.split(","), {}
    for together in [modes] if program.world == 1 else [[mode] for mode in modes]:
        turns = Contest(program, device, arguments.steps, arguments.causal, arguments.profile)
        for mode in together:
            turns.add(mode, lambda mode=mode: Ours(program, rank, str(device), mode, address))
        if arguments.peer and program.world == 1:
            turns.add("peer_compiled", lambda: PeerStep(program, device, arguments.causal))
            if arguments.peer_eager:
                turns.add("peer_eager", lambda: PeerStep(program, device, arguments.causal, compiled=False))
        found |= turns.run()
        del turns
        gc.collect()
    stages, count = program.parallel["pipeline"]["stages"], program.parallel["pipeline"]["micro_batches"]
    if stages > 1:
        found["bound_of_the_bubble"] = round(stages * count / (count + stages - 1), 3)
    return found


def spawn(arguments: argparse.Namespace, names: list[str], own: list[str]) -> dict[str, dict]:
    """The ranks of programs of one world as processes, which run all of them; rank 0 tells.

    Args:
        arguments: parsed.
        names: of the programs.
        own: the arguments as they were given.
    """
    world = Program(Path(arguments.programs) / names[0]).world
    address = f"127.0.0.1:{29600 + os.getpid() % 5000}"
    processes = [subprocess.Popen([sys.executable, __file__, *own, "--rank", str(rank), "--address", address],
                                  stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL, text=True)
                 for rank in range(world)]
    found: dict[str, dict] = {}
    for line in processes[0].stdout:
        if line.startswith("{"):
            found |= json.loads(line)
            for name, figures in json.loads(line).items():
                show(name, figures)
    codes = [process.wait() for process in processes]
    return found | ({"failed": codes} if any(codes) else {})


def show(name: str, found: dict[str, dict]) -> None:
    """The table of one program, on stderr."""
    keys = ("ms", "ms_read", "tokens_per_second", "mfu", "mfu_data_sheet", "peak_gb", "reserved_gb", "start_s")
    print(f"\n{name}", *keys, "losses", sep="\t", file=sys.stderr)
    for entry, figures in found.items():
        if not isinstance(figures, dict):
            print(entry, figures, file=sys.stderr)
            continue
        print(entry, *(figures.get(key) for key in keys), figures.get("losses", figures), sep="\t", file=sys.stderr)
        for kind, value in figures.get("profile", {}).items():
            print(f"  {kind}: {value}", file=sys.stderr)
    sys.stderr.flush()
    found = {entry: figures for entry, figures in found.items() if isinstance(figures, dict)}
    base = found.get("peer_compiled", {}).get("tokens_per_second")
    for entry, figures in found.items():
        if base and "tokens_per_second" in figures:
            print(f"{entry}: {figures['tokens_per_second'] / base:.3f} x the compiled peer", file=sys.stderr)


def main() -> int:
    """Runs what the arguments say; the last line of stdout is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", required=True, help="folder with exported programs")
    parser.add_argument("--run", default="", help="names of programs, with commas between")
    parser.add_argument("--modes", default="cuda_graph,inductor", help="exact, eager, cuda_graph, inductor")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--steps", type=int, default=10, help="steps of a turn")
    parser.add_argument("--causal", action="store_true", help="one document a sample: causal attention on both sides")
    parser.add_argument("--peer", action="store_true", help="also the hand-written GPT, compiled")
    parser.add_argument("--peer-eager", action="store_true", help="and not compiled")
    parser.add_argument("--profile", action="store_true", help="also where the time goes, by kind of kernel")
    parser.add_argument("--gpu", type=int, default=0, help="which, for programs of one rank")
    parser.add_argument("--attention", action="store_true", help="time attention of every kind, and tiles of our own")
    parser.add_argument("--check", action="store_true", help="compare the kernels with their plain forms first")
    parser.add_argument("--nproc", type=int, default=1, help="more than 1: programs of several ranks")
    parser.add_argument("--shared", action="store_true", help="all ranks on one GPU, by gloo: for their losses alone")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    groups.ON_GPUS = "gloo" if arguments.shared else "nccl"
    names = [name for name in arguments.run.split(",") if name]
    if arguments.rank is not None:
        for name in names:
            print(json.dumps({name: contest(arguments, name, arguments.rank, arguments.address)}), flush=True)
        return 0
    result: dict = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if arguments.device == "cuda"
                    else "cpu", "causal": arguments.causal}
    device = torch.device(f"cuda:{arguments.gpu}" if arguments.device == "cuda" else "cpu")
    if arguments.check:
        result["check"] = check(device)
        for name, far in result["check"].items():
            print(f"{name}: {far:.2e}", file=sys.stderr)
    if arguments.attention:
        result["attention"] = time_attention(device, TILES)
        for name, figures in result["attention"].items():
            print(name, figures, file=sys.stderr)
    if arguments.nproc > 1:
        result |= spawn(arguments, names, sys.argv[1:])
    else:
        for name in names:
            result[name] = contest(arguments, name, 0, None)
            show(name, result[name])
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
