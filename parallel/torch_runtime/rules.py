"""One rule per primitive: what it computes on one rank, in PyTorch. The twin of `parallel/proof/replay/numpy_ops.py`,
with which the tests compare it; a new primitive is one line (or one function) in both.

A rule takes the node and its inputs (tensors; Python numbers, booleans and tuples for constants, zero-dim ones
included) and returns a tensor or a tuple of tensors. `execute` casts the result to the type that the graph declares.
Primitives that write parameters are in UPDATES: they change their first inputs in place. Collectives are in `groups`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from parallel.common.errors import UserError
from parallel.torch_runtime.attention import flash
from parallel.torch_runtime.graph import Node

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
UPDATES: dict[str, Rule] = {}
VIEWS = {
    "Load", "Depend", "StopGradient", "Reshape", "Transpose", "TransposeExt", "ExpandDims", "Squeeze", "Flatten",
    "StridedSlice", "Slice", "Split", "SplitWithSize", "Unstack", "TupleGetItem", "MakeTuple", "MakeList", "Cast",
    "BroadcastTo", "Contiguous", "ScalarToTensor", "TensorToScalar", "TensorToTuple", "Tile", "AddN",
    "Item",
}  # fmt: skip
"""Primitives whose result may share memory with an input (a cast to the same type, a sum of one item...)."""


def rule(*names: str, table: dict[str, Rule] = RULES) -> Callable[[Rule], Rule]:
    """Registers `function(node, *inputs)` as the rule of the primitives `names`."""

    def register(function: Rule) -> Rule:
        table.update(dict.fromkeys(names, function))
        return function

    return register


def plain(function: Callable, count: int | None = None) -> Rule:
    """A rule from a function of the first `count` inputs."""
    return lambda node, *inputs: function(*inputs[:count])


def ints(value: Any) -> tuple[int, ...]:
    """A shape or a list of dims as integers."""
    if isinstance(value, Tensor):
        return tuple(int(item) for item in value.reshape(-1).tolist())
    return tuple(int(item) for item in value) if isinstance(value, (tuple, list)) else (int(value),)


def dims_of(value: Any, dims: int) -> tuple[int, ...]:
    """Dims as a tuple; none given means all of them."""
    listed = ints(value) if value is not None else ()
    return listed or tuple(range(dims))


def _maximum(x: Any, y: Any) -> Any:
    if not isinstance(x, Tensor):
        x, y = y, x
    return torch.maximum(x, y) if isinstance(y, Tensor) else x.clamp(min=y)


def _minimum(x: Any, y: Any) -> Any:
    if not isinstance(x, Tensor):
        x, y = y, x
    return torch.minimum(x, y) if isinstance(y, Tensor) else x.clamp(max=y)


def _truth(x: Any) -> Any:
    return x if not isinstance(x, Tensor) or x.dtype == torch.bool else x != 0


def _where(condition: Tensor, one: Any, other: Any) -> Tensor:
    if isinstance(one, float) and isinstance(other, float):  # torch would round both to float32
        one = torch.full((), one, dtype=torch.float64, device=condition.device)
    return torch.where(condition, one, other)


def _expand_dims(x: Tensor, dim: Any) -> Tensor:
    size = x.dim() + len(ints(dim))
    for place in sorted(item % size for item in ints(dim)):
        x = x.unsqueeze(place)
    return x


def _broadcast_to(x: Tensor, shape: Any) -> Tensor:
    return x.expand(ints(shape))


def _xdivy(x: Any, y: Any) -> Tensor:
    return torch.where(x == 0, torch.zeros_like(x / y), x / y)


RULES |= {
    name: plain(function, 1) for name, function in {
        "Exp": torch.exp, "Log": torch.log, "Sqrt": torch.sqrt, "Square": lambda x: x * x, "Neg": operator.neg,
        "Abs": torch.abs, "Cos": torch.cos, "Sin": torch.sin, "Tanh": torch.tanh, "IsFinite": torch.isfinite,
        "LogicalNot": lambda x: torch.logical_not(x), "Sign": torch.sign, "Floor": torch.floor, "ReLU": torch.relu,
        "Erf": torch.erf, "Log1p": torch.log1p, "Sigmoid": torch.sigmoid, "SiLU": lambda x: x * torch.sigmoid(x),
        "Rsqrt": torch.rsqrt, "Reciprocal": lambda x: 1.0 / x, "ZerosLike": torch.zeros_like,
        "OnesLike": torch.ones_like, "TensorMove": torch.clone, "Identity": torch.clone, "Load": lambda x: x,
        "StopGradient": lambda x: x, "Cast": lambda x: x, "ScalarToTensor": lambda x: x, "Size": torch.numel,
        "Shape": lambda x: tuple(x.shape), "TensorToScalar": lambda x: x, "Copy": torch.clone,
        "Contiguous": lambda x: x.contiguous(), "HSigmoid": lambda x: (x / 6 + 0.5).clamp(0, 1),
        "BitwiseNot": torch.bitwise_not,
    }.items()
}  # fmt: skip
RULES |= {
    name: plain(function, 2) for name, function in {
        "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Muls": operator.mul, "Div": operator.truediv,
        "Pow": operator.pow, "RealDiv": operator.truediv, "FloorDiv": operator.floordiv, "FloorMod": operator.mod,
        "Mod": torch.fmod, "Maximum": _maximum, "Minimum": _minimum, "Equal": operator.eq, "NotEqual": operator.ne,
        "Less": operator.lt, "Greater": operator.gt, "LessEqual": operator.le, "GreaterEqual": operator.ge,
        "LogicalAnd": lambda x, y: _truth(x) & _truth(y), "LogicalOr": lambda x, y: _truth(x) | _truth(y),
        "BitwiseXor": operator.xor, "BitwiseAnd": operator.and_, "BitwiseOr": operator.or_,
        "RightShift": operator.rshift, "ScalarAdd": operator.add, "ScalarMul": operator.mul, "Divs": operator.truediv,
        "Adds": operator.add, "Subs": operator.sub, "BitwiseAndTensor": operator.and_,
        "BitwiseRightShift": operator.rshift, "BitwiseLeftShift": operator.lshift, "BitwiseXorTensor": operator.xor,
        "BitwiseOrTensor": operator.or_, "BitwiseAndScalar": operator.and_, "BitwiseXorScalar": operator.xor,
        "BitwiseOrScalar": operator.or_, "Xdivy": _xdivy, "Tile": lambda x, times: torch.tile(x, ints(times)),
        "ReluGrad": lambda g, x: g * (x > 0), "BroadcastTo": _broadcast_to, "ExpandDims": _expand_dims,
        "Transpose": lambda x, order: x.permute(ints(order)), "SigmoidGrad": lambda y, g: g * y * (1 - y),
        "TanhGrad": lambda y, g: g * (1 - y * y), "SqrtGrad": lambda y, g: g / (2 * y),
        "RsqrtGrad": lambda y, g: -0.5 * g * y**3, "ReciprocalGrad": lambda y, g: -g * y * y,
        "AbsGrad": lambda x, g: g * torch.sign(x), "SiLUGrad": lambda g, x: _silu_grad(g, x),
        "BiasAdd": lambda x, bias: x + bias.reshape(1, -1, *[1] * (x.dim() - 2)),
        "LessScalar": operator.lt, "LessEqualScalar": operator.le, "GreaterScalar": operator.gt,
        "GreaterEqualScalar": operator.ge, "EqualScalar": operator.eq, "NotEqualScalar": operator.ne,
    }.items()
}  # fmt: skip
RULES |= {
    "Select": plain(_where, 3),
    "SelectV2": plain(_where, 3),
    "MaskedFill": lambda node, x, mask, value: torch.where(mask, value, x),
    "AddN": lambda node, items: sum(items[1:], start=items[0]),
    "AddExt": lambda node, x, y, alpha: x + alpha * y,
    "SubExt": lambda node, x, y, alpha: x - alpha * y,
    "MakeTuple": lambda node, *items: tuple(items),
    "MakeList": lambda node, *items: tuple(items),
    "TupleGetItem": lambda node, items, index: items[int(index)],
    "Depend": lambda node, x, *after: x,
    "TensorToTuple": lambda node, x: x,  # its readers take tensors, without waiting for the device
    "FlashAttentionScore": flash.forward, "FlashAttentionScoreGrad": flash.backward,
    "UpdateState": lambda node, *after: None,
    "Reshape": lambda node, x, shape: x.reshape(ints(shape)),
    "Squeeze": lambda node, x, *dims: x.reshape(node.outputs[0].shape),
    "Flatten": lambda node, x: x.reshape(x.shape[0], -1),
    "Concat": lambda node, items, dim=None: torch.cat(items, _dim(node, dim)),
    "Stack": lambda node, items, dim=None: torch.stack(items, _dim(node, dim)),
    "TransposeExt": lambda node, x, a, b, *_: x.transpose(int(a), int(b)),
}  # fmt: skip


@rule("Range", "Zeros", "Ones", "FillV2", "Full")
def _made(node: Node, *inputs: Any) -> Tensor:
    """What is made of numbers alone; the folder of constants puts it on the device."""
    if node.op == "Range":
        return torch.arange(*(float(item) if isinstance(item, Tensor) else item for item in inputs[:3]))
    value = {"Zeros": 0, "Ones": 1}.get(node.op, inputs[1] if len(inputs) > 1 else 0)
    dtype = torch.float32 if isinstance(value, (float, int)) and not isinstance(value, bool) else None
    return torch.full(ints(inputs[0]), value.item() if isinstance(value, Tensor) else value, dtype=dtype)


def _numbers(nested: Any) -> Iterator[int]:
    """All numbers of nested lists, in order."""
    if isinstance(nested, (list, tuple)):
        for item in nested:
            yield from _numbers(item)
    else:
        yield int(nested)


@rule("Pad")
def _pad(node: Node, x: Tensor) -> Tensor:
    flat = list(_numbers(node.attributes["paddings"]))
    pairs = list(zip(flat[::2], flat[1::2], strict=True))
    return nnf.pad(x, [size for pair in reversed(pairs) for size in pair])


def _dim(node: Node, dim: Any) -> int:
    return int(node.attributes.get("axis") or 0) if dim is None else int(dim)


def _silu_grad(gradient: Tensor, x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return gradient * (sigmoid + x * sigmoid * (1.0 - sigmoid))


def _prod(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    for dim in sorted((dim % x.dim() for dim in dims), reverse=True):
        x = x.prod(dim, keepdim=keep)
    return x


def _floating(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.float()


_REDUCTIONS: dict[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = {
    "ReduceSum": lambda x, dims, keep: x.sum(dims, keepdim=keep),
    "SumExt": lambda x, dims, keep: x.sum(dims, keepdim=keep),
    "ReduceMax": lambda x, dims, keep: x.amax(dims, keepdim=keep),
    "ReduceMin": lambda x, dims, keep: x.amin(dims, keepdim=keep),
    "ReduceMean": lambda x, dims, keep: _floating(x).mean(dims, keepdim=keep),
    "MeanExt": lambda x, dims, keep: _floating(x).mean(dims, keepdim=keep),
    "ReduceAny": lambda x, dims, keep: torch.any(x, dims, keepdim=keep),
    "ReduceAll": lambda x, dims, keep: torch.all(x, dims, keepdim=keep),
    "ReduceProd": _prod,
}


def _reduction(function: Callable) -> Rule:
    def reduced(node: Node, x: Tensor, dims: Any = None, keep: Any = False, *_: Any) -> Tensor:
        return function(x, dims_of(dims, x.dim()), bool(keep)) if x.dim() else function(x[None], (0,), False)

    return reduced


RULES |= {name: _reduction(function) for name, function in _REDUCTIONS.items()}


@rule("MatMul", "BatchMatMul", "MatMulExt", "Mm", "Bmm", "MatMulV2")
def _matmul(node: Node, a: Tensor, b: Tensor, left: Any = False, right: Any = False, *_: Any) -> Tensor:
    if left:
        a = a.transpose(-1, -2)
    if right:
        b = b.transpose(-1, -2)
    return torch.matmul(a, b)


_MASKS = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")


@rule("StridedSlice")
def _strided_slice(node: Node, x: Tensor, begin: Any, end: Any, strides: Any, *masks: int) -> Tensor:
    return x[_index(ints(begin), ints(end), ints(strides), *masks)]


@rule("StridedSliceGrad")
def _strided_slice_grad(node: Node, gradient: Tensor, shape: Any, begin: Any, end: Any, strides: Any,
                        *masks: int) -> Tensor:
    out = gradient.new_zeros(ints(shape))
    # The gradient has its masks as attributes.
    masks = masks or tuple(int(node.attributes.get(name) or 0) for name in _MASKS)
    out[_index(ints(begin), ints(end), ints(strides), *masks)] = gradient
    return out


def _index(begin: Sequence[int], end: Sequence[int], strides: Sequence[int], begin_mask: int = 0, end_mask: int = 0,
           ellipsis_mask: int = 0, new_axis_mask: int = 0, shrink_mask: int = 0) -> tuple:
    """The index of a StridedSlice; a mask's bit i says something else about entry i."""
    index: list[Any] = []
    for i, (b, e, s) in enumerate(zip(begin, end, strides, strict=True)):
        if ellipsis_mask >> i & 1:
            index.append(Ellipsis)
        elif new_axis_mask >> i & 1:
            index.append(None)
        elif shrink_mask >> i & 1:
            index.append(int(b))
        else:
            index.append(slice(None if begin_mask >> i & 1 else b, None if end_mask >> i & 1 else e, s))
    return tuple(index)


@rule("Slice")
def _slice(node: Node, x: Tensor, begin: Any, size: Any) -> Tensor:
    return x[tuple(slice(b, b + s if s >= 0 else None) for b, s in zip(ints(begin), ints(size), strict=True))]


@rule("SliceGrad")
def _slice_grad(node: Node, gradient: Tensor, x: Tensor, begin: Any, size: Any) -> Tensor:
    out = torch.zeros_like(x)
    out[tuple(slice(b, b + s) for b, s in zip(ints(begin), ints(size), strict=True))] = gradient
    return out


@rule("Gather")
def _gather(node: Node, table: Tensor, ids: Tensor, dim: int, batch_dims: int = 0) -> Tensor:
    dim, shared = int(dim), int(batch_dims)
    if not shared:
        dim %= table.dim()
        found = table.index_select(dim, ids.reshape(-1))
        return found.reshape(*table.shape[:dim], *ids.shape, *table.shape[dim + 1:])
    # The first dims of both are indexed together; what is taken replaces `dim`.
    batch, place = table.shape[:shared], dim % table.dim() - shared
    rows = table.reshape(-1, *table.shape[shared:]).movedim(place + 1, 1)  # [R, n, ...]
    count, size, rest = rows.shape[0], rows.shape[1], rows.shape[2:]
    picked = ids.reshape(count, -1) + torch.arange(count, device=ids.device)[:, None] * size
    found = rows.reshape(count * size, *rest).index_select(0, picked.reshape(-1))
    own = ids.shape[shared:]
    found = found.reshape(count, *own, *rest)
    if place:
        found = found.movedim(tuple(range(1, 1 + len(own))), tuple(range(1 + place, 1 + place + len(own))))
    return found.reshape(*batch, *found.shape[1:])


@rule("GatherD")
def _gather_d(node: Node, x: Tensor, dim: int, ids: Tensor) -> Tensor:
    ids = ids.long()
    return torch.gather(x, int(dim), torch.where(ids < 0, ids + x.shape[int(dim)], ids))


@rule("UnsortedSegmentSum")
def _segment_sum(node: Node, x: Tensor, ids: Tensor, count: int) -> Tensor:
    count, rest = int(count), x.shape[ids.dim():]
    # Ids outside [0, count) are added to a row that is left out.
    flat, rows = ids.reshape(-1).long(), x.reshape(-1, *rest)
    flat = torch.where((flat >= 0) & (flat < count), flat, count)
    out = x.new_zeros((count + 1, *rest))
    if x.is_cuda:  # sorts the ids, so that the order of additions is fixed; index_add uses atomics there
        return out.index_put_((flat,), rows, accumulate=True)[:count]
    return out.index_add_(0, flat, rows)[:count]


@rule("OneHot")
def _one_hot(node: Node, ids: Tensor, depth: int, on: Any, off: Any, dim: int = -1) -> Tensor:
    # Ids outside [0, depth) have no 1: so a slice of the classes sees only its own.
    hit = ids.unsqueeze(-1) == torch.arange(int(depth), device=ids.device, dtype=ids.dtype)
    return _where(hit, on, off).movedim(-1, int(dim))


@rule("Split", "SplitWithSize")
def _split(node: Node, x: Tensor, *numbers: Any) -> tuple[Tensor, ...]:
    if node.op == "SplitWithSize":
        sizes, dim = numbers[:2]
        return torch.split(x, list(ints(sizes)), int(dim))
    dim, parts = numbers if len(numbers) == 2 else (node.attributes["axis"], node.attributes["output_num"])
    return torch.split(x, x.shape[int(dim)] // int(parts), int(dim))


@rule("Unstack")
def _unstack(node: Node, x: Tensor, dim: Any = None, *_: Any) -> tuple[Tensor, ...]:
    return torch.unbind(x, _dim(node, dim))


@rule("Softmax", "LogSoftmax")
def _softmax(node: Node, x: Tensor, dims: Any = -1) -> Tensor:
    over = dims_of(dims, x.dim())
    if len(over) == 1:
        return (torch.log_softmax if node.op == "LogSoftmax" else torch.softmax)(x, over[0])
    shifted = x - x.amax(over, keepdim=True)
    total = shifted.exp().sum(over, keepdim=True)
    return shifted - total.log() if node.op == "LogSoftmax" else shifted.exp() / total


@rule("SoftmaxBackward", "SoftmaxGrad")
def _softmax_backward(node: Node, gradient: Tensor, y: Tensor, dims: Any = -1) -> Tensor:
    return y * (gradient - (gradient * y).sum(dims_of(dims, y.dim()), keepdim=True))


@rule("LayerNorm")
def _layer_norm(node: Node, x: Tensor, gamma: Tensor, beta: Tensor, begin: int, begin_params: int,
                epsilon: float) -> tuple:
    over = tuple(range(int(begin) % x.dim(), x.dim()))
    mean = x.mean(over, keepdim=True)
    centred = x - mean
    variance = (centred * centred).mean(over, keepdim=True)
    return centred * torch.rsqrt(variance + epsilon) * gamma + beta, mean, variance


@rule("LayerNormGrad")
def _layer_norm_grad(node: Node, x: Tensor, gradient: Tensor, variance: Tensor, mean: Tensor, gamma: Tensor,
                     begin: int, begin_params: int, *epsilon: float) -> tuple:
    first = int(begin) % x.dim()
    inner, outer = tuple(range(first, x.dim())), tuple(range(int(begin_params) % x.dim()))
    small = epsilon[0] if epsilon else node.attributes["epsilon"]
    inverse = torch.rsqrt(variance.reshape(*x.shape[:first], *[1] * len(inner)) + small)
    normed = (x - mean.reshape(inverse.shape)) * inverse
    scaled = gradient * gamma
    centred = scaled - scaled.mean(inner, keepdim=True)
    dx = inverse * (centred - normed * (scaled * normed).mean(inner, keepdim=True))
    return dx, (gradient * normed).sum(outer), gradient.sum(outer)


@rule("RmsNorm")
def _rms_norm(node: Node, x: Tensor, gamma: Tensor, epsilon: float) -> tuple:
    inverse = torch.rsqrt((x * x).mean(-1, keepdim=True) + epsilon)
    return x * inverse * gamma, inverse


@rule("RmsNormGrad")
def _rms_norm_grad(node: Node, gradient: Tensor, x: Tensor, inverse: Tensor, gamma: Tensor) -> tuple:
    normed, scaled = x * inverse, gradient * gamma
    dx = inverse * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return dx, (gradient * normed).sum(tuple(range(x.dim() - gamma.dim())))


_GELU_A, _GELU_B = math.sqrt(2.0 / math.pi), 0.044715


@rule("GeLU")
def _gelu(node: Node, x: Tensor) -> Tensor:
    return nnf.gelu(x, approximate="tanh")


@rule("GeLUGrad")
def _gelu_grad(node: Node, gradient: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(gradient, x, approximate="tanh")


@rule("GroupedMatmul")
def _grouped(node: Node, rows: Sequence[Tensor], weights: Sequence[Tensor], *more: Any) -> tuple:
    (x_NI,), (w_EIO,), ends = rows, weights, more[5]
    if x_NI.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UserError("captured graphs do not know how many rows an expert has", where="model.moe.dispatch",
                        value="dropless",
                        hint="set it to capacity (dense for ReLU gates), or parallel.execution to eager")
    sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    products = [x @ w for x, w in zip(x_NI[:sum(sizes)].split(sizes), w_EIO, strict=True)]
    return (torch.cat([*products, x_NI.new_zeros(len(x_NI) - sum(sizes), w_EIO.shape[2])]),)


@rule("TopK")
def _top(node: Node, x: Tensor, count: int) -> tuple:
    values, order = torch.sort(x, dim=-1, descending=True, stable=True)
    return values[..., :int(count)], order[..., :int(count)].int()


@rule("CumSum", "CumsumExt")
def _cumulate(node: Node, x: Tensor, dim: int, *_: Any) -> Tensor:
    if node.attributes.get("reverse"):
        x = x.flip(int(dim))
    total = x.cumsum(int(dim))
    if node.attributes.get("exclusive"):
        total = total - x
    return total.flip(int(dim)) if node.attributes.get("reverse") else total


@rule("ScatterNd")
def _scatter(node: Node, ids: Tensor, updates: Tensor, shape: Any) -> Tensor:
    return updates.new_zeros(ints(shape)).index_put_(ids.long().unbind(-1), updates, accumulate=True)


@rule("GatherNd")
def _gather_nd(node: Node, x: Tensor, ids: Tensor) -> Tensor:
    return x[ids.long().unbind(-1)]


@rule("Einsum")
def _einsum(node: Node, items: Sequence[Tensor], *_: Any) -> Tensor:
    return torch.einsum(node.attributes["equation"], *items)


@rule("DynamicBroadcastGradientArgs", "BroadcastGradientArgs")
def _broadcast_dims(node: Node, one: Any, other: Any) -> tuple:
    one, other = ints(one), ints(other)
    size = max(len(one), len(other))
    a, b = ((1,) * (size - len(shape)) + tuple(shape) for shape in (one, other))
    return tuple(i for i in range(size) if a[i] < b[i]), tuple(i for i in range(size) if b[i] < a[i])


@rule("AdamWeightDecay", table=UPDATES)
def _adam(node: Node, p: Tensor, m: Tensor, v: Tensor, rate: Any, beta1: Any, beta2: Any, epsilon: Any, decay: Any,
          gradient: Tensor, *_: Any) -> None:
    m.mul_(beta1).add_((1.0 - beta1) * gradient)
    v.mul_(beta2).add_((1.0 - beta2) * gradient * gradient)
    p.sub_(rate * (m / (v.sqrt() + epsilon) + decay * p))


def _assign(node: Node, p: Tensor, value: Any, *_: Any) -> None:
    if isinstance(value, Tensor):
        p.copy_(value.reshape(p.shape) if value.numel() == p.numel() else value)
    else:
        p.fill_(value)


def _scatter_update(node: Node, p: Tensor, rows: Tensor, value: Tensor, *_: Any) -> None:
    p.index_copy_(0, rows.reshape(-1).long(), value.reshape(-1, *p.shape[1:]).to(p.dtype))


def _scatter_sub(node: Node, p: Tensor, rows: Tensor, value: Tensor, *_: Any) -> None:
    flat, values = rows.reshape(-1).long(), value.reshape(-1, *p.shape[1:]).to(p.dtype)
    if p.is_cuda:  # sorts the rows, so that the order of additions is fixed; index_add uses atomics there
        p.index_put_((flat,), -values, accumulate=True)
    else:
        p.index_add_(0, flat, values, alpha=-1)


UPDATES |= {
    "Assign": _assign,
    "ScatterUpdate": _scatter_update,
    "ScatterSub": _scatter_sub,
    "AssignAdd": lambda node, p, value, *_: p.add_(value),
    "AssignSub": lambda node, p, value, *_: p.sub_(value),
    "InplaceZero": lambda node, p, *_: p.zero_(),
    "InplaceCopy": lambda node, p, value, *_: p.copy_(value),
}
WRITES = {**dict.fromkeys(UPDATES, 1), "AdamWeightDecay": 3, "FusedAdam": 3, "FusedAdagrad": 2, "SlotAttention": 2}
"""How many of its first inputs a primitive (or a fused node) writes; those that write none are not named."""
ANSWERS = {"SlotAttention"}
"""Those of WRITES whose result is not the first of what they write."""
