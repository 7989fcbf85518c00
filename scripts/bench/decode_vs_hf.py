"""Decoding with the key and value cache: against Hugging Face's GPT-2 in torch, and against recomputing everything.

    python scripts/bench/decode_vs_hf.py [--rounds 9]

Both models have random weights and GPT-2's sizes (124 million parameters: 12 layers, 768 wide, 12 heads, vocabulary
50,257), float32, batch 1, greedy. A turn is a run of 32 steps at contexts around 144 or 528, one token at a time, in a
process per side; in the same turns and as often torch sums as many bytes as the model has, which is called the memory's
speed. Ours also recomputes the whole sequence for one token. The last line of stdout is JSON; `ratio` is of steps per
second at context 144.
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
# A turn's steps lie around the context that it is named after.
STARTS = {144: 128, 528: 512}
CHUNK = 64


def main() -> None:
    """Runs both sides in turns and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side at each context")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        {"ours": our_side, "hf": hf_side}[arguments.side]()
        return
    turns.require("torch", "transformers", "mindspore")
    print(turns.describe_machine())
    sides = [turns.Side(__file__, "ours"), turns.Side(__file__, "hf")]
    for side in sides:
        print(f"{side.name}: {side.about['about']}, {side.about['weights'] / 1e6:.1f} million weights read a step")
    steps, reads, whole = {}, [], {}
    for context in STARTS:
        sides[0].ask(task="steps", context=context)
        sides[1].ask(task="steps", context=context)
        steps[context] = {"ours": [], "hf": []}
        for number in range(arguments.rounds):
            part = turns.in_turns(sides[:: 1 if number % 2 == 0 else -1], 1, task="steps", context=context)
            for name, values in part.items():
                steps[context][name] += values
            reads.append(sides[1].ask(task="read", bytes=sides[0].about["weights"] * 4)["seconds"])
        whole[context] = min(sides[0].ask(task="whole", context=context)["seconds"] for _ in range(3))
    for side in sides:
        side.close()
    report(steps, reads, whole, sides[0].about)


def report(steps: dict, reads: list[float], whole: dict, about: dict) -> None:
    """Prints milliseconds of a step, ratios and the share of the memory's speed."""
    bytes_read = about["weights"] * 4
    bandwidth = bytes_read / statistics.median(reads)
    figures = {}
    for context, sides in steps.items():
        ours, hf = (statistics.median(sides[name]) / STEPS for name in ("ours", "hf"))
        ratio = turns.ratio(sides["hf"], sides["ours"])
        share = bytes_read / ours / bandwidth
        figures[context] = (ours, hf, ratio, share)
        print(f"context {context}: ours {ours * 1e3:.2f} ms a step, Hugging Face {hf * 1e3:.2f} ms, ratio {ratio:.2f}, "
              f"{share:.0%} of the memory's speed; recomputing {whole[context] * 1e3:.0f} ms, "
              f"{whole[context] / ours:.1f} times as long; per round "
              + " ".join(f"{p / o:.2f}" for p, o in zip(sides["hf"], sides["ours"], strict=True)))
    print(f"reading {bytes_read / 1e6:.0f} MB: {bandwidth / 1e9:.1f} GB/s (median of the turns)")
    ours, hf, ratio, share = figures[144]
    print(json.dumps({
        "ratio": round(ratio, 3), "ours": round(1 / ours, 2), "peer": round(1 / hf, 2), "unit": "tokens/s",
        "share_of_bandwidth": round(share, 3), "bandwidth_gb_s": round(bandwidth / 1e9, 2),
        "ratio_528": round(figures[528][2], 3), "step_ms": {c: round(f[0] * 1e3, 2) for c, f in figures.items()},
        "recompute_ratio": {c: round(whole[c] / f[0], 1) for c, f in figures.items()}, "kernels": about["kernels"],
        "threads": turns.threads(), "malloc": turns.MALLOC}))


# ---------------------------------------------------------------- ours

def our_side() -> None:
    """The generator's decoder on random weights."""
    import mindspore as ms

    from pangu.generation.generate import cache_capacity
    from pangu.generation.kv_cache import CachedDecoder

    out = turns.private_stdout()
    model = our_model()
    weights = sum(item.size for name, item in model.parameters_and_names()
                  if name not in ("embedding.position.table", "query_embedding.table"))
    decoders = {context: CachedDecoder(model, 1, cache_capacity(start + STEPS, CHUNK), CHUNK)
                for context, start in STARTS.items()}
    last = recomputing(model)
    prompt = np.random.default_rng(0).integers(0, VOCABULARY, CONTEXT).astype(np.int32)

    def steps(context: int) -> None:
        decoder, start = decoders[context], STARTS[context]
        token = np.array([[prompt[start]]], np.int32)
        for place in range(start, start + STEPS):
            token = decoder.read(token, np.array([place], np.int32))[1].asnumpy().reshape(1, 1)

    def answer(command: dict) -> dict:
        context = command["context"]
        if command["task"] == "steps":
            return {"seconds": timed(lambda: steps(context))}
        return {"seconds": min(timed(lambda: last(prompt[None, :context]).asnumpy()) for _ in range(3))}

    for context, start in STARTS.items():
        for first in range(0, start, CHUNK):
            decoders[context].read(prompt[None, first:first + CHUNK], np.array([first], np.int32))
    fast = decoders[144].fast
    turns.serve({"about": f"mindspore {ms.__version__}, {'C++ kernels' if fast else 'MindSpore kernels'}",
                 "weights": weights, "kernels": fast}, answer, out)


def recomputing(model):
    """Logits after the last of a whole sequence [B, S], without a cache: what the cache saves."""
    from mindspore import Tensor, nn

    class LastLogits(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.model = model

        def construct(self, ids_BS, positions_BS, mask_BSS):
            hidden_ND = self.model.hidden(ids_BS, positions_BS, mask_BSS)
            last_BD = hidden_ND.reshape((ids_BS.shape[0], ids_BS.shape[1], -1))[:, -1]
            return self.model.head(last_BD, self.model.embedding.word.table)

    cell = LastLogits()

    def compute(ids):
        length = ids.shape[1]
        mask = np.tril(np.ones((1, length, length), np.float32))
        return cell(Tensor(ids), Tensor(np.arange(length, dtype=np.int32)[None]), Tensor(mask))

    return compute


def our_model():
    """PanGu-alpha of GPT-2's size."""
    import mindspore as ms
    from mindspore.nn.utils import no_init_parameters

    from pangu.config import ModelConfig
    from pangu.model import PanGuAlpha
    from parallel.layers.parameter import initialize

    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    with no_init_parameters():
        model = PanGuAlpha(ModelConfig(layers=LAYERS, hidden_size=WIDTH, heads=HEADS, vocabulary_size=VOCABULARY,
                                       sequence_length=CONTEXT))
    initialize(model, 1)
    return model.set_train(False)


# ---------------------------------------------------------------- Hugging Face

def hf_side() -> None:
    """GPT2LMHeadModel with its own cache, cut back to the context before every turn."""
    import torch
    import transformers

    out = turns.private_stdout()
    torch.set_num_threads(turns.threads())
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, vocab_size=VOCABULARY,
                                     n_positions=CONTEXT)
    model = transformers.GPT2LMHeadModel(config).eval()
    weights = sum(item.numel() for name, item in model.named_parameters() if "wpe" not in name)
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

    turns.serve({"about": f"transformers {transformers.__version__}, torch {torch.__version__}", "weights": weights},
                answer, out)


def timed(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
