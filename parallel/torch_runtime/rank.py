"""One process of a run on torch: settings and an exported program in, the figures of the run out."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from parallel.common.errors import PeerError
from parallel.common.files import read_json
from parallel.common.settings import validate
from parallel.task import package_of
from parallel.torch_runtime.program import Program
from parallel.training.settings import RunSettings
from parallel.training.stop import listen_early

_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "timeout")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb `rank`."""
    parser.add_argument("program", metavar="DIR", help="folder of the exported program")
    parser.add_argument("--settings", required=True, metavar="FILE",
                        help="settings of the run, as the launcher wrote them")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="what it runs on (default cpu)")


def run(settings: None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Verb `rank`: one process of a run; variables of the launcher say which."""
    listen_early()
    path = Path(arguments.settings)
    tree = read_json(path, dict, hint="launch the run again")
    return run_rank(Path(arguments.program), stored_settings(tree, str(path)), device=arguments.device)


def stored_settings(tree: dict[str, Any], where: str) -> RunSettings:
    """Settings of a run of any model, without importing the model.

    Raises:
        UserError: a key or a model that is not known.
    """
    name = tree["model"]["name"]
    return validate(package_of(name).stored_settings_class(name), tree, where=where)


def run_rank(program: Path, settings: RunSettings, *, device: str = "cpu") -> dict[str, Any]:
    """Trains as the rank that the launcher's variables name, rank 0 of 1 without them.

    Args:
        program: folder of the exported program.
        settings: of the run.
        device: "cpu" or "gpu".

    Raises:
        UserError: anything that a user can repair.
    """
    from parallel.torch_runtime.step import TorchStep

    opened, rank = Program(program), int(os.environ.get("RANK", "0"))
    mode = settings.parallel.execution
    if mode == "auto":
        mode = "cuda_graph" if device == "gpu" else "exact"
    backend = TorchStep(opened, rank, device="cuda" if device == "gpu" else "cpu", mode=mode)
    try:
        return package_of(settings.model.name).train_on(settings, backend, opened.tree.get("figures", {}))
    except RuntimeError as error:
        raise _explained(error, rank, opened.world) from error
    finally:
        backend.close()


def _explained(error: RuntimeError, rank: int, world: int) -> Exception:
    """What collectives throw when a process of the run is gone, as a user's error."""
    if world > 1 and any(word in str(error) for word in _GONE):
        return PeerError("another process of the run has ended or does not answer", where=f"rank {rank} of {world}",
                         hint="its own log says why; start the run again to go on from the newest checkpoint")
    return error
