"""The folder of a checkpoint: its name and path, and how it appears there complete or not at all. What is in it:
`full`, `sharded`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from parallel.common.errors import UserError
from parallel.common.files import inside, json_with_digest, read_json
from parallel.common.folders import remove_folder
from parallel.common.progress import info
from parallel.common.structured import DIGEST_KEY

FORMAT = "parallel.checkpoint"
VERSION = 2
"""2: JSON files carry their digest. 1: without."""
INDEX_VERSION = 3
"""Of a checkpoint in slices with an index (`parallel.checkpoint.index`)."""
PARAMETERS_FILE = "parameters.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
LAYOUT_PART = re.compile(r"^layout-(\d{5,})-of-(\d{5,})\.json$")
_STATE = {"step": int, "iteration": int, "skipped": int, "counters": dict, "window": list, "metrics": dict,
          "early_stop": dict, "companions": dict, "run": dict, "train": dict, "quantization": dict}
"""What `state.json` holds where it holds it."""
_IN_WORDS = {int: "no whole number", dict: "no object", list: "no list"}
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
    return newest_undamaged(found)


def newest_undamaged(found: Sequence[Path], damaged: Callable[[Path], UserError | None] | None = None) -> Path:
    """The last of `found` that is not damaged; each one that is passed over is reported. `damaged` looks for what is
    wrong; None = `damage`.

    Raises:
        UserError: all are damaged (what is wrong with the newest).
    """
    first = None
    for path in reversed(found):
        error = (damaged or damage)(path)
        if error is None:
            if first is not None:
                info(f"taking {path} instead")
            return path
        first = first or error
        info(f"{path.name} is damaged and passed over: {error}")
    raise first


def remove_old(directory: str | Path, keep: int | None) -> None:
    """Deletes all checkpoints of a folder but the newest `keep`; None keeps all."""
    if keep is not None:
        for old in list_checkpoints(directory)[:-keep]:
            remove_folder(old)


def read_sealed_json(path: Path) -> dict:
    """A layout or state of a checkpoint; of version 1, which had no digests, too.

    Raises:
        UserError: missing, damaged or changed.
    """
    value = read_json(path, dict, hint="use another checkpoint")
    # A digest that was there has been compared and taken off.
    known = value.get("version")
    if known not in (None, 1) and DIGEST_KEY.encode() not in path.read_bytes():
        raise UserError("file is damaged: it has no digest", where=path, hint="use another checkpoint")
    return value


def read_state(path: Path) -> dict:
    """`state.json` of the checkpoint at `path`; {} where there is none.

    Raises:
        UserError: damaged, changed, or a value of another kind than the code writes.
    """
    file = path / "state.json"
    state = read_sealed_json(file) if file.is_file() else {}
    for name, kind in _STATE.items():
        value = state.get(name)
        if not (value is None or type(value) is kind and (kind is not int or 0 <= value < 1 << 63)):
            raise UserError(f"'{name}' is {_IN_WORDS[kind]}", where=file, value=value, hint="use another checkpoint")
    return state


def damage(path: Path) -> UserError | None:
    """What is wrong with the JSON files of a checkpoint and the presence of the files they name; None if nothing.

    Cheap: the tensors are compared with their checksums when they are read (`newest.good_checkpoint` reads them all).
    """
    try:
        layouts = [entry for entry in path.iterdir() if entry.name == "layout.json" or LAYOUT_PART.match(entry.name)]
        if not layouts:
            return UserError("the checkpoint has no layout", where=path)
        read_state(path)
        for layout in layouts:
            for name in sorted(_files_named(layout)):
                if not inside(path, name).is_file():
                    return UserError("a file of the checkpoint is missing", where=path / name)
    except UserError as error:
        return error
    except (OSError, AttributeError, TypeError) as error:
        return UserError(f"file is damaged: {type(error).__name__}", where=path)
    return None


def _files_named(path: Path) -> set[str]:
    layout = read_sealed_json(path)
    if layout.get("version") == INDEX_VERSION:
        return set(layout.get("files"))
    return {entry.get("file") for entry in layout.get("tensors").values()}


def write_plain_json(path: Path, value: dict) -> None:
    """JSON with its digest and without a temporary file of its own: the folder is what is renamed."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json_with_digest(value))
        file.flush()
        os.fsync(file.fileno())


def parameter_bytes(checkpoint: Path) -> int:
    """Size on disk of a checkpoint's parameters."""
    return sum(file.stat().st_size for file in checkpoint.glob(f"{PARAMETERS_FILE.split('.')[0]}*.safetensors"))
