"""One rule per primitive: what it computes on one rank, in NumPy. A new primitive is one line (or one function) here.

A rule takes the node and its inputs (arrays; Python numbers, booleans and tuples for constants), returns an array or
a tuple of arrays for a primitive with several results. `executor` casts the result to the type that the graph declares
and stops if the shape differs. Primitives that write parameters are in UPDATES: they return the new values of their
first inputs. Collectives are in `collectives`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from parallel.proof.compile.graph import Node

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
UPDATES: dict[str, Rule] = {}


def rule(*names: str, table: dict[str, Rule] = RULES) -> Callable[[Rule], Rule]:
    """Registers `function(node, *inputs)` as the rule of the primitives `names`."""

    def register(function: Rule) -> Rule:
        table.update(dict.fromkeys(names, function))
        return function

    return register


def plain(function: Callable, count: int | None = None) -> Rule:
    """A rule from a NumPy function of the first `count` inputs."""
    return lambda node, *inputs: function(*inputs[:count])


def axes_of(value: Any, dims: int) -> tuple[int, ...]:
    """Dims as a tuple; none given means all of them."""
    listed = tuple(int(item) for item in np.atleast_1d(np.asarray(value, np.int64))) if value is not None else ()
    return listed or tuple(range(dims))


def _erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def _logical_shift(x: np.ndarray, bits: Any) -> np.ndarray:
    return np.right_shift(x, bits)


RULES |= {
    name: plain(function, 1) for name, function in {
        "Exp": np.exp, "Log": np.log, "Sqrt": np.sqrt, "Square": np.square, "Neg": np.negative, "Abs": np.abs,
        "Cos": np.cos, "Sin": np.sin, "Tanh": np.tanh, "IsFinite": np.isfinite, "LogicalNot": np.logical_not,
        "Sign": np.sign, "Floor": np.floor, "ReLU": lambda x: np.maximum(x, 0), "Erf": _erf, "Log1p": np.log1p,
        "Sigmoid": lambda x: 1.0 / (1.0 + np.exp(-x)), "SiLU": lambda x: x / (1.0 + np.exp(-x)),
        "Rsqrt": lambda x: 1.0 / np.sqrt(x), "Reciprocal": lambda x: 1.0 / x, "ZerosLike": np.zeros_like,
        "OnesLike": np.ones_like, "TensorMove": np.array, "Identity": np.array, "Load": np.asarray,
        "StopGradient": np.asarray, "Cast": np.asarray, "ScalarToTensor": np.asarray, "Size": np.size,
        "Shape": np.shape, "TensorToScalar": np.asarray, "Copy": np.array, "Contiguous": np.array,
        "HSigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1), "BitwiseNot": np.invert,
    }.items()
}  # fmt: skip
RULES |= {
    name: plain(function, 2) for name, function in {
        "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Muls": np.multiply, "Div": np.divide, "Pow": np.power,
        "RealDiv": np.divide, "FloorDiv": np.floor_divide, "FloorMod": np.mod, "Mod": np.fmod, "Maximum": np.maximum,
        "Minimum": np.minimum, "Equal": np.equal, "NotEqual": np.not_equal, "Less": np.less, "Greater": np.greater,
        "LessEqual": np.less_equal, "GreaterEqual": np.greater_equal, "LogicalAnd": np.logical_and,
        "LogicalOr": np.logical_or, "BitwiseXor": np.bitwise_xor, "BitwiseAnd": np.bitwise_and,
        "BitwiseOr": np.bitwise_or, "RightShift": _logical_shift, "ScalarAdd": np.add, "ScalarMul": np.multiply,
        "Divs": np.divide, "Adds": np.add, "Subs": np.subtract, "BitwiseAndTensor": np.bitwise_and,
        "BitwiseRightShift": np.right_shift, "BitwiseLeftShift": np.left_shift, "BitwiseXorTensor": np.bitwise_xor,
        "BitwiseOrTensor": np.bitwise_or, "BitwiseAndScalar": np.bitwise_and, "BitwiseXorScalar": np.bitwise_xor,
        "BitwiseOrScalar": np.bitwise_or, "Xdivy": lambda x, y: np.where(x == 0, 0, x / y),
        "Tile": lambda x, times: np.tile(x, tuple(times)), "ReluGrad": lambda g, x: g * (x > 0),
        "BroadcastTo": lambda x, shape: np.broadcast_to(x, tuple(b if a == -1 else a for a, b in zip(
            shape, (0,) * (len(shape) - np.ndim(x)) + np.shape(x), strict=True))),
        "ExpandDims": lambda x, dim: np.expand_dims(x, axes_of(dim, 0)),
        "Transpose": lambda x, order: np.transpose(x, tuple(order)), "SigmoidGrad": lambda y, g: g * y * (1 - y),
        "TanhGrad": lambda y, g: g * (1 - y * y), "SqrtGrad": lambda y, g: g / (2 * y),
        "RsqrtGrad": lambda y, g: -0.5 * g * y**3, "ReciprocalGrad": lambda y, g: -g * y * y,
        "AbsGrad": lambda x, g: g * np.sign(x), "SiLUGrad": lambda g, x: _silu_grad(g, x),
        "BiasAdd": lambda x, bias: x + bias.reshape(1, -1, *[1] * (x.ndim - 2)),
        "LessScalar": np.less, "LessEqualScalar": np.less_equal, "GreaterScalar": np.greater,
        "GreaterEqualScalar": np.greater_equal, "EqualScalar": np.equal, "NotEqualScalar": np.not_equal,
        "FillV2": lambda shape, value: np.full(tuple(shape), value), "Full": lambda s, v: np.full(tuple(s), v),
    }.items()
}  # fmt: skip
RULES |= {
    "Select": plain(np.where, 3),
    "SelectV2": plain(np.where, 3),
    "MaskedFill": lambda node, x, mask, value: np.where(mask, value, x),
    "TransposeExt": plain(np.swapaxes, 3),
    "AddN": lambda node, items: sum(items[1:], start=items[0]),
    "AddExt": lambda node, x, y, alpha: x + alpha * y,
    "SubExt": lambda node, x, y, alpha: x - alpha * y,
    "MakeTuple": lambda node, *items: tuple(items),
    "MakeList": lambda node, *items: tuple(items),
    "TupleGetItem": lambda node, items, index: items[int(index)],
    "TensorToTuple": lambda node, x: tuple(int(item) for item in x),
    "Depend": lambda node, x, *after: x,
    "UpdateState": lambda node, *after: None,
    "Reshape": lambda node, x, shape: np.reshape(x, tuple(int(size) for size in np.atleast_1d(shape))
                                                 if np.size(shape) else ()),
    "Squeeze": lambda node, x, *dims: np.reshape(x, node.outputs[0].shape),
    "Flatten": lambda node, x: np.reshape(x, (len(x), -1)),
    "Concat": lambda node, items, dim=None: np.concatenate(items, _dim(node, dim)),
    "Stack": lambda node, items, dim=None: np.stack(items, _dim(node, dim)),
    "Pad": lambda node, x: np.pad(x, np.reshape(node.attributes["paddings"], (-1, 2))),
    "Range": lambda node, start, stop, step, *_: np.arange(start, stop, step),
    "Zeros": lambda node, shape, *_: np.zeros(tuple(np.atleast_1d(shape))),
    "Ones": lambda node, shape, *_: np.ones(tuple(np.atleast_1d(shape))),
}  # fmt: skip


def _dim(node: Node, dim: Any) -> int:
    return int(node.attributes.get("axis") or 0) if dim is None else int(dim)


def _silu_grad(gradient: np.ndarray, x: np.ndarray) -> np.ndarray:
    sigmoid = 1.0 / (1.0 + np.exp(-x))
    return gradient * (sigmoid + x * sigmoid * (1.0 - sigmoid))


def _reduction(function: Callable) -> Rule:
    return lambda node, x, dims=None, keep=False, *_: function(x, axis=axes_of(dims, np.ndim(x)), keepdims=bool(keep))


RULES |= {name: _reduction(function) for name, function in {
    "ReduceSum": np.sum, "SumExt": np.sum, "ReduceMax": np.max, "ReduceMin": np.min, "ReduceMean": np.mean,
    "MeanExt": np.mean, "ReduceAny": np.any, "ReduceAll": np.all, "ReduceProd": np.prod}.items()}


@rule("MatMul", "BatchMatMul", "MatMulExt", "Mm", "Bmm", "MatMulV2")
def _matmul(node: Node, a: np.ndarray, b: np.ndarray, left: Any = False, right: Any = False, *_: Any) -> np.ndarray:
    if left:
        a = np.swapaxes(a, -1, -2)
    if right:
        b = np.swapaxes(b, -1, -2)
    return np.matmul(a, b)


_MASKS = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")


@rule("StridedSlice")
def _strided_slice(node: Node, x: np.ndarray, begin: Any, end: Any, strides: Any, *masks: int) -> np.ndarray:
    return x[_index(begin, end, strides, *masks)]


@rule("StridedSliceGrad")
def _strided_slice_grad(node: Node, gradient: np.ndarray, shape: Any, begin: Any, end: Any, strides: Any,
                        *masks: int) -> np.ndarray:
    out = np.zeros(tuple(shape), gradient.dtype)
    # The gradient has its masks as attributes.
    out[_index(begin, end, strides, *(masks or (int(node.attributes.get(name) or 0) for name in _MASKS)))] = gradient
    return out


def _index(begin: Sequence[int], end: Sequence[int], strides: Sequence[int], begin_mask: int = 0, end_mask: int = 0,
           ellipsis_mask: int = 0, new_axis_mask: int = 0, shrink_mask: int = 0) -> tuple:
    """NumPy's index of a StridedSlice; a mask's bit i says something else about entry i."""
    index: list[Any] = []
    for i, (b, e, s) in enumerate(zip(begin, end, strides, strict=True)):
        if ellipsis_mask >> i & 1:
            index.append(Ellipsis)
        elif new_axis_mask >> i & 1:
            index.append(None)
        elif shrink_mask >> i & 1:
            index.append(int(b))
        else:
            index.append(slice(None if begin_mask >> i & 1 else int(b), None if end_mask >> i & 1 else int(e), int(s)))
    return tuple(index)


@rule("Slice")
def _slice(node: Node, x: np.ndarray, begin: Sequence[int], size: Sequence[int]) -> np.ndarray:
    return x[tuple(slice(b, b + s if s >= 0 else None) for b, s in zip(begin, size, strict=True))]


@rule("SliceGrad")
def _slice_grad(node: Node, gradient: np.ndarray, x: np.ndarray, begin: Sequence[int],
                size: Sequence[int]) -> np.ndarray:
    out = np.zeros_like(x)
    out[tuple(slice(b, b + s) for b, s in zip(begin, size, strict=True))] = gradient
    return out


@rule("Gather")
def _gather(node: Node, table: np.ndarray, ids: np.ndarray, dim: int, batch_dims: int = 0) -> np.ndarray:
    if not int(batch_dims):
        return np.take(table, ids, axis=int(dim))
    # The first dims of both are indexed together; what is taken replaces `dim`.
    shared = int(batch_dims)
    rows, picked = table.reshape(-1, *table.shape[shared:]), ids.reshape(-1, *ids.shape[shared:])
    found = np.stack([np.take(row, pick, axis=int(dim) - shared) for row, pick in zip(rows, picked, strict=True)])
    return found.reshape(*table.shape[:shared], *found.shape[1:])


@rule("GatherD")
def _gather_d(node: Node, x: np.ndarray, dim: int, ids: np.ndarray) -> np.ndarray:
    return np.take_along_axis(x, ids.astype(np.int64), int(dim))


@rule("UnsortedSegmentSum")
def _segment_sum(node: Node, x: np.ndarray, ids: np.ndarray, count: int) -> np.ndarray:
    rest = x.shape[np.ndim(ids):]
    out = np.zeros((int(count), *rest), x.dtype)
    flat, rows = ids.reshape(-1), x.reshape(-1, *rest)
    kept = (flat >= 0) & (flat < count)
    np.add.at(out, flat[kept], rows[kept])
    return out


@rule("OneHot")
def _one_hot(node: Node, ids: np.ndarray, depth: int, on: Any, off: Any, dim: int = -1) -> np.ndarray:
    # Ids outside [0, depth) have no 1: so a slice of the classes sees only its own.
    hit = np.expand_dims(ids, -1) == np.arange(int(depth))
    return np.moveaxis(np.where(hit, on, off), -1, int(dim))


@rule("Split", "SplitWithSize")
def _split(node: Node, x: np.ndarray, *numbers: Any) -> tuple[np.ndarray, ...]:
    if node.op == "SplitWithSize":
        sizes, dim = numbers
        return tuple(np.split(x, np.cumsum(sizes)[:-1], axis=int(dim)))
    dim, parts = numbers if len(numbers) == 2 else (node.attributes["axis"], node.attributes["output_num"])
    return tuple(np.split(x, int(parts), axis=int(dim)))


@rule("Unstack")
def _unstack(node: Node, x: np.ndarray, dim: Any = None, *_: Any) -> tuple[np.ndarray, ...]:
    return tuple(np.moveaxis(x, _dim(node, dim), 0))


@rule("Softmax", "LogSoftmax")
def _softmax(node: Node, x: np.ndarray, dims: Any = -1) -> np.ndarray:
    axis = axes_of(dims, x.ndim)
    shifted = x - x.max(axis=axis, keepdims=True)
    total = np.exp(shifted).sum(axis=axis, keepdims=True)
    return shifted - np.log(total) if node.op == "LogSoftmax" else np.exp(shifted) / total


@rule("SoftmaxBackward", "SoftmaxGrad")
def _softmax_backward(node: Node, gradient: np.ndarray, y: np.ndarray, dims: Any = -1) -> np.ndarray:
    return y * (gradient - (gradient * y).sum(axis=axes_of(dims, y.ndim), keepdims=True))


@rule("LayerNorm")
def _layer_norm(node: Node, x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, begin: int, begin_params: int,
                epsilon: float) -> tuple:
    axis = tuple(range(int(begin) % x.ndim, x.ndim))
    mean, variance = x.mean(axis=axis, keepdims=True), x.var(axis=axis, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * gamma + beta, mean, variance


@rule("LayerNormGrad")
def _layer_norm_grad(node: Node, x: np.ndarray, gradient: np.ndarray, variance: np.ndarray, mean: np.ndarray,
                     gamma: np.ndarray, begin: int, begin_params: int, *epsilon: float) -> tuple:
    first = int(begin) % x.ndim
    inner, outer = tuple(range(first, x.ndim)), tuple(range(int(begin_params) % x.ndim))
    small = epsilon[0] if epsilon else node.attributes["epsilon"]
    inverse = 1.0 / np.sqrt(variance.reshape(*x.shape[:first], *[1] * len(inner)) + small)
    normed = (x - mean.reshape(inverse.shape)) * inverse
    scaled = gradient * gamma
    centred = scaled - scaled.mean(axis=inner, keepdims=True)
    dx = inverse * (centred - normed * (scaled * normed).mean(axis=inner, keepdims=True))
    return dx, (gradient * normed).sum(axis=outer), gradient.sum(axis=outer)


@rule("RmsNorm")
def _rms_norm(node: Node, x: np.ndarray, gamma: np.ndarray, epsilon: float) -> tuple:
    inverse = 1.0 / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + epsilon)
    return x * inverse * gamma, inverse


@rule("RmsNormGrad")
def _rms_norm_grad(node: Node, gradient: np.ndarray, x: np.ndarray, inverse: np.ndarray, gamma: np.ndarray) -> tuple:
    normed, scaled = x * inverse, gradient * gamma
    dx = inverse * (scaled - normed * (scaled * normed).mean(axis=-1, keepdims=True))
    return dx, (gradient * normed).sum(axis=tuple(range(x.ndim - gamma.ndim)))


_GELU_A, _GELU_B = math.sqrt(2.0 / math.pi), 0.044715


@rule("GeLU")
def _gelu(node: Node, x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1.0 + np.tanh(_GELU_A * (x + _GELU_B * x**3)))


@rule("GeLUGrad")
def _gelu_grad(node: Node, gradient: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    tanh = np.tanh(_GELU_A * (x + _GELU_B * x**3))
    inner = _GELU_A * (1.0 + 3.0 * _GELU_B * x * x)
    return gradient * (0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner)


@rule("GroupedMatmul")
def _grouped(node: Node, rows: Sequence[np.ndarray], weights: Sequence[np.ndarray], *more: Any) -> tuple:
    """Consecutive rows times a weight each; the last of the tensors says where the rows of each weight end."""
    (x_NI,), (w_EIO,), ends = rows, weights, more[5]
    y_NO = np.zeros((len(x_NI), w_EIO.shape[2]), x_NI.dtype)
    for number, (first, last) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        y_NO[int(first):int(last)] = x_NI[int(first):int(last)] @ w_EIO[number]
    return (y_NO,)


@rule("TopK")
def _top(node: Node, x: np.ndarray, count: int) -> tuple:
    order = np.argsort(-x, axis=-1, kind="stable")[..., :int(count)]
    return np.take_along_axis(x, order, -1), order.astype(np.int32)


@rule("CumSum", "CumsumExt")
def _cumulate(node: Node, x: np.ndarray, dim: int, *_: Any) -> np.ndarray:
    if node.attributes.get("reverse"):
        x = np.flip(x, int(dim))
    total = np.cumsum(x, axis=int(dim))
    if node.attributes.get("exclusive"):
        total = total - x
    return np.flip(total, int(dim)) if node.attributes.get("reverse") else total


@rule("ScatterNd")
def _scatter(node: Node, ids: np.ndarray, updates: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    out = np.zeros(tuple(shape), updates.dtype)
    np.add.at(out, tuple(np.moveaxis(ids, -1, 0)), updates)
    return out


@rule("GatherNd")
def _gather_nd(node: Node, x: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return x[tuple(np.moveaxis(ids, -1, 0))]


@rule("Einsum")
def _einsum(node: Node, items: Sequence[np.ndarray], *_: Any) -> np.ndarray:
    return np.einsum(node.attributes["equation"], *items)


@rule("DynamicBroadcastGradientArgs", "BroadcastGradientArgs")
def _broadcast_dims(node: Node, one: Sequence[int], other: Sequence[int]) -> tuple:
    size = max(len(one), len(other))
    a, b = ((1,) * (size - len(shape)) + tuple(shape) for shape in (one, other))
    return tuple(i for i in range(size) if a[i] < b[i]), tuple(i for i in range(size) if b[i] < a[i])


# Numbers of FlashAttentionScore's input layouts.
BNSD, TND = 1, 4


def _sequences(q: np.ndarray, hidden: np.ndarray | None, ends: tuple | None, other: tuple | None, layout: int,
               sparse: int) -> list[tuple[Any, np.ndarray | bool]]:
    """(index of its rows, which pairs of positions are hidden) of every sequence that FlashAttentionScore runs over.

    Raises:
        ValueError: a mode that no model uses, or ends that do not reach the last row.
    """
    if int(layout) == BNSD and ends is None and int(sparse) == 0:
        return [((Ellipsis,), False if hidden is None else hidden.astype(bool))]
    if int(layout) != TND or ends != other or int(sparse) not in (2, 3):
        raise ValueError(f"no rule for FlashAttentionScore with layout {layout}, sparse mode {sparse}")
    if not np.array_equal(hidden, np.triu(np.ones_like(hidden), 1)) or ends[-1] != len(q):
        raise ValueError(f"FlashAttentionScore with a mask that is not causal, or {ends[-1]} of {len(q)} rows")
    return [(slice(start, end), np.triu(np.ones((end - start, end - start), bool), 1))
            for start, end in zip((0, *ends[:-1]), ends, strict=True) if end > start]


def _heads_first(x: np.ndarray) -> np.ndarray:
    """[s, H, K] of one sequence as [H, s, K]; [B, H, S, K] as it is. Its own inverse."""
    return np.swapaxes(x, 0, 1) if x.ndim == 3 else x


def _kept(bits: np.ndarray | None, keep: float) -> Any:
    """What the probabilities are multiplied by: 0 or 1 / keep (a float32), the first column in the lowest bit."""
    grown = float(np.float32(1.0) / np.float32(keep))
    return 1.0 if bits is None else np.unpackbits(bits, axis=-1, bitorder="little") * grown


@rule("FlashAttentionScore")
def _flash(node: Node, q: np.ndarray, k: np.ndarray, v: np.ndarray, shift: None, bits: Any, padding: None, mask: Any,
           prefix: None, ends: Any, other: Any, heads: int, keep: float, scale: float, before: int, after: int,
           precise: int, layout: int, sparse: int) -> tuple:
    kept, out = _kept(bits, keep), np.empty_like(v)
    largest, total = (np.empty((*q.shape[:-1], 8), q.dtype) for _ in range(2))
    for rows, hidden in _sequences(q, mask, ends, other, layout, sparse):
        queries, keys, values = (_heads_first(x[rows]) for x in (q, k, v))
        scores = np.where(hidden, -np.inf, queries @ np.swapaxes(keys, -1, -2) * scale)
        top = scores.max(axis=-1, keepdims=True)
        p = np.exp(scores - top)
        row_sum = p.sum(axis=-1, keepdims=True)
        out[rows] = _heads_first((p / row_sum * kept) @ values)
        largest[rows], total[rows] = _heads_first(top), _heads_first(row_sum)
    return largest, total, np.zeros(1, q.dtype), out


@rule("FlashAttentionScoreGrad")
def _flash_grad(node: Node, q: np.ndarray, k: np.ndarray, v: np.ndarray, gradient: np.ndarray, shift: None, bits: Any,
                padding: None, mask: Any, largest: np.ndarray, total: np.ndarray, unused: Any, out: np.ndarray,
                prefix: None, ends: Any, other: Any, heads: int, keep: float, scale: float, before: int, after: int,
                precise: int, layout: int, sparse: int) -> tuple:
    kept = _kept(bits, keep)
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    for rows, hidden in _sequences(q, mask, ends, other, layout, sparse):
        queries, keys, values, dy, y, top, row_sum = (_heads_first(x[rows]) for x in (q, k, v, gradient, out, largest,
                                                                                      total))
        scores = np.where(hidden, -np.inf, queries @ np.swapaxes(keys, -1, -2) * scale)
        p = np.exp(scores - top[..., :1]) / row_sum[..., :1]
        ds = p * (dy @ np.swapaxes(values, -1, -2) * kept - (dy * y).sum(axis=-1, keepdims=True)) * scale
        dv[rows] = _heads_first(np.swapaxes(p * kept, -1, -2) @ dy)
        dq[rows], dk[rows] = _heads_first(ds @ keys), _heads_first(np.swapaxes(ds, -1, -2) @ queries)
    return dq, dk, dv, np.zeros(1, q.dtype)


@rule("AdamWeightDecay", table=UPDATES)
def _adam(node: Node, p: np.ndarray, m: np.ndarray, v: np.ndarray, rate: Any, beta1: Any, beta2: Any, epsilon: Any,
          decay: Any, gradient: np.ndarray, *_: Any) -> tuple:
    rate, beta1, beta2, epsilon, decay, one = (p.dtype.type(item) for item in (rate, beta1, beta2, epsilon, decay, 1.0))
    m = beta1 * m + (one - beta1) * gradient
    v = beta2 * v + (one - beta2) * gradient * gradient
    return p - rate * (m / (np.sqrt(v) + epsilon) + decay * p), m, v


def _scatter_update(node: Node, p: np.ndarray, rows: np.ndarray, value: np.ndarray, *_: Any) -> tuple:
    new = p.copy()
    new[rows] = value
    return (new,)


def _scatter_sub(node: Node, p: np.ndarray, rows: np.ndarray, value: np.ndarray, *_: Any) -> tuple:
    new = p.copy()
    np.subtract.at(new, rows, value)
    return (new,)


UPDATES |= {
    "ScatterUpdate": _scatter_update,
    "ScatterSub": _scatter_sub,
    "Assign": lambda node, p, value, *_: (value,),
    "AssignAdd": lambda node, p, value, *_: (p + value,),
    "AssignSub": lambda node, p, value, *_: (p - value,),
    "InplaceZero": lambda node, p, *_: (np.zeros_like(p),),
    "InplaceCopy": lambda node, p, value, *_: (np.broadcast_to(value, p.shape),),
}
