"""Segments of a network's description, the consecutive operations of one pipeline unit, and what one costs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from parallel.planning.describe import Description, Op, SymbolicTensor
from parallel.planning.shapes import Dims


@dataclass(frozen=True)
class Collective:
    """One kind of collective of a micro-batch (or of a step, for gradients).

    Args:
        kind: AllReduce, AllGather, ReduceScatter, AlltoAll, Send or Receive.
        factors: factors of the mesh in which the ranks of the group differ; () for pipeline and the norm over stages.
        bytes: of the full tensor that it is about (as in the dry run).
        dimension: data, op, pipeline, optimizer, expert or norm.
        phase: forward, recompute or backward.
        purpose: activation, loss, gradient, parameter, stage or norm.
    """

    kind: str
    factors: tuple[int, ...]
    bytes: int
    dimension: str
    phase: str
    purpose: str = "activation"


@dataclass
class Work:
    """Work of one rank's cores: products as (FLOPs, least dim, bytes moved), everything else as bytes moved; beside it
    the kernels of a runtime that runs node by node (`parallel.planning.runtime`), where the cluster names one."""

    products: Counter = field(default_factory=Counter)
    bytes: int = 0
    kernels: int = 0
    started: Counter = field(default_factory=Counter)

    @property
    def flops(self) -> int:
        """Of the products."""
        return sum(flops * times for (flops, _, _), times in self.products.items())

    def add(self, other: Work) -> None:
        """Adds another's work."""
        self.products.update(other.products)
        self.bytes += other.bytes
        self.kernels += other.kernels
        self.started.update(other.started)


@dataclass
class SegmentWalk:
    """Bytes of one rank beside what is counted for the stage.

    Args:
        backward: of the fullest moment of the backward pass, less `kept`; may be negative.
        kept: what the backward pass reads, as it is when that begins.
        gradients: of its parameters, as they are when it has ended.
        put_off: what the products of weights' gradients read, where these come at the end of a micro-batch.
        borrowed: the largest of these alone.
        tables: gradients of parameters that are looked up in.
    """

    backward: int = 0
    kept: int = 0
    gradients: int = 0
    put_off: int = 0
    borrowed: int = 0
    tables: int = 0


@dataclass
class SegmentCost:
    """One segment's cost for one micro-batch on one rank.

    Args:
        forward, backward, recompute: work; recompute is what the backward pass needs again if nothing was kept.
        collectives: all of them; those with phase recompute count only where the unit is recomputed.
        kept: bytes of each forward result that the backward pass reads, by the tensor's number in the segment.
        kept_recomputed: the same if the unit is recomputed: what reaches it from outside.
        kept_selective, selective: what is kept, and computed again, if only the cells named in the config are.
        selective_collectives: what moves again where only those cells are.
        arrivals: (number, collective) of the redistributions of tensors that come from outside.
        arrived_from: for each (tensor, layout) in `kept` that was redistributed from outside, its layout there.
        largest: bytes of the largest result.
        divides: whether every axis divides the dim that it shards.
        outputs: layouts of the tensors that it makes.
        walk: what a runtime that runs node by node holds at its fullest.
    """

    forward: Work = field(default_factory=Work)
    backward: Work = field(default_factory=Work)
    recompute: Work = field(default_factory=Work)
    collectives: Counter = field(default_factory=Counter)
    kept: dict[tuple, int] = field(default_factory=dict)
    kept_recomputed: dict[tuple, int] = field(default_factory=dict)
    kept_selective: dict[tuple, int] = field(default_factory=dict)
    selective: Work = field(default_factory=Work)
    selective_collectives: Counter = field(default_factory=Counter)
    arrivals: Counter = field(default_factory=Counter)
    arrived_from: dict[tuple, Dims] = field(default_factory=dict)
    largest: int = 0
    divides: bool = True
    outputs: dict[int, Dims] = field(default_factory=dict)
    walk: SegmentWalk | None = None


@dataclass
class Segment:
    """Consecutive operations of one unit, with its tensors numbered in order of appearance."""

    unit: int
    operations: list[Op]
    items: list[SymbolicTensor] = field(default_factory=list)
    number: dict[int, int] = field(default_factory=dict)
    outside: list[int] = field(default_factory=list)
    alike: int = 0


def segments(description: Description) -> list[Segment]:
    """The operations in segments of one unit each; those that are alike have the same number `alike`."""
    found: list[Segment] = []
    for operation in description.operations:
        if not found or found[-1].unit != operation.unit:
            found.append(Segment(operation.unit, []))
        found[-1].operations.append(operation)
    known: dict[tuple, int] = {}
    for segment in found:
        # A number for each kind of segment: hashing the whole signature again for every layout would cost most of it.
        segment.alike = known.setdefault(_number(segment), len(known))
    return found


def _number(segment: Segment) -> tuple:
    """Numbers the tensors of a segment and returns its signature."""
    made: set[int] = set()
    marks = []
    for operation in segment.operations:
        for item in operation.inputs:
            if id(item) not in segment.number:
                segment.number[id(item)] = len(segment.items)
                segment.items.append(item)
                if item.parameter is None and id(item) not in made:
                    segment.outside.append(segment.number[id(item)])
        for item in operation.outputs:
            segment.number[id(item)] = len(segment.items)
            segment.items.append(item)
            made.add(id(item))
        marks.append((operation.primitive, operation.layer, operation.wanted, operation.out_wanted, operation.needed,
                      operation.plain, tuple(segment.number[id(item)] for item in operation.inputs),
                      tuple((item.shape, item.dtype, item.differentiable) for item in operation.outputs)))
    heads = tuple((segment.items[index].shape, segment.items[index].dtype, segment.items[index].differentiable,
                   segment.items[index].producer < 0) for index in segment.outside)
    return tuple(marks), heads
