"""Named layouts: a layer says which named axis shards each dimension; the config says the degree of each axis.

    matmul: (("tokens", None), ("width", None)) -> ("tokens", "width")

reads: the first operand's dim 0 is sharded along `tokens`, the second's dim 0 along `width`. Under data 4, op 2 that is
MindSpore's strategy ((4, 1), (2, 1)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mindspore import nn, ops
from mindspore.parallel import Layout

from parallel.sharding.config import ParallelConfig

Operand = tuple  # of axis names, None for a dim that is not sharded


@dataclass(frozen=True)
class OpSharding:
    """How one primitive is sharded.

    Args:
        primitive: the primitive to be given a strategy.
        inputs: one tuple of axis names for each tensor operand.
        outputs: the same for the results; only where MindSpore would choose another, which sequence parallelism alone
            needs (a row-parallel matmul whose result is to be sharded by tokens becomes ReduceScatter instead of
            AllReduce).
        weights: for each operand the attribute of the layer's own parameter that it is; None or missing = no parameter.
    """

    primitive: ops.Primitive
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...] | None = None
    weights: tuple[str | None, ...] = ()


class Axes:
    """Sizes of the named axes under one `ParallelConfig`.

    Names: batch, tokens (batch x sequence flattened), residual (tokens of the residual stream: also sharded over op
    under sequence parallelism), heads, width (feed-forward and projections), vocabulary, experts, feature_tokens (a
    ranker's tokens, each with weights of its own), rows (samples sharded over data and op).
    """

    def __init__(self, config: ParallelConfig) -> None:
        data, op = config.data, config.op
        self.sizes = {
            "batch": data,
            "tokens": data,
            "residual": data * op if config.sequence else data,
            "heads": op,
            "width": op,
            "vocabulary": op if config.vocabulary else 1,
            "experts": config.expert,
            "data_in_expert": data // config.expert,
            "feature_tokens": op,
            "rows": data * op,
        }
        self.sequence = config.sequence and op > 1
        self.stages = config.pipeline.stages
        self.mesh = Layout((data // config.expert, config.expert, op), ("replica", "expert", "op"))
        data_axes = ("replica", "expert")
        self.mesh_axes = {"batch": data_axes, "tokens": data_axes,
                          "residual": (*data_axes, "op") if config.sequence else data_axes,
                          "experts": "expert", "data_in_expert": "replica", "rows": (*data_axes, "op"),
                          **dict.fromkeys(("heads", "width", "vocabulary", "feature_tokens"), "op")}

    def strategy(self, operands: tuple[Operand, ...]) -> tuple:
        """MindSpore's strategy: a tuple of degrees for each operand, or a `Layout` where numbers would not do.

        From numbers MindSpore lays devices out in the order of the dims: the first sharded dim gets the slowest axis. A
        ranker's tensors have the tokens (op) before the batch (data), so there the mesh must be named.
        """
        if any("feature_tokens" in operand or "experts" in operand for operand in operands):
            return tuple(self.mesh(*(self._place(name) for name in operand)) for operand in operands)
        return tuple(tuple(1 if name is None else self.sizes[name] for name in operand) for operand in operands)

    def _place(self, name: str | None) -> Any:
        return "None" if name is None or self.sizes[name] == 1 else self.mesh_axes[name]


class Layer(nn.Cell):
    """A cell that carries its layout: `sharding()` lists how each of its primitives is sharded.

    `auto_prefix=False` keeps the names of the parameters below as they are (for wrappers).

    Attributes:
        in_compute_type: of this layer's own parameters, those that it casts to the type of its products wherever they
            are used, so that a network that is not trained may hold them in it (`hold_weights`).
    """

    in_compute_type: tuple[str, ...] = ()

    def sharding(self) -> list[OpSharding]:
        """The layout of this layer's own primitives (its child layers carry their own)."""
        return []

    def weights(self) -> dict[str, Operand]:
        """How this layer's own parameters are sharded, by attribute; those not named are replicated. Checkpoints are
        sharded by it where no graph is compiled."""
        return {name: operand for op in self.sharding() for name, operand in zip(op.weights, op.inputs, strict=False)
                if name is not None}

    def redistributes(self, axes: Axes) -> bool:
        """Whether this layer means to take or hand on tensors in another layout than its own (mixing tokens, sending
        samples to experts). A redistribution beside any other layer is a mistake, which the dry run reports."""
        return False

    def apply_sharding(self, axes: Axes) -> None:
        """Writes the strategies for `axes` on the primitives. Has no effect on one device or under data parallelism."""
        for layout in self.sharding():
            outputs = axes.strategy(layout.outputs) if layout.outputs is not None and axes.sequence else None
            layout.primitive.shard(axes.strategy(layout.inputs), outputs)


def apply_sharding(network: nn.Cell, config: ParallelConfig) -> Any:
    """Writes the layout of every `Layer` in `network`; returns the network."""
    axes = Axes(config)
    for _, cell in network.cells_and_names():
        if isinstance(cell, Layer):
            cell.apply_sharding(axes)
    return network


def hold_weights(network: nn.Cell, compute_dtype: Any) -> None:
    """Gives the parameters that layers cast to the type of their products that type, so that no call casts them: for
    networks that are used and not trained. They have no values yet.

    Args:
        network: its layers.
        compute_dtype: the network's; a layer with a `compute_dtype` of its own keeps to that.
    """
    for _, cell in network.cells_and_names():
        for name in cell.in_compute_type if isinstance(cell, Layer) else ():
            item = getattr(cell, name)
            if item is not None:
                item.set_dtype(getattr(cell, "compute_dtype", compute_dtype))


def redistributing(network: nn.Cell, config: ParallelConfig) -> list[str]:
    """Names of the layers of `network` beside which a redistribution is meant (`Layer.redistributes`)."""
    axes = Axes(config)
    return [name for name, cell in network.cells_and_names() if isinstance(cell, Layer) and cell.redistributes(axes)]
