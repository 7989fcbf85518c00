"""Attention of one new token of each group over slots of a cache, in one Triton kernel: keys and values of the new
tokens are written into the cache, those of the visible slots read where they lie, the softmax taken in passing.

A head's slots are shared by several programs; the one that ends last puts their parts together, always in the same
order. Blocks in which nothing is visible are not read, so a call takes as long as the context is, not as the cache. A
slot that is written by the same call is taken from the new keys and values, whoever writes it.

Shapes: G groups, C slots that a group looks at, T slots of the cache, H heads, K head width, D = H K.

Source: FlashAttention-2 (Dao 2023) and Flash-Decoding (Dao et al. 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from parallel.torch_runtime.fusion.product_kernels import counts_on, early_options, fetch

BLOCK = 32
PROGRAMS = 2048
"""About so many programs share the work."""


@triton.jit
def _slots_kernel(q, k, v, keys, values, write, read, visible, out, parts, counts, groups, slots, each, scale, q_row,
                  k_row, v_row, heads, HAS: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, C: tl.constexpr,
                  LINES: tl.constexpr, EARLY: tl.constexpr):
    group, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, WIDTH)
    there = d < HAS
    at = head * HAS + d
    if EARLY:  # old keys and values are no result of the kernel before
        gdc_launch_dependents()
        lines = head * HAS + tl.arange(0, LINES) * (HAS // LINES)
        for begin in range(split * each, tl.minimum((split + 1) * each, slots), C):
            c = begin + tl.arange(0, C)
            seen = tl.load(visible + group * slots + c, mask=c < slots, other=0) != 0
            if tl.max(seen.to(tl.int32), 0) > 0:
                slot = tl.load(read + group * slots + c, mask=seen, other=0)
                place = slot.to(tl.int64)[:, None] * (heads * HAS) + lines[None, :]
                fetch(keys + place)
                fetch(values + place)
        gdc_wait()
    query = tl.load(q + group * q_row + at, mask=there, other=0.0).to(tl.float32) * scale
    top, total = -float("inf"), 0.0
    mixed = tl.zeros((WIDTH,), tl.float32)
    for begin in range(split * each, tl.minimum((split + 1) * each, slots), C):
        c = begin + tl.arange(0, C)
        seen = tl.load(visible + group * slots + c, mask=c < slots, other=0) != 0
        if tl.max(seen.to(tl.int32), 0) > 0:
            slot = tl.load(read + group * slots + c, mask=seen, other=-1)
            place = slot.to(tl.int64)[:, None] * (heads * HAS) + at[None, :]
            full = seen[:, None] & there[None, :]
            key = tl.load(keys + place, mask=full, other=0.0).to(tl.float32)
            value = tl.load(values + place, mask=full, other=0.0).to(tl.float32)
            for other in range(groups):
                own = slot == tl.load(write + other)
                if tl.max(own.to(tl.int32), 0) > 0:
                    new_key = tl.load(k + other * k_row + at, mask=there, other=0.0).to(tl.float32)
                    new_value = tl.load(v + other * v_row + at, mask=there, other=0.0).to(tl.float32)
                    key = tl.where(own[:, None], new_key[None, :], key)
                    value = tl.where(own[:, None], new_value[None, :], value)
            scores = tl.where(seen, tl.sum(key * query[None, :], 1), -float("inf"))
            new = tl.maximum(top, tl.max(scores, 0))
            shrink = tl.exp(top - new)
            p = tl.exp(scores - new)
            total = total * shrink + tl.sum(p, 0)
            mixed = mixed * shrink + tl.sum(p[:, None] * value, 0)
            top = new
    if split == 0:
        target = tl.load(write + group).to(tl.int64) * (heads * HAS) + at
        tl.store(keys + target, tl.load(k + group * k_row + at, mask=there), mask=there)
        tl.store(values + target, tl.load(v + group * v_row + at, mask=there), mask=there)
    last = True
    if SPLITS > 1:
        number = group * heads + head
        own_part = parts + (number * SPLITS + split).to(tl.int64) * (WIDTH + 2)
        tl.store(own_part + d, mixed)
        tl.store(own_part + WIDTH, top)
        tl.store(own_part + WIDTH + 1, total)
        tl.debug_barrier()
        last = tl.atomic_add(counts + number, 1, sem="acq_rel") == SPLITS - 1
        if last:
            tl.debug_barrier()
            base = parts + (number * SPLITS).to(tl.int64) * (WIDTH + 2)
            s = tl.arange(0, SPLITS)
            tops = tl.load(base + s * (WIDTH + 2) + WIDTH, cache_modifier=".cg")
            totals = tl.load(base + s * (WIDTH + 2) + WIDTH + 1, cache_modifier=".cg")
            highest = tl.max(tops, 0)
            factor = tl.where(tops == -float("inf"), 0.0, tl.exp(tops - highest))
            total = tl.sum(totals * factor, 0)
            all_mixed = tl.load(base + s[:, None] * (WIDTH + 2) + d[None, :], cache_modifier=".cg")
            mixed = tl.sum(all_mixed * factor[:, None], 0)
            tl.store(counts + number, 0)
    if last:
        found = mixed / tl.where(total > 0.0, total, 1.0)
        tl.store(out + group * (heads * HAS) + at, found.to(out.dtype.element_ty), mask=there)


def attend(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, write: Tensor, read: Tensor, visible: Tensor,
           scale: float, splits: int | None = None) -> Tensor:
    """[G, D] in the type of q; `keys` and `values` get the new tokens' rows.

    Args:
        keys, values: [T, H, K].
        q, k, v: [G, D], their last dim contiguous.
        write: [G], the slots of the new tokens.
        read: [G, C], slots that a group looks at.
        visible: [G, C] int8, 1 where it sees one. A group that sees none gets zeros.
        scale: of q.
        splits: programs that share a head's slots, a power of two; None = about PROGRAMS in all.
    """
    (groups, slots), (_, heads, width) = read.shape, keys.shape
    blocks = triton.cdiv(slots, BLOCK)
    if splits is None:
        splits = max(1, min(triton.next_power_of_2(PROGRAMS // (groups * heads) + 1) // 2 or 1, blocks))
        splits = 1 << (splits.bit_length() - 1)
    out = torch.empty(groups, heads * width, dtype=q.dtype, device=q.device)
    padded = triton.next_power_of_2(width)
    parts = out
    if splits > 1:
        parts = torch.empty(groups * heads * splits * (padded + 2), dtype=torch.float32, device=q.device)
    _slots_kernel[(groups, heads, splits)](
        q, k, v, keys, values, write, read, visible, out, parts, counts_on(q.device), groups, slots,
        triton.cdiv(blocks, splits) * BLOCK, scale, q.stride(0), k.stride(0), v.stride(0), heads, HAS=width,
        WIDTH=padded, SPLITS=splits, C=BLOCK, LINES=triton.next_power_of_2(max(1, width * keys.element_size() // 128)),
        num_warps=4, **early_options(q.device))
    return out
