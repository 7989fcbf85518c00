"""One rank's graph as a program holds it: numbered values and the nodes that compute them.

Values are numbered: first the graph's inputs, then its parameters, then its constants, then the nodes' results, in
order. A collective names its group by number; the ranks of group `i` are in the graph's own table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

COLLECTIVES = ("AllReduce", "AllGather", "ReduceScatter", "Broadcast", "AlltoAll", "AllToAll", "Send", "Receive")
WIDTHS = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}
"""Bytes of an element; 1 of any other type."""


@dataclass(frozen=True)
class Kind:
    """Shape and element type ("float32", "bfloat16", "int32", "bool", ...) of a tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Of all its elements."""
        return math.prod(self.shape) * WIDTHS.get(self.dtype, 1)


@dataclass(frozen=True)
class Literal:
    """An array constant.

    Args:
        kind: its type.
        fill: the value of all its elements; None where they differ.
        data: elements otherwise, as an array of `kind`'s NumPy type (bfloat16 as its 16 bits in uint16).
    """

    kind: Kind
    fill: float | int | bool | None = None
    data: np.ndarray | None = None

    def array(self) -> np.ndarray:
        """The NumPy array; bfloat16 as float32."""
        if self.data is None:
            dtype = "float32" if self.kind.dtype == "bfloat16" else self.kind.dtype
            return np.full(self.kind.shape, self.fill, dtype)
        if self.kind.dtype == "bfloat16":
            return np.left_shift(self.data.astype(np.uint32), np.uint32(16)).view(np.float32).reshape(self.kind.shape)
        return self.data.reshape(self.kind.shape)


@dataclass
class Node:
    """One application of a primitive.

    Args:
        op: the primitive.
        inputs: numbers of values.
        outputs: declared types of its results; empty for tuples.
        attributes: those that a rule reads; a collective's `group` is a number of the rank's table.
        scope: path of cells.
        marks: micro-batch, whether it is computed again, which parameter it communicates for.
        number: of its result.
    """

    op: str
    inputs: list[int]
    outputs: list[Kind]
    attributes: dict[str, Any] = field(default_factory=dict)
    scope: str = ""
    marks: dict[str, Any] = field(default_factory=dict)
    number: int = -1


@dataclass
class Graph:
    """One rank's graph, flat.

    Args:
        inputs: names and types of what is fed, in order.
        parameters: names and types of what the rank holds.
        constants: Python values, tuples of such, or `Literal`s.
        nodes: in execution order.
        result: number of the value that is returned.
        groups: ranks of every group; of a Send or Receive (sender, receiver).
    """

    inputs: list[tuple[str, Kind]]
    parameters: list[tuple[str, Kind]]
    constants: list[Any]
    nodes: list[Node]
    result: int
    groups: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def first_parameter(self) -> int:
        """Number of the first parameter."""
        return len(self.inputs)

    @property
    def first_constant(self) -> int:
        """Number of the first constant."""
        return len(self.inputs) + len(self.parameters)

    @property
    def first_node(self) -> int:
        """Number of the first node's result."""
        return self.first_constant + len(self.constants)

    def is_parameter(self, number: int) -> bool:
        """Whether a value is one of the parameters."""
        return self.first_parameter <= number < self.first_constant

    def used_inputs(self) -> list[int]:
        """Numbers of the inputs that a node reads; a stage between others may need none."""
        read = {number for node in self.nodes for number in node.inputs} | {self.result}
        return [number for number in range(len(self.inputs)) if number in read]

    def constant(self, number: int) -> Any:
        """The constant with this number, None if the value is none."""
        place = number - self.first_constant
        return self.constants[place] if 0 <= place < len(self.constants) else None
