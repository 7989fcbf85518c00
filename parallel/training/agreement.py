"""What all ranks of a run must have alike before they begin: the code and the settings."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError
from parallel.common.settings import without
from parallel.training.backend import Backend

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("parallel", "pangu", "recsys")
_OWN = {"output": True, "data": {"directory", "validation_directory", "corpus", "path", "cache", "tokenizer"},
        "adapt": {"checkpoint", "pairs", "validation"}}
"""Settings in which machines may differ: where their folders are."""


@cache
def code_digest() -> str:
    """SHA-256 of all sources of the packages that train."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((_ROOT / package).rglob("*.py")):
            digest.update(str(path.relative_to(_ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def settings_digest(describe: dict[str, Any]) -> str:
    """SHA-256 of a run's settings but those of folders."""
    tree = without(describe, _OWN)
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()


def graph_key(describe: dict[str, Any]) -> str:
    """A name for the graphs that this code makes of a run's settings."""
    return hashlib.sha256(f"{code_digest()} {settings_digest(describe)}".encode()).hexdigest()[:16]


def facts_of(describe: dict[str, Any]) -> dict[str, Any]:
    """What a machine tells the others before its ranks start: host, digests of code and settings, commit."""
    return {"host": socket.gethostname(), "code": code_digest(), "settings": settings_digest(describe),
            "commit": commit()}


def commit() -> str:
    """The commit of these sources, "unknown" outside a repository."""
    try:
        ended = subprocess.run(["git", "-C", str(_ROOT), "describe", "--always", "--dirty"], capture_output=True,
                              text=True, timeout=10.0, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return ended.stdout.strip()


def agree(backend: Backend, describe: dict[str, Any]) -> None:
    """Compares this rank with rank 0; all ranks call it.

    Raises:
        UserError: on all ranks, that one has other code or settings.
    """
    for what, digest in (("code", code_digest()), ("settings", settings_digest(describe))):
        mine = [float(int(digest[place:place + 4], 16)) for place in range(0, 32, 4)]
        first = backend.exchange(mine if backend.rank == 0 else [0.0] * len(mine))
        own = [0.0] * backend.ranks
        own[backend.rank] = float(first != mine)
        different = [rank for rank, wrong in enumerate(backend.exchange(own)) if wrong]
        if different:
            raise UserError(f"rank {different[0]} has other {what} than rank 0", where="launch",
                            hint="use the same commit and the same settings on all machines of a run")
