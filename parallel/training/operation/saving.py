"""When a run's checkpoints are written: at once, or in the background while training goes on.

In the background a step pays for the copy of what its rank writes, and for an exchange of two numbers at each step
until the checkpoint is in place. One is under way at a time; a stop, the end of the run and the next one wait for it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from parallel.checkpoint.full import begun
from parallel.checkpoint.owners import Disks
from parallel.checkpoint.writing import Save
from parallel.common.errors import UserError
from parallel.common.progress import info
from parallel.training.backend import Backend
from parallel.training.companions import Companion
from parallel.training.settings import OutputSettings

LOCAL_RANKS = "PARALLEL_LOCAL_RANKS"
"""Set by a launcher: how many ranks it started on this machine."""
RESTARTS = "PARALLEL_RESTARTS"
"""Set by a launcher: how often it has started the ranks again."""


def disks_of(ranks: int, output: OutputSettings) -> Disks:
    """Which of `ranks` processes share a disk.

    Raises:
        UserError: machines without a shared disk hold different numbers of ranks.
    """
    return Disks(ranks, ranks if output.shared_disk else int(os.environ.get(LOCAL_RANKS, ranks)))


class Saver:
    """Writes a run's checkpoints; every rank has one and calls the same methods after the same steps.

    Args:
        backend: this process.
        output: the `output:` block.
        directory: of the checkpoints.
        companions: hear of a checkpoint when it is in place.

    Attributes:
        newest: the last checkpoint in place.
    """

    def __init__(self, backend: Backend, output: OutputSettings, directory: Path,
                 companions: Sequence[Companion]) -> None:
        self.backend, self.output, self.directory, self.companions = backend, output, directory, companions
        self.disks = disks_of(backend.ranks, output)
        self.newest: Path | None = None
        self._work: _Work | None = None
        if output.save_in_background and any(not companion.may_wait for companion in companions):
            name = next(companion.name for companion in companions if not companion.may_wait)
            raise UserError(f"'{name}' of this run needs each checkpoint at once", where="output.save_in_background",
                            value=True, hint="set it to false")

    def save(self, step: int, states: Sequence[Any], state: dict[str, Any], *, at_once: bool) -> None:
        """Begins a checkpoint of now; `at_once` or without `output.save_in_background` it is in place on return.

        Raises:
            UserError: no space or no permission, for this checkpoint or the one that was under way.
        """
        self.settle()
        save = begun(self.directory, step, self.backend.parameters(), states, state, self.output.keep,
                     rank=self.backend.rank, holder=self.backend.holder, disks=self.disks, add_files=self._add_files)
        if at_once or not self.output.save_in_background:
            self._is_in_place(save.run(self.backend.barrier), step)
            return
        save.begin()
        self.backend.barrier()
        save.copy()
        self._work = _Work(save, step)

    def look(self) -> None:
        """Goes on with the checkpoint that is under way, where all ranks are ready for it. All ranks call it.

        Raises:
            UserError: a rank could not write; on all of them.
        """
        work = self._work
        if work is None:
            return
        done, failed = self.backend.exchange([float(work.is_done), float(work.error is not None)])
        if failed:
            self._work = None
            work.wait()
            work.save.give_up()
            if isinstance(work.error, UserError) or work.error is None:
                raise work.error or UserError(f"{int(failed)} of {self.backend.ranks} ranks could not write it",
                                              where=work.save.target, hint="their logs say why")
            raise work.error
        if done < self.backend.ranks:
            return
        if work.next():
            return
        self._work = None
        work.save.tidy()
        self._is_in_place(work.save.target, work.step)

    def settle(self) -> None:
        """Waits until nothing is under way. All ranks call it after the same step.

        Raises:
            UserError: see `look`.
        """
        while self._work is not None:
            self._work.wait()
            self.look()

    def _is_in_place(self, path: Path, step: int) -> None:
        self.newest = path
        for companion in self.companions:
            companion.after_checkpoint(step)

    def _add_files(self, folder: Path) -> None:
        for companion in self.companions:
            companion.add_files(folder)


class _Work:
    """A checkpoint that a thread of this rank works on: first writing, then putting in place."""

    def __init__(self, save: Save, step: int) -> None:
        self.save, self.step = save, step
        self.error: Exception | None = None
        self._left = [save.complete]
        self._start(save.write)

    @property
    def is_done(self) -> bool:
        """Whether the thread has done what it was given."""
        return not self._thread.is_alive()

    def next(self) -> bool:
        """Begins the next step; False if that was the last."""
        if not self._left:
            return False
        self._start(self._left.pop())
        return True

    def wait(self) -> None:
        """Returns when the thread is done."""
        self._thread.join()

    def _start(self, act: Callable[[], None]) -> None:
        def run() -> None:
            try:
                act()
            except Exception as error:
                self.error = error
                info(f"the checkpoint of step {self.step} could not be written: {error}")

        # Not waited for when the process ends on an error: what is half-made is hidden.
        self._thread = threading.Thread(target=run, daemon=True, name="checkpoint")
        self._thread.start()
