"""Gradients of the rows that a step uses (`parallel.layers.embedding`), each row once.

Everything here is work on one device's rows: it comes after the partitioned forward and backward pass.

Shapes: K rows fetched, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from parallel.layers.embedding import RowTable

_TOP, _GATHER, _SUM, _FLAT = ops.TopK(), ops.Gather(), ops.UnsortedSegmentSum(), ops.Squeeze(0)


def row_tables(network: nn.Cell) -> list[RowTable]:
    """The layers of `network` whose tables have gradients of rows, in the order of their parameters."""
    return [cell for _, cell in network.cells_and_names() if isinstance(cell, RowTable) and cell.by_rows]


def slots_for(network: nn.Cell, parameters: Sequence[Parameter]) -> tuple[list[Parameter], tuple[int, ...]]:
    """What a step differentiates by, and which of `parameters` are tables with gradients of rows: in place of these are
    the slots' gradients, and behind all the slots' numbers, in the same order."""
    tables = {id(cell.table): cell.make_slots() for cell in row_tables(network)}
    numbers = tuple(number for number, parameter in enumerate(parameters) if id(parameter) in tables)
    given = [tables[id(parameter)].gradient if id(parameter) in tables else parameter for parameter in parameters]
    return [*given, *(tables[id(parameters[number])].number for number in numbers)], numbers


def separated(gradients: tuple, numbers: tuple[int, ...]) -> tuple[tuple, tuple]:
    """(gradients, rows): one gradient for each parameter, those of the tables [K, W], each row once; and these rows'
    numbers (`once`).

    Args:
        gradients: by what `slots_for` gives.
        numbers: see there.
    """
    rows, count = (), len(gradients) - len(numbers)
    own, asked = gradients[:count], gradients[count:]
    for place in range(len(numbers)):
        number = numbers[place]
        rows_K, total_KW = once(asked[place], own[number])
        own = own[:number] + (total_KW,) + own[number + 1:]
        rows = rows + (rows_K,)
    return own, rows


def once(asked_RK: Tensor, gradients_RKW: Tensor) -> tuple[Tensor, Tensor]:
    """(rows_K, total_KW): the distinct rows, largest first, and the sums of their gradients; behind the last one rows
    of -1 with sums of 0.

    Args:
        asked_RK: which row of this device's shard each slot is, -1 = none. A device holds one part: R is 1.
        gradients_RKW: of the slots.
    """
    # By K alone, lest the shapes before partitioning (R parts) be written into the graph.
    count, width = asked_RK.shape[1], gradients_RKW.shape[2]
    # Nor a Reshape, for whose shape the partitioner puts that of the whole input.
    asked_K = _FLAT(ops.strided_slice(asked_RK, (0, 0), (1, count), (1, 1)))
    gradients_KW = _FLAT(ops.strided_slice(gradients_RKW, (0, 0, 0), (1, count, width), (1, 1, 1)))
    if count == 1:
        return asked_K, gradients_KW
    sorted_K, order_K = _TOP(asked_K, count)
    before_K = ops.concat((ops.strided_slice(sorted_K, (0,), (1,), (1,)) + 1,
                           ops.strided_slice(sorted_K, (0,), (count - 1,), (1,))))
    first_K = ops.cast(ops.not_equal(sorted_K, before_K), ms.int32)
    number_K = ops.cast(ops.cumsum(ops.cast(first_K, ms.float32), 0), ms.int32) - 1
    total_KW = _SUM(_GATHER(gradients_KW, order_K, 0), number_K, count)
    return _SUM((sorted_K + 1) * first_K, number_K, count) - 1, total_KW
