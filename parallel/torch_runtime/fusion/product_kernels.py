"""Triton kernels for serving: products of few rows with weights [T, O, K] in int8 or a floating type, and layer norm.

A product of few rows takes as long as its weights take to be read, so all that is done to its result is done before it
is stored: the scale of int8 weights, bias, GELU, the residual. int8 weights are widened in registers (W8A16). One row
is multiplied and summed by the ordinary units (`_row_kernel`), more go through the matrix units with the weights as the
first factor (`_rows_kernel`). Where the outputs alone give too little to do at once, several programs share an output's
inputs; the one that ends last adds their parts up in a fixed order.

Shapes: T tokens (1 for a plain matrix), M rows, K inputs, O outputs, G groups of 128 inputs with a scale each.

Imported on GPUs only, and by the tests in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

GROUP = 128
MOST_ROWS = 64
_FEW = 16


@dataclass(frozen=True)
class Tile:
    """How a product is cut: outputs and inputs of a block, programs that share an output's inputs, warps, blocks of
    weights under way, whether one row takes the matrix units, too, and how many bytes of each output's weights one row
    fetches while the kernel before it ends (None = AHEAD).

    Four warps and 64 outputs would be Hopper's `wgmma`, for which Triton reads int8 weights byte by byte: two warps."""

    outputs: int
    inputs: int
    parts: int = 1
    warps: int = 4
    stages: int = 3
    matrix: bool = False
    ahead: int | None = None


TILES: dict[tuple[bool, int], Tile] = {
    (False, 1): Tile(4, 512, 1, 4, 3), (True, 1): Tile(16, 512, 1, 4, 3),
    (False, 16): Tile(32, 128, 1, 4, 4), (True, 16): Tile(32, 128, 1, 2, 6),
    (False, 32): Tile(32, 128, 1, 4, 4), (True, 32): Tile(64, 128, 2, 2, 4),
    (False, 64): Tile(64, 128, 1, 4, 4), (True, 64): Tile(64, 128, 1, 4, 4),
}
"""By whether weights are int8 and the rows of a block: what a product runs with unless its shape has one of its own."""
CHOSEN: dict[tuple, Tile | None] = {}
"""The tiles that were found the fastest for a shape (`tiles`); None where torch's own product was."""


def key_of(x: Tensor, w: Tensor) -> tuple:
    """What a tile is chosen by: whether weights are int8, rows of a block, and the weights' shape."""
    return w.dtype == torch.int8, rows_of_block(x.shape[1]), *w.shape


def rows_of_block(rows: int) -> int:
    """1, or the least of 16, 32 and 64 that holds so many rows."""
    return 1 if rows == 1 else max(_FEW, triton.next_power_of_2(rows))


EARLY = True
"""Whether kernels begin while the one before them ends (programmatic dependent launch, from Hopper on): what they read
first, weights, is no result of it, and is on its way to the second-level cache when the activations are ready. Products
of several rows do not: their blocks are large, and two kernels side by side were slower."""
AHEAD = 2048  # bytes of an output's weights that are fetched so


def early_options(device: torch.device) -> dict[str, bool]:
    """Options of a launch on a device."""
    early = EARLY and not _lane and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


@triton.jit
def fetch(pointers):
    """Asks for the lines of some addresses in the second-level cache."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)],
                              dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _wide(b):
    """float32 of int8s by bit operations, exactly: b + 128 becomes the last byte of 2^23. Hopper's own conversion is
    slower than reading the weights."""
    return tl.inline_asm_elementwise("""{
        .reg .b32 t;
        xor.b32 t, $4, 0x80808080;
        prmt.b32 $0, t, 0x4B000000, 0x7440;
        prmt.b32 $1, t, 0x4B000000, 0x7441;
        prmt.b32 $2, t, 0x4B000000, 0x7442;
        prmt.b32 $3, t, 0x4B000000, 0x7443;
        sub.f32 $0, $0, 0f4B000080;
        sub.f32 $1, $1, 0f4B000080;
        sub.f32 $2, $2, 0f4B000080;
        sub.f32 $3, $3, 0f4B000080;
        }""", "=f,=f,=f,=f,r", [b], dtype=tl.float32, is_pure=True, pack=4)


@triton.jit
def _begun(weights, first, inputs, LINE: tl.constexpr, LINES: tl.constexpr):
    """Lets the next kernel begin, fetches the first weights and waits for the kernel before."""
    gdc_launch_dependents()
    if LINES > 0:
        place = tl.minimum(first + tl.arange(0, LINES) * LINE, inputs - 1)
        fetch(weights + place[None, :])
    gdc_wait()


@triton.jit
def _ended(found, scale, bias, extra, HAS_BIAS: tl.constexpr, HAS_EXTRA: tl.constexpr, GELU: tl.constexpr,
           SCALED: tl.constexpr):
    """What is done to sums before they are stored, all in float32."""
    if SCALED:
        found = found * scale
    if HAS_BIAS:
        found = found + bias
    if GELU:
        found = found * tl.sigmoid(1.5957691216057308 * (found + 0.044715 * found * found * found))
    if HAS_EXTRA:
        found = found + extra
    return found


@triton.jit
def _row_kernel(x, w, scale, bias, extra, y, parts, counts, inputs, outputs, x_token, w_token, scale_token, y_token,
                SCALED: tl.constexpr, GROUPED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_EXTRA: tl.constexpr,
                GELU: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
                O: tl.constexpr, K: tl.constexpr, LINE: tl.constexpr, LINES: tl.constexpr, EARLY: tl.constexpr,
                BITS: tl.constexpr):
    block, token, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    o = block * O + tl.arange(0, O)
    inside = o < outputs
    safe = tl.where(inside, o, 0)
    each = tl.cdiv(tl.cdiv(inputs, K), PARTS) * K
    weights = w + token * w_token + safe.to(tl.int64)[:, None] * inputs
    if EARLY:
        _begun(weights, part * each, inputs, LINE, LINES)
    sums = tl.zeros((O, K), tl.float32)
    for begin in tl.range(part * each, tl.minimum((part + 1) * each, inputs), K, num_stages=STAGES):
        k = begin + tl.arange(0, K)
        if EVEN:
            a = tl.load(x + token * x_token + k).to(tl.float32)
            b = tl.load(weights + k[None, :], eviction_policy="evict_first")
        else:
            a = tl.load(x + token * x_token + k, mask=k < inputs, other=0.0).to(tl.float32)
            b = tl.load(weights + k[None, :], mask=k[None, :] < inputs, other=0)
        b = _wide(b) if BITS and (SCALED or GROUPED) else b.to(tl.float32)
        if GROUPED:
            b = b * tl.load(scale + token * scale_token + (begin // 128) * outputs + safe)[:, None]
        sums += a[None, :] * b
    found = tl.sum(sums, 1)
    last = True
    if PARTS > 1:
        place = (token * tl.num_programs(0) + block) * PARTS
        tl.store(parts + (place + part) * O + tl.arange(0, O), found)
        tl.debug_barrier()
        last = tl.atomic_add(counts + place // PARTS, 1, sem="acq_rel") == PARTS - 1
        if last:
            tl.debug_barrier()
            found = tl.zeros((O,), tl.float32)
            for other in tl.static_range(PARTS):
                found += tl.load(parts + (place + other) * O + tl.arange(0, O), cache_modifier=".cg")
            tl.store(counts + place // PARTS, 0)
    if last:
        own = tl.load(scale + token * scale_token + safe) if SCALED else 0.0
        add = tl.load(bias + token * outputs + safe).to(tl.float32) if HAS_BIAS else 0.0
        more = tl.load(extra + token * y_token + safe).to(tl.float32) if HAS_EXTRA else 0.0
        found = _ended(found, own, add, more, HAS_BIAS, HAS_EXTRA, GELU, SCALED)
        tl.store(y + token * y_token + o, found.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _rows_kernel(x, w, scale, bias, extra, y, parts, counts, rows, inputs, outputs, x_token, x_row, w_token,
                 scale_token, y_token, SCALED: tl.constexpr, GROUPED: tl.constexpr, HAS_BIAS: tl.constexpr,
                 HAS_EXTRA: tl.constexpr, GELU: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr,
                 STAGES: tl.constexpr, O: tl.constexpr, K: tl.constexpr, M: tl.constexpr):
    block, token, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    o, m = block * O + tl.arange(0, O), tl.arange(0, M)
    inside, present = o < outputs, m < rows
    safe, row = tl.where(inside, o, 0), tl.where(present, m, 0)
    each = tl.cdiv(tl.cdiv(inputs, K), PARTS) * K
    weights = w + token * w_token + safe.to(tl.int64)[:, None] * inputs
    given = x + token * x_token + row[None, :] * x_row
    sums = tl.zeros((O, M), tl.float32)
    for begin in tl.range(part * each, tl.minimum((part + 1) * each, inputs), K, num_stages=STAGES):
        k = begin + tl.arange(0, K)
        if EVEN:
            a = tl.load(given + k[:, None], mask=present[None, :], other=0.0)
            b = tl.load(weights + k[None, :], eviction_policy="evict_first")
        else:
            a = tl.load(given + k[:, None], mask=present[None, :] & (k[:, None] < inputs), other=0.0)
            b = tl.load(weights + k[None, :], mask=k[None, :] < inputs, other=0)
        if GROUPED:
            own = tl.load(scale + token * scale_token + (begin // 128) * outputs + safe)
            sums += tl.dot(b.to(a.dtype), a, input_precision="ieee") * own[:, None]
        else:
            sums = tl.dot(b.to(a.dtype), a, sums, input_precision="ieee")
    found = sums
    last = True
    if PARTS > 1:
        place = (token * tl.num_programs(0) + block) * PARTS
        spread = tl.arange(0, O)[:, None] * M + m[None, :]
        tl.store(parts + (place + part) * (O * M) + spread, found)
        tl.debug_barrier()
        last = tl.atomic_add(counts + place // PARTS, 1, sem="acq_rel") == PARTS - 1
        if last:
            tl.debug_barrier()
            found = tl.zeros((O, M), tl.float32)
            for other in tl.static_range(PARTS):
                found += tl.load(parts + (place + other) * (O * M) + spread, cache_modifier=".cg")
            tl.store(counts + place // PARTS, 0)
    if last:
        own = tl.load(scale + token * scale_token + safe)[:, None] if SCALED else 0.0
        add = tl.load(bias + token * outputs + safe).to(tl.float32)[:, None] if HAS_BIAS else 0.0
        at = token * y_token + row[None, :] * outputs + safe[:, None]
        more = tl.load(extra + at).to(tl.float32) if HAS_EXTRA else 0.0
        found = _ended(found, own, add, more, HAS_BIAS, HAS_EXTRA, GELU, SCALED)
        tl.store(y + at, found.to(y.dtype.element_ty), mask=inside[:, None] & present[None, :])


@triton.jit
def _norm_kernel(x, gamma, beta, y, width, x_row, epsilon, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = place < width
    if EARLY:
        gdc_launch_dependents()
    factor = tl.load(gamma + place, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(beta + place, mask=inside, other=0.0).to(tl.float32)
    if EARLY:
        gdc_wait()
    own = tl.load(x + row * x_row + place, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, own - tl.sum(own, 0) / width, 0.0)
    found = centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + epsilon)
    found = found * factor + shift
    tl.store(y + row * width + place, found.to(y.dtype.element_ty), mask=inside)


_COUNTS: dict[tuple[torch.device, int], Tensor] = {}
_MOST_SHARED = 1 << 16
_lane = 0


@contextlib.contextmanager
def lane(number: int) -> Iterator[None]:
    """Launches within it may run beside those of other lanes; all but those of lane 0 wait for the kernel before."""
    global _lane
    before, _lane = _lane, number
    try:
        yield
    finally:
        _lane = before


def counts_on(device: torch.device) -> Tensor:
    """Zeros by which the programs of a launch tell who ends last, and which are zeros again when it has ended; for
    launches one after the other, those of a lane."""
    if (device, _lane) not in _COUNTS:
        _COUNTS[device, _lane] = torch.zeros(_MOST_SHARED, dtype=torch.int32, device=device)
    return _COUNTS[device, _lane]


def product(x: Tensor, w: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, extra: Tensor | None = None,
            gelu: bool = False, tile: Tile | None = None) -> Tensor:
    """gelu(x w^T scale + bias) + extra, [T, M, O] in the type of x.

    Args:
        x: [T, M, K], its last dim contiguous; at most MOST_ROWS rows.
        w: [T, O, K], contiguous, int8 or floating.
        scale: of int8 weights, [T, G, O] float32, contiguous; G = 1, or K / 128 rounded up.
        bias: [T, O], contiguous.
        extra: [T, M, O], contiguous.
        gelu: whether there is one (the tanh form).
        tile: None = that of CHOSEN, else of TILES.
    """
    (tokens, rows, inputs), outputs = x.shape, w.shape[1]
    tile = tile or CHOSEN.get(key_of(x, w)) or TILES[w.dtype == torch.int8, rows_of_block(rows)]
    block = _FEW if tile.matrix and rows == 1 else rows_of_block(rows)
    grouped = scale is not None and scale.shape[1] > 1
    depth = GROUP if grouped else tile.inputs
    blocks = triton.cdiv(outputs, tile.outputs)
    shared = min(tile.parts, triton.cdiv(inputs, depth), max(1, _MOST_SHARED // (blocks * tokens)))
    y = torch.empty(tokens, rows, outputs, dtype=x.dtype, device=x.device)
    parts = y
    if shared > 1:
        parts = torch.empty(tokens * blocks * shared * tile.outputs * block, dtype=torch.float32, device=x.device)
    options = {"SCALED": scale is not None and not grouped, "GROUPED": grouped, "HAS_BIAS": bias is not None,
               "HAS_EXTRA": extra is not None, "GELU": gelu, "EVEN": inputs % depth == 0, "PARTS": shared,
               "STAGES": tile.stages, "O": tile.outputs, "K": depth, "num_warps": tile.warps}
    given = (x, w, y if scale is None else scale, y if bias is None else bias, y if extra is None else extra, y, parts,
             counts_on(x.device))
    token = 0 if scale is None else scale.stride(0)
    grid = (blocks, tokens, shared)
    if block == 1:
        lines = (AHEAD if tile.ahead is None else tile.ahead) // 128
        _row_kernel[grid](*given, inputs, outputs, x.stride(0), w.stride(0), token, y.stride(0), BITS=x.is_cuda,
                          LINE=128 // w.element_size(), LINES=lines, **early_options(x.device), **options)
    else:
        _rows_kernel[grid](*given, rows, inputs, outputs, x.stride(0), x.stride(1), w.stride(0), token, y.stride(0),
                           M=block, **options)
    return y


def normed(x: Tensor, gamma: Tensor, beta: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """Layer norm of rows [N, D] in float32, stored as `dtype`."""
    rows, width = x.shape
    y = torch.empty(rows, width, dtype=dtype, device=x.device)
    block = triton.next_power_of_2(width)
    _norm_kernel[(rows,)](x, gamma, beta, y, width, x.stride(0), epsilon, BLOCK=block,
                          num_warps=min(16, max(1, block // 512)), **early_options(x.device))
    return y
