"""What a process that a launcher started does first."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from parallel.common.ownership import end_with_parent, owned
from parallel.training.stop import listen_early

WORKER = "PARALLEL_WORKER"
"""Variable that the launchers set."""


def begin_worker() -> None:
    """In a process that a launcher started: it ends with the launcher, and signals ask it to stop from now on."""
    if os.environ.get(WORKER):
        end_with_parent()
        listen_early()


@contextlib.contextmanager
def owning(directory: str | Path, rank: int) -> Iterator[None]:
    """Owns the folder of a run as its rank 0, or joins the launcher that does; machines after the first rely on it.

    Raises:
        UserError: another run has the folder.
    """
    joins, launched = bool(os.environ.get("PARALLEL_OWNER")), bool(os.environ.get(WORKER))
    with owned(directory) if joins or (rank == 0 and not launched) else contextlib.nullcontext():
        yield
