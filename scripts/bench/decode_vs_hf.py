"""Decoding with the key and value cache, float32 and int8: against Hugging Face's GPT-2, and against recomputing all.

    python scripts/bench/decode_vs_hf.py [--rounds 9]

All models have random weights and GPT-2's sizes (124 million parameters: 12 layers, 768 wide, 12 heads, vocabulary
50,257), batch 1, greedy; Hugging Face's is float32. A turn is a run of 32 steps at contexts around 144 or 528, one
token at a time, in a process per side; in the same turns and as often torch sums as many bytes as the float32 model
has, which is called the memory's speed. Ours also recomputes the full sequence for one token. The last line of stdout
is JSON; `ratio` is of steps per second, float32 against Hugging Face, at context 144.
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

LAYERS, WIDTH, HEADS, VOCABULARY, CONTEXT = 12, 768, 12, 50257, 1024
STEPS = 32
# A turn's steps are around the context that it is named after.
STARTS = {144: 128, 528: 512}
CHUNK = 64


def main() -> None:
    """Runs all sides in turns and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side at each context")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        if arguments.side == "hf":
            hf_side()
        else:
            our_side(arguments.side)
        return
    turns.require("torch", "transformers")
    print(turns.describe_machine())
    sides = [turns.Side(__file__, name) for name in ("float32", "int8", "hf")]
    for side in sides:
        print(f"{side.name}: {side.about['about']}, {side.about['bytes'] / 1e6:.1f} MB read a step")
    float32, _, hf = sides
    steps, reads, recompute = {}, [], {}
    for context in STARTS:
        for side in sides:
            side.ask(task="steps", context=context)
        steps[context] = {side.name: [] for side in sides}
        for number in range(arguments.rounds):
            part = turns.in_turns(sides[:: 1 if number % 2 == 0 else -1], 1, task="steps", context=context)
            for name, values in part.items():
                steps[context][name] += values
            reads.append(hf.ask(task="read", bytes=float32.about["bytes"])["seconds"])
        recompute[context] = min(float32.ask(task="recompute", context=context)["seconds"] for _ in range(3))
    about = {side.name: side.about for side in sides}
    for side in sides:
        side.close()
    report(steps, float32.about["bytes"] / statistics.median(reads), recompute, about)


def report(steps: dict, bandwidth: float, recompute: dict, about: dict) -> None:
    """Prints milliseconds of a step, ratios and the share of the memory's speed (bytes/s)."""
    figures: dict = {name: {} for name in ("float32", "int8")}
    for context, sides in steps.items():
        hf = statistics.median(sides["hf"]) / STEPS
        for name, found in figures.items():
            ours = statistics.median(sides[name]) / STEPS
            found[context] = {"ms": ours * 1e3, "ratio": turns.ratio(sides["hf"], sides[name]),
                              "share": about[name]["bytes"] / ours / bandwidth}
            print(f"context {context}, {name}: {ours * 1e3:.2f} ms a step, Hugging Face {hf * 1e3:.2f} ms, ratio "
                  f"{found[context]['ratio']:.2f}, {found[context]['share']:.0%} of the memory's speed; per round "
                  + " ".join(f"{p / o:.2f}" for p, o in zip(sides["hf"], sides[name], strict=True)))
        print(f"context {context}: recomputing takes {recompute[context] * 1e3:.0f} ms, "
              f"{recompute[context] * 1e3 / figures['float32'][context]['ms']:.1f} times as long as a float32 step")
    print(f"reading: {bandwidth / 1e9:.1f} GB/s (median of the turns)")
    rounded = {name: {key: {context: round(row[key], 3) for context, row in found.items()}
                      for key in ("ms", "ratio", "share")} for name, found in figures.items()}
    print(json.dumps({
        "ratio": rounded["float32"]["ratio"][144], "ratio_528": rounded["float32"]["ratio"][528],
        "int8_ratio": rounded["int8"]["ratio"][144], "int8_ratio_528": rounded["int8"]["ratio"][528],
        "ours": round(1e3 / figures["float32"][144]["ms"], 2), "ours_int8": round(1e3 / figures["int8"][144]["ms"], 2),
        "peer": round(STEPS / statistics.median(steps[144]["hf"]), 2), "unit": "tokens/s",
        "step_ms": {name: found["ms"] for name, found in rounded.items()},
        "share_of_bandwidth": {name: found["share"] for name, found in rounded.items()},
        "bandwidth_gb_s": round(bandwidth / 1e9, 2),
        "recompute_ratio": {c: round(recompute[c] * 1e3 / figures["float32"][c]["ms"], 1) for c in recompute},
        "threads": turns.threads(), "malloc": turns.MALLOC}))


# ---------------------------------------------------------------- ours

def our_side(kind: str) -> None:
    """The C++ kernels on random weights, float32 or int8."""
    from pangu.generation.kernel_runner import SLOTS, KernelRunner
    from pangu.generation.runner import Span
    from pangu.native import kernel_library

    out = turns.private_stdout()
    library = kernel_library()
    if library is None:
        sys.exit("error: this bench needs a C++ compiler")
    weights = our_weights(kind == "int8")
    runner = KernelRunner(weights, CONTEXT // SLOTS, library)
    table = list(range(CONTEXT // SLOTS))
    prompt = np.random.default_rng(0).integers(0, VOCABULARY, CONTEXT).tolist()
    for first in range(0, max(STARTS.values()), CHUNK):
        runner.run([Span(table, first, prompt[first:first + CHUNK], 0)])

    def steps(context: int) -> None:
        # What the steps write is after the context; the prompt's own keys are written again for the next turn.
        start = STARTS[context]
        token = prompt[start]
        for place in range(start, start + STEPS):
            token = int(runner.run([Span(table, place, [token], 1)])[1][0])

    def answer(command: dict) -> dict:
        context = command["context"]
        if command["task"] == "steps":
            seconds = timed(lambda: steps(context))
            runner.run([Span(table, STARTS[context], prompt[STARTS[context]:STARTS[context] + STEPS], 0)])
            return {"seconds": seconds}
        full = Span(table, 0, prompt[:context], 1)
        return {"seconds": min(timed(lambda: runner.run([full])) for _ in range(3))}

    turns.serve({"about": f"C++ kernels, {kind}", "bytes": weights.step_bytes}, answer, out)


def our_config():
    """PanGu-alpha of GPT-2's size."""
    from pangu.config import ModelConfig

    return ModelConfig(layers=LAYERS, hidden_size=WIDTH, heads=HEADS, vocabulary_size=VOCABULARY,
                       sequence_length=CONTEXT)


def our_weights(int8: bool):
    """Random parameters in the order of the kernels."""
    from pangu.generation.kernel_runner import WeightSource, pack_float, pack_int8, pack_weights
    from pangu.generation.weights import parameter_shapes
    from parallel.layers.int8_numbers import quantize

    shapes, generator = parameter_shapes(our_config()), np.random.default_rng(1)

    def array(name):
        values = generator.standard_normal(shapes[name], dtype=np.float32) * np.float32(0.02)
        return values + np.float32(name.endswith("gamma"))

    def matrix(name, bias):
        values = None if bias is None else array(bias)
        return pack_int8(*quantize(array(name).T), values) if int8 else pack_float(array(name), values)

    return pack_weights(our_config(), WeightSource(array, matrix))


# ---------------------------------------------------------------- Hugging Face

def hf_side() -> None:
    """GPT2LMHeadModel with its own cache, shortened to the context before every turn."""
    import torch
    import transformers

    out = turns.private_stdout()
    torch.set_num_threads(turns.threads())
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, vocab_size=VOCABULARY,
                                     n_positions=CONTEXT)
    model = transformers.GPT2LMHeadModel(config).eval()
    read = 4 * sum(item.numel() for name, item in model.named_parameters() if "wpe" not in name)
    prompt = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, CONTEXT))
    caches, memory = {}, {}

    @torch.inference_mode()
    def steps(context: int) -> float:
        start = STARTS[context]
        if context not in caches:
            caches[context] = model(prompt[None, :start], use_cache=True).past_key_values
        cache = caches[context]
        cache.crop(start)
        token = prompt[None, start:start + 1]
        began = time.perf_counter()
        for _ in range(STEPS):
            output = model(token, past_key_values=cache, use_cache=True)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
        return time.perf_counter() - began

    def answer(command: dict) -> dict:
        if command["task"] == "steps":
            return {"seconds": steps(command["context"])}
        if "block" not in memory:
            memory["block"] = torch.ones(command["bytes"] // 4)
        return {"seconds": statistics.mean(timed(lambda: memory["block"].sum().item()) for _ in range(STEPS))}

    turns.serve({"about": f"transformers {transformers.__version__}, torch {torch.__version__}", "bytes": read},
                answer, out)


def timed(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
