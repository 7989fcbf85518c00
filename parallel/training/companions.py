"""What goes along with a training run: sees every batch before its step, hears of every step after it, and keeps a
state of its own in the checkpoints (a stream's offsets, windows of metrics, rows touched since an export)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parallel.common.errors import UserError


class Companion:
    """Base of all companions; each method may be left as it is.

    Attributes:
        name: of its state in the checkpoint; unique in a run.
        may_wait: whether a checkpoint may be completed some steps after it was begun (`output.save_in_background`).
    """

    name = "companion"
    may_wait = False
    save: Callable[[], Any] = staticmethod(lambda: None)
    """Set by the trainer: writes a checkpoint of the steps done; for use between two steps."""
    go_back: Callable[[int], Any] = staticmethod(lambda step: None)
    """Set by the trainer: returns to the checkpoint of a step; for use between two steps."""

    def before_step(self, step: int, batch: Sequence[np.ndarray]) -> None:
        """Called with the number of steps done and this process's rows of the next batch."""

    def after_step(self, step: int, outputs: dict[str, float]) -> None:
        """Called with the number of steps done and the results of the last one."""

    def before_checkpoint(self, directory: Path, step: int) -> None:
        """Called on every rank before a checkpoint of `step` is written below `directory`."""

    def add_files(self, folder: Path) -> None:
        """Called by the process that writes a checkpoint, to put files of its own into its folder before it is
        complete."""

    def check_files(self, folder: Path, part: int, parts: int) -> None:
        """Called before a checkpoint is chosen to go on from, on each of `parts` processes, which share the files.

        Raises:
            UserError: a file is missing or damaged; then an earlier checkpoint is looked at.
        """

    def restore_files(self, folder: Path) -> None:
        """Called on every rank with the checkpoint that a run goes on from, before `restore`.

        Raises:
            UserError: a file is missing or damaged.
        """

    def after_checkpoint(self, step: int) -> None:
        """Called when a checkpoint of `step` is complete on the disk."""

    def finish(self, step: int) -> dict[str, Any]:
        """Called once when a run ends without an error, with the number of steps done; figures for its JSON line."""
        return {}

    def state(self, step: int) -> Any:
        """What a checkpoint of `step` keeps, JSON values; None = nothing."""
        return None

    def restore(self, state: Any) -> None:
        """Takes what `state` gave; called before the first batch of a resumed run.

        Raises:
            UserError: the state is damaged or does not fit.
        """


def states_of(companions: Iterable[Companion], step: int) -> dict[str, Any]:
    """States by name, those that are None left out."""
    found = {companion.name: companion.state(step) for companion in companions}
    return {name: state for name, state in found.items() if state is not None}


def restore_all(companions: Iterable[Companion], states: dict[str, Any], where: Any) -> None:
    """Gives each companion its state.

    Raises:
        UserError: a state is damaged.
    """
    for companion in companions:
        companion.restore_files(Path(where))
        if companion.name in states:
            try:
                companion.restore(states[companion.name])
            except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError):
                raise UserError(f"the state of '{companion.name}' in the checkpoint is damaged", where=where,
                                hint="use another checkpoint") from None
