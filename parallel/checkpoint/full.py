"""Checkpoints: a folder with safetensors files and JSON, complete or absent.

    checkpoints/step_00001000/
        parameters.safetensors    the network's parameters, by name
        optimizer.safetensors     moments, `adam_m.<parameter>` and so on (absent when not saved)
        layout.json               for every tensor: file, dtype, shape, crc32
        state.json                counters of the step, position in the data, whatever the trainer adds

A checkpoint is written into a hidden folder beside its own and renamed when everything is on the disk. Nothing is
ever unpickled. Slices of many ranks: `parallel.checkpoint.sharded`; both kinds are loaded here.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parallel.checkpoint.adapter_names import hint_for_unknown
from parallel.checkpoint.folder import (
    FORMAT,
    OPTIMIZER_FILE,
    PARAMETERS_FILE,
    VERSION,
    checkpoint_path,
    remove_old,
    write_plain_json,
)
from parallel.checkpoint.safetensors_file import DTYPES, write_safetensors
from parallel.checkpoint.sharded import Holder, Slices, parameter_of, save_slices
from parallel.checkpoint.tensors import NamedTensor, named
from parallel.common.errors import UserError
from parallel.common.files import explain_os_error
from parallel.common.folders import put_in_place, sweep, temporary_name

_MAX_SHOWN = 3


def save(directory: str | Path, step: int, parameters: Sequence[Any], states: Sequence[Any], state: dict[str, Any],
         keep: int | None, *, rank: int = 0, holder: Holder | None = None,
         add_files: Callable[[Path], None] | None = None) -> Path | None:
    """A checkpoint of a run of any number of processes: rank 0 writes full tensors, or every rank its slices.

    All ranks call it; see `save_checkpoint` and `save_slices`. None on a rank that writes nothing.
    """
    if holder is not None:
        return save_slices(directory, step, parameters, states, state, keep, holder, add_files)
    return save_checkpoint(directory, step, parameters, states, state, keep, add_files) if rank == 0 else None


def save_checkpoint(directory: str | Path, step: int, parameters: Sequence[Any], states: Sequence[Any] = (),
                    state: dict[str, Any] | None = None, keep: int | None = None,
                    add_files: Callable[[Path], None] | None = None) -> Path:
    """Writes `<directory>/step_<step>` atomically, then deletes all but the newest `keep`.

    Args:
        directory: folder of the run's checkpoints.
        step: names the checkpoint; one that exists is replaced.
        parameters: the network's, `NamedTensor`s or MindSpore parameters.
        states: the optimizer's.
        state: JSON values to keep beside them.
        keep: how many to keep; None = all.
        add_files: called with the folder before it is complete, to put more files into it.

    Raises:
        UserError: no space or no permission; what was there before is untouched.
    """
    directory, target = Path(directory), checkpoint_path(directory, step)
    parameters, states = named(parameters), named(states)
    if not parameters:
        raise ValueError("a checkpoint without parameters")
    hidden = temporary_name(target)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        sweep(directory)
        _check_space(directory, [*parameters, *states])
        hidden.mkdir()
        entries = {}
        for name, tensors in ((PARAMETERS_FILE, parameters), (OPTIMIZER_FILE, states)):
            if tensors:
                entries.update(_write_tensors(hidden / name, tensors))
        if add_files is not None:
            add_files(hidden)
        write_plain_json(hidden / "layout.json", {"format": FORMAT, "version": VERSION, "tensors": entries})
        write_plain_json(hidden / "state.json", {"format": FORMAT, "version": VERSION, "step": step, **(state or {})})
        put_in_place(hidden, target)
    except OSError as error:
        raise explain_os_error(error, target) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    remove_old(directory, keep)
    return target


def _check_space(directory: Path, tensors: Sequence[NamedTensor]) -> None:
    needed = sum(math.prod(t.shape) * np.dtype(DTYPES[t.dtype]).itemsize for t in tensors) + (1 << 20)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(f"a checkpoint needs {needed / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB left; "
                        "nothing was written", where=directory, hint="free some space or lower output.keep")


def _write_tensors(path: Path, tensors: Sequence[NamedTensor]) -> dict[str, dict]:
    plan = [(t.name, t.dtype, tuple(t.shape), t.read) for t in tensors]
    checksums = write_safetensors(path, plan)
    return {name: {"file": path.name, "dtype": dtype, "shape": list(shape), "crc32": checksums[name]}
            for name, dtype, shape, _ in plan}


class Checkpoint:
    """A checkpoint, full or in slices, as full tensors: `layout[name]` = {file, dtype, shape}, `state`, `read(name)`.

    Raises:
        UserError: not a checkpoint, or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self._slices = Slices(path)
        self.path, self.state = self._slices.path, self._slices.state
        self.names, self.read = self._slices.names, self._slices.read
        self.layout = {name: {"file": tensor.kind, "dtype": tensor.dtype, "shape": list(tensor.shape)}
                       for name, tensor in self._slices.tensors.items()}


def load_checkpoint(path: str | Path, parameters: Sequence[Any], states: Sequence[Any] = (),
                    extents: dict[str, tuple] | None = None) -> dict[str, Any]:
    """Fills parameters and moments and returns the JSON state; compares all names and shapes before it changes any.

    The checkpoint may be full or in the slices of any layout.

    Args:
        path: a checkpoint, or a folder of them (the newest is taken).
        parameters: the network's, `NamedTensor`s or MindSpore parameters; each must be in the checkpoint and the other
            way round.
        states: the optimizer's; () leaves moments alone.
        extents: by parameter name the part that this process holds; parameters without one are on another stage and
            left alone. None: everything is held in full.

    Raises:
        UserError: missing, extra, of another shape or type, damaged; the parameter is named.
    """
    checkpoint, parameters, states = Slices(path), named(parameters), named(states)
    if extents is not None:
        parameters, states = ([p for p in many if parameter_of(p.name) in extents] for many in (parameters, states))
    _compare(checkpoint, PARAMETERS_FILE, parameters, extents or {})
    if states:
        if not checkpoint.names(OPTIMIZER_FILE):
            raise UserError("the checkpoint has no optimizer state, so training cannot go on from it",
                            where=checkpoint.path, hint="use one saved with output.save_optimizer")
        _compare(checkpoint, OPTIMIZER_FILE, states, extents or {})
    for parameter in [*parameters, *states]:
        parameter.assign(checkpoint.read(parameter.name, (extents or {}).get(parameter_of(parameter.name))))
    return checkpoint.state


def load_parameters(path: str | Path, parameters: Sequence[Any]) -> dict[str, Any]:
    """`load_checkpoint` without moments, for evaluation and serving."""
    return load_checkpoint(path, parameters)


def _compare(checkpoint: Slices, kind: str, parameters: Sequence[NamedTensor], extents: dict[str, tuple]) -> None:
    wanted = {p.name: p for p in parameters}
    missing = [name for name in wanted if name not in checkpoint.tensors]
    extra = [name for name in checkpoint.names(kind) if name not in wanted]
    for what, names in (("lacks", missing), ("has the unknown", [] if extents else extra)):
        if names:
            hint = "is it of another model or optimizer?"
            if names is extra:
                hint = hint_for_unknown(names, hint)
            more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
            raise UserError(f"the checkpoint {what} parameter {', '.join(names[:_MAX_SHOWN])}{more}",
                            where=checkpoint.path, hint=hint)
    for name, parameter in wanted.items():
        saved, extent = checkpoint.tensors[name], extents.get(parameter_of(name))
        shape = saved.shape if extent is None else tuple(stop - start for start, stop in extent)
        if shape != tuple(parameter.shape):
            raise UserError(f"'{name}' has shape {list(parameter.shape)} in the model and {list(shape)} in the "
                            "checkpoint", where=checkpoint.path,
                            hint="use the model settings that the checkpoint was trained with")
        if saved.dtype != parameter.dtype:
            raise UserError(f"'{name}' is {parameter.dtype} in the model and {saved.dtype} in the checkpoint",
                            where=checkpoint.path)

