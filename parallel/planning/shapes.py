"""What each primitive does to shapes and named shardings: one small rule for each, for every model alike.

A tensor's dims are `Dim(size, axis)`: how long, and which factors of the mesh shard it (none: unsharded). A rule takes
the dims of the operands (and the plain arguments) and gives those of the results, so shape and layout follow from one
rule. A rule also names the dims that it sums over: if such a dim is sharded, the result is a partial sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Dim(NamedTuple):
    """One dim of a tensor: its full size and the factors of the mesh that shard it, outermost first."""

    size: int
    axis: tuple[int, ...] = ()


Dims = tuple  # of Dim


class Result(NamedTuple):
    """Dims of each result, and the axes of the dims that were summed over."""

    outputs: tuple[Dims, ...]
    summed: tuple[int, ...] = ()


def sizes(dims: Dims) -> tuple[int, ...]:
    """The plain shape."""
    return tuple(dim.size for dim in dims)


def count(dims: Dims) -> int:
    """Elements."""
    return math.prod(dim.size for dim in dims)


def broadcast(operands: list[Dims]) -> Dims:
    """Dims of an elementwise result: of every dim the longest, sharded as in that operand."""
    rank, result = max(map(len, operands), default=0), []
    for index in range(rank):
        here = [dims[index - rank + len(dims)] for dims in operands if index - rank + len(dims) >= 0]
        longest = max(dim.size for dim in here)
        axis = next((dim.axis for dim in here if dim.size == longest and dim.axis), ())
        result.append(Dim(longest, axis))
    return tuple(result)


def reshaped(dims: Dims, shape: tuple[int, ...]) -> Dims:
    """Dims after a reshape: a sharding stays where the sharded dim leads a group of dims that becomes another, else
    lost."""
    total = count(dims)
    if -1 in shape:
        known = -math.prod(shape)
        shape = tuple(total // known if size == -1 else size for size in shape)
    result: list[Dim] = []
    i = j = 0
    while i < len(dims) or j < len(shape):
        first_in, first_out = i, j
        left = dims[i].size if i < len(dims) else 1
        right = shape[j] if j < len(shape) else 1
        i, j = min(i + 1, len(dims)), min(j + 1, len(shape))
        while left != right:
            if left < right:
                left, i = left * dims[i].size, i + 1
            else:
                right, j = right * shape[j], j + 1
        group = [Dim(size) for size in shape[first_out:j]]
        axis = next((dim.axis for dim in dims[first_in:i] if dim.size > 1), ())
        long = next((k for k, dim in enumerate(group) if dim.size > 1), None)
        if axis and long is not None:
            group[long] = Dim(group[long].size, axis)
        result += group
    return tuple(result)


def _same(operands: list[Dims], primitive: Any, arguments: list) -> Result:
    return Result((broadcast(operands),))


def _first(operands: list[Dims], primitive: Any, arguments: list) -> Result:
    return Result((operands[0],))


def _matmul(operands: list[Dims], primitive: Any, arguments: list) -> Result:
    a, b = operands[0], operands[1]
    if primitive.transpose_a:
        a = (*a[:-2], a[-1], a[-2])
    if primitive.transpose_b:
        b = (*b[:-2], b[-1], b[-2])
    summed = a[-1].axis or b[-2].axis
    return Result(((*broadcast([a[:-2], b[:-2]]), a[-2], b[-1]),), summed)


def _reshape(operands: list[Dims], primitive: Any, arguments: list) -> Result:
    return Result((reshaped(operands[0], tuple(arguments[1])),))


def _transpose(operands: list[Dims], primitive: Any, arguments: list) -> Result:
    return Result((tuple(operands[0][index] for index in arguments[1]),))


def _gather(operands: list[Dims], primitive: Any, arguments: list) -> Result:
    table, ids, axis, batch = operands[0], operands[1], arguments[2], getattr(primitive, "batch_dims", 0)
    axis %= len(table)
    return Result(((*table[:axis], *ids[batch:], *table[axis + 1:]),), table[axis].axis)


def _reduce(operands: list[Dims], primitive: Any, arguments: list) -> Result:
    dims = operands[0]
    axes = arguments[1] if len(arguments) > 1 else ()
    axes = (axes,) if isinstance(axes, int) else tuple(axes if axes is not None else ())
    axes = {axis % len(dims) for axis in axes} if axes else set(range(len(dims)))
    keep = primitive.keep_dims
    summed = tuple(factor for axis in sorted(axes) for factor in dims[axis].axis)
    out = tuple(Dim(1) if index in axes else dim for index, dim in enumerate(dims) if keep or index not in axes)
    return Result((out,), summed)


def _expand(operands: list[Dims], primitive: Any, arguments: list) -> Result:
    dims, axis = list(operands[0]), arguments[1]
    dims.insert(axis if axis >= 0 else len(dims) + 1 + axis, Dim(1))
    return Result((tuple(dims),))


def _layer_norm(operands: list[Dims], primitive: Any, arguments: list) -> Result:
    narrow = (*operands[0][:-1], Dim(1))
    return Result((operands[0], narrow, narrow))


def _rms_norm(operands: list[Dims], primitive: Any, arguments: list) -> Result:
    return Result((operands[0], (*operands[0][:-1], Dim(1))))


def _one_hot(operands: list[Dims], primitive: Any, arguments: list) -> Result:
    return Result(((*operands[0], Dim(arguments[1])),))


def _concat(operands: list[Dims], primitive: Any, arguments: list) -> Result:
    dims = list(operands[0])
    axis = primitive.axis % len(dims)
    dims[axis] = Dim(sum(operand[axis].size for operand in operands))
    return Result((tuple(dims),))


def _stack(operands: list[Dims], primitive: Any, arguments: list) -> Result:
    dims = list(operands[0])
    dims.insert(primitive.axis, Dim(len(operands)))
    return Result((tuple(dims),))


def _split(operands: list[Dims], primitive: Any, arguments: list) -> Result:
    dims, pieces, axis = operands[0], arguments[1], arguments[2] % len(operands[0])
    return Result(tuple((*dims[:axis], Dim(size), *dims[axis + 1:]) for size in pieces))


def _strided_slice(operands: list[Dims], primitive: Any, arguments: list) -> Result:
    dims, (begin, end, step) = operands[0], arguments[1:4]
    out = []
    for index, dim in enumerate(dims):
        if index >= len(begin):
            out.append(dim)
            continue
        length = len(range(*slice(begin[index], end[index], step[index]).indices(dim.size)))
        out.append(Dim(length, dim.axis))
    return Result((tuple(out),))


def _tile(operands: list[Dims], primitive: Any, arguments: list) -> Result:
    times = tuple(arguments[1])
    dims = (*[Dim(1)] * (len(times) - len(operands[0])), *operands[0])
    return Result((tuple(Dim(dim.size * n, dim.axis) for dim, n in zip(dims, times, strict=True)),))


def _pad(operands: list[Dims], primitive: Any, arguments: list) -> Result:
    return Result((tuple(Dim(dim.size + before + after, dim.axis)
                         for dim, (before, after) in zip(operands[0], primitive.paddings, strict=True)),))


def _top(operands: list[Dims], primitive: Any, arguments: list) -> Result:
    out = (*operands[0][:-1], Dim(arguments[1]))
    return Result((out, out))


def _flash(operands: list[Dims], primitive: Any, arguments: list) -> Result:
    """Largest scores and their sums, eight copies of each; an output that nobody uses; the mixed values."""
    queries, values = operands[0], operands[2]
    narrow = (*queries[:-1], Dim(8))
    return Result((narrow, narrow, (Dim(1),), (*queries[:-1], values[-1])))


def attended(primitive: Any, operands: list) -> int:
    """Keys of a record, with all of which a fused attention multiplies its queries (masked ones are counted, too).

    Args:
        primitive: FlashAttentionScore.
        operands: its tensors, queries first; with documents one after the other the last one tells where they end,
            `primitive.documents` of them for each record.
    """
    queries, last = operands[0].shape, operands[-1].shape
    return queries[2] if len(queries) == 4 else queries[0] * primitive.documents // last[0]


_ELEMENTWISE = (
    "Add Sub Mul RealDiv Div FloorDiv Maximum Minimum Pow AddN Equal NotEqual Greater GreaterEqual Less LessEqual "
    "LogicalAnd LogicalOr Select BitwiseAnd BitwiseOr BitwiseXor RightShift LeftShift")
_UNARY = (
    "Cast ReLU GeLU FastGeLU Gelu Sigmoid SiLU Swish Tanh Exp Log Log1p Neg Abs Sqrt Rsqrt Square Erf Softmax "
    "LogSoftmax ZerosLike OnesLike CumSum LogicalNot StopGradient Depend Reciprocal")

RULES: dict[str, Callable[[list[Dims], Any, list], Result]] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _same), **dict.fromkeys(_UNARY.split(), _first),
    "MatMul": _matmul, "BatchMatMul": _matmul, "Reshape": _reshape, "Transpose": _transpose, "Gather": _gather,
    "ReduceSum": _reduce, "ReduceMean": _reduce, "ReduceMax": _reduce, "ReduceMin": _reduce, "ExpandDims": _expand,
    "LayerNorm": _layer_norm, "RmsNorm": _rms_norm, "OneHot": _one_hot, "Concat": _concat, "Stack": _stack,
    "SplitWithSize": _split, "StridedSlice": _strided_slice, "Tile": _tile, "Pad": _pad, "PadV3": _pad, "TopK": _top,
    "FlashAttentionScore": _flash,
}

INTEGER_RESULTS = frozenset({"Equal", "NotEqual", "Greater", "GreaterEqual", "Less", "LessEqual", "LogicalAnd",
                             "LogicalOr", "LogicalNot"})
"""Results without a gradient."""
SIDE_RESULTS: dict[str, dict[int, str | None]] = {
    "TopK": {1: "int32"}, "FlashAttentionScore": {0: "float32", 1: "float32", 2: None}}
"""Results beside the one that has a gradient, by place, and their element types (None = that of the inputs)."""
FOLLOWERS = frozenset({"Cast", "Reshape", "StopGradient", "Depend", "Detach"})
"""Primitives that keep their input's sharding."""
VIEWS = frozenset({"Reshape", "StopGradient", "Depend", "Detach", "ExpandDims"})
"""Results that share their input's memory."""
PRODUCTS = frozenset({"MatMul", "BatchMatMul"})
"""Primitives that the matrix unit runs."""
