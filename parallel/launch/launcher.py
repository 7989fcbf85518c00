"""The processes of a run on this machine: started, watched, signalled and ended together."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from parallel.common.ownership import owned, owner_environment, start_guard
from parallel.common.progress import info
from parallel.common.structured import parse_object
from parallel.launch.plan import Plan

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 30.0
_COLLECT_SECONDS = 1.0
_TAIL_LINES = 12
_USER_ERROR = 2
_CHATTER = re.compile(r"\[(INFO|WARNING)\] ")  # of MindSpore, which would push the error out of sight


class Launcher:
    """Starts this machine's ranks and watches over them; subclasses say how they are started.

    Args:
        plan: numbers and addresses.
        command: arguments of the Python interpreter.
        logs: folder of the logs.
        trains: whether the ranks write checkpoints beside that folder, which one launch at a time may.
    """

    def __init__(self, plan: Plan, command: list[str], logs: Path, *, trains: bool = False) -> None:
        self.plan, self.command, self.logs, self.trains = plan, command, logs, trains
        self.processes: dict[int, subprocess.Popen] = {}
        self.scheduler: subprocess.Popen | None = None
        self.signalled: int | bool = False

    def run(self) -> dict[str, Any]:
        """Until all ranks have ended; the exit code is 0 or that of the first rank that failed."""
        if self.plan.node_rank == 0:
            self.plan.keep_port()
        with self._owning() as environment:
            return self._run(environment)

    @contextmanager
    def _owning(self) -> Iterator[dict[str, str]]:
        """Owns the run's folder on machine 0, where something is trained; the variables by which ranks know it."""
        directory = self.logs.parent
        if not self.trains or self.plan.node_rank > 0:
            yield owner_environment(None)
        else:
            with owned(directory, "launch"):
                yield owner_environment(directory)

    def _run(self, environment: dict[str, str]) -> dict[str, Any]:
        self.logs.mkdir(parents=True, exist_ok=True)
        guard = None
        before = {number: signal.signal(number, self._forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with _kept_environment():
                os.environ.update(environment)
                self._start()
            # Ranks watch over their parent themselves; the scheduler is MindSpore's own program.
            if self.signalled is not False:
                self._forward(self.signalled, None)  # it came before there was a process to forward it to
            guard = start_guard([item.pid for item in [*self.processes.values(), self.scheduler] if item is not None])
            first = self.plan.node_rank * self.plan.local
            info(f"started ranks {first} to {first + self.plan.local - 1} of {self.plan.ranks}; logs in {self.logs}")
            failed = self._watch()
        finally:
            self._end_all()
            if guard is not None:
                guard.kill()
                guard.wait()
            for number, old in before.items():
                signal.signal(number, old)
        return self._report(failed)

    def _start(self) -> None:
        """Fills `processes` (and `scheduler`, if there is one)."""
        raise NotImplementedError

    def _watch(self) -> tuple[int, int] | None:
        """(rank, exit code) of the first to fail, or None when all have ended well."""
        shown = _Follower(self.log(0)) if 0 in self.processes else None
        try:
            while True:
                codes = {rank: process.poll() for rank, process in self.processes.items()}
                if any(code not in (None, 0) for code in codes.values()):
                    return self._first_failure()
                if all(code == 0 for code in codes.values()):
                    return None
                if self.scheduler is not None and self.scheduler.poll() not in (None, 0) and not self.signalled:
                    return -1, self.scheduler.returncode
                time.sleep(_POLL_SECONDS)
        finally:
            if shown is not None:
                shown.close()

    def _first_failure(self) -> tuple[int, int]:
        """(rank, exit code) of the rank that took the others with it: when one ends, the rest fail soon after for want
        of it. A killed one comes first, then one that reported an error of the user's."""
        deadline = time.monotonic() + _COLLECT_SECONDS
        while time.monotonic() < deadline and any(process.poll() is None for process in self.processes.values()):
            time.sleep(_POLL_SECONDS)
        failed = {rank: process.poll() for rank, process in self.processes.items() if process.poll() not in (None, 0)}
        order = {-signal.SIGKILL: 0, _USER_ERROR: 1}
        return min(failed.items(), key=lambda item: order.get(item[1], 2))

    def log(self, rank: int) -> Path:
        """Log file of a rank."""
        return self.logs / f"rank_{rank}.log"

    def _forward(self, number: int, frame: Any) -> None:
        self.signalled = number
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(number)

    def _end_all(self) -> None:
        """Ends what still runs: politely, then at once. The ranks are sessions of their own, children included."""
        alive = [p for p in [*self.processes.values(), self.scheduler] if p is not None and p.poll() is None]
        for process in alive:
            process.terminate()
        deadline = time.monotonic() + (_GRACE_SECONDS if self.signalled else 3.0)
        while any(p.poll() is None for p in alive) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        for process in alive:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    if os.getpgid(process.pid) != os.getpgid(0):
                        os.killpg(os.getpgid(process.pid), signal.SIGKILL)
                    else:
                        process.kill()
            process.wait()

    def _report(self, failed: tuple[int, int] | None) -> dict[str, Any]:
        rank, code = failed if failed is not None else (None, 0)
        error = self._reported_error(rank) if code == _USER_ERROR else None
        if error is not None:
            info(f"{error} (rank {rank} of {self.plan.ranks}; the other ranks were ended)")
        elif failed is not None:
            name = "the scheduler" if rank == -1 else f"rank {rank}"
            log = self.logs / "scheduler.log" if rank == -1 else self.log(rank)
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
            info(f"error: {name} {how}; the other ranks were ended. The end of {log}:")
            for line in [line for line in _last_lines(log, 4 * _TAIL_LINES) if not _CHATTER.match(line)][-_TAIL_LINES:]:
                info(f"  {line}")
        # A shell shows a death by signal n as 128 + n.
        return {**_figures(self.log(0)), "exit_code": code if code >= 0 else 128 - code, "ranks": self.plan.ranks,
                "failed_rank": rank, "logs": str(self.logs)}

    def _reported_error(self, rank: int) -> str | None:
        """The line of an error that a user can repair at the end of a rank's log."""
        lines = _last_lines(self.log(rank), 4 * _TAIL_LINES) if rank >= 0 else []
        return next((line for line in reversed(lines) if line.startswith("error: ")), None)


class MsrunLauncher(Launcher):
    """Ranks of MindSpore: the scheduler (on machine 0) and the workers of msrun's process manager."""

    def _start(self) -> None:
        from mindspore.parallel.cluster.process_entity import _ProcessManager

        plan = self.plan
        with _quiet_stdout(), _kept_environment():
            # msrun starts "python": let that be this one.
            os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
            os.environ["RANK_SIZE"] = str(plan.ranks)
            manager = _ProcessManager(argparse.Namespace(
                worker_num=plan.ranks, local_worker_num=plan.local, master_addr=plan.host, master_port=plan.port,
                node_rank=plan.node_rank, log_dir=str(self.logs), join=False, cluster_time_out=plan.timeout,
                bind_core=False, bind_numa=False, sim_level=-1, sim_rank_id=-1, rank_table_file="",
                worker_log_name="rank", tail_worker_log="-1", task_script="python",
                task_script_args=["-u", *self.command]))
            if plan.node_rank == 0:
                manager.start_scheduler()
                self.scheduler = manager.msn_process
            manager.start_workers()
        first = plan.node_rank * plan.local
        self.processes = {first + local: process for local, process in manager.proc_rank_map.items()}


class TorchLauncher(Launcher):
    """Ranks of torch, each given its rank by variables and their meeting point, as torchrun does.

    Args:
        plan, command, logs, trains: see `Launcher`.
        environment: more variables for them.
    """

    def __init__(self, plan: Plan, command: list[str], logs: Path, *, trains: bool = False,
                 environment: dict[str, str] | None = None) -> None:
        super().__init__(plan, command, logs, trains=trains)
        self.environment = environment or {}

    def _start(self) -> None:
        plan, cores = self.plan, len(os.sched_getaffinity(0))
        for local in range(plan.local):
            rank = plan.node_rank * plan.local + local
            environment = {
                **os.environ, **self.environment, "RANK": str(rank), "WORLD_SIZE": str(plan.ranks),
                "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(plan.local), "MASTER_ADDR": plan.host,
                "MASTER_PORT": str(plan.port), "PARALLEL_MEET_SECONDS": str(plan.timeout),
            }  # fmt: skip
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // plan.local)))
            with open(self.log(rank), "w", encoding="utf-8") as log:
                self.processes[rank] = subprocess.Popen([sys.executable, "-u", *self.command], stdout=log,
                                                        stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                                        env=environment, start_new_session=True)


class _Follower:
    """Copies rank 0's log to stderr while it grows."""

    def __init__(self, path: Path) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._copy, args=(path,), daemon=True)
        self._thread.start()

    def _copy(self, path: Path) -> None:
        with open(path, encoding="utf-8", errors="replace") as file:
            while True:
                stopping = self._stop.is_set()
                text = file.readline()
                if text:
                    # Its own errors are reported by the launcher, in a line.
                    if not text.startswith("error: "):
                        sys.stderr.write(text)
                        sys.stderr.flush()
                elif stopping:
                    return
                else:
                    self._stop.wait(_POLL_SECONDS)

    def close(self) -> None:
        """Copies what is left and ends."""
        self._stop.set()
        self._thread.join(timeout=5.0)


class _quiet_stdout:
    """msrun prints its commands on stdout, which here belongs to the JSON line."""

    def __enter__(self) -> None:
        self._stdout, sys.stdout = sys.stdout, sys.stderr

    def __exit__(self, *_: object) -> None:
        sys.stdout = self._stdout


@contextmanager
def _kept_environment() -> Iterator[None]:
    """msrun gives the processes their ranks by this process's own variables: they go once the processes have them, so
    that what this process starts later is no worker."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _figures(log: Path) -> dict[str, Any]:
    """The JSON line at the end of rank 0's log, {} if there is none."""
    for line in reversed(_last_lines(log)):
        if line.startswith("{"):
            with suppress(ValueError):
                return parse_object(line)
    return {}


def _last_lines(path: Path, count: int = _TAIL_LINES) -> list[str]:
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - (64 << 10)))
        return file.read().decode("utf-8", "replace").split("\n")[-count - 1:]
