"""A network with the layers of one pipeline stage only, for compiling that stage quickly.

MindSpore's partitioner analyses the layers of all stages, then drops those of the others. Here each of these is one
negation in the layout of the residual stream, so that tensors still cross the borders between stages where they did;
the graph that is left for the stage is the same, node for node (`tests/parallel/training/test_stage_only.py`).
"""

from __future__ import annotations

from typing import Any

from mindspore import Parameter, Tensor, nn, ops

from parallel.layers.embedding import Residual
from parallel.sharding.config import ParallelConfig
from parallel.sharding.layout import Axes
from parallel.sharding.parallelize import has_stack
from parallel.sharding.trainable import pipeline_units


class PlaceholderLayer(nn.Cell):
    """-x in place of a layer that another stage holds. One use of x and no more: MindSpore numbers what crosses a
    border by its uses.

    Args:
        layer: with a `Residual` at its end. It stays a child that is never called, so that whatever is numbered by the
            order of the cells (dropout) keeps its number.
        axes: sizes of the named axes.
    """

    def __init__(self, layer: nn.Cell, axes: Axes) -> None:
        super().__init__(auto_prefix=False)
        stream = _residual(layer).sharding()[0].inputs[0]
        self.layer, self.negative, self.wait = layer, ops.Neg().shard(axes.strategy((stream,))), ops.Depend()
        self.pipeline_stage = layer.pipeline_stage

    def construct(self, x_ND: Tensor, *others: Any) -> Tensor:
        """others: what the layer takes beside the residual stream, used here too lest it no longer cross a border."""
        for other in others:
            if other is not None:
                x_ND = self.wait(x_ND, other)
        return self.negative(x_ND)


def leave_out_other_stages(network: nn.Cell, config: ParallelConfig, stage: int) -> None:
    """Replaces the layers of `network` (sharded by `config`) that `stage` does not hold.

    The first and the last layer stay: what comes before and after the layers may need them. So do layers that do not
    end in a `Residual`, and under the interleaved schedule all: MindSpore does not compile placeholders in chunks.
    """
    if config.pipeline.stages == 1 or config.pipeline.interleave > 1 or not has_stack(network):
        return
    _, _, *units, _, _ = pipeline_units(network)
    layers = [unit[0] for unit in units]
    left_out = {id(layer) for layer in layers if layer.pipeline_stage != stage and _residual(layer) is not None}
    axes = Axes(config)
    for _, parent in list(network.cells_and_names()):
        for name, cell in list(parent._cells.items()):
            if id(cell) in left_out:
                parent._cells[name] = PlaceholderLayer(cell, axes)


def held_parameters(network: nn.Cell) -> list[Parameter]:
    """Trainable parameters but those of layers that were left out."""
    left_out = {id(parameter) for _, cell in network.cells_and_names() if isinstance(cell, PlaceholderLayer)
                for parameter in cell.layer.get_parameters()}
    return [parameter for parameter in network.trainable_params() if id(parameter) not in left_out]


def _residual(layer: nn.Cell) -> Residual | None:
    found = [cell for cell in layer.cells() if isinstance(cell, Residual)]
    return found[-1] if found else None
