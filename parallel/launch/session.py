"""Training in this process, by whichever backend suits the layout and the machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from parallel.common.progress import info
from parallel.launch.choose import choice_of
from parallel.launch.programs import exported
from parallel.training.backend import Backend
from parallel.training.settings import RunSettings
from parallel.training.stop import listen_early


def ranks_here() -> int:
    """How many processes a launcher started with this one."""
    return int(os.environ.get("MS_WORKER_NUM", "1"))


def runs_on_torch(settings: RunSettings) -> bool:
    """Whether a run that no launcher started goes to torch, and says so.

    Raises:
        UserError: the backend that is needed is not installed.
    """
    if ranks_here() > 1:
        return False
    choice = choice_of(settings, 1)
    if choice.backend == "torch":
        info(choice.text())
    return choice.backend == "torch"


def train_on_torch(settings: RunSettings) -> dict[str, Any]:
    """Exports the program of one process and runs it here; the figures of the run."""
    from parallel.torch_runtime.rank import run_rank

    program, _ = exported(settings, 1)
    device = choice_of(settings, 1).device
    return run_rank(program, settings, device=device.lower())


def trained(make: Callable[[], Backend], train: Callable[[Backend], dict[str, Any]]) -> dict[str, Any]:
    """`train(make())` in this process; the backend is closed whatever happens."""
    listen_early()
    backend = make()
    try:
        return train(backend)
    finally:
        backend.close()
