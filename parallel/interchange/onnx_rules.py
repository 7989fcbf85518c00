"""One rule per primitive of a forward pass: the ONNX nodes that compute it. A new primitive is one line (or one
function) here, beside those of `parallel/proof/replay/numpy_ops.py` and `parallel/torch_runtime/rules.py`.

A rule takes the graph that grows, the node and its inputs (`Value`s; Python numbers and tuples, `Literal`s and free
sizes for constants) and returns a `Value` or a tuple of them. What it returns is cast to the type that the node
declares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parallel.common.errors import UserError
from parallel.interchange.onnx_graph import LAST, OnnxGraph, Value
from parallel.interchange.sizes import Size
from parallel.torch_runtime.graph import Node
from parallel.torch_runtime.rules import dims_of, ints

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
_FLOATS = ("float16", "float32", "float64")


@dataclass(frozen=True)
class At:
    """What a rule is given of its node: the node, the declared type of its result and its shape with free sizes; None
    where it has several results."""

    node: Node
    dtype: str | None
    shape: tuple | None


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers `function(graph, at, *inputs)` as the rule of the primitives `names`."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def unary(op: str) -> Rule:
    """A rule that is one ONNX operator of the first input."""
    return lambda g, at, x, *_: same(g, op, x)


def same(g: OnnxGraph, op: str, *inputs: Value, **attributes: Any) -> Value:
    """A node whose result has the type and dims of its first input."""
    return g.node(op, inputs, inputs[0].dtype, inputs[0].dims, **attributes)


def both(g: OnnxGraph, x: Any, y: Any, dtype: str | None = None) -> tuple[Value, Value]:
    """Two operands as tensors of one type: `dtype`, else that of the one that is computed."""
    if dtype is None:
        dtype = next((item.dtype for item in (x, y) if isinstance(item, Value)), None)
    return g.tensor(x, dtype), g.tensor(y, dtype)


def binary(op: str) -> Rule:
    """A rule that is one ONNX operator of two inputs, in the type of the result."""

    def made(g: OnnxGraph, at: At, x: Any, y: Any, *_: Any) -> Value:
        x, y = both(g, x, y, at.dtype)
        return g.node(op, [x, y], x.dtype, max(x.dims, y.dims))

    return made


def compared(op: str, negated: bool = False) -> Rule:
    """A rule that compares two inputs."""

    def made(g: OnnxGraph, at: At, x: Any, y: Any, *_: Any) -> Value:
        x, y = both(g, x, y)
        found = g.node(op, [x, y], "bool", max(x.dims, y.dims))
        return same(g, "Not", found) if negated else found

    return made


def passed(g: OnnxGraph, at: At, x: Any, *_: Any) -> Any:
    """The first input as it is."""
    return x


RULES |= {name: unary(op) for name, op in {
    "Exp": "Exp", "Log": "Log", "Sqrt": "Sqrt", "Neg": "Neg", "Abs": "Abs", "Cos": "Cos", "Sin": "Sin", "Tanh": "Tanh",
    "Sign": "Sign", "Floor": "Floor", "ReLU": "Relu", "Erf": "Erf", "Sigmoid": "Sigmoid", "Reciprocal": "Reciprocal",
    "LogicalNot": "Not"}.items()}
RULES |= {name: binary(op) for name, op in {
    "Add": "Add", "Sub": "Sub", "Mul": "Mul", "Muls": "Mul", "Div": "Div", "RealDiv": "Div", "Divs": "Div",
    "Adds": "Add", "Subs": "Sub", "Pow": "Pow", "Maximum": "Max", "Minimum": "Min", "ScalarAdd": "Add",
    "ScalarMul": "Mul", "LogicalAnd": "And", "LogicalOr": "Or"}.items()}
RULES |= {name: compared(*op) for name, op in {
    "Equal": ("Equal",), "NotEqual": ("Equal", True), "Less": ("Less",), "LessEqual": ("LessOrEqual",),
    "Greater": ("Greater",), "GreaterEqual": ("GreaterOrEqual",), "LessScalar": ("Less",),
    "LessEqualScalar": ("LessOrEqual",), "GreaterScalar": ("Greater",), "GreaterEqualScalar": ("GreaterOrEqual",),
    "EqualScalar": ("Equal",), "NotEqualScalar": ("Equal", True)}.items()}
RULES |= dict.fromkeys(("Load", "Depend", "StopGradient", "TensorMove", "Identity", "Copy", "Contiguous",
                        "ScalarToTensor", "TensorToScalar"), passed)
RULES |= {
    "UpdateState": lambda g, at, *_: None,
    "MakeTuple": lambda g, at, *items: tuple(items),
    "MakeList": lambda g, at, *items: tuple(items),
    "TupleGetItem": lambda g, at, items, index: items[int(index)],
    "Cast": lambda g, at, x, *_: g.tensor(x, at.dtype),
    "Square": lambda g, at, x: same(g, "Mul", x, x),
    "Rsqrt": lambda g, at, x: same(g, "Reciprocal", same(g, "Sqrt", x)),
    "SiLU": lambda g, at, x: same(g, "Mul", x, same(g, "Sigmoid", x)),
    "HSigmoid": lambda g, at, x: same(g, "HardSigmoid", x, alpha=1.0 / 6.0, beta=0.5),
    "Log1p": lambda g, at, x: same(g, "Log", same(g, "Add", x, g.array(1.0, x.dtype))),
    "Reshape": lambda g, at, x, shape: g.reshape(g.tensor(x), shape if isinstance(shape, tuple) else (shape,)),
    "Squeeze": lambda g, at, x, *_: g.reshape(x, at.shape),
    "Flatten": lambda g, at, x: same(g, "Flatten", x, axis=1),
    "Transpose": lambda g, at, x, order: g.transpose(x, order),
    "AddN": lambda g, at, items: same(g, "Sum", *(g.tensor(item, at.dtype) for item in items)),
    "IsFinite": lambda g, at, x: same(g, "Not", g.node("Or", [g.node(op, [x], "bool", x.dims) for op in (
        "IsNaN", "IsInf")], "bool", x.dims)),
}  # fmt: skip


@rule("AddExt", "SubExt")
def _add_scaled(g: OnnxGraph, at: At, x: Any, y: Any, alpha: Any) -> Value:
    x, y = both(g, x, y, at.dtype)
    y = y if alpha == 1 else same(g, "Mul", y, g.array(alpha, y.dtype))
    return g.node("Add" if at.node.op == "AddExt" else "Sub", [x, y], x.dtype, max(x.dims, y.dims))


@rule("FloorDiv", "FloorMod")
def _floored(g: OnnxGraph, at: At, x: Any, y: Any) -> Value:
    x, y = both(g, x, y, at.dtype)
    dims = max(x.dims, y.dims)
    if x.dtype in _FLOATS:
        whole = same(g, "Floor", g.node("Div", [x, y], x.dtype, dims))
        if at.node.op == "FloorDiv":
            return whole
        return g.node("Sub", [x, g.node("Mul", [whole, y], x.dtype, dims)], x.dtype, dims)
    rest = g.node("Mod", [x, y], x.dtype, dims)  # of whole numbers it has the divisor's sign
    if at.node.op == "FloorMod":
        return rest
    return g.node("Div", [g.node("Sub", [x, rest], x.dtype, dims), y], x.dtype, dims)


@rule("ZerosLike", "OnesLike")
def _like(g: OnnxGraph, at: At, x: Value) -> Value:
    value = g.array(0 if at.node.op == "ZerosLike" else 1, x.dtype)
    return g.node("Expand", [value, g.node("Shape", [x], "int64", 1)], x.dtype, x.dims)


@rule("Zeros", "Ones", "FillV2", "Full")
def _made(g: OnnxGraph, at: At, shape: Any, value: Any = None, *_: Any) -> Value:
    value = {"Zeros": 0, "Ones": 1}.get(at.node.op, value)
    return g.filled(shape if isinstance(shape, tuple) else (shape,), value, at.dtype)


@rule("Select", "SelectV2")
def _select(g: OnnxGraph, at: At, condition: Value, x: Any, y: Any) -> Value:
    x, y = both(g, x, y, at.dtype)
    return g.node("Where", [g.tensor(condition, "bool"), x, y], x.dtype, max(condition.dims, x.dims, y.dims))


@rule("MaskedFill")
def _masked(g: OnnxGraph, at: At, x: Value, mask: Value, value: Any) -> Value:
    return g.node("Where", [mask, g.tensor(value, x.dtype), x], x.dtype, max(x.dims, mask.dims))


@rule("ExpandDims")
def _expand_dims(g: OnnxGraph, at: At, x: Value, dim: Any) -> Value:
    listed = ints(dim)
    return g.node("Unsqueeze", [g.tensor(x), g.array(list(listed), "int64")], x.dtype, x.dims + len(listed))


def _dim(at: At, dim: Any) -> int:
    return int(at.node.attributes.get("axis") or 0) if dim is None else int(dim)


@rule("Concat")
def _concat(g: OnnxGraph, at: At, items: Sequence[Any], dim: Any = None) -> Value:
    tensors = [g.tensor(item, at.dtype) for item in items]
    return g.node("Concat", tensors, at.dtype, tensors[0].dims, axis=_dim(at, dim))


@rule("Stack")
def _stack(g: OnnxGraph, at: At, items: Sequence[Any], dim: Any = None) -> Value:
    place = _dim(at, dim)
    tensors = [g.unsqueeze(g.tensor(item, at.dtype), place) for item in items]
    return g.node("Concat", tensors, at.dtype, tensors[0].dims, axis=place)


@rule("Split", "SplitWithSize")
def _split(g: OnnxGraph, at: At, x: Value, *numbers: Any) -> tuple[Value, ...]:
    if at.node.op == "SplitWithSize":
        sizes, dim = numbers[:2]
        kinds = [(x.dtype, x.dims)] * len(sizes)
        return tuple(g.several("Split", [x, g.ints(sizes)], kinds, axis=int(dim)))
    dim, parts = numbers if len(numbers) == 2 else (at.node.attributes["axis"], at.node.attributes["output_num"])
    return tuple(g.several("Split", [x], [(x.dtype, x.dims)] * int(parts), axis=int(dim), num_outputs=int(parts)))


@rule("Tile")
def _tile(g: OnnxGraph, at: At, x: Any, times: Any) -> Value:
    x = g.tensor(x)
    times = tuple(times) if isinstance(times, tuple) else (times,)
    x = g.reshape(x, at.shape) if x.dims == 0 and not times else x
    while x.dims < len(times):
        x = g.unsqueeze(x, 0)
    return g.node("Tile", [x, g.ints((1,) * (x.dims - len(times)) + times)], x.dtype, x.dims)


@rule("BroadcastTo")
def _broadcast_to(g: OnnxGraph, at: At, x: Any, shape: tuple) -> Value:
    return g.node("Expand", [g.tensor(x), g.ints(tuple(1 if size == -1 else size for size in shape))], at.dtype,
                  len(shape))


@rule("Pad")
def _pad(g: OnnxGraph, at: At, x: Value) -> Value:
    pairs = np.reshape(at.node.attributes["paddings"], (-1, 2))
    return same(g, "Pad", x, g.array(pairs.T.reshape(-1), "int64"))


def reduced(op: str) -> Rule:
    """A rule that reduces dims."""

    def made(g: OnnxGraph, at: At, x: Value, dims: Any = None, keep: Any = False, *_: Any) -> Value:
        over = [dim % x.dims for dim in dims_of(dims, x.dims)]
        dims_left = x.dims if keep else x.dims - len(over)
        return g.node(op, [g.tensor(x, at.dtype), g.array(over, "int64")], at.dtype, dims_left,
                      keepdims=int(bool(keep)))

    return made


RULES |= {name: reduced(op) for name, op in {
    "ReduceSum": "ReduceSum", "SumExt": "ReduceSum", "ReduceMax": "ReduceMax", "ReduceMin": "ReduceMin",
    "ReduceMean": "ReduceMean", "MeanExt": "ReduceMean", "ReduceProd": "ReduceProd"}.items()}


def _turned(g: OnnxGraph, x: Value) -> Value:
    return g.transpose(x, [*range(x.dims - 2), x.dims - 1, x.dims - 2])


@rule("MatMul", "BatchMatMul", "MatMulExt", "Mm", "Bmm", "MatMulV2")
def _matmul(g: OnnxGraph, at: At, a: Any, b: Any, left: Any = False, right: Any = False, *_: Any) -> Value:
    a, b = both(g, a, b)
    a, b = _turned(g, a) if left else a, _turned(g, b) if right else b
    return g.node("MatMul", [a, b], a.dtype, max(a.dims, b.dims))


@rule("BiasAdd")
def _bias(g: OnnxGraph, at: At, x: Value, bias: Value) -> Value:
    return same(g, "Add", x, g.reshape(bias, (1, -1, *[1] * (x.dims - 2))))


@rule("StridedSlice")
def _strided_slice(g: OnnxGraph, at: At, x: Value, begin: tuple, end: tuple, strides: tuple, begin_mask: int = 0,
                   end_mask: int = 0, ellipsis_mask: int = 0, new_axis_mask: int = 0, shrink_mask: int = 0) -> Value:
    starts, ends, steps, over, dim = [], [], [], [], 0
    given = sum(not new_axis_mask >> i & 1 and not ellipsis_mask >> i & 1 for i in range(len(begin)))
    for i, (b, e, s) in enumerate(zip(begin, end, strides, strict=True)):
        if ellipsis_mask >> i & 1:
            dim += x.dims - given
            continue
        if new_axis_mask >> i & 1:
            continue
        if shrink_mask >> i & 1:
            b, e, s = b, (b + 1 if b != -1 else LAST), 1
        else:
            b = (0 if s > 0 else LAST) if begin_mask >> i & 1 else b
            e = (LAST if s > 0 else -LAST) if end_mask >> i & 1 else e
        starts.append(b), ends.append(e), steps.append(s), over.append(dim)
        dim += 1
    if over:
        x = same(g, "Slice", x, g.ints(tuple(starts)), g.ints(tuple(ends)), g.array(over, "int64"),
                 g.ints(tuple(steps)))
    return g.reshape(x, at.shape) if shrink_mask or new_axis_mask else x


@rule("Slice")
def _slice(g: OnnxGraph, at: At, x: Value, begin: tuple, size: tuple) -> Value:
    ends = tuple(LAST if s == -1 else s + b if isinstance(s, Size) else b + s for b, s in zip(begin, size, strict=True))
    return same(g, "Slice", x, g.ints(tuple(begin)), g.ints(ends))


@rule("Gather")
def _gather(g: OnnxGraph, at: At, table: Any, ids: Any, dim: int, batch_dims: int = 0) -> Value:
    table, ids, dim, shared = g.tensor(table), g.tensor(ids), int(dim), int(batch_dims)
    if not shared:
        return g.node("Gather", [table, ids], table.dtype, table.dims + ids.dims - 1, axis=dim % table.dims)
    # GatherND takes rows right behind the dims that both are walked along together: `dim` is moved there and back.
    dim, dims = dim % table.dims, table.dims + ids.dims - 1 - shared
    table = g.transpose(table, [*range(shared), dim, *range(shared, dim), *range(dim + 1, table.dims)])
    places = g.cast(g.unsqueeze(ids, ids.dims), "int64")
    found = g.node("GatherND", [table, places], table.dtype, dims, batch_dims=shared)
    before = range(ids.dims, ids.dims + dim - shared)
    return g.transpose(found, [*range(shared), *before, *range(shared, ids.dims), *range(before.stop, dims)])


@rule("GatherD")
def _gather_d(g: OnnxGraph, at: At, x: Value, dim: int, ids: Value) -> Value:
    return g.node("GatherElements", [x, ids], x.dtype, ids.dims, axis=int(dim))


@rule("GatherNd")
def _gather_nd(g: OnnxGraph, at: At, x: Value, ids: Value) -> Value:
    return g.node("GatherND", [x, g.cast(ids, "int64")], x.dtype, len(at.shape))


@rule("OneHot")
def _one_hot(g: OnnxGraph, at: At, ids: Value, depth: int, on: Any, off: Any, dim: int = -1) -> Value:
    hit = g.node("Equal", [g.unsqueeze(ids, ids.dims), g.array(np.arange(int(depth)), ids.dtype)], "bool", ids.dims + 1)
    found = g.node("Where", [hit, g.tensor(on, at.dtype), g.tensor(off, at.dtype)], at.dtype, ids.dims + 1)
    if int(dim) in (-1, ids.dims):
        return found
    order = list(range(ids.dims))
    order.insert(int(dim), ids.dims)
    return g.transpose(found, order)


@rule("Softmax", "LogSoftmax")
def _softmax(g: OnnxGraph, at: At, x: Value, dims: Any = -1) -> Value:
    over = dims_of(dims, x.dims)
    if len(over) != 1:
        raise UserError("a softmax over several dims has no rule", where=at.node.scope)
    return same(g, at.node.op, x, axis=int(over[0]))


@rule("LayerNorm")
def _layer_norm(g: OnnxGraph, at: At, x: Value, gamma: Value, beta: Value, begin: int, begin_params: int,
                epsilon: float) -> tuple:
    return same(g, "LayerNormalization", x, gamma, beta, axis=int(begin), epsilon=float(epsilon)), None, None


@rule("RmsNorm")
def _rms_norm(g: OnnxGraph, at: At, x: Value, gamma: Value, epsilon: float) -> tuple:
    mean = same(g, "ReduceMean", same(g, "Mul", x, x), g.array([x.dims - 1], "int64"), keepdims=1)
    root = same(g, "Sqrt", same(g, "Add", mean, g.array(epsilon, x.dtype)))
    inverse = same(g, "Reciprocal", root)
    return same(g, "Mul", same(g, "Mul", x, inverse), gamma), inverse


@rule("GeLU")
def _gelu(g: OnnxGraph, at: At, x: Value) -> Value:
    def number(value: float) -> Value:
        return g.array(value, x.dtype)

    cube = same(g, "Mul", same(g, "Mul", x, x), x)
    inner = same(g, "Add", x, same(g, "Mul", cube, number(0.044715)))
    tanh = same(g, "Tanh", same(g, "Mul", inner, number(math.sqrt(2.0 / math.pi))))
    return same(g, "Mul", same(g, "Mul", x, number(0.5)), same(g, "Add", tanh, number(1.0)))


@rule("TopK")
def _top(g: OnnxGraph, at: At, x: Value, count: Any) -> tuple:
    values, order = g.several("TopK", [x, g.ints(count)], [(x.dtype, x.dims), ("int64", x.dims)], axis=-1)
    return values, g.cast(order, "int32")


@rule("CumSum", "CumsumExt")
def _cumulate(g: OnnxGraph, at: At, x: Value, dim: int, *_: Any) -> Value:
    flags = {name: int(bool(at.node.attributes.get(name))) for name in ("exclusive", "reverse")}
    return same(g, "CumSum", g.tensor(x, at.dtype), g.array(int(dim), "int64"), **flags)


@rule("Einsum")
def _einsum(g: OnnxGraph, at: At, items: Sequence[Value], *_: Any) -> Value:
    return g.node("Einsum", items, at.dtype, len(at.shape), equation=at.node.attributes["equation"])


def apply(g: OnnxGraph, at: At, inputs: Sequence[Any]) -> Any:
    """The result of a node, in the type that it declares.

    Raises:
        UserError: a primitive without a rule.
    """
    found = RULES.get(at.node.op)
    if found is None:
        raise UserError(f"no ONNX rule for the primitive {at.node.op}", where=at.node.scope,
                        hint="add one to parallel/interchange/onnx_rules.py")
    result = found(g, at, *inputs)
    if isinstance(result, Value) and at.dtype in _TYPES and result.dtype != at.dtype:
        result = g.cast(result, at.dtype)
    return result


_TYPES = (*_FLOATS, "int8", "uint8", "int32", "int64", "bool")
