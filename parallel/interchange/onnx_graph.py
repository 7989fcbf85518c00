"""An ONNX graph that grows node by node: names, constants, shapes with free sizes. Needs the package onnx."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from parallel.common.errors import UserError
from parallel.interchange.sizes import Counted, Filled, Size
from parallel.torch_runtime.graph import Literal

OPSET = 18
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE,
         "int8": TensorProto.INT8, "uint8": TensorProto.UINT8, "int32": TensorProto.INT32, "int64": TensorProto.INT64,
         "bool": TensorProto.BOOL}
LAST = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Value:
    """A tensor of the graph.

    Args:
        name: in the graph.
        dtype: element type.
        dims: how many it has.
    """

    name: str
    dtype: str
    dims: int


class OnnxGraph:
    """Nodes, constants, inputs and outputs of one model.

    Args:
        free: names of the sizes that are known only when it runs.
    """

    def __init__(self, free: Sequence[str]) -> None:
        self.free = tuple(free)
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.count = 0
        self.sizes: dict[str, str] = {}  # name of a free size -> int64 [1] that holds it
        self.made: dict[Any, Value] = {}
        self.weights: set[str] = set()

    def node(self, op: str, inputs: Sequence[Value | str], dtype: str, dims: int, **attributes: Any) -> Value:
        """The result of one more node."""
        return self.several(op, inputs, [(dtype, dims)], **attributes)[0]

    def several(self, op: str, inputs: Sequence[Value | str], kinds: Sequence[tuple[str, int]],
                **attributes: Any) -> list[Value]:
        """The results of one more node, of these types and numbers of dims."""
        found = [Value(self._name(op), dtype, dims) for dtype, dims in kinds]
        self.nodes.append(helper.make_node(op, [item if isinstance(item, str) else item.name for item in inputs],
                                           [item.name for item in found], name=found[0].name, **attributes))
        return found

    def _name(self, op: str) -> str:
        self.count += 1
        return f"{op}_{self.count}"

    # -- what is fed and returned -------------------------------------------------------------------------------------

    def feed(self, name: str, dtype: str, shape: Sequence[int | str]) -> Value:
        """One more input; a size that is a name is free."""
        self.inputs.append(helper.make_tensor_value_info(name, TYPES[dtype], list(shape)))
        value = Value(name, dtype, len(shape))
        for dim, size in enumerate(shape):
            if isinstance(size, str) and size not in self.sizes:
                self.sizes[size] = self.node("Shape", [value], "int64", 1, start=dim, end=dim + 1).name
        return value

    def give(self, value: Value, name: str, shape: Sequence[int | str]) -> None:
        """One more output."""
        self.nodes.append(helper.make_node("Identity", [value.name], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, TYPES[value.dtype], list(shape)))

    def parameter(self, name: str, array: np.ndarray) -> Value:
        """A weight by its name in checkpoints."""
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        self.weights.add(name)
        return Value(name, array.dtype.name, array.ndim)

    # -- constants ----------------------------------------------------------------------------------------------------

    def array(self, value: Any, dtype: str | None = None) -> Value:
        """A constant tensor; equal ones are one."""
        array = np.asarray(value, dtype)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self.made:
            name = self._name("constant")
            self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
            self.made[key] = Value(name, array.dtype.name, array.ndim)
        return self.made[key]

    def ints(self, values: Any) -> Value:
        """int64 [n] of whole numbers, some of them free sizes."""
        values = tuple(values) if isinstance(values, (tuple, list)) else (values,)
        if not any(isinstance(item, Size) for item in values):
            return self.array([int(item) for item in values], "int64")
        if values not in self.made:
            parts = [self._free(item) if isinstance(item, Size) else self.array([int(item)], "int64")
                     for item in values]
            self.made[values] = parts[0] if len(parts) == 1 else self.node("Concat", parts, "int64", 1, axis=0)
        return self.made[values]

    def _free(self, size: Size) -> Value:
        """int64 [1]."""
        if size not in self.made:
            total: Value | None = None
            for name, times in zip(self.free, size.times, strict=True):
                if times:
                    one = Value(self.sizes[name], "int64", 1)
                    if times != 1:
                        one = self.node("Mul", [one, self.array([int(times)], "int64")], "int64", 1)
                    total = one if total is None else self.node("Add", [total, one], "int64", 1)
            if total is None:
                total = self.array([int(size.constant)], "int64")
            elif size.constant:
                total = self.node("Add", [total, self.array([int(size.constant)], "int64")], "int64", 1)
            self.made[size] = total
        return self.made[size]

    def scalar(self, size: Size, dtype: str) -> Value:
        """A free size as a tensor without dims."""
        if any(isinstance(item, float) and not item.is_integer() for item in (size.constant, *size.times)):
            raise UserError("a factor of a free size is no whole number", where="export", value=size)
        return self.cast(self.node("Squeeze", [self._free(size), self.array([0], "int64")], "int64", 0), dtype)

    def tensor(self, value: Any, dtype: str | None = None) -> Value:
        """Any value of the graph (result, number, constant tensor, free size) as a tensor, cast to `dtype`."""
        if isinstance(value, Value):
            return value if dtype is None else self.cast(value, dtype)
        if isinstance(value, Literal):
            return self.array(value.array(), dtype or value.kind.dtype)
        if isinstance(value, Size):
            return self.scalar(value, dtype or "float32")
        if isinstance(value, Filled):
            return self.filled(value.shape, value.value, dtype or value.dtype)
        if isinstance(value, Counted):
            return self._counted(value, dtype)
        if isinstance(value, tuple) and any(isinstance(item, Size) for item in value):
            return self.ints(value)
        return self.array(value, dtype)

    def _counted(self, value: Counted, dtype: str | None) -> Value:
        begin, step = (self.array(item, "int64") for item in (int(value.first), int(value.step)))
        end = self.scalar(Size(int(value.first) + int(value.step) * value.length.constant,
                               tuple(int(value.step) * item for item in value.length.times)), "int64")
        return self.cast(self.node("Range", [begin, end, step], "int64", 1), dtype or value.dtype)

    def filled(self, shape: Sequence, value: Any, dtype: str) -> Value:
        """A tensor of one value."""
        if not shape:
            return self.tensor(value, dtype)
        return self.node("Expand", [self.tensor(value, dtype), self.ints(tuple(shape))], dtype, len(shape))

    # -- what many rules need -----------------------------------------------------------------------------------------

    def cast(self, value: Value, dtype: str) -> Value:
        """`value` in another type."""
        if value.dtype == dtype:
            return value
        return self.node("Cast", [value], dtype, value.dims, to=TYPES[dtype])

    def reshape(self, value: Value, shape: Sequence) -> Value:
        """`value` in a shape, one of whose sizes may be -1 and some of which may be free."""
        shape = tuple(shape)
        free = [place for place, size in enumerate(shape) if isinstance(size, Size)]
        if len(free) == 1 and -1 not in shape:
            shape = tuple(-1 if place == free[0] else size for place, size in enumerate(shape))
        return self.node("Reshape", [value, self.ints(shape) if shape else self.array([], "int64")], value.dtype,
                         len(shape))

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        """Dims in another order."""
        if list(order) == list(range(value.dims)):
            return value
        return self.node("Transpose", [value], value.dtype, value.dims, perm=[int(dim) for dim in order])

    def unsqueeze(self, value: Value, dim: int) -> Value:
        """One more dim of size 1."""
        return self.node("Unsqueeze", [value, self.array([dim], "int64")], value.dtype, value.dims + 1)
