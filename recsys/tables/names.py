"""Names of the parameters that are tables. Needs no MindSpore."""

from __future__ import annotations


def is_sparse(name: str) -> bool:
    """Whether a parameter is an embedding table (trained by `train.sparse_optimizer`)."""
    return name.endswith(".table") and ".tables." in name
