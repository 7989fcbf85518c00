"""The newest checkpoint of a run that is undamaged: where a resumed run goes on."""

from __future__ import annotations

from pathlib import Path

from parallel.checkpoint.folder import list_checkpoints, newest_undamaged
from parallel.checkpoint.sharded import Slices
from parallel.common.errors import UserError
from parallel.common.folders import sweep


def good_checkpoint(directory: str | Path) -> Path | None:
    """The newest checkpoint of `directory` all of whose data are what was written; None if there is none at all.

    Reads every byte of the newest (and of older ones as long as the newer are damaged). Each damaged one is reported on
    stderr with what is wrong and what is taken instead. What killed processes left half-made there is removed first.

    Raises:
        UserError: there are checkpoints and all are damaged.
    """
    sweep(directory)
    found = list_checkpoints(directory)
    return newest_undamaged(found, _damage) if found else None


def _damage(path: Path) -> UserError | None:
    try:
        Slices(path).check()
    except UserError as error:
        return error
    except OSError as error:
        return UserError(f"cannot be read: {error.strerror}", where=path)
    return None
