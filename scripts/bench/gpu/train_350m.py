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
    $E programs/stages2 $B parallel.data=1 parallel.pipeline.stages=2 parallel.pipeline.micro_batches=8 \\
        train.global_batch_size=32

Then, on a machine with torch, NumPy and GPUs (no MindSpore), from the repository's root:

    python scripts/bench/gpu/train_350m.py --programs programs --check                 # kernels against plain torch
    python scripts/bench/gpu/train_350m.py --programs programs --run one16 --modes cuda_graph,inductor --peer
    python scripts/bench/gpu/train_350m.py --programs programs --run one16 --modes inductor --peer --causal
    python scripts/bench/gpu/train_350m.py --programs programs --run one16drop --modes inductor --peer
    python scripts/bench/gpu/train_350m.py --programs programs --run one32 --modes inductor
    python scripts/bench/gpu/train_350m.py --programs programs --run data2,shard2,op2,stages2 --modes inductor --nproc 2

`--device cpu` runs the same on small programs. Ours and the peer take turns; the table gives milliseconds of a step
back to back and read each step, tokens/s, MFU over the peak measured in this run and over 989 TFLOP/s, and peak memory.
MFU counts model FLOPs: 6 N + 12 L D S a token, N = 12 L D^2 + V D; no recomputation, causal attention not halved.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from parallel.torch_runtime.program import Program  # noqa: E402
from parallel.torch_runtime.step import TorchStep, measured_tflops  # noqa: E402

DATA_SHEET_TFLOPS = 989.0


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


class PeerLayer(nn.Module):
    """A pre-norm decoder layer with one matmul for q, k and v."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nnf.scaled_dot_product_attention(q, k, v, mask, self.dropout, is_causal=mask is None)
        x = x + nnf.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, width)), self.dropout)
        return x + nnf.dropout(self.down(nnf.gelu(self.up(self.norm2(x)), approximate="tanh")), self.dropout)


class Peer(nn.Module):
    """A GPT with a tied head, of a program's sizes."""

    def __init__(self, model: dict, dropout: float) -> None:
        super().__init__()
        width, self.dropout = model["hidden_size"], dropout
        self.words = nn.Embedding(model["vocabulary_size"], width)
        self.places = nn.Embedding(model["sequence_length"], width)
        self.layers = nn.ModuleList(PeerLayer(width, model["heads"], dropout) for _ in range(model["layers"]))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, records: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:
        x = nnf.dropout(self.words(records[:, :-1]) + self.places(places), self.dropout)
        for layer in self.layers:
            x = layer(x, mask)
        logits = nnf.linear(self.norm(x), self.words.weight)
        return nnf.cross_entropy(logits.flatten(0, 1).float(), records[:, 1:].flatten())


class PeerStep:
    """Compiled forward and backward in bf16 autocast over float32 weights, clipped, fused AdamW."""

    def __init__(self, program: Program, device: torch.device, causal: bool, compiled: bool = True) -> None:
        settings = program.settings
        torch.manual_seed(0)
        self.net = Peer(settings["model"], float(settings["model"]["dropout"])).to(device)
        self.loss = torch.compile(self.net) if compiled else self.net
        options = settings["train"]["optimizer"]
        self.optimizer = torch.optim.AdamW(self.net.parameters(), options["learning_rate"], tuple(options["betas"]),
                                           options["epsilon"], options["weight_decay"], fused=True)
        self.device, self.causal = device, causal

    def __call__(self, batch: list[np.ndarray]) -> Tensor:
        records, places, documents = (torch.from_numpy(item).to(self.device).long() for item in batch[:3])
        mask = None
        if not self.causal:
            visible = (documents[:, :, None] == documents[:, None, :]).tril()
            mask = torch.where(visible, 0.0, -10000.0).to(torch.bfloat16)[:, None]
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.loss(records, places, mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class Ours:
    """A rank of a program in a mode, with the same call as the peer."""

    def __init__(self, program: Program, rank: int, device: str, mode: str, address: str | None) -> None:
        self.step = TorchStep(program, rank, device=device, mode=mode, address=address)

    def __call__(self, batch: list[np.ndarray]) -> Tensor:
        part, parts = self.step.share
        rows = [item[part * len(item) // parts:(part + 1) * len(item) // parts] for item in batch]
        return self.step.run("step", rows)[0]


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
    """

    def __init__(self, program: Program, device: torch.device, steps: int, causal: bool) -> None:
        self.program, self.device, self.steps = program, device, steps
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
                              "back_to_back": [], "read": []}

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


def check(device: torch.device) -> dict[str, float]:
    """Largest relative difference of every fused node of its own kernel from its plain form."""
    from parallel.torch_runtime import fused
    from parallel.torch_runtime.program import Kind, Node

    own, plain, found = fused.fused_rules(device), fused._PLAIN, {}
    torch.manual_seed(0)

    def told(name: str, got, wanted) -> None:
        pairs = zip(got, wanted, strict=True) if isinstance(got, (tuple, list)) else [(got, wanted)]
        found[name] = max(float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-20))
                          for a, b in pairs)

    rows, columns = (512, 40000) if device.type == "cuda" else (16, 300)
    logits = torch.randn(rows, columns, device=device).bfloat16()
    labels = torch.randint(-2, columns + 2, (rows,), device=device, dtype=torch.int32)
    largest = logits.float().amax(-1, keepdim=True)
    told("row_sums", own["RowSums"](None, logits, largest, labels), plain["RowSums"](None, logits, largest, labels))
    spread = [torch.randn(rows, device=device) for _ in range(2)]
    node = Node("RowSumsGrad", [], [Kind((rows, columns), "bfloat16")])
    told("row_sums_grad", own["RowSumsGrad"](node, logits, largest, labels, *spread),
         plain["RowSumsGrad"](node, logits, largest, labels, *spread))
    p, m, v, g = (torch.rand(1000, 37, device=device) for _ in range(4))
    scalars = torch.tensor([1e-3, 0.9, 0.95, 1e-8, 0.1, 0.5, 0.0], device=device)
    ours, theirs = ([item.clone() for item in (p, m, v)] for _ in range(2))
    own["FusedAdam"](None, *ours, scalars, g)
    plain["FusedAdam"](None, *theirs, scalars, g)
    told("adam", ours, theirs)
    told("sum_of_squares", own["SumOfSquares"](None, g), plain["SumOfSquares"](None, g))
    for dropout in (False, True):
        for causal in (False, True):
            found |= check_attention(device, own, dropout, causal)
    return found


def check_attention(device: torch.device, own: dict, dropout: bool, causal: bool) -> dict[str, float]:
    """Attention and its gradients against the written-out form in float32."""
    from parallel.torch_runtime import fused
    from parallel.torch_runtime.program import Node

    size = (2, 4, 256, 64)
    q, k, v, dout = (torch.randn(size, device=device).bfloat16() for _ in range(4))
    q = q / 8
    documents = torch.arange(size[2], device=device)[None].expand(size[0], -1) // (size[2] if causal else 100)
    visible = (documents[:, :, None] == documents[:, None, :]).tril()
    bias = torch.where(visible, 0.0, -10000.0)[:, None]
    extra, attributes = [], {"causal": causal, "dropout": dropout}
    mask = torch.ones((), device=device)
    if dropout:
        keys = [torch.randint(-2**31, 2**31 - 1, (size[0], 1, size[2], 1), device=device).int() for _ in range(2)]
        columns = torch.randint(-2**31, 2**31 - 1, (1, size[1], 1, size[2]), device=device).int()
        attributes |= {"threshold": int(-(2**31) + 0.1 * 2**32), "scale": 1 / 0.9}
        extra = [*keys, columns]
        mask = fused.kept_mask(*extra, attributes["threshold"]) * attributes["scale"]
    node = Node("FusedAttention", [], [], attributes)
    inputs = [q, k, v, *([] if causal else [bias.bfloat16()]), *extra]
    forward = own["FusedAttention"](node, *inputs)
    gradients = own["FusedAttentionGrad"](node, dout, forward, *inputs)
    leaves = [item.float().requires_grad_() for item in (q, k, v)]
    wanted = (torch.softmax(leaves[0] @ leaves[1].transpose(-1, -2) + bias, -1) * mask) @ leaves[2]
    wanted.backward(dout.float())
    name = f"attention{'_dropout' if dropout else ''}{'_causal' if causal else ''}"
    far = [float((a.float() - b).abs().max() / b.abs().max())
           for a, b in zip([forward[0], *gradients], [wanted.detach(), *(item.grad for item in leaves)], strict=True)]
    return {name: max(far)}


def contest(arguments: argparse.Namespace, name: str, rank: int, address: str | None) -> dict[str, dict]:
    """All modes (and the peer) of one program."""
    program = Program(Path(arguments.programs) / name)
    device = torch.device(f"cuda:{rank}" if arguments.device == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    turns = Contest(program, device, arguments.steps, arguments.causal)
    for mode in arguments.modes.split(","):
        turns.add(mode, lambda mode=mode: Ours(program, rank, str(device), mode, address))
    if arguments.peer and program.world == 1:
        turns.add("peer_compiled", lambda: PeerStep(program, device, arguments.causal))
        if arguments.peer_eager:
            turns.add("peer_eager", lambda: PeerStep(program, device, arguments.causal, compiled=False))
    return turns.run()


def spawn(arguments: argparse.Namespace, name: str) -> dict[str, dict]:
    """The ranks of a program as processes; rank 0 reports."""
    world = Program(Path(arguments.programs) / name).world
    found = {}
    for number, mode in enumerate(arguments.modes.split(",")):
        address = f"127.0.0.1:{29600 + number + 7 * (os.getpid() % 100)}"
        given = [sys.executable, __file__, "--programs", arguments.programs, "--run", name, "--modes", mode, "--device",
                 arguments.device, "--steps", str(arguments.steps), *(["--causal"] if arguments.causal else [])]
        processes = [subprocess.Popen([*given, "--rank", str(rank), "--address", address],
                                      stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL, text=True)
                     for rank in range(world)]
        told, _ = processes[0].communicate()
        codes = [process.wait() for process in processes]
        if any(codes):
            found[mode] = {"failed": codes}
            continue
        found |= json.loads(told.strip().splitlines()[-1])
    return found


def show(name: str, found: dict[str, dict]) -> None:
    """The table of one program, on stderr."""
    keys = ("ms", "ms_read", "tokens_per_second", "mfu", "mfu_data_sheet", "peak_gb", "reserved_gb", "start_s")
    print(f"\n{name}", *keys, "losses", sep="\t", file=sys.stderr)
    for entry, figures in found.items():
        print(entry, *(figures.get(key) for key in keys), figures.get("losses", figures), sep="\t", file=sys.stderr)
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
    parser.add_argument("--check", action="store_true", help="compare the kernels with their plain forms first")
    parser.add_argument("--nproc", type=int, default=1, help="more than 1: programs of several ranks")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    names = [name for name in arguments.run.split(",") if name]
    if arguments.rank is not None:
        print(json.dumps(contest(arguments, names[0], arguments.rank, arguments.address)), flush=True)
        return 0
    result: dict = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if arguments.device == "cuda"
                    else "cpu", "causal": arguments.causal}
    if arguments.check:
        result["check"] = check(torch.device(arguments.device))
        for name, far in result["check"].items():
            print(f"{name}: {far:.2e}", file=sys.stderr)
    for name in names:
        found = spawn(arguments, name) if arguments.nproc > 1 else contest(arguments, name, 0, None)
        show(name, found)
        result[name] = found
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
