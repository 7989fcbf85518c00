"""Adapters as files: taken out of a checkpoint, kept alone, merged into the weights.

A folder of adapters is a checkpoint that holds the adapters' parameters only; its state.json says rank, alpha, targets.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pangu.adaptation.settings import LowRankSettings
from parallel.checkpoint import adapter_names
from parallel.checkpoint.folder import FORMAT, PARAMETERS_FILE, VERSION
from parallel.checkpoint.sharded import Slices
from parallel.checkpoint.writing import write_checkpoint, write_full
from parallel.common.errors import UserError
from parallel.common.settings import validate

DOWN, UP = f".{adapter_names.DOWN}", f".{adapter_names.UP}"


def extract_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `extract-adapter`."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="checkpoint of a run with adapt.low_rank")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make; must not exist")


def merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `merge-adapter`."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR",
                        help="checkpoint of the adapted run, or of the model that --adapter belongs to")
    parser.add_argument("--adapter", metavar="DIR", help="folder of adapters (none: those in the checkpoint)")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make; must not exist")


def run_extract(settings: None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Writes the adapters of a checkpoint into a folder of their own.

    Raises:
        UserError: the checkpoint has none, or is damaged.
    """
    source = Slices(arguments.checkpoint)
    low_rank = _settings_of(source)
    names = [name for name in source.names(PARAMETERS_FILE) if name.endswith((DOWN, UP))]
    kept = _View(source, names, source.read)
    _write(arguments.output, kept, {"run": {"adapt": {"low_rank": low_rank.model_dump(mode="json")}}})
    return {"output": str(arguments.output), "adapters": len(names) // 2, "bytes": kept.nbytes}


def run_merge(settings: None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Adds adapters to the weights that they belong to and writes a checkpoint of the plain model.

    Raises:
        UserError: no adapters, adapters of another model, or a damaged checkpoint.
    """
    source = Slices(arguments.checkpoint)
    adapters = Slices(arguments.adapter) if arguments.adapter is not None else source
    low_rank = _settings_of(adapters)
    adapted = {name.removesuffix(DOWN) + ".weight" for name in adapters.names(PARAMETERS_FILE) if name.endswith(DOWN)}
    for name in sorted(adapted):
        _check(source, adapters, name)
    names = [name for name in source.names(PARAMETERS_FILE) if not name.endswith((DOWN, UP))]

    def read(name: str, extent: tuple | None = None) -> np.ndarray:
        weight = source.read(name, extent)
        return weight if name not in adapted else merge(
            weight, *(adapters.read(name.removesuffix(".weight") + end) for end in (DOWN, UP)), low_rank.alpha)

    plain = _View(source, names, read)
    _write(arguments.output, plain, {key: value for key, value in source.state.items() if key in ("step", "iteration")})
    return {"output": str(arguments.output), "merged": len(adapted), "bytes": plain.nbytes}


def merge(weight_OI: np.ndarray, down_RI: np.ndarray, up_OR: np.ndarray, alpha: float) -> np.ndarray:
    """W + (alpha / R) U D, worked out in float64 and rounded once to the type of W."""
    change_OI = up_OR.astype(np.float64) @ down_RI.astype(np.float64)
    return (weight_OI.astype(np.float64) + alpha / down_RI.shape[0] * change_OI).astype(weight_OI.dtype)


def _settings_of(source: Slices) -> LowRankSettings:
    adapt = (source.state.get("run") or {}).get("adapt") or {}
    has_any = any(name.endswith(DOWN) for name in source.names(PARAMETERS_FILE))
    if not has_any or not isinstance(adapt, dict) or not adapt.get("low_rank"):
        raise UserError("there are no adapters in the checkpoint", where=source.path,
                        hint="take one of a run with adapt.low_rank")
    return validate(LowRankSettings, adapt["low_rank"], where=str(source.path))


def _check(source: Slices, adapters: Slices, name: str) -> None:
    down, up = (adapters.tensors.get(name.removesuffix(".weight") + end) for end in (DOWN, UP))
    weight = source.tensors.get(name)
    if down is None or up is None:
        raise UserError(f"half an adapter: {name.removesuffix('.weight')}", where=adapters.path)
    if weight is None or weight.shape != (up.shape[0], down.shape[1]):
        raise UserError("the adapters belong to another model", where=adapters.path, value=name,
                        hint="give the checkpoint that they were trained on")


@dataclass
class _View:
    """Some tensors of a checkpoint, perhaps with other values, as `write_full` reads them."""

    source: Slices
    kept: list[str]
    read: Callable[..., np.ndarray]

    @property
    def tensors(self) -> dict[str, Any]:
        return {name: self.source.tensors[name] for name in self.kept}

    def names(self, kind: str) -> list[str]:
        return sorted(self.kept) if kind == PARAMETERS_FILE else []

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def _write(output: str, view: _View, state: dict[str, Any]) -> None:
    write_checkpoint(Path(output), view.nbytes, lambda folder: write_full(folder, view),
                     {"format": FORMAT, "version": VERSION, "step": 0, **state})
