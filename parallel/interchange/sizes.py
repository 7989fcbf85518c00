"""Sizes that are known only when a graph runs, found by compiling it several times.

MindSpore compiles fixed shapes. Graphs of one network over other numbers of rows differ in constants alone (shapes,
counts, filled tensors), and each such number is a sum of multiples of the numbers of rows: two graphs for one free
size, three for two, say which. Sizes are primes, so that none of them equals a size of the network by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parallel.common.errors import UserError
from parallel.torch_runtime.graph import Graph, Literal

PRIMES = (211, 223, 199, 227)
Number = int | float


@dataclass(frozen=True)
class Size:
    """constant + the sum over free sizes of times x size.

    Args:
        constant: a whole or floating number; so are the factors.
        times: factor of each free size, in the order of their names.
    """

    constant: Number
    times: tuple[Number, ...]

    def __add__(self, other: Number | Size) -> Size:
        if not isinstance(other, Size):
            return Size(self.constant + other, self.times)
        return Size(self.constant + other.constant, tuple(a + b for a, b in zip(self.times, other.times, strict=True)))


@dataclass(frozen=True)
class Filled:
    """A constant tensor of one value whose shape has free sizes."""

    shape: tuple
    dtype: str
    value: Number | bool


@dataclass(frozen=True)
class Counted:
    """The constant tensor first, first + step, ... of a free length."""

    length: Size
    dtype: str
    first: Number
    step: Number


def variants(names: Sequence[str]) -> list[dict[str, int]]:
    """The sizes for which a graph with the free sizes `names` is compiled: one set more than there are names."""
    base = dict(zip(names, PRIMES[::2], strict=False))
    return [base, *({**base, name: PRIMES[2 * place + 1]} for place, name in enumerate(names))]


class FreeSizes:
    """What the constants of graphs that differ in free sizes are, and the shapes of their values.

    Args:
        names: of the free sizes.
        graphs: compiled for `variants(names)`, in that order.

    Raises:
        UserError: the graphs differ in more than constants.
    """

    def __init__(self, names: Sequence[str], graphs: Sequence[Graph]) -> None:
        self.names, self.graphs, self.graph = tuple(names), graphs, graphs[0]
        sets = variants(names)
        self._inverse = np.linalg.inv(np.array([[1, *one.values()] for one in sets], np.float64))
        for other in graphs[1:]:
            if [_form(node) for node in other.nodes] != [_form(node) for node in self.graph.nodes] \
                    or len(other.constants) != len(self.graph.constants):
                raise UserError("the network's graph depends on the number of rows by more than its sizes",
                                where="export", value=", ".join(names))

    def constant(self, place: int) -> Any:
        """The constant with this place: as in the graph where all agree, else with `Size`s, `Filled` or `Counted`."""
        return self.joined([graph.constants[place] for graph in self.graphs])

    def shape(self, place: int, result: int = 0) -> tuple:
        """Shape of the result of the node with this place, with `Size`s where it is free."""
        found = [graph.nodes[place].outputs[result].shape for graph in self.graphs]
        return tuple(self.joined(list(sizes)) for sizes in zip(*found, strict=True))

    def joined(self, values: list[Any]) -> Any:
        """One value for those of all graphs."""
        first = values[0]
        if isinstance(first, tuple):
            return tuple(self.joined(list(items)) for items in zip(*values, strict=True))
        if isinstance(first, Literal):
            return self._literal(values)
        if all(value == first and type(value) is type(first) for value in values):
            return first
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            return self._size(values)
        raise UserError("a constant of the graph depends on the number of rows in a way that is not known",
                        where="export", value=first)

    def _size(self, values: list[Number]) -> Size:
        found = self._inverse @ np.array(values, np.float64)
        if all(isinstance(value, int) for value in values):
            whole = np.rint(found)
            if np.abs(whole - found).max() > 1e-6:
                raise UserError("a size of the graph is no sum of multiples of the numbers of rows", where="export",
                                value=values)
            return Size(int(whole[0]), tuple(int(item) for item in whole[1:]))
        clean = np.where(np.abs(np.rint(found) - found) < 1e-9, np.rint(found), found)
        return Size(float(clean[0]), tuple(float(item) for item in clean[1:]))

    def _literal(self, values: list[Literal]) -> Any:
        first = values[0]
        if all(_equal(first, value) for value in values):
            return first
        shape = tuple(self.joined(list(sizes)) for sizes in zip(*(value.kind.shape for value in values), strict=True))
        if all(value.fill is not None for value in values):
            fill = self.joined([value.fill for value in values])
            return fill if not shape and isinstance(fill, Size) else Filled(shape, first.kind.dtype, fill)
        arrays = [value.array() for value in values]
        if len(shape) == 1 and all(_is_count(array) for array in arrays):
            low, step = arrays[0][0].item(), (arrays[0][1] - arrays[0][0]).item()
            if all((array[0], array[1] - array[0]) == (low, step) for array in arrays):
                return Counted(shape[0], first.kind.dtype, low, step)
        raise UserError("a table of the graph depends on the number of rows in a way that is not known", where="export",
                        value=shape)


def _form(node: Any) -> tuple:
    return node.op, node.inputs, [(len(kind.shape), kind.dtype) for kind in node.outputs], node.attributes


def _equal(one: Literal, other: Literal) -> bool:
    return (one.kind, one.fill) == (other.kind, other.fill) and (one.data is None) == (other.data is None) and (
        one.data is None or np.array_equal(one.data, other.data))


def _is_count(array: np.ndarray) -> bool:
    return array.size > 2 and bool((np.diff(array) == array[1] - array[0]).all())
