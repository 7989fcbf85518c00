"""Names of the parameters of low-rank adapters (`parallel.layers.low_rank`), without any framework."""

from __future__ import annotations

DOWN, UP = "adapter_down", "adapter_up"
"""Last words of the names of an adapter's parameters."""


def hint_for_unknown(names: list[str], otherwise: str) -> str:
    """What to do about parameters of a checkpoint that a model does not have."""
    return "merge its adapters into the weights first (merge-adapter)" if all(map(is_adapter, names)) else otherwise


def hint_for_missing(names: list[str], otherwise: str) -> str:
    """What to do about parameters of a model that a checkpoint does not have."""
    if all(map(is_adapter, names)):
        return "it has no adapters (adapt.low_rank): take another output.directory, and name it as adapt.checkpoint"
    return otherwise


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return name.rpartition(".")[2] in (DOWN, UP)
