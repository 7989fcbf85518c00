"""Names of the parameters that are tables. Needs no MindSpore."""

from __future__ import annotations


def is_sparse(name: str) -> bool:
    """Whether a parameter is an embedding table (trained by `train.sparse_optimizer`)."""
    return name.endswith(".table") and ".tables." in name


ACCUMULATOR = "_accumulator"
"""End of the name of what row-wise Adagrad keeps of a table in the graph."""


def is_accumulator(name: str) -> bool:
    """Whether a parameter of the network is an optimizer's state of a table's rows."""
    return name.endswith(ACCUMULATOR)
