"""Checkpoints: a folder with safetensors files and JSON, complete or absent.

    checkpoints/step_00001000/
        parameters.safetensors    the network's parameters, by name
        optimizer.safetensors     moments, `adam_m.<parameter>` and so on (absent when not saved)
        layout.json               for every tensor: file, dtype, shape, crc32
        state.json                counters of the step, position in the data, whatever the trainer adds

A checkpoint is written into a hidden folder beside its place and renamed when everything is on the disk. Nothing is
ever unpickled. Slices of many ranks: `parallel.checkpoint.sharded`; both kinds are loaded here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from parallel.checkpoint.adapter_names import hint_for_missing, hint_for_unknown
from parallel.checkpoint.folder import OPTIMIZER_FILE, PARAMETERS_FILE
from parallel.checkpoint.owners import Disks
from parallel.checkpoint.sharded import Slices, parameter_of
from parallel.checkpoint.tensors import NamedTensor, named
from parallel.checkpoint.writing import FullSave, Holder, Save, SlicedSave
from parallel.common.errors import UserError

_MAX_SHOWN = 3


def save(directory: str | Path, step: int, parameters: Sequence[Any], states: Sequence[Any], state: dict[str, Any],
         keep: int | None, *, rank: int = 0, holder: Holder | None = None, disks: Disks | None = None,
         barrier: Callable[[], None] | None = None, add_files: Callable[[Path], None] | None = None) -> Path:
    """A checkpoint of a run of any number of processes, which all call it: full tensors, or every rank's slices.

    Args: see `parallel.checkpoint.writing.Save`;
        holder: which slices this process holds; None = everything.
        barrier: returns when all processes have called it; None = the holder's, or there is nobody to wait for.

    Raises:
        UserError: no space or no permission; what was there before is untouched.
    """
    under_way = begun(directory, step, parameters, states, state, keep, rank=rank, holder=holder, disks=disks,
                      add_files=add_files)
    return under_way.run(barrier or (holder.barrier if holder is not None else _nobody))


def begun(directory: str | Path, step: int, parameters: Sequence[Any], states: Sequence[Any], state: dict[str, Any],
          keep: int | None, *, rank: int = 0, holder: Holder | None = None, disks: Disks | None = None,
          add_files: Callable[[Path], None] | None = None) -> Save:
    """What `save` does, to be done step by step."""
    if holder is not None:
        return SlicedSave(directory, step, parameters, states, state, keep, holder, disks, add_files)
    return FullSave(directory, step, parameters, states, state, keep, rank=rank,
                     disks=disks or Disks.shared(rank + 1), add_files=add_files)


def save_checkpoint(directory: str | Path, step: int, parameters: Sequence[Any], states: Sequence[Any] = (),
                    state: dict[str, Any] | None = None, keep: int | None = None,
                    add_files: Callable[[Path], None] | None = None) -> Path:
    """Writes `<directory>/step_<step>` atomically from one process, then deletes all but the newest `keep`.

    Args, errors: see `parallel.checkpoint.writing.Save`.
    """
    return save(directory, step, parameters, states, state or {}, keep, add_files=add_files)


def _nobody() -> None:
    """The barrier of one process."""


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
    # Where every process takes its part, each asks for what is on its machine's disk.
    checkpoint, parameters, states = Slices(path, partial=extents is not None), named(parameters), named(states)
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
    for what, names, hint in (("lacks", missing, hint_for_missing),
                              ("has the unknown", [] if extents else extra, hint_for_unknown)):
        if names:
            more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
            raise UserError(f"the checkpoint {what} parameter {', '.join(names[:_MAX_SHOWN])}{more}",
                            where=checkpoint.path, hint=hint(names, "is it of another model or optimizer?"))
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

