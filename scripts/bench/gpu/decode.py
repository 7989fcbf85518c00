"""PanGu-alpha's decoding of one sequence on a GPU by an exported program: share of the memory's bandwidth, kernels a
token, int8 against bfloat16, and Hugging Face's GPT-2 of the same sizes.

Make programs where MindSpore is (any CPU machine):

    B="model.dropout=0 train.precision=bf16 parallel.devices=null parallel.data=1 parallel.op=1 generate.batch_size=1"
    B="$B parallel.optimizer.shard=1 parallel.recompute.policy=none"
    python -m parallel export --config configs/pangu/13b.yaml --graphs decode --output programs/13b $B
    python -m parallel export --config configs/pangu/350m.yaml --graphs decode --output programs/350m $B

Then, on a machine with torch, NumPy and a GPU (no MindSpore), from the repository's root:

    python scripts/bench/gpu/decode.py --program programs/13b --contexts 1000,144
    python scripts/bench/gpu/decode.py --program programs/350m --contexts 1000,144 --peer

Weights are random by the program's recipes and are made on the GPU. A token's time is that of a replayed CUDA graph of
the decode step, at a context that stays; the sides take turns. `loop` has in it all that the host does: inputs laid out
and copied, the likeliest token read, given back. Logits of both sides are checked against the program run node by node
(bfloat16), int8's within what rounding weights changes. The bandwidth is that of a copy on the device in the same run,
read and written; bytes are those of all weights once, and of the visible keys and values.

`--device cpu` runs small programs without a graph. Last line of stdout: JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from pangu.generation.runner import Span  # noqa: E402
from pangu.generation.sharded.runner import Call  # noqa: E402
from pangu.generation.sharded.shapes import SLOTS  # noqa: E402
from parallel.torch_runtime.inference.member import Member  # noqa: E402
from parallel.torch_runtime.inference.rank import InferenceRank  # noqa: E402
from parallel.torch_runtime.inference.weights import form_of  # noqa: E402
from parallel.torch_runtime.program import CACHE, Program  # noqa: E402

MOST_ERROR = 0.05
SIDES = {"bf16": None, "int8": lambda name: True}


class Side:
    """A program with one kind of weights.

    Args:
        program: with a decode graph of one sequence.
        name: of SIDES, or "plain": node by node, nothing fused.
        device: "gpu" or "cpu".
    """

    def __init__(self, program: Program, name: str, device: str) -> None:
        begun = time.perf_counter()
        self.name, self.program, member = name, program, Member(program, device)
        self.device, self.cuda = member.device, member.device.type == "cuda"
        self.generator = torch.Generator(self.device).manual_seed(program.seed)
        # On a CPU the fused nodes run in plain torch.
        self.rank = InferenceRank(program, member, self.start, program.shapes("decode")["read"][1] + SLOTS,
                                  name != "plain", eight=SIDES.get(name), fused=name != "plain")
        self.shapes, self.context = self.rank.shape("decode"), 0
        self.seconds = time.perf_counter() - begun

    def start(self, name: str, extent: Any) -> Tensor:
        """Random values by the recipe, made on the device; the same for every side."""
        held = self.program.by_name[name]
        distribution, scale = held.start
        self.generator.manual_seed(sum(name.encode()) * 7919 + len(name))
        if distribution == "fill":
            return torch.full(held.shape, float(scale), device=self.device)
        made = torch.empty(held.shape, device=self.device)
        if distribution == "normal":
            return made.normal_(0.0, scale, generator=self.generator)
        return made.uniform_(-scale, scale, generator=self.generator)

    def inputs(self, context: int, token: int = 7) -> list[np.ndarray]:
        """Of a step whose token is the last of so many."""
        table = np.arange(1, 1 + self.shapes["read"][1] // SLOTS)
        return Call("decode", [Span(table, context - 1, np.array([token]), 1)]).arrays(self.shapes, 0)

    def logits(self, tokens: list[int]) -> Tensor:
        """After each of some tokens, float32 [N, V]."""
        return torch.stack([self.rank.run("decode", self.inputs(place, token))[0].float().clone()
                            for place, token in enumerate(tokens, 1)])

    def fill(self) -> None:
        """Keys and values of a full cache, random."""
        for name, tensor in self.rank.state.items():
            if name.startswith(CACHE):
                tensor.normal_(generator=self.generator)

    def ready(self, context: int) -> None:
        """The step of a context, captured."""
        self.context = context
        for _ in range(4):
            self.rank.run("decode", self.inputs(context))

    def milliseconds(self, times: int = 30) -> float:
        """Of a step, the host's work left out."""
        bound = self.rank.bound["decode"]
        if not self.cuda:
            begin = time.perf_counter()
            self.rank.run("decode", self.inputs(self.context))
            return 1e3 * (time.perf_counter() - begin)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            bound.recorded.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / times

    def loop(self, context: int, count: int = 48) -> float:
        """Greedy tokens a second from a context on."""
        token, begin = 7, time.perf_counter()
        for number in range(count):
            token = int(self.rank.run("decode", self.inputs(context + number, token))[0].argmax())
        return count / (time.perf_counter() - begin)

    def bytes_read(self, context: int) -> int:
        """Of a token: the weights of all products once, keys and values that are visible."""
        graph, weights = self.rank.graphs["decode"], self.rank.weights
        parts = {(name, form_of(node)) for node in graph.nodes if node.op == "Product"
                 for name in node.attributes["weights"]}
        caches = [tensor for name, tensor in self.rank.state.items() if name.startswith(CACHE)]
        return (sum(item.numel() * item.element_size() for key in parts for item in weights.parts[key])
                + sum(context * tensor[0].numel() * tensor.element_size() for tensor in caches))

    def kernels(self) -> tuple[int, list]:
        """How many kernels a token takes, and the milliseconds of those that take longest."""
        if not self.cuda:
            return 0, []
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.rank.bound["decode"].recorded.replay()
            torch.cuda.synchronize()
        names: dict[str, list] = {}
        for item in profile.profiler.kineto_results.events():
            if "CUDA" in str(item.device_type()) and item.duration_ns() > 0 and "Profiler" not in item.name():
                entry = names.setdefault(item.name()[:60], [0, 0.0])
                entry[0] += 1
                entry[1] += item.duration_ns() / 1e6
        shown = sorted(([name, *entry] for name, entry in names.items()), key=lambda item: -item[2])
        return sum(entry[0] for entry in names.values()), shown[:10]

    def close(self) -> None:
        """Gives the memory back."""
        self.rank.release()
        self.rank.weights = self.rank.state = None
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True)
    parser.add_argument("--contexts", default="1000,144")
    parser.add_argument("--device", default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loop", type=int, default=48, help="tokens that are generated")
    parser.add_argument("--peer", action="store_true", help="Hugging Face's GPT-2 of the same sizes beside it")
    parser.add_argument("--check", action="store_true", help="logits against the program run node by node")
    arguments = parser.parse_args()
    program, contexts = Program(arguments.program), [int(item) for item in arguments.contexts.split(",")]
    from scripts.bench.gpu.w8a16 import copy_bandwidth, name_of

    sides = {name: Side(program, name, arguments.device) for name in SIDES}
    device = sides["bf16"].device
    copied = copy_bandwidth(device, 1 << (32 if device.type == "cuda" else 22))
    found: dict[str, Any] = {"copy_tb_s": round(copied / 1e12, 3), "device": name_of(device),
                             "start_seconds": {name: round(side.seconds, 1) for name, side in sides.items()}}
    if arguments.check:
        found["errors"] = errors(program, sides, arguments.device)
        print("relative errors of logits:", found["errors"], flush=True)
        if not max(found["errors"].values()) < MOST_ERROR:
            raise SystemExit("the sides do not compute what the program does")
    for side in sides.values():
        side.fill()
    for context in contexts:
        found[str(context)] = at_context(sides, context, arguments.rounds, copied)
    for name, side in sides.items():
        count, longest = side.kernels()
        found[f"{name}_kernels"] = count
        print(f"{name}: {count} kernels a token")
        for item in longest:
            print(f"    {item[2]:.3f} ms in {item[1]:4d}  {item[0]}")
    context = min(contexts)
    found["loop"] = {name: statistics.median(side.loop(context, arguments.loop) for _ in range(3))
                     for name, side in sides.items()}
    print("tokens/s with the host's work:", {name: round(value, 1) for name, value in found["loop"].items()})
    if device.type == "cuda":
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    if arguments.peer:
        from scripts.bench.gpu import hf_decode

        found["peer"] = hf_decode.measured(program.settings["model"], device, context, arguments.loop,
                                          lambda begin: sides["bf16"].loop(begin, arguments.loop))
    print(json.dumps(found))


def errors(program: Program, sides: dict[str, Side], device: str) -> dict[str, float]:
    """||logits - plain|| / ||plain|| of each side, after a few tokens."""
    tokens = [int(item) for item in np.random.default_rng(0).integers(0, 999, 5)]
    plain = Side(program, "plain", device)
    wanted = plain.logits(tokens)
    found = {name: float((side.logits(tokens) - wanted).norm() / wanted.norm()) for name, side in sides.items()}
    plain.close()
    return found


def at_context(sides: dict[str, Side], context: int, rounds: int, copied: float) -> dict[str, Any]:
    """Milliseconds of a token by side, in turns, and their share of the bandwidth."""
    for side in sides.values():
        side.ready(context)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            times[name].append(side.milliseconds())
    found: dict[str, Any] = {}
    for name, side in sides.items():
        own, read = statistics.median(times[name]), side.bytes_read(context)
        found[name] = {"ms": round(own, 4), "tokens_per_second": round(1e3 / own, 1), "gb": round(read / 1e9, 3),
                       "share_of_copy": round(read / own * 1e3 / copied, 4),
                       "spread": round(max(times[name]) / min(times[name]) - 1, 4)}
        print(f"context {context} {name}: {own:.3f} ms, {1e3 / own:.1f} tokens/s, {read / 1e9:.2f} GB, "
              f"{found[name]['share_of_copy']:.1%} of the copy", flush=True)
    found["int8_speedup"] = round(found["bf16"]["ms"] / found["int8"]["ms"], 3)
    return found


if __name__ == "__main__":
    main()
