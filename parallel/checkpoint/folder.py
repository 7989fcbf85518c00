"""The folder of a checkpoint: its name, its place, and how it appears there complete or not at all. What is in it:
`checkpoint`, `sliced_checkpoint`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from parallel.common.errors import UserError
from parallel.common.folders import remove_folder

FORMAT = "parallel.checkpoint"
VERSION = 1
PARAMETERS_FILE = "parameters.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
_NAME = re.compile(r"^step_(\d{8,})$")


def checkpoint_path(directory: str | Path, step: int) -> Path:
    """`<directory>/step_00001000`."""
    return Path(directory) / f"step_{step:08d}"


def list_checkpoints(directory: str | Path) -> list[Path]:
    """Complete checkpoints of a folder, oldest first."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(found) if (path / "state.json").is_file()]


def resolve_checkpoint(path: str | Path) -> Path:
    """`path` itself if it is a checkpoint, or the newest one below it (`path` or `path/checkpoints`).

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if (path / "layout.json").is_file() or next(path.glob("layout-*-of-*.json"), None):
        return path
    found = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
    if not found:
        raise UserError("no checkpoint here", where=path, hint="give the folder of a run or of a checkpoint")
    return found[-1]


def remove_old(directory: str | Path, keep: int | None) -> None:
    """Deletes all checkpoints of a folder but the newest `keep`; None keeps all."""
    if keep is not None:
        for old in list_checkpoints(directory)[:-keep]:
            remove_folder(old)


def write_plain_json(path: Path, value: dict) -> None:
    """JSON without a temporary file of its own: the folder is what is renamed."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())
