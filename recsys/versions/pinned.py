"""Which checkpoint of a folder a server answers with: the newest, one it is pinned to, or the one before. Needs no
MindSpore."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parallel.checkpoint.folder import list_checkpoints
from parallel.common.errors import UserError


class Versions:
    """The checkpoints below a folder, and the one that the engine has.

    Args:
        engine: `recsys.serving.engine.Engine`; its `pinned` keeps other reloads away.
        folder: of a run, of checkpoints, or one checkpoint.
    """

    def __init__(self, engine: Any, folder: str | Path) -> None:
        self.engine, self.folder = engine, Path(folder)

    def paths(self) -> dict[str, Path]:
        """Complete checkpoints by name, the oldest first."""
        found = list_checkpoints(self.folder) or list_checkpoints(self.folder / "checkpoints")
        return {path.name: path for path in found}

    def state(self) -> dict[str, Any]:
        """What there is and what is served."""
        return {"versions": list(self.paths()), "current": Path(self.engine.trained.path).name,
                "pinned": self.engine.pinned, "version": self.engine.version}

    def pin(self, name: str) -> dict[str, Any]:
        """Takes a checkpoint by its name and keeps it, whatever else appears, until `release`.

        Raises:
            UserError: there is none of this name, or it does not fit.
        """
        found = self.paths()
        if name not in found:
            raise UserError("there is no such version", where="version", value=name,
                            hint=f"known: {', '.join(found) or 'none'}")
        self.engine.reload(found[name], pin=True)
        return self.state()

    def rollback(self) -> dict[str, Any]:
        """Pins the checkpoint before the one that is served.

        Raises:
            UserError: there is none before it.
        """
        names, current = list(self.paths()), Path(self.engine.trained.path).name
        before = [name for name in names if name < current]
        if not before:
            raise UserError("there is no version before this one", where="version", value=current)
        return self.pin(before[-1])

    def release(self) -> dict[str, Any]:
        """Lets reloads take the newest checkpoint again; what is served stays until the next one."""
        self.engine.pinned = None
        return self.state()
