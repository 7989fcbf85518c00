"""Named axes on the physical mesh of one pipeline stage, as MindSpore assigns them; redistributions between layouts.

The ranks of a stage are numbered data-major: rank = data coordinate x op + op coordinate. MindSpore derives the
device matrix of every primitive from its strategy, dims in order, the first one outermost, and what is left over
repeats on the inside. So `("batch", "width")` shards the batch over data and the width over op. Where a dim that op
shards stands before the batch (a ranker's tokens), the layers name the mesh themselves, and the planner reads the same
names. To compare layouts the mesh is split into factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import zip_longest

from parallel.planning.shapes import Dim, Dims
from parallel.sharding.config import ParallelConfig
from parallel.sharding.layout import Axes


class Mesh:
    """Factors of data x op (outermost first) and which of them a named axis takes."""

    def __init__(self, config: ParallelConfig) -> None:
        self.config, self.axes = config, Axes(config)
        data, op, expert = config.data, config.op, config.expert
        # A partial optimizer shard takes the innermost data-parallel ranks.
        outer = data // config.optimizer_shard if 1 < config.optimizer_shard < data else 1
        bounds, chain = sorted({data, data // expert, data * op, outer} - {1}), [1]
        # Bounds that do not divide each other cannot all be had; those of data x op come first.
        kept = [bound for bound in bounds if bound in (data, data * op)
                or (all(max(bound, other) % min(bound, other) == 0 for other in (data, data * op)))]
        for bound in kept:
            if bound % chain[-1] == 0:
                chain.append(bound)
        self.degree_of = [right // left for left, right in zip(chain[:-1], chain[1:], strict=True)]
        self.everything = tuple(range(len(self.degree_of)))
        done = 1
        self.data_factors: set[int] = set()
        self.named: dict[str, list[int]] = {"replica": [], "expert": [], "op": []}
        for factor, degree in enumerate(self.degree_of):
            if done < data:
                self.data_factors.add(factor)
            self.named["replica" if done < data // expert else "expert" if done < data else "op"].append(factor)
            done *= degree

    def degree(self, factors: tuple[int, ...]) -> int:
        """Shards that these factors make; the size of a group that differs in them."""
        return math.prod(self.degree_of[factor] for factor in factors)

    def placement(self, names: list[str]) -> dict[str, tuple[int, ...]]:
        """Factors of each named axis of one primitive, given in the order of its device matrix."""
        if {"feature_tokens", "experts"} & set(names):
            # Here the layers name the mesh itself (`Axes.strategy`).
            return {name: self._named_factors(name) for name in names}
        taken, placed = 0, {}
        for name in names:
            size, factors = self.axes.sizes[name], []
            if name in placed or size == 1:
                placed.setdefault(name, ())
                continue
            while size > 1 and taken < len(self.degree_of):
                factors.append(taken)
                size //= self.degree_of[taken]
                taken += 1
            placed[name] = tuple(factors)
        return placed

    def _named_factors(self, name: str) -> tuple[int, ...]:
        if self.axes.sizes[name] == 1:
            return ()
        axes = self.axes.mesh_axes[name]
        return tuple(factor for axis in ([axes] if isinstance(axes, str) else axes)
                     for factor in self.named[axis])

    def local(self, dims: Dims) -> int:
        """Elements of one rank's slice."""
        total = 1
        for dim in dims:
            total *= -(-dim.size // self.degree(dim.axis)) if dim.axis else dim.size
        return total

    def kind(self, factors: tuple[int, ...]) -> str:
        """Which dimension a group serves: "data" if its ranks differ in data alone, else "op"."""
        return "data" if set(factors) <= self.data_factors else "op"

    def rest(self, dims: Dims) -> tuple[int, ...]:
        """Factors that do not shard the tensor: the ranks that hold the same slice."""
        used = {factor for dim in dims for factor in dim.axis}
        return tuple(factor for factor in self.everything if factor not in used)


def redistribution(mesh: Mesh, source: Dims, target: Dims) -> list[tuple[str, tuple[int, ...], int]]:
    """What brings a tensor from one layout to another: (kind, factors, elements) in order; splits cost nothing.

    Elements are those of the tensor that the collective is about on one rank: the result of an AllGather, what goes
    through an AlltoAll. As in MindSpore every factor of a dim is a dim of its own, and what is tried comes in this
    order: split where a dim is unsharded and the factor free, exchange where the factor shards another dim, gather at
        last.
    """
    slots, steps = _slots(source, target), []
    while any(slot.now != slot.goal for slot in slots):
        used = {slot.now for slot in slots}
        open_slots = [slot for slot in slots if slot.now is None and slot.goal is not None]
        free = [slot for slot in open_slots if slot.goal not in used]
        if free:
            free[0].now = free[0].goal
            continue
        if open_slots:
            slot = open_slots[0]
            holder = next(other for other in slots if other.now == slot.goal)
            holder.now, slot.now = None, slot.goal
            steps.append(("AlltoAll", (slot.goal,), _elements(mesh, source, slots)))
            continue
        over = [slot for slot in slots if slot.now is not None and slot.now != slot.goal]
        # Neighbouring factors of one dim are gathered at once.
        over = [slot for slot in over if slot.dim == over[0].dim]
        factors = tuple(slot.now for slot in over)
        for slot in over:
            slot.now = None
        steps.append(("AllGather", factors, _elements(mesh, source, slots)))
    return steps


@dataclass
class _Slot:
    """One factor's slot in one dim: what shards it now, and what shall."""

    dim: int
    now: int | None
    goal: int | None


def _slots(source: Dims, target: Dims) -> list[_Slot]:
    slots = []
    for number, (here, there) in enumerate(zip(source, target, strict=True)):
        slots += [_Slot(number, now, goal) for now, goal in zip_longest(here.axis, there.axis)]
    return slots


def _elements(mesh: Mesh, dims: Dims, slots: list[_Slot]) -> int:
    now = [tuple(slot.now for slot in slots if slot.dim == number and slot.now is not None)
           for number in range(len(dims))]
    return mesh.local(tuple(Dim(dim.size, axis) for dim, axis in zip(dims, now, strict=True)))
