"""Writing a checkpoint: hidden until it is complete, in steps that a trainer may take while it goes on training.

    begin     the first rank of each disk makes the hidden folder           all ranks meet
    copy      what a rank writes is copied, if training goes on meanwhile
    write     every rank writes its slices; this may be a thread's work     all ranks know that all have written
    complete  the first rank of each disk writes index and state, renames   all ranks know that all are in place
    tidy      older checkpoints go

Nobody needs another rank's files for any of it, so machines may have disks of their own.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from parallel.checkpoint.folder import (
    FORMAT,
    OPTIMIZER_FILE,
    PARAMETERS_FILE,
    VERSION,
    checkpoint_path,
    remove_old,
    write_plain_json,
)
from parallel.checkpoint.index import Written, index_name, index_tree, part_name, read_written, written_tree
from parallel.checkpoint.owners import Disks, Extent, Holders, written_by
from parallel.checkpoint.safetensors_file import DTYPES, write_safetensors
from parallel.checkpoint.sharded import Slices, parameter_of
from parallel.checkpoint.tensors import NamedTensor, named
from parallel.common.errors import UserError
from parallel.common.files import explain_os_error
from parallel.common.folders import put_in_place, sweep, sync_folder, temporary_name

_SHARED_NAME = ".ranks"


@dataclass(frozen=True)
class Holder:
    """A process that holds slices.

    Args:
        rank, ranks: which it is, of how many.
        extents: its slices by parameter name; moments are sharded as their parameters, and a parameter without one is
            not held (it belongs to another stage).
        shapes: full shapes by parameter name.
        barrier: returns when all ranks have called it.
        holders: who holds which slices of the parameters of `extents`; asked once, at the first checkpoint.
    """

    rank: int
    ranks: int
    extents: dict[str, Extent]
    shapes: dict[str, tuple[int, ...]]
    barrier: Callable[[], None]
    holders: Callable[[], Holders]
    _written: dict[tuple, dict[str, Extent]] = field(default_factory=dict)

    def writes(self, tensors: Sequence[NamedTensor], disks: Disks) -> dict[str, Extent]:
        """What this process writes of its tensors: which part of each; what is left out is another rank's to write."""
        key = disks, tuple(tensor.name for tensor in tensors)
        if key not in self._written:
            listed = [(tensor.name, parameter_of(tensor.name), np.dtype(DTYPES[tensor.dtype]).itemsize)
                      for tensor in tensors]
            self._written[key] = written_by(self.rank, listed, self.holders(), disks)
        return self._written[key]


class Part:
    """The part `extent` of a `NamedTensor` whose own extent is `held`."""

    def __init__(self, tensor: NamedTensor, held: Extent, extent: Extent) -> None:
        self.name, self.dtype, self.extent = tensor.name, tensor.dtype, extent
        self.shape = tuple(stop - start for start, stop in extent)
        self.tensor, self.place = tensor, tuple(slice(start - first, stop - first) for (start, stop), (first, _) in
                                                zip(extent, held, strict=True))

    def read(self) -> np.ndarray:
        """See `NamedTensor`."""
        return self.tensor.read()[self.place]

    def assign(self, value: np.ndarray) -> None:
        """See `NamedTensor`; never asked for."""
        raise NotImplementedError


class Save:
    """A checkpoint under way; see the module for the order of its steps.

    Args:
        directory: folder of the run's checkpoints.
        step: names the checkpoint; one that exists is replaced.
        parameters, states: the network's and the optimizer's, `NamedTensor`s or MindSpore parameters.
        state: JSON values to keep beside them.
        keep: how many checkpoints to keep; None = all.
        rank: this process.
        disks: which ranks share a disk; None = one process.
        add_files: called with the hidden folder, by the ranks that make one, to put more files into it.

    Every step raises a `UserError` where there is no space or no permission; what was there before is untouched.
    """

    def __init__(self, directory: str | Path, step: int, parameters: Sequence[Any], states: Sequence[Any],
                 state: dict[str, Any], keep: int | None, *, rank: int = 0, disks: Disks | None = None,
                 add_files: Callable[[Path], None] | None = None) -> None:
        self.directory, self.target, self.keep = Path(directory), checkpoint_path(directory, step), keep
        self.rank, self.disks = rank, disks or Disks.shared(1)
        self.kinds = {PARAMETERS_FILE: named(parameters), OPTIMIZER_FILE: named(states)}
        self.state = {"format": FORMAT, "version": VERSION, "step": step, **state}
        self.add_files = add_files
        self.hidden = self._hidden()

    @property
    def chief(self) -> bool:
        """Whether this rank makes the folder and puts it in place."""
        return self.disks.is_chief(self.rank)

    def begin(self) -> None:
        """Makes the hidden folder."""
        if not self.chief:
            return
        with self._or_nothing():
            self.directory.mkdir(parents=True, exist_ok=True)
            sweep(self.directory)
            sweep_shared(self.directory)
            self._check_space()
            self.hidden.mkdir()
            if self.add_files is not None:
                self.add_files(self.hidden)

    def copy(self) -> None:
        """Copies what this rank writes: from here on training may change it."""
        self.kinds = {kind: [_Kept(tensor) for tensor in tensors] for kind, tensors in self.kinds.items()}

    def write(self) -> None:
        """Writes this rank's part."""
        with self._or_nothing():
            self._write()

    def complete(self) -> None:
        """Makes the checkpoint visible."""
        if not self.chief:
            return
        with self._or_nothing():
            self._write_index()
            write_plain_json(self.hidden / "state.json", self.state)
            sync_folder(self.hidden)
            put_in_place(self.hidden, self.target)

    def tidy(self) -> None:
        """Deletes checkpoints that are no longer kept."""
        if self.chief:
            remove_old(self.directory, self.keep)

    def give_up(self) -> None:
        """Removes what is half-made."""
        shutil.rmtree(self.hidden, ignore_errors=True)

    def run(self, barrier: Callable[[], None]) -> Path:
        """All steps at once; all ranks call it."""
        self.begin()
        barrier()
        self.write()
        barrier()
        self.complete()
        barrier()
        self.tidy()
        return self.target

    @contextmanager
    def _or_nothing(self) -> Iterator[None]:
        """Whatever goes wrong leaves nothing half-made, and a full disk is a line."""
        try:
            yield
        except BaseException as error:
            if self.chief:
                self.give_up()
            if isinstance(error, OSError):
                raise explain_os_error(error, self.target) from error
            raise

    def _check_space(self) -> None:
        own = [tensor for tensors in self.kinds.values() for tensor in tensors]
        needed = self._writers * sum(math.prod(t.shape) * np.dtype(DTYPES[t.dtype]).itemsize for t in own) + (1 << 20)
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise UserError(f"a checkpoint needs {needed / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB left; "
                            "nothing was written", where=self.directory, hint="free some space or lower output.keep")

    @property
    def _writers(self) -> int:
        """How many ranks write as much as this one to its disk."""
        return 1

    def _hidden(self) -> Path:
        raise NotImplementedError

    def _write(self) -> None:
        raise NotImplementedError

    def _write_index(self) -> None:
        raise NotImplementedError


class FullSave(Save):
    """A checkpoint of full tensors: the first rank of each disk writes it alone."""

    entries: dict[str, dict]

    def _hidden(self) -> Path:
        if not self.kinds[PARAMETERS_FILE]:
            raise ValueError("a checkpoint without parameters")
        return temporary_name(self.target)

    def copy(self) -> None:
        """See `Save`."""
        if self.chief:
            super().copy()

    def _write(self) -> None:
        if not self.chief:
            return
        self.entries = {}
        for kind, tensors in self.kinds.items():
            if tensors:
                plan = [(tensor.name, tensor.dtype, tuple(tensor.shape), tensor.read) for tensor in tensors]
                checksums = write_safetensors(self.hidden / kind, plan)
                self.entries.update({name: {"file": kind, "dtype": dtype, "shape": list(shape),
                                            "crc32": checksums[name]} for name, dtype, shape, _ in plan})

    def _write_index(self) -> None:
        write_plain_json(self.hidden / "layout.json", {"format": FORMAT, "version": VERSION, "tensors": self.entries})


class SlicedSave(Save):
    """A checkpoint of slices: every rank writes those of which it is the writer (`parallel.checkpoint.owners`)."""

    def __init__(self, directory: str | Path, step: int, parameters: Sequence[Any], states: Sequence[Any],
                 state: dict[str, Any], keep: int | None, holder: Holder, disks: Disks | None = None,
                 add_files: Callable[[Path], None] | None = None) -> None:
        disks = disks or Disks.shared(holder.ranks)
        own = [[tensor for tensor in named(many) if parameter_of(tensor.name) in holder.extents]
               for many in (parameters, states)]
        writes = holder.writes([*own[0], *own[1]], disks)
        self.holder, self.extents = holder, writes
        parameters, states = ([Part(tensor, holder.extents[parameter_of(tensor.name)], writes[tensor.name])
                               for tensor in many if tensor.name in writes] for many in own)
        super().__init__(directory, step, parameters, states, state, keep, rank=holder.rank, disks=disks,
                         add_files=add_files)

    def _hidden(self) -> Path:
        # One name for all ranks of a disk: they share no process id. The run's folder has one owner.
        return self.target.with_name(f".{self.target.name}{_SHARED_NAME}")

    @property
    def _writers(self) -> int:
        return self.disks.each

    def _write(self) -> None:
        holder = self.holder
        read = {tensor.name: tensor.read for tensors in self.kinds.values() for tensor in tensors}
        plan = [(tensor.name, kind, tensor.dtype, holder.shapes[parameter_of(tensor.name)], self.extents[tensor.name])
                for kind, tensors in self.kinds.items() for tensor in tensors]
        written = write_rank(self.hidden, self.rank, holder.ranks, plan, lambda name, extent: read[name]())
        write_plain_json(self.hidden / part_name(self.rank), written_tree(written))

    def _write_index(self) -> None:
        first, files = self.disks.of(self.rank) * self.disks.each, []
        slices: list[Written] = []
        for rank in range(first, first + self.disks.each):
            files.append(self.hidden / part_name(rank))
            slices += read_written(files[-1])
        write_plain_json(self.hidden / index_name(self.rank, self.disks), index_tree(slices, self.holder.ranks))
        for file in files:
            file.unlink()


class _Kept:
    """A `NamedTensor` as it was."""

    def __init__(self, tensor: NamedTensor) -> None:
        self.name, self.dtype, self.shape = tensor.name, tensor.dtype, tensor.shape
        # What a framework reads may be its own memory, which the next step changes.
        self.value = np.array(tensor.read(), order="C", copy=True)

    def read(self) -> np.ndarray:
        """See `NamedTensor`."""
        return self.value

    def assign(self, value: np.ndarray) -> None:
        """See `NamedTensor`; never asked for."""
        raise NotImplementedError


def sweep_shared(directory: Path) -> None:
    """Removes what ranks that are gone left half-made together; for the owner of the folder, before its ranks write."""
    for path in Path(directory).glob(f".step_*{_SHARED_NAME}"):
        shutil.rmtree(path, ignore_errors=True)


def rank_file(name: str, rank: int, ranks: int) -> str:
    """`parameters-00003-of-00008.safetensors` for `parameters.safetensors`."""
    stem, suffix = name.rsplit(".", 1)
    return f"{stem}-{rank:05d}-of-{ranks:05d}.{suffix}"


def write_rank(folder: Path, rank: int, ranks: int,
               tensors: Iterable[tuple[str, str, str, tuple[int, ...], Extent]],
               read: Callable[[str, Extent], np.ndarray]) -> list[Written]:
    """Writes one rank's files into `folder` and returns their entries in the index.

    Args:
        folder: a folder that becomes a checkpoint when all ranks are written.
        rank, ranks: whose files, of how many.
        tensors: (name, kind of file, dtype, full shape, extent).
        read: gives the data of an extent when its turn comes.
    """
    # Sorted: the bytes then do not depend on the layout that the data come from.
    tensors, written = sorted(tensors, key=lambda entry: entry[0]), []
    for kind in (PARAMETERS_FILE, OPTIMIZER_FILE):
        own = [entry for entry in tensors if entry[1] == kind]
        if not own:
            continue
        file = rank_file(kind, rank, ranks)
        plan = [(name, dtype, tuple(stop - start for start, stop in extent), lambda name=name,
                 extent=extent: read(name, extent))
                for name, _, dtype, _, extent in own]
        checksums = write_safetensors(folder / file, plan)
        written += [Written(name, kind, dtype, tuple(full), extent, file, checksums[name])
                    for name, _, dtype, full, extent in own]
    return written


def write_index(folder: Path, slices: Iterable[Written], ranks: int) -> None:
    """Writes the index of slices that are all in `folder`."""
    write_plain_json(folder / "layout.json", index_tree(slices, ranks))


def write_full(folder: Path, slices: Slices) -> None:
    """Writes a full checkpoint of the tensors of `slices` into `folder`."""
    layout = {}
    for kind in (PARAMETERS_FILE, OPTIMIZER_FILE):
        names = slices.names(kind)
        if names:
            plan = [(name, slices.tensors[name].dtype, slices.tensors[name].shape, lambda name=name: slices.read(name))
                    for name in names]
            checksums = write_safetensors(folder / kind, plan)
            layout.update({name: {"file": kind, "dtype": dtype, "shape": list(shape), "crc32": checksums[name]}
                           for name, dtype, shape, _ in plan})
    write_plain_json(folder / "layout.json", {"format": FORMAT, "version": VERSION, "tensors": layout})


def write_checkpoint(target: str | Path, needed: int, write: Callable[[Path], None], state: dict[str, Any]) -> Path:
    """Calls `write(folder)`, adds state.json and renames: `target` is complete or absent.

    Raises:
        UserError: `target` exists, or the disk has less than `needed` bytes or fills up.
    """
    target = Path(target)
    if target.exists():
        raise UserError("the folder exists already", where=target, hint="choose another or delete it")
    hidden = temporary_name(target)
    try:
        hidden.mkdir(parents=True)
        free = shutil.disk_usage(hidden).free
        if needed + (1 << 20) > free:
            raise UserError(f"this needs {needed / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB left; nothing was "
                            "written", where=target, hint="free some space")
        write(hidden)
        write_plain_json(hidden / "state.json", state)
        hidden.rename(target)
    except OSError as error:
        raise explain_os_error(error, target) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return target
