"""Experts against the dense network that they were split from: does the time follow the active parameters?

    python scripts/bench/sparse_moe.py [--tokens 16] [--width 256] [--ratio 4] [--batch 512] [--rounds 9]

Two families: TokenMixer-Large's Sparse-Pertoken MoE (routed SwiGLU experts and a shared one) and RankMixer's ReLU
experts with shares of their gates shut, at 1:2 and 1:4 of 8 experts. All networks get the same input in turns in one
process; "training" is the gradient by input and weights. `share` is the share of the products (routers included) that
is left, `excess` the time over dense divided by it: 1 would be ideal.

The last line of stdout is JSON: `ratio` is the time of Sparse-Pertoken MoE at 1:2 over dense, forward.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import NormalDist, median

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import turns  # noqa: E402 - beside this file

EXPERTS = 8
FAMILIES = {"swiglu": "Sparse-Pertoken MoE", "relu": "ReLU experts"}


def main() -> None:
    """Parses the flags, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16, help="T")
    parser.add_argument("--width", type=int, default=256, help="D")
    parser.add_argument("--ratio", type=int, default=4, help="n, inner width of the dense network over D")
    parser.add_argument("--batch", type=int, default=512, help="samples")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side")
    arguments = parser.parse_args()
    if any(os.environ.get(key) != value for key, value in turns.MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], turns.environment())
    print(turns.describe_machine())
    rows = [row for family in FAMILIES for row in measure(family, arguments)]
    half = next(row for row in rows if row["sparsity"] == "1:2" and row["what"] == "forward")
    print(json.dumps({"ratio": half["ratio"], "ours": half["ms"], "peer": half["dense_ms"], "unit": "ms",
                      "threads": turns.threads(), "malloc": turns.MALLOC, "rows": rows}))


def networks(family: str, arguments: argparse.Namespace) -> dict:
    """The dense network and its sparse forms, with values."""
    from parallel.layers.experts.moe import SparsePertokenMoE
    from parallel.layers.experts.relu_moe import ReluMoE
    from parallel.layers.grouped import GroupedFeedForward, GroupedSwiGLU
    from parallel.layers.parameter import initialize

    sizes = (arguments.tokens, arguments.width, arguments.ratio * arguments.width)
    made = {"dense": (GroupedSwiGLU if family == "swiglu" else GroupedFeedForward)(*sizes)}
    for active in (4, 2):
        made[f"1:{EXPERTS // active}"] = (
            SparsePertokenMoE(*sizes, experts=EXPERTS, active=active) if family == "swiglu" else
            ReluMoE(*sizes, experts=EXPERTS, router="single_relu", budget=active / EXPERTS, penalty=1e-8,
                    penalty_step=1.2))
    for network in made.values():
        initialize(network, 1)
    if family == "relu":
        for active in (4, 2):
            shut(made[f"1:{EXPERTS // active}"].infer_router, active / EXPERTS)
    return made


def shut(router, share: float) -> None:
    """Lets `share` of the gates be open for a standard normal input."""
    import mindspore as ms

    sigma = np.sqrt(np.square(router.weight.asnumpy()).sum(1, keepdims=True))
    router.bias.set_data(ms.Tensor((-NormalDist().inv_cdf(1.0 - share) * sigma).astype(np.float32)))


def products(network) -> int:
    """Multiplications and additions of a dense network's products for one sample."""
    if hasattr(network, "flops_per_sample"):
        return network.flops_per_sample
    return sum(cell.flops_per_sample for cell in network.cells() if hasattr(cell, "flops_per_sample"))


def measure(family: str, arguments: argparse.Namespace) -> list[dict]:
    """Rows of one family: median and best times of dense, 1:2 and 1:4, forward and training."""
    import mindspore as ms
    from mindspore import nn, ops

    class First(nn.Cell):
        def __init__(self, network) -> None:
            super().__init__(auto_prefix=False)
            self.network = network

        def construct(self, x):
            y = self.network(x)
            return y[0] if isinstance(y, tuple) else y

    class Gradient(nn.Cell):
        def __init__(self, network) -> None:
            super().__init__(auto_prefix=False)
            self.first, self.parameters = First(network), ms.ParameterTuple(network.trainable_params())
            self.run = ops.GradOperation(get_all=True, get_by_list=True, sens_param=True)

        def construct(self, x):
            change, gradients = self.run(self.first, self.parameters)(x, x)
            return ops.depend(change[0], gradients)

    ms.set_context(mode=ms.GRAPH_MODE)
    sides = networks(family, arguments)
    shape = (arguments.tokens, arguments.batch, arguments.width)
    x = ms.Tensor(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    rows = []
    for what, kind in (("forward", First), ("training", Gradient)):
        calls = {name: kind(network).set_train(what == "training") for name, network in sides.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(arguments.rounds + 1):
            for name, call in calls.items():
                started = time.perf_counter()
                call(x).asnumpy()
                if turn:
                    times[name].append((time.perf_counter() - started) * 1e3)
        for name in list(calls)[1:]:
            rows.append(row(family, name, what, times, products(sides[name]) / products(sides["dense"])))
    return rows


def row(family: str, name: str, what: str, times: dict[str, list[float]], share: float) -> dict:
    """One line of the table, printed."""
    own, dense = median(times[name]), median(times["dense"])
    made = {"family": FAMILIES[family], "sparsity": name, "what": what, "ms": own, "dense_ms": dense,
            "ratio": own / dense, "ratio_best": min(times[name]) / min(times["dense"]), "share": share,
            "excess": own / dense / share}
    print(f"{FAMILIES[family]} {name} {what}: {own:.1f} ms, dense {dense:.1f} ms, ratio {made['ratio']:.2f} "
          f"(best of each {made['ratio_best']:.2f}), share {share:.3f}, excess {made['excess']:.2f}", file=sys.stderr)
    return made


if __name__ == "__main__":
    main()
