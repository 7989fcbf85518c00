"""Which part of every parameter each rank holds: extents, from the layers' layouts, without compiling.

An extent is `((start, stop), ...)`, one pair a dim. Ranks are numbered as MindSpore does: stage slowest, then data,
then op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mindspore import nn

from parallel.sharding.config import ParallelConfig
from parallel.sharding.layout import Axes, Layer
from parallel.sharding.parallelize import stage_of_layers
from parallel.sharding.trainable import pipeline_units, shared_parameters

Extent = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class FullParameter:
    """A parameter as the model has it: full shape, and which extents of it the ranks of a layout hold."""

    name: str
    shape: tuple[int, ...]
    slice_of_rank: Callable[[int], Extent | None]


def extent_shape(extent: Extent) -> tuple[int, ...]:
    """Sizes of an extent."""
    return tuple(stop - start for start, stop in extent)


def sharded_parameters(network: nn.Cell, config: ParallelConfig) -> list[FullParameter]:
    """All parameters of `network` with their extents under `config` (resolved).

    The rules are those of MindSpore's semi-automatic parallelism: a dim is sharded over the axis that its layer names;
    under optimizer parallelism dim 0 of what is left is sharded again over the ranks that hold the same slice, in
    consecutive groups of `shard` ranks, where it divides, is not below the threshold and the layer allows it. On a
    stage that does not use a parameter there is no extent.
    """
    axes, stages = Axes(config), _stages_of_parameters(network, config)
    operands = _operands(network)
    found = []
    for parameter in network.get_parameters():
        operand = operands.get(id(parameter)) or (None,) * len(parameter.shape)
        # A tuple of mesh axes would be needed only by an activation; a weight is sharded over one at a time.
        mesh_axes = tuple(axes.mesh_axes[axis] if axis and axes.sizes[axis] > 1 else None for axis in operand)
        extents = SliceOfRank(tuple(parameter.shape), mesh_axes, stages.get(id(parameter)), config,
                              parameter.parallel_optimizer)
        found.append(FullParameter(parameter.name, tuple(parameter.shape), extents))
    return found


def holders(parameters: Sequence[FullParameter], config: ParallelConfig,
            rank: int | None = None) -> dict[str, dict[Extent, tuple[int, ...]]]:
    """Who holds which slice of every parameter: {name: {extent: ranks in rising order}}.

    Of a parameter that several stages hold, the first one's slices alone: the others borrow it.

    Args:
        parameters: of `sharded_parameters`.
        config: resolved.
        rank: leave out what this rank does not hold; None = nothing.
    """
    found: dict[str, dict[Extent, tuple[int, ...]]] = {}
    alike: dict[Any, dict[Extent, tuple[int, ...]]] = {}
    per_stage = config.data * config.op
    for full in parameters:
        rule = full.slice_of_rank
        if rank is not None and rule(rank) is None:
            continue
        # Most parameters are those of one layer once more.
        key = rule.key if isinstance(rule, SliceOfRank) else full.name
        if key not in alike:
            ranks_of: dict[Extent, list[int]] = {}
            for stage in range(config.pipeline.stages):
                for holder in range(stage * per_stage, (stage + 1) * per_stage):
                    extent = rule(holder)
                    if extent is None:
                        break
                    ranks_of.setdefault(extent, []).append(holder)
                if ranks_of:
                    break
            alike[key] = {extent: tuple(ranks) for extent, ranks in ranks_of.items()}
        found[full.name] = alike[key]
    return found


def _operands(network: nn.Cell) -> dict[int, tuple]:
    """Axis names of each parameter's dims, by identity, for the parameters whose layer says them."""
    found = {}
    for _, cell in network.cells_and_names():
        if isinstance(cell, Layer):
            for attribute, operand in cell.weights().items():
                parameter = getattr(cell, attribute, None)
                if parameter is not None:
                    found[id(parameter)] = operand
    return found


def _stages_of_parameters(network: nn.Cell, config: ParallelConfig) -> dict[int, set[int]]:
    if config.pipeline.stages == 1:
        return {}
    units = pipeline_units(network)
    assigned = stage_of_layers(len(units) - 2, config)
    stages: dict[int, set[int]] = {}
    for unit, (stage, _) in zip(units, [assigned[0], *assigned, assigned[-1]], strict=True):
        for cell in unit:
            for parameter in cell.get_parameters():
                stages.setdefault(id(parameter), set()).add(stage)
        for parameter, cells in shared_parameters(network):
            if any(cell in unit for cell in cells):
                stages.setdefault(id(parameter), set()).add(stage)
    return stages


@dataclass(frozen=True)
class SliceOfRank:
    """rank -> extent of one parameter.

    Args:
        shape: the full parameter's.
        mesh_axes: for each dim the axis of the mesh that shards it ("expert" or "op"), or None.
        stages: those that use it; None = there is one.
        config: resolved.
        shardable: whether its layer lets the optimizer shard it.
    """

    shape: tuple[int, ...]
    mesh_axes: tuple[str | None, ...]
    stages: set[int] | None
    config: ParallelConfig
    shardable: bool

    @property
    def key(self) -> tuple:
        """Equal for parameters of which every rank of one `config` holds the same extent."""
        return self.shape, self.mesh_axes, None if self.stages is None else frozenset(self.stages), self.shardable

    @property
    def mesh(self) -> dict[str, int]:
        """Axes of one stage, the slowest first: data = replica x expert."""
        config = self.config
        return {"replica": config.data // config.expert, "expert": config.expert, "op": config.op}

    def __call__(self, rank: int) -> Extent | None:
        stage, inner = divmod(rank, self.config.data * self.config.op)
        if self.stages is not None and stage not in self.stages:
            return None
        at = self._coordinates(inner)
        extent = tuple(_part(size, self.mesh[axis], at[axis]) if axis else (0, size)
                       for size, axis in zip(self.shape, self.mesh_axes, strict=True))
        shard = self.shard
        if shard == 1:
            return extent
        (start, stop), *rest = extent
        first, last = _part(stop - start, shard, self._number_among_same(at) % shard)
        return ((start + first, start + last), *rest)

    @property
    def shard(self) -> int:
        """Number of the optimizer's shards of dim 0 of a slice."""
        config = self.config
        same = math.prod(self.mesh[axis] for axis in self._free_axes)
        shard = same if config.optimizer_shard == config.data else config.optimizer_shard
        if config.optimizer_shard == 1 or not self.shardable or not self.shape or shard < 2:
            return 1
        slices = tuple(size // self.mesh[axis] if axis else size
                       for size, axis in zip(self.shape, self.mesh_axes, strict=True))
        kilobytes = 4 * math.prod(slices) / 1024
        return shard if slices[0] % shard == 0 and kilobytes >= config.optimizer.threshold_kb else 1

    @property
    def shard_step(self) -> int:
        """Distance of the ranks that hold the parts of one slice."""
        sizes, step = list(self.mesh.items()), 1
        while sizes and sizes[-1][0] not in self._free_axes:
            step *= sizes.pop()[1]
        return step

    @property
    def _free_axes(self) -> list[str]:
        return [axis for axis in self.mesh if axis not in self.mesh_axes]

    def _coordinates(self, inner: int) -> dict[str, int]:
        found = {}
        for axis, size in reversed(self.mesh.items()):
            inner, found[axis] = divmod(inner, size)
        return found

    def _number_among_same(self, at: dict[str, int]) -> int:
        """The index of a rank among those that hold the same slice."""
        number = 0
        for axis in self._free_axes:
            number = number * self.mesh[axis] + at[axis]
        return number


def _part(size: int, degree: int, number: int) -> tuple[int, int]:
    step = size // degree
    return number * step, (number + 1) * step


def slice_of_mindspore(layout: Sequence[Any], rank: int, same_slice: Sequence[int] = ()) -> Extent:
    """The extent of `rank` from an entry of `cell.parameter_layout_dict` of a compiled cell.

    Args:
        layout: device matrix, tensor map, slice shape before the optimizer's shard, field size, uniform split, name of
            the optimizer-shard group, full shape.
        rank: the rank within its stage.
        same_slice: the ranks (within the stage) of the optimizer-shard group, in order; () if there is none.
    """
    matrix, tensor_map, slice_shape = list(layout[0]), list(layout[1]), list(layout[2])
    inner, coordinates = rank, []
    for size in reversed(matrix):
        coordinates.insert(0, inner % size)
        inner //= size
    extent = []
    for size, axis in zip(slice_shape, tensor_map, strict=True):
        number = coordinates[len(matrix) - 1 - axis] if axis >= 0 else 0
        extent.append((number * size, (number + 1) * size))
    if same_slice:
        (start, stop), *rest = extent
        first, last = _part(stop - start, len(same_slice), list(same_slice).index(rank))
        extent = [(start + first, start + last), *rest]
    return tuple(extent)
