"""Verb `count`: parameters and FLOPs of a ranker, exactly, without allocating it (see `recsys.layers.sizes`)."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from parallel.common.progress import table
from recsys.build import labels_of, loss_network, spec_of
from recsys.layers.sizes import count
from recsys.tables.names import is_sparse

if TYPE_CHECKING:
    from recsys.settings import Run


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
