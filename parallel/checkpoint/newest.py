"""The newest checkpoint of a run that is undamaged: where a resumed run goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from parallel.checkpoint.folder import checkpoint_path, list_checkpoints, newest_undamaged
from parallel.checkpoint.owners import Disks
from parallel.checkpoint.sharded import Slices
from parallel.checkpoint.writing import sweep_shared
from parallel.common.errors import UserError
from parallel.common.folders import sweep
from parallel.common.progress import info


class Ranks(Protocol):
    """This process among those of a run, as `parallel.training.backend.Backend` is."""

    rank: int
    ranks: int

    def exchange(self, values: list[float]) -> list[float]:
        """Adds lists of equal length over all ranks."""
        ...


Check = Callable[[Path, int, int], None]
"""Raises a `UserError` where one of several processes (number, how many) finds files of others damaged."""


def good_checkpoint(directory: str | Path, also: Check | None = None) -> Path | None:
    """The newest checkpoint of `directory` all of whose data are what was written; None if there is none at all.

    Reads every byte of the newest (and of older ones as long as the newer are damaged). Each damaged one is reported on
    stderr with what is wrong and what is taken instead. What killed processes left half-made there is removed first.
    `also` looks at files of others in a checkpoint (`parallel.training.companions`).

    Raises:
        UserError: there are checkpoints and all are damaged.
    """
    sweep(directory)
    found = list_checkpoints(directory)
    return newest_undamaged(found, partial(_damage, also=also)) if found else None


def agreed_checkpoint(directory: str | Path, backend: Ranks, disks: Disks, also: Check | None = None) -> Path | None:
    """`good_checkpoint` of a run of many processes, the same on all; each reads its share of the bytes on its disk.

    Raises:
        UserError: there are checkpoints and all are damaged, on all processes.
    """
    if disks.is_chief(backend.rank):
        sweep(directory)
        sweep_shared(Path(directory))
    if backend.ranks == 1:
        return good_checkpoint(directory, also)
    first, steps = None, _steps_of_chief(directory, backend)
    for step in steps:
        path = checkpoint_path(directory, step)
        error = _damage(path, backend.rank % disks.each, disks.each, disks.count > 1, also)
        bad = [rank for rank, wrong in enumerate(_gathered(backend, error is not None)) if wrong]
        if not bad:
            if first is not None and backend.rank == 0:
                info(f"taking {path} instead")
            return path
        first = first or error or UserError(f"rank {bad[0]} found it damaged", where=path, hint="its log says how")
        if error is not None or backend.rank == 0:
            info(f"{path.name} is damaged and passed over: {error or f'rank {bad[0]} says how'}")
    if first is not None:
        raise first
    return None


def _steps_of_chief(directory: str | Path, backend: Ranks) -> Sequence[int]:
    """Steps of the checkpoints that rank 0 sees, the newest first."""
    own = [int(path.name.rpartition("_")[2]) for path in reversed(list_checkpoints(directory))]
    chief = backend.rank == 0
    count = int(backend.exchange([float(len(own)) if chief else 0.0])[0])
    steps = []
    for place in range(count):
        # Two numbers: each is exact in float32.
        step = own[place] if chief else 0
        high, low = backend.exchange([float(step >> 20), float(step & 0xFFFFF)])
        steps.append((int(high) << 20) + int(low))
    return steps


def _gathered(backend: Ranks, wrong: bool) -> list[float]:
    own = [0.0] * backend.ranks
    own[backend.rank] = float(wrong)
    return backend.exchange(own)


def _damage(path: Path, part: int = 0, parts: int = 1, partial: bool = False,
            also: Check | None = None) -> UserError | None:
    try:
        Slices(path, partial=partial).check(part, parts)
        if also is not None:
            also(path, part, parts)
    except UserError as error:
        return error
    except OSError as error:
        return UserError(f"cannot be read: {error.strerror}", where=path)
    return None
