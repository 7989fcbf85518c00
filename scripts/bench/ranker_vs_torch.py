"""RankMixer against the same network in torch, eager and compiled: samples/s forward and training.

    python scripts/bench/ranker_vs_torch.py [--sizes 8x128,16x768] [--batch 512] [--rounds 7] [--no-compile]

All sides run the blocks, the mean over the tokens and one linear head on given tokens [T, B, D], from the same
parameters; their logits and first losses must agree. Training is the cross-entropy, its gradient and one Adam step:
ours is the `TrainStep` that `python -m recsys train` runs, which also takes the norm of the gradient and leaves out
steps that are not finite. torch: baddbmm for the per-token networks, tanh GELU, layer_norm, and its fused Adam. In
turns, a process each; `--no-kernels` adds ours without the C++ primitives (PANGU_KERNELS=0).

The last line of stdout is JSON: `ratio` is ours over torch eager, geometric mean of all rows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))

import turns  # noqa: E402 - beside this file

# Inner width over D: that of the preset rankmixer_100m for D = 768, else 4.
RATIOS = {768: 2.7083333}
LAYERS = 2


def main() -> None:
    """Runs all sides in turns, size by size, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="8x128,16x768", help="tokens x width, several with commas")
    parser.add_argument("--batch", type=int, default=512, help="samples of a batch (a quarter of it at D >= 512)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every side")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-kernels", action="store_true", help="add ours with MindSpore's own kernels only")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side(arguments.side, arguments.sizes, arguments.batch, Path(arguments.folder))
        return
    turns.require("torch", "mindspore")
    print(turns.describe_machine())
    names = (["ours"] + (["plain"] if arguments.no_kernels else []) + ["eager"]
             + ([] if arguments.no_compile else ["compile"]))
    rows = [row for size in arguments.sizes.split(",") for row in measure(size, names, arguments)]
    ratios = {name: geometric([row["ratio"][name] for row in rows]) for name in names[1:]}
    rates = {name: geometric([row["samples_per_second"][name] for row in rows]) for name in names}
    print(json.dumps({"ratio": round(ratios["eager"], 3), "ours": round(rates["ours"], 1),
                      "peer": round(rates["eager"], 1), "unit": "samples/s, geometric mean", "ratios": ratios,
                      "threads": turns.threads(), "malloc": turns.MALLOC, "rows": rows}))


def geometric(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def measure(size: str, names: list[str], arguments: argparse.Namespace) -> list[dict]:
    """Rows of one size: forward and training."""
    rows, batch = [], batch_of(size, arguments.batch)
    with tempfile.TemporaryDirectory() as folder:
        sides = [turns.Side(__file__, name, "--sizes", size, "--batch", str(arguments.batch), "--folder", folder)
                 for name in names]
        for what in ("logits", "loss"):
            spread = np.ptp([one.about[what] for one in sides], axis=0).max()
            if spread > 1e-3:
                sys.exit(f"error: the sides do not compute the same {what}: they differ by {spread}")
        for what in ("forward", "training"):
            calls = max(1, round(0.3 / sides[0].ask(what=what, calls=1)["seconds"]))
            seconds = turns.in_turns(sides, arguments.rounds, what=what, calls=calls)
            ratio = {name: turns.ratio(seconds[name], seconds["ours"]) for name in names[1:]}
            speed = {name: batch * calls / statistics.median(values) for name, values in seconds.items()}
            rows.append({"network": f"T{size.replace('x', ' D')} L{LAYERS} batch {batch}", "what": what,
                         "samples_per_second": speed, "ratio": ratio})
            print(f"{rows[-1]['network']} {what}: " + ", ".join(
                f"{name} {speed[name]:,.0f}/s" + (f" ({ratio[name]:.2f})" if name in ratio else "")
                for name in names), file=sys.stderr)
        for one in sides:
            one.close()
    return rows


def batch_of(size: str, batch: int) -> int:
    return batch // 4 if int(size.split("x")[1]) >= 512 else batch


def side(name: str, size: str, batch: int, folder: Path) -> None:
    """One side: answers {"what": "forward" | "training", "calls": n} with seconds."""
    out = turns.private_stdout()
    if name == "plain":
        os.environ["PANGU_KERNELS"] = "0"
    tokens, width = map(int, size.split("x"))
    generator = np.random.default_rng(0)
    x = generator.standard_normal((tokens, batch_of(size, batch), width)).astype(np.float32)
    y = generator.integers(0, 2, (x.shape[1], 1)).astype(np.float32)
    make = our_side if name in ("ours", "plain") else torch_side
    forward, training = make(tokens, width, x, y, folder / "start.npz", name == "compile")
    about = {"logits": forward().reshape(-1)[:64].tolist(), "loss": training()}
    for call in (forward, training):
        call(), call()

    def answer(command: dict) -> dict:
        began = time.perf_counter()
        for _ in range(command["calls"]):
            (forward if command["what"] == "forward" else training)()
        return {"seconds": time.perf_counter() - began}

    turns.serve(about, answer, out)


def our_side(tokens: int, width: int, x: np.ndarray, y: np.ndarray, start: Path, compiled: bool):
    """(forward() -> logits, training() -> loss) in MindSpore; writes the start values."""
    import mindspore as ms
    from mindspore import nn

    from parallel.layers.grouped import TokenLayout
    from parallel.layers.parameter import initialize
    from parallel.training.optimizers.run import Optimizer
    from parallel.training.step import TrainStep
    from recsys.layers.tokenization import MeanPool
    from recsys.models.rankmixer.model import RankMixerBlock, RankMixerSettings
    from recsys.ranker import BinaryCrossEntropy, TaskHeads
    from recsys.settings import RankerOptimizer, RankerTrain

    settings = RankMixerSettings(tokens=tokens, width=width, ffn_ratio=RATIOS.get(width, 4.0))

    class Network(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            layout = TokenLayout()
            self.blocks = nn.CellList([RankMixerBlock(settings, layout, ms.float32) for _ in range(LAYERS)])
            self.pool, self.head = MeanPool(layout), TaskHeads(width, [], 1)

        def construct(self, x):
            for block in self.blocks:
                x, _ = block(x)
            return self.head(self.pool(x))

    class Loss(nn.Cell):
        def __init__(self, network) -> None:
            super().__init__(auto_prefix=False)
            self.network, self.entropy = network, BinaryCrossEntropy()

        def construct(self, x, y):
            return self.entropy(self.network(x), y).mean()

    ms.set_context(mode=ms.GRAPH_MODE)
    # Two networks: one stays in inference, the other in training.
    scorer, learner = Network(), Network()
    initialize(scorer, 1), initialize(learner, 1)
    scorer.set_train(False)
    loss = Loss(learner)
    step = TrainStep(loss, Optimizer(loss.trainable_params(), RankerOptimizer(), 10_000), RankerTrain())
    if not start.exists():
        np.savez(start, **{p.name: p.asnumpy() for p in scorer.trainable_params()})
    x_ms, y_ms = ms.Tensor(x), ms.Tensor(y)
    return lambda: scorer(x_ms).asnumpy().copy(), lambda: float(step(x_ms, y_ms)[0].asnumpy())


def torch_side(tokens: int, width: int, x: np.ndarray, y: np.ndarray, start: Path, compiled: bool):
    """The same in torch, from the same start values."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(turns.threads())
    weights = {name: torch.from_numpy(value.copy()).requires_grad_() for name, value in np.load(start).items()}
    frozen = {name: value.detach().clone() for name, value in weights.items()}

    def forward(x, weights):
        batch = x.shape[1]
        for index in range(LAYERS):
            w = {name.split(".", 2)[2]: value for name, value in weights.items()
                 if name.startswith(f"blocks.{index}.")}
            mixed = x.reshape(tokens, batch, tokens, -1).permute(2, 1, 0, 3).reshape(tokens, batch, width)
            s = functional.layer_norm(mixed + x, (width,), w["norm1.gamma"], w["norm1.beta"], 1e-5)
            inner = functional.gelu(torch.baddbmm(w["network.mapping.bias"], s, w["network.mapping.weight"]),
                                    approximate="tanh")
            v = torch.baddbmm(w["network.projection.bias"], inner, w["network.projection.weight"])
            x = functional.layer_norm(v + s, (width,), w["norm2.gamma"], w["norm2.beta"], 1e-5)
        head = next(value for name, value in weights.items() if name.startswith("head") and name.endswith("weight"))
        bias = next(value for name, value in weights.items() if name.startswith("head") and name.endswith("bias"))
        return functional.linear(x.mean(0), head, bias)

    optimizer = torch.optim.Adam(weights.values(), lr=1e-3, fused=True)
    run = torch.compile(forward) if compiled else forward
    x_torch, y_torch = torch.from_numpy(x), torch.from_numpy(y)

    def score():
        with torch.inference_mode():
            return run(x_torch, frozen).numpy()

    def step():
        optimizer.zero_grad()
        loss = functional.binary_cross_entropy_with_logits(run(x_torch, weights), y_torch)
        loss.backward()
        optimizer.step()
        return loss.item()

    return score, step


if __name__ == "__main__":
    main()
