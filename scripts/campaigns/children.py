"""Commands without the cost of their start: children of a process that has imported what they import.

A child runs `python -m <package> <verb> ...` as the interpreter would, in a session of its own, and begins after a
tenth of a second instead of ten: kills can be many, and most of them fall into work instead of imports.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

_IMPORTED = ["numpy", "safetensors", "pydantic", "yaml", "rich", "torch", "torch.distributed", "mindspore",
             "parallel.common.command", "parallel.torch_runtime.rank", "parallel.torch_runtime.step",
             "parallel.training.trainer", "pangu.build", "recsys.build", "pangu.train", "recsys.train",
             "pangu.data.packing", "data_tools.dedup"]


@cache
def _context() -> multiprocessing.context.ForkServerContext:
    # One thread each: a process that has started others cannot be forked.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context


class Child:
    """A command that runs.

    Args:
        words: what follows `python -m`.
        log: file that takes what it writes.
        environment: further variables.
    """

    def __init__(self, words: list[str], log: Path, **environment: str) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self.process = _context().Process(target=_run, args=(words, str(log), environment))
        self.process.start()

    def ended(self, seconds: float) -> bool:
        """Whether it has ended within so many seconds."""
        self.process.join(max(0.0, seconds))
        return self.process.exitcode is not None

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self.process.exitcode

    def kill(self) -> None:
        """SIGKILL to it and to what it started."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()

    def told(self) -> str:
        """What it has written."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""


def all_ended(children: list[Child], seconds: float) -> bool:
    """Whether all end within so many seconds."""
    deadline = time.monotonic() + seconds
    return all(child.ended(deadline - time.monotonic()) for child in children)


def _run(words: list[str], log: str, environment: dict[str, str]) -> None:
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    sys.argv = [words[0], *words[1:]]
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
