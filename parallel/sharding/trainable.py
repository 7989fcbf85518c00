"""What `parallel` asks of a network that it trains, lays out and counts: base classes with defaults."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from mindspore import Parameter, nn


class Trainable(nn.Cell):
    """Base of networks that end in a scalar loss.

    Attributes:
        shares_graph: whether all micro-batches may share one graph of the network.
        can_weigh: whether the network returns (loss, weight) where `weighted` is set, so that the losses of rows with
            different numbers of counted tokens are averaged rightly.
        weighted: set by `parallel.training.step.enable_weighted_loss`.
    """

    shares_graph = True
    can_weigh = False
    weighted = False

    def pipeline_cells(self) -> list[nn.Cell | list[nn.Cell]] | None:
        """[before, layer, layer, ..., after]: cells in the order of the forward pass, each perhaps a list of cells;
        None for a network without a stack of layers, which has no stages and no recomputation."""
        return None

    def shared_parameters(self) -> list[tuple[Parameter, list[nn.Cell]]]:
        """Parameters that cells on several stages use, and these cells."""
        return []


@runtime_checkable
class Counted(Protocol):
    """A cell that knows its forward FLOPs; its children are then not asked."""

    @property
    def flops_per_sample(self) -> int:
        """Forward FLOPs of one sample."""


@runtime_checkable
class PartlyIdle(Protocol):
    """A cell with parameters that a sample does not use, such as those of experts that are not chosen."""

    @property
    def idle_parameters(self) -> int:
        """How many."""


def pipeline_units(network: Any) -> list[list[nn.Cell]] | None:
    """`Trainable.pipeline_cells` with every unit as a list; None for other cells and networks without a stack."""
    cells = network.pipeline_cells() if isinstance(network, Trainable) else None
    return None if not cells else [unit if isinstance(unit, list) else [unit] for unit in cells]


def shared_parameters(network: Any) -> list[tuple[Parameter, list[nn.Cell]]]:
    """`Trainable.shared_parameters`; none for other cells."""
    return network.shared_parameters() if isinstance(network, Trainable) else []


def is_weighted(network: Any) -> bool:
    """Whether the network returns (loss, weight)."""
    return isinstance(network, Trainable) and network.weighted
