"""Parameters and FLOPs of a ranker's network, exactly, without allocating it.

FLOPs are those of the matrix products of one forward pass, two for each multiplication and addition; lookups, norms,
activations and pooling are not counted. A cell with `flops_per_sample` (`Counted`) counts for its children, too.
"""

from __future__ import annotations

from mindspore import nn

from parallel.sharding.trainable import Counted, PartlyIdle
from recsys.tables.names import is_sparse


def flops_per_sample(cell: nn.Cell) -> int:
    """Forward FLOPs of one sample."""
    if isinstance(cell, Counted):
        return cell.flops_per_sample
    return sum(flops_per_sample(child) for child in cell.cells())


def count(network: nn.Cell) -> dict[str, int]:
    """parameters, dense_parameters (without tables), active_parameters (dense ones that a sample uses), flops."""
    sizes = {p.name: p.size for p in network.trainable_params()}
    dense = sum(size for name, size in sizes.items() if not is_sparse(name))
    idle = sum(cell.idle_parameters for _, cell in network.cells_and_names() if isinstance(cell, PartlyIdle))
    # Heads that only training has are not part of the forward pass that is counted.
    auxiliary = sum(flops_per_sample(cell) for cell in network.model.auxiliary_heads())
    return {"parameters": sum(sizes.values()), "dense_parameters": dense, "active_parameters": dense - idle,
            "flops_per_sample": flops_per_sample(network.model) - auxiliary}
