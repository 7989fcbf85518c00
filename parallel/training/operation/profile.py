"""The profiler's window of a run: `train.profile`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from parallel.common.progress import info
from parallel.training.backend import Backend
from parallel.training.settings import ProfileSettings


class ProfileWindow:
    """Profiles the steps of a window, this process's own, into `<directory>/profile`.

    Args:
        backend: profiles.
        settings: which steps; None = none.
        directory: of the run.
    """

    def __init__(self, backend: Backend, settings: ProfileSettings | None, directory: Path) -> None:
        self.backend, self.settings, self.folder = backend, settings, directory / "profile"
        self.stop: Callable[[], None] | None = None

    def before_step(self, step: int) -> None:
        """Called with the number of the step that comes, from 1."""
        if self.settings is not None and step == self.settings.start:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.stop = self.backend.profiler(self.folder)

    def after_step(self, step: int) -> None:
        """Called with the number of the step that was made."""
        if self.stop is not None and step >= self.settings.start + self.settings.steps - 1:
            self.close()

    def close(self) -> None:
        """Ends the window, where the run ends within it."""
        if self.stop is not None:
            stop, self.stop = self.stop, None
            stop()
            if self.backend.rank == 0:
                info(f"profile of the steps from {self.settings.start} on: {self.folder}")
