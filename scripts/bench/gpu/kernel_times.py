"""Where a GPU's time goes in a step: kernels by kind, what communication is not hidden, and when nothing runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

KINDS = {
    "communication": ("nccl",), "attention": ("fmha", "flash", "cudnn_generated", "_forward_kernel", "_backward_rows",
                                              "_backward_columns", "_rows_kernel", "_columns_kernel", "sdpa"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
    "update": ("_adam_kernel", "_adagrad_kernel", "multi_tensor"),
    "copies": ("Memcpy", "Memset", "CatArray", "direct_copy"), "reductions": ("reduce_kernel", "triton_red",
                                                                               "triton_per"),
}  # fmt: skip
_SHOWN = 14


def profiled(step: Callable[[Any], Any], batches: Sequence[Any], device: torch.device) -> dict[str, Any]:
    """Milliseconds of a step.

    Args:
        step: called with each batch.
        batches: of that many steps.
        device: a GPU.

    Returns:
        by kind of kernel; "hidden" and "exposed" communication; "idle"; the kernels that take longest.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for batch in batches:
            step(batch)
        torch.cuda.synchronize(device)
    events = [(item.start_ns(), item.start_ns() + item.duration_ns(), item.name())
              for item in profile.profiler.kineto_results.events()
              if "CUDA" in str(item.device_type()) and item.duration_ns() > 0 and "Profiler" not in item.name()
              and not item.name().startswith(("step", "nccl:"))]
    return summed(events, len(batches))


def summed(events: list[tuple[int, int, str]], steps: int) -> dict[str, Any]:
    """The same from (begin, end, name) in ns."""
    if not events:
        return {}
    kinds, names = defaultdict(int), defaultdict(lambda: [0, 0])
    for begin, end, name in events:
        kinds[kind_of(name)] += end - begin
        names[name][0] += end - begin
        names[name][1] += 1
    talking = [(begin, end) for begin, end, name in events if kind_of(name) == "communication"]
    working = [(begin, end) for begin, end, name in events if kind_of(name) != "communication"]
    everything, computing = _union([*talking, *working]), _union(working)
    span = max(end for _, end, _ in events) - min(begin for begin, _, _ in events)

    def per_step(nanoseconds: float) -> float:
        return round(nanoseconds / 1e6 / steps, 3)

    longest = sorted(names.items(), key=lambda item: -item[1][0])[:_SHOWN]
    return {"span": per_step(span), "kinds": {kind: per_step(total) for kind, total in kinds.items()},
            "kernels": round(len(events) / steps), "exposed": per_step(everything - computing),
            "hidden": per_step(_union(talking) - (everything - computing)), "idle": per_step(span - everything),
            "longest": [[name[:70], per_step(total), round(count / steps)] for name, (total, count) in longest]}


def kind_of(name: str) -> str:
    """Which of KINDS a kernel is; "other" are element-wise passes."""
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")


def _union(intervals: list[tuple[int, int]]) -> int:
    total, until = 0, 0
    for begin, end in sorted(intervals):
        total += max(0, end - max(begin, until))
        until = max(until, end)
    return total
