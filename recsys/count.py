"""Parameters and FLOPs of a ranker, exactly, without allocating it.

FLOPs are those of the matrix products of one forward pass, two for each multiplication and addition; lookups, norms,
activations and pooling are not counted. A cell with `flops_per_sample` (`Counted`) counts for its children, too.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mindspore import nn

from parallel.common.progress import table
from parallel.sharding.trainable import Counted, PartlyIdle
from recsys.build import labels_of, loss_network, spec_of
from recsys.layers.embedding import is_sparse

if TYPE_CHECKING:
    from recsys.settings import Run


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


def run(settings: Run, arguments: argparse.Namespace) -> dict:
    """Verb `count`."""
    spec = spec_of(settings)
    network = loss_network(settings, spec, len(labels_of(settings)))
    figures = count(network)
    batch = settings.train.global_batch_size
    parts: dict[str, list[int]] = {}
    for item in network.trainable_params():
        part = "tables" if is_sparse(item.name) else item.name.split(".")[0]
        parts.setdefault(part, []).append(item.size)
    table(f"{settings.model.name}: parameters", ["part", "tensors", "parameters"],
          [[part, len(sizes), sum(sizes)] for part, sizes in parts.items()])
    return {**figures, "batch": batch, "flops_per_batch": figures["flops_per_sample"] * batch,
            "tokens": network.model.token_count}
