"""The program of a run for the torch backend: exported once a machine by a process of its own, and the command of its
ranks, which import no MindSpore."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError
from parallel.common.files import atomic_write
from parallel.common.lines import split_lines
from parallel.common.structured import parse_object
from parallel.training.settings import RunSettings

PROGRAM = "program"
_EXPORTED, _RESOLVED = "exported.json", "settings.json"


def exported(settings: RunSettings, ranks: int, node_rank: int = 0, *, folder: str = PROGRAM,
             graphs: Sequence[str] = ()) -> tuple[Path, Path]:
    """Writes the settings of a run and its program into the run's folder.

    Args:
        settings: of a run of any model.
        ranks: processes on all machines.
        node_rank: this machine; each writes a folder of its own, for they may share the disk.
        folder: its name in the run's folder.
        graphs: kinds to export; none = those of training.

    Returns:
        (folder of the program, file of the settings).
    Raises:
        UserError: MindSpore, which compiles, is missing, or it refuses the layout.
    """
    folder = Path(settings.output.directory) / (folder if node_rank == 0 else f"{folder}-{node_rank}")
    folder.mkdir(parents=True, exist_ok=True)
    # What the user did not give is not given to the export either: some defaults depend on other keys.
    tree = settings.model_dump(mode="json", exclude_unset=True)
    tree.setdefault("model", {})["name"] = settings.model.name
    tree.setdefault("parallel", {})["devices"] = ranks
    _write(folder / _EXPORTED, tree)
    _export(folder, graphs)
    resolved = settings.parallel.resolve(ranks).model_copy(update={"devices": ranks})
    _write(folder / _RESOLVED, settings.model_copy(update={"parallel": resolved}).model_dump(mode="json"))
    return folder, folder / _RESOLVED


def _write(path: Path, tree: dict[str, Any]) -> None:
    """As a config file: JSON is YAML."""
    with atomic_write(path) as file:
        json.dump(tree, file, ensure_ascii=False, indent=1)


def _export(folder: Path, graphs: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "parallel", "export", "--config", str(folder / _EXPORTED), "--output", str(folder)]
    command += ["--graphs", ",".join(graphs)] if graphs else []
    error = None
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("error: "):
                error = line.removeprefix("error: ").strip()
            else:
                sys.stderr.write(line)
                sys.stderr.flush()
        lines = split_lines(process.stdout.read())
    if error is not None:
        raise UserError(error)
    if process.returncode or not lines:
        raise RuntimeError(f"exporting the program failed with exit code {process.returncode}")
    return parse_object(lines[-1])


def rank_command(program: Path, settings: Path, device: str) -> list[str]:
    """Arguments of the Python interpreter for a rank of an exported program.

    Args:
        program: its folder.
        settings: the run's.
        device: "CPU" or "GPU".
    """
    return ["-m", "parallel.torch_runtime", "rank", str(program), "--settings", str(settings), "--device",
            device.lower()]
