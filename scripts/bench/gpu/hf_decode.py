"""The peer of `decode.py`: Hugging Face's GPT-2 of a PanGu-alpha's sizes, bfloat16, random weights, batch 1, greedy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def measured(model: dict[str, Any], device: torch.device, context: int, count: int, ours: Callable[[int], float],
             rounds: int = 3) -> dict[str, Any]:
    """Tokens a second of each way to generate that works here, beside ours in the same turns.

    Args:
        model: settings of the PanGu-alpha.
        device: where.
        context: tokens of the prompt.
        count: tokens that are generated.
        ours: gives our tokens a second from a context on.
        rounds: turns.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=model["vocabulary_size"], n_positions=model["sequence_length"],
                        n_embd=model["hidden_size"], n_layer=model["layers"], n_head=model["heads"],
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        net = GPT2LMHeadModel(config).to(torch.bfloat16).eval()
    ids = torch.randint(0, config.vocab_size, (1, context), device=device)
    # On GPUs a static cache makes `generate` compile the step, as a CUDA graph.
    ways = {"generate": {}, "static cache": {"cache_implementation": "static"}}
    found: dict[str, list[float]] = {}
    for name, options in ways.items():
        try:
            _rate(net, ids, count, options)
            for _ in range(rounds):
                found.setdefault(name, []).append(_rate(net, ids, count, options))
                found.setdefault(f"ours beside {name}", []).append(ours(context))
        except Exception as error:  # noqa: BLE001  a way that this version of transformers lacks
            found.pop(name, None)
            print(f"Hugging Face, {name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
    shown = {name: round(statistics.median(values), 1) for name, values in found.items()}
    print("tokens/s, host's work in it:", shown)
    best = max((value for name, value in shown.items() if not name.startswith("ours")), default=None)
    if best is not None:
        own = statistics.median(value for name, values in found.items() if name.startswith("ours") for value in values)
        shown["ratio_to_best"] = round(own / best, 3)
    return shown


def _rate(net: Any, ids: torch.Tensor, count: int, options: dict) -> float:
    """Tokens a second of all tokens but the first, with which the prompt is read."""
    times: list[float] = []

    def step(given: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        given[0, -1].item()
        times.append(time.perf_counter())
        return torch.zeros(given.shape[0], dtype=torch.bool, device=given.device)

    with torch.no_grad():
        net.generate(ids, max_new_tokens=1 + count, min_new_tokens=1 + count, do_sample=False, use_cache=True,
                     pad_token_id=0, stopping_criteria=[step], **options)
    return (len(times) - 1) / (times[-1] - times[0])
