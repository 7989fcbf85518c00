"""A separated ranker's passes on a GPU by an exported program: int8 weights against bfloat16.

Make a program where MindSpore is (any CPU machine):

    python -m parallel export --config scripts/bench/gpu/served_rankmixer_1b.yaml --output programs/rankmixer_1b \\
        --graphs user_1,candidates_16,candidates_64,candidates_512 serve.engine.requests=1 \\
        "serve.engine.candidates=[16,64,512]" train.precision=bf16

Then, on a machine with torch, NumPy and a GPU, from the repository's root:

    python scripts/bench/gpu/served_ranker.py --program programs/rankmixer_1b

Both sides are the same program with random weights: the per-token networks in bfloat16 (cast once), or int8 where a
product has few rows (`EIGHT_ROWS`) and bfloat16 where it has more. Each pass is a replayed CUDA graph; the sides take
turns, and a pass reads far more than a second-level cache holds. `request` is the user's pass and that over so many
candidates; with the user's state cached the candidates' pass alone. Probabilities of both sides are compared.

`--device cpu` runs without a graph. Last line of stdout: JSON; `less` is how much less time int8 takes.
"""

from __future__ import annotations

import argparse
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
from parallel.torch_runtime.inference.member import Member  # noqa: E402
from parallel.torch_runtime.inference.rank import InferenceRank  # noqa: E402
from parallel.torch_runtime.program import Program  # noqa: E402
from recsys.passes.weights import is_eight  # noqa: E402


class Side:
    """The program with one kind of weights.

    Args:
        program: of a separated ranker.
        eight: whether int8.
        device: "gpu" or "cpu".
    """

    def __init__(self, program: Program, eight: bool, device: str) -> None:
        self.program, member = program, Member(program, device)
        self.device, self.cuda = member.device, member.device.type == "cuda"
        self.generator = torch.Generator(self.device)
        self.rank = InferenceRank(program, member, self.start, 0, True, eight=is_eight if eight else None, fused=True)

    def start(self, name: str, extent: Any) -> Tensor:
        """Random values, the same for both sides."""
        held = self.program.by_name[name]
        distribution, scale = held.start
        self.generator.manual_seed(sum(name.encode()) * 7919 + len(name))
        if distribution == "fill":
            return torch.full(held.shape, float(scale), device=self.device)
        return torch.empty(held.shape, device=self.device).uniform_(-scale, scale, generator=self.generator)

    def ready(self, kind: str, inputs: list[np.ndarray]) -> np.ndarray:
        """Captures a pass; its result."""
        for _ in range(4):
            result = self.rank.run(kind, inputs)
        return result.float().cpu().numpy()

    def milliseconds(self, kind: str, inputs: list[np.ndarray], times: int = 30) -> float:
        """Of a pass."""
        if not self.cuda:
            begin = time.perf_counter()
            self.rank.run(kind, inputs)
            return 1e3 * (time.perf_counter() - begin)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            self.rank.bound[kind].recorded.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / times


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True)
    parser.add_argument("--device", default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    program = Program(arguments.program)
    sides = {"bf16": Side(program, False, arguments.device), "int8": Side(program, True, arguments.device)}
    generator, state, found = np.random.default_rng(0), None, {}
    for kind in sorted(program.inference_kinds, key=lambda kind: (not kind.startswith("user"), kind)):
        inputs = [drawn(generator, *item) for item in program.tree["shapes"][kind]]
        if kind.startswith("candidates"):
            inputs[0] = np.broadcast_to(state, inputs[0].shape).astype(np.float32).copy()
        results = {name: side.ready(kind, inputs) for name, side in sides.items()}
        if kind.startswith("user"):
            state = results["bf16"][:1]
        difference = np.linalg.norm(results["int8"] - results["bf16"]) / np.linalg.norm(results["bf16"])
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(arguments.rounds):
            for name, side in sides.items():
                times[name].append(side.milliseconds(kind, inputs))
        own = {name: statistics.median(values) for name, values in times.items()}
        found[kind] = {**{name: round(value, 4) for name, value in own.items()},
                       "less": round(1 - own["int8"] / own["bf16"], 4), "difference": float(f"{difference:.2e}")}
        print(f"{kind}: bf16 {own['bf16']:.4f} ms, int8 {own['int8']:.4f} ms, {found[kind]['less']:.1%} less, "
              f"relative difference {difference:.1e}", flush=True)
    user = next(value for kind, value in found.items() if kind.startswith("user"))
    requests = {kind: {name: round(user[name] + value[name], 4) for name in sides} for kind, value in found.items()
                if kind.startswith("candidates")}
    for kind, own in requests.items():
        own["less"] = round(1 - own["int8"] / own["bf16"], 4)
        print(f"request of {kind}: bf16 {own['bf16']:.4f} ms, int8 {own['int8']:.4f} ms, {own['less']:.1%} less")
    print(json.dumps({"unit": "ms", "passes": found, "requests": requests,
                      "weight_gb": {name: round(side.rank.weights.bytes() / 1e9, 3) for name, side in sides.items()}}))


def drawn(generator: np.random.Generator, name: str, shape: list[int], dtype: str) -> np.ndarray:
    """A random input; ids that every table has."""
    if dtype == "int32":
        return np.zeros(shape, np.int32) if name == "index" else generator.integers(0, 64, shape).astype(np.int32)
    return generator.standard_normal(shape).astype(np.float32)


if __name__ == "__main__":
    main()
