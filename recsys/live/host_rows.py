"""What versions say of tables on the host: all their rows, or those seen since the version before.

Where tables are spread over processes, each writes its rows into a hidden folder that all see; process 0 then puts the
folder into the version. Needs no MindSpore.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from recsys.tables.files import FOLDER, write_all_entries
from recsys.tables.host import HostTables

_STAGED = ".tables"


class HostRows:
    """Rows of tables on the host for one version after the other.

    Args:
        tables: of this process.
        folder: of the versions.
    """

    def __init__(self, tables: HostTables, folder: Path) -> None:
        self.tables, self.staged = tables, folder / _STAGED
        self.spread = tables.exchange.ranks > 1
        self.since, self.since_time, self.sweeps = 0, 0.0, 0

    def swept(self) -> bool:
        """Whether rows were evicted since the last version: a delta cannot say so."""
        if not self.tables.settings.sweep_every:
            return False
        before, self.sweeps = self.sweeps, self.tables.steps // self.tables.settings.sweep_every
        return self.sweeps != before

    def stage(self, full: bool, written: Callable[[], None]) -> Callable[[Path], object]:
        """What puts the rows of all processes, as they are, into a version's folder; called by all processes.

        Args:
            full: all rows; otherwise those seen since the last call.
            written: returns when the version before has taken its files.
        """
        entries = self._entries(full)
        if not self.spread:
            return lambda folder: write_all_entries(folder / FOLDER, entries)
        written()
        exchange = self.tables.exchange
        if exchange.rank == 0:
            shutil.rmtree(self.staged, ignore_errors=True)  # of a run that was killed
        exchange.all_to_all([b""] * exchange.ranks)  # the version before has taken its files
        write_all_entries(self.staged, entries, exchange.rank, exchange.ranks)
        exchange.all_to_all([b""] * exchange.ranks)
        return lambda folder: self.staged.rename(folder / FOLDER)

    def _entries(self, full: bool) -> dict:
        self.tables.settle()
        found = {}
        for name, table in self.tables.tables.items():
            seconds = self.tables.plans[name].slot.feature.expire_unit == "seconds"
            found[name] = table.entries(0 if full else int(self.since_time) if seconds else self.since + 1)
        self.since, self.since_time = self.tables.steps, max(0.0, self.tables.seconds - 1.0)
        return found
