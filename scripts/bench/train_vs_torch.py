"""A training step of PanGu-alpha against the same model in torch, eager and compiled: forward, backward, clip, AdamW.

    python scripts/bench/train_vs_torch.py [--rounds 9] [--batch 8] [--no-compile]

4 layers (query layer included), 256 wide, 4 heads, 256 tokens, vocabulary 40,000, float32, dropout 0; all sides start
from the same parameters and see the same batch, and the first losses must agree. In turns, a process each. The share
of the peak is model FLOPs per second over those of the largest of a few square matmuls, measured in the same turns.
The last line of stdout is JSON; `ratio` is against torch eager.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))

import turns  # noqa: E402 - beside this file

LAYERS, WIDTH, HEADS, LENGTH, VOCABULARY = 4, 256, 4, 256, 40000
RATE, BETAS, EPSILON, DECAY, CLIP, SEED = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0, 1
PEAK_SIZE = 2048


def main() -> None:
    """Runs all sides in turns and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="turns of every side")
    parser.add_argument("--steps", type=int, default=2, help="training steps of a turn")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side(arguments.side, arguments.batch)
        return
    turns.require("torch", "mindspore")
    print(turns.describe_machine())
    names = ["ours", "eager"] + ([] if arguments.no_compile else ["compile"])
    sides = [turns.Side(__file__, name, "--batch", str(arguments.batch)) for name in names]
    for one in sides:
        print(f"{one.name}: {one.about['about']}, first loss {one.about['loss']:.6f}")
    losses = [one.about["loss"] for one in sides]
    if max(losses) - min(losses) > 1e-4:
        sys.exit("error: the sides do not compute the same loss")
    peak = turns.in_turns(sides[:2], 3, task="peak")
    seconds = turns.in_turns(sides, arguments.rounds, task="train", steps=arguments.steps)
    peak = {name: peak[name] + turns.in_turns([one], 2, task="peak")[name] for name, one in
            (("ours", sides[0]), ("eager", sides[1]))}
    for one in sides:
        one.close()
    report(arguments, seconds, min(peak["ours"] + peak["eager"]))


def report(arguments: argparse.Namespace, seconds: dict[str, list[float]], peak_seconds: float) -> None:
    """Prints rates, shares and ratios."""
    from pangu.config import ModelConfig
    from pangu.train import flops_per_token

    tokens = arguments.batch * LENGTH * arguments.steps
    config = ModelConfig(**model_settings())
    peak = 2 * PEAK_SIZE**3 / peak_seconds
    rates = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    ratios = {name: turns.ratio(values, seconds["ours"]) for name, values in seconds.items()}
    shares = {name: rate * flops_per_token(config) / peak for name, rate in rates.items()}
    print(f"peak of a {PEAK_SIZE} x {PEAK_SIZE} float32 matmul: {peak / 1e9:.0f} GFLOP/s")
    for name, rate in rates.items():
        print(f"{name}: {rate:.0f} tokens/s, {shares[name]:.0%} of the peak, ours is {ratios[name]:.2f} times as fast; "
              f"per round {' '.join(f'{p / o:.2f}' for p, o in zip(seconds[name], seconds['ours'], strict=True))}")
    print(json.dumps({
        "ratio": round(ratios["eager"], 3), "ours": round(rates["ours"], 1), "peer": round(rates["eager"], 1),
        "unit": "tokens/s", "ratio_compile": round(ratios["compile"], 3) if "compile" in ratios else None,
        "peer_compile": round(rates["compile"], 1) if "compile" in rates else None,
        "share_of_peak": round(shares["ours"], 3), "peak_gflops": round(peak / 1e9, 1), "threads": turns.threads(),
        "malloc": turns.MALLOC}))


def model_settings() -> dict:
    return {"layers": LAYERS, "hidden_size": WIDTH, "heads": HEADS, "sequence_length": LENGTH,
            "vocabulary_size": VOCABULARY, "dropout": 0.0}


def batch_of(batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Records [B, S + 1], positions and causal mask."""
    records = np.random.default_rng(SEED).integers(10, VOCABULARY, (batch, LENGTH + 1), dtype=np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (batch, 1))
    return records, positions, np.tile(np.tril(np.ones((LENGTH, LENGTH), np.float16)), (batch, 1, 1))


def side(name: str, batch: int) -> None:
    """One side: answers {"task": "train" | "peak"} with seconds."""
    out = turns.private_stdout()
    make = our_side if name == "ours" else torch_side
    about, step, matmul = make(batch, name)
    loss = step()
    for _ in range(2):
        step()

    def answer(command: dict) -> dict:
        if command["task"] == "peak":
            return {"seconds": min(timed(matmul) for _ in range(5))}
        began = time.perf_counter()
        for _ in range(command["steps"]):
            step()
        return {"seconds": time.perf_counter() - began}

    turns.serve({"about": about, "loss": loss}, answer, out)


def timed(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# ---------------------------------------------------------------- ours

def our_side(batch: int, name: str):
    """The trainer's own step on prepared tensors; the loss is read every step."""
    import mindspore as ms
    from mindspore import Tensor, ops

    from pangu.settings import Run
    from pangu.train import training_step
    from parallel.training.device import start_device

    processes = start_device()
    settings = Run()
    settings.model = settings.model.model_validate(model_settings())
    settings.train = settings.train.model_validate({
        "global_batch_size": batch, "clip_norm": CLIP, "seed": SEED, "optimizer": {
            "learning_rate": RATE, "betas": BETAS, "epsilon": EPSILON, "weight_decay": DECAY,
            "schedule": {"name": "constant", "warmup_steps": 0}}})
    network = training_step(settings, processes)
    arrays = batch_of(batch)
    square = Tensor(np.random.default_rng(0).standard_normal((PEAK_SIZE, PEAK_SIZE), np.float32))
    product = ops.MatMul()

    def step() -> float:
        return float(network(*[Tensor(array) for array in arrays])[0].asnumpy())

    return f"mindspore {ms.__version__}", step, lambda: product(square, square).asnumpy()


# ---------------------------------------------------------------- torch

def torch_side(batch: int, name: str):
    """The same model with torch's own fused attention, cross entropy and AdamW."""
    import torch

    torch.set_num_threads(turns.threads())
    model, groups = torch_model()
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPSILON, fused=True)
    forward = torch.compile(model) if name == "compile" else model
    records = torch.from_numpy(batch_of(batch)[0].astype(np.int64))

    def step() -> float:
        loss = forward(records[:, :-1], records[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    square = torch.randn(PEAK_SIZE, PEAK_SIZE)
    return f"torch {torch.__version__} {name}", step, lambda: square @ square


def torch_model():
    """PanGu-alpha in torch with our start values, and its parameter groups (decayed and not)."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
            self.mapping, self.projection = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def forward(self, hidden, query=None):
            normed = self.norm1(hidden)
            batch, length, _ = hidden.shape
            heads = [x.view(batch, length, HEADS, -1).transpose(1, 2) for x in (
                self.query(normed if query is None else query), self.key(normed), self.value(normed))]
            mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
            hidden = hidden + self.output(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
            return hidden + self.projection(F.gelu(self.mapping(self.norm2(hidden)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.word, self.position, self.top = (nn.Embedding(rows, WIDTH) for rows in (VOCABULARY, LENGTH, LENGTH))
            self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, ids, labels):
            places = torch.arange(LENGTH)
            hidden = self.word(ids) + self.position(places)
            for layer in self.layers[:-1]:
                hidden = layer(hidden)
            query = self.top(places).expand(ids.shape[0], -1, -1)
            hidden = self.layers[-1](self.norm(hidden), query)
            logits = hidden @ self.word.weight.T
            return F.cross_entropy(logits.view(-1, VOCABULARY), labels.reshape(-1))

    model = Model()
    start_values(dict(model.named_parameters()))
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return model, [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]


def start_values(parameters: dict) -> None:
    """Our start values, which depend on name and seed alone, under torch's names."""
    import torch
    from mindspore.nn.utils import no_init_parameters

    from pangu.config import ModelConfig
    from pangu.model import PanGuAlpha
    from parallel.layers.parameter import start_value

    with no_init_parameters():
        ours = PanGuAlpha(ModelConfig(**model_settings()))
    names = {"embedding.word.table": "word.weight", "embedding.position.table": "position.weight",
             "query_embedding.table": "top.weight"}
    for name, item in ours.parameters_and_names():
        theirs = names.get(name) or (name.replace("query_layer.", f"layers.{LAYERS - 1}.").replace("attention.", "")
                                     .replace("feed_forward.", "").replace("gamma", "weight").replace("beta", "bias"))
        value = start_value(name, item.shape, item.start, SEED)
        parameters[theirs].data.copy_(torch.from_numpy(value))


if __name__ == "__main__":
    main()
