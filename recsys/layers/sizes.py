"""Parameters and FLOPs of a ranker's network, exactly, without allocating it.

FLOPs are those of the matrix products of one forward pass, two for each multiplication and addition; lookups, norms,
activations and pooling are not counted. A cell that says `flops_per_sample` is believed, its children with it; a
`Linear` counts for each of its `rows` (positions of a list, 1 unless said).
"""

from __future__ import annotations

from mindspore import nn

from parallel.layers.linear import Linear
from recsys.layers.embedding import is_sparse


def flops_per_sample(cell: nn.Cell) -> int:
    """Forward FLOPs of one sample."""
    own = getattr(cell, "flops_per_sample", None)
    if own is not None:
        return own
    if isinstance(cell, Linear):
        return 2 * cell.inputs * cell.outputs * getattr(cell, "rows", 1)
    return sum(flops_per_sample(child) for child in cell.cells())


def count(network: nn.Cell) -> dict[str, int]:
    """parameters, dense_parameters (without tables), active_parameters (dense ones that a sample uses), flops."""
    sizes = {p.name: p.size for p in network.trainable_params()}
    dense = sum(size for name, size in sizes.items() if not is_sparse(name))
    idle = sum(getattr(cell, "idle_parameters", 0) for _, cell in network.cells_and_names())
    # Heads that only training has are not part of the forward pass that is counted.
    auxiliary = sum(flops_per_sample(cell) for cell in getattr(network.model, "auxiliary", ()))
    return {"parameters": sum(sizes.values()), "dense_parameters": dense, "active_parameters": dense - idle,
            "flops_per_sample": flops_per_sample(network.model) - auxiliary}
