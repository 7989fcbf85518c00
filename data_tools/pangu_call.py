"""Calls the language model's command line: `train-vocabulary`, `pack` and `train` live there, in another package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from parallel.common.command import own_file
from parallel.common.errors import UserError
from parallel.common.lines import split_lines
from parallel.common.progress import info
from parallel.common.structured import BadText, parse_object
from parallel.common.yaml_core import dump_yaml

_ROOT = Path(__file__).resolve().parent.parent


def call_pangu(verb: str, config: str | None, overrides: dict[str, Any]) -> dict[str, Any]:
    """Runs `python -m pangu <verb>` with `key=value` for every override; returns its JSON line. Paths mean what they
    mean here.

    Its progress goes to this process's stderr.

    Raises:
        UserError: the command failed; its own message is above.
    """
    words = [sys.executable, "-m", "pangu", verb, *(["--config", own_file(config)] if config else [])]
    words += [f"{key}={dump_yaml(value, flow=True)}" for key, value in overrides.items()]
    info(f"pangu {verb} ...")
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=False,
                          env={**os.environ, "PYTHONPATH": path})
    if done.returncode != 0:
        raise UserError(f"python -m pangu {verb} failed", value=f"exit code {done.returncode}",
                        hint="its message is above")
    try:
        return parse_object(split_lines(done.stdout.strip())[-1])
    except (IndexError, BadText):
        raise UserError(f"python -m pangu {verb} printed no figures", value=done.stdout[-200:]) from None
