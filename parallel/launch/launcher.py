"""The processes of a run on this machine: started, watched, signalled and ended together."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from parallel.common.errors import PeerError, UserError
from parallel.common.ownership import owned, owner_environment, start_guard
from parallel.common.progress import info
from parallel.common.structured import parse_object
from parallel.launch.machines import End, Machines
from parallel.launch.plan import Plan
from parallel.training.operation.saving import LOCAL_RANKS, RESTARTS

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 30.0
_COLLECT_SECONDS = 1.0
_TAIL_LINES = 12
_USER_ERROR = UserError.exit_code
_REPORTED = (UserError.exit_code, PeerError.exit_code)
_SCHEDULER, _ELSEWHERE = -1, -2
_CHATTER = re.compile(r"\[(INFO|WARNING)\] ")  # of MindSpore, which would push the error out of sight


class Launcher:
    """Starts this machine's ranks and watches over them; subclasses say how they are started.

    Args:
        plan: numbers and addresses.
        command: arguments of the Python interpreter.
        logs: folder of the logs.
        machines: this machine among those of the run, met; None = there is one.
        trains: whether the ranks write checkpoints beside that folder, which one launch at a time may.
    """

    def __init__(self, plan: Plan, command: list[str], logs: Path, machines: Machines | None = None, *,
                 trains: bool = False) -> None:
        self.plan, self.command, self.logs, self.trains = plan, command, logs, trains
        self.machines = machines or Machines(plan, {})
        self.processes: dict[int, subprocess.Popen] = {}
        self.scheduler: subprocess.Popen | None = None
        self.signalled: int | bool = False
        self.silent: list[int] = []

    def run(self) -> dict[str, Any]:
        """Until all ranks have ended; the exit code is 0 or that of the first rank that failed. Where `max_restarts`
        allows it, all ranks of all machines begin again after a failure that no user has to repair."""
        restarts = 0
        with self._owning() as environment:
            while True:
                if self.plan.node_rank == 0:
                    self.plan.keep_port()
                self.machines.ready(restarts)
                failed = self._run({**environment, RESTARTS: str(restarts)})
                end = self.machines.ended(self._end_of(failed))
                figures = self._report(failed, end) | {"restarts": restarts}
                if not end.why or end.final or restarts >= self.plan.max_restarts:
                    return figures
                restarts += 1
                info(f"starting all ranks again from the last complete checkpoint (restart {restarts} of at most "
                     f"{self.plan.max_restarts})")
                self._put_logs_aside(restarts)
                self.processes, self.scheduler = {}, None

    def _end_of(self, failed: tuple[int, int] | None) -> End:
        if failed is None or failed[0] == _ELSEWHERE:
            return End()
        final = failed[1] == _USER_ERROR or self.signalled is not False
        return End(f"rank {failed[0]} {_how(failed[1])}", final)

    def _put_logs_aside(self, restart: int) -> None:
        for rank in self.processes:
            with suppress(FileNotFoundError):
                self.log(rank).rename(self.logs / f"rank_{rank}.before_restart_{restart}.log")

    @contextmanager
    def _owning(self) -> Iterator[dict[str, str]]:
        """Owns the run's folder on machine 0, where something is trained; the variables by which ranks know it."""
        directory = self.logs.parent
        if not self.trains or self.plan.node_rank > 0:
            yield owner_environment(None)
        else:
            with owned(directory, "launch"):
                yield owner_environment(directory)

    def _run(self, environment: dict[str, str]) -> tuple[int, int] | None:
        """The ranks once from start to end; see `_watch`."""
        self.logs.mkdir(parents=True, exist_ok=True)
        guard = None
        before = {number: signal.signal(number, self._forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with _kept_environment():
                os.environ.update(environment)
                os.environ[LOCAL_RANKS] = str(self.plan.local)
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
        return failed

    def _start(self) -> None:
        """Fills `processes` (and `scheduler`, if there is one)."""
        raise NotImplementedError

    def _started(self, rank: int, environment: dict[str, str]) -> subprocess.Popen:
        """A rank's process, its output in its log."""
        with open(self.log(rank), "w", encoding="utf-8") as log:
            return subprocess.Popen([sys.executable, "-u", *self.command], stdout=log, stderr=subprocess.STDOUT,
                                    stdin=subprocess.DEVNULL, env=environment, start_new_session=True)

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
                    return _SCHEDULER, self.scheduler.returncode
                if self.machines.failure() is not None:
                    return _ELSEWHERE, PeerError.exit_code
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
        self.silent = [rank for rank, process in self.processes.items() if process.poll() is None]
        order = {-signal.SIGKILL: 0, _USER_ERROR: 1, PeerError.exit_code: 3}
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

    def _report(self, failed: tuple[int, int] | None, end: End) -> dict[str, Any]:
        if failed is None and end.why:
            failed = (_ELSEWHERE, PeerError.exit_code)
        rank, code = failed if failed is not None else (None, 0)
        error = self._reported_error(rank) if code in _REPORTED else None
        if rank == _ELSEWHERE:
            info(f"error: {end.why or self.machines.failure()}; the ranks of this machine were ended")
        elif error is not None:
            silent = f"rank {' '.join(map(str, self.silent[:8]))} did not answer; " if self.silent else ""
            info(f"{error} (rank {rank} of {self.plan.ranks}; {silent if code == PeerError.exit_code else ''}the other "
                 "ranks were ended)")
        elif failed is not None:
            name = "the scheduler" if rank == _SCHEDULER else f"rank {rank}"
            log = self.logs / "scheduler.log" if rank == _SCHEDULER else self.log(rank)
            info(f"error: {name} {_how(code)}; the other ranks were ended. The end of {log}:")
            for line in [line for line in _last_lines(log, 4 * _TAIL_LINES) if not _CHATTER.match(line)][-_TAIL_LINES:]:
                info(f"  {line}")
        # A shell shows a death by signal n as 128 + n.
        return {**figures_in(self.log(0)), "exit_code": code if code >= 0 else 128 - code, "ranks": self.plan.ranks,
                "failed_rank": rank, "logs": str(self.logs)}

    def _reported_error(self, rank: int) -> str | None:
        """The line of an error that a user can repair at the end of a rank's log."""
        lines = _last_lines(self.log(rank), 4 * _TAIL_LINES) if rank >= 0 else []
        return next((line for line in reversed(lines) if line.startswith("error: ")), None)


class MindSporeLauncher(Launcher):
    """Ranks of MindSpore, which know who they are by the variables of its dynamic cluster, and on machine 0 the
    scheduler at which they meet. https://www.mindspore.cn/tutorials/en/r2.7.0/parallel/dynamic_cluster.html
    """

    def _start(self) -> None:
        plan = self.plan
        shared = {
            **os.environ, "MS_WORKER_NUM": str(plan.ranks), "MS_SCHED_HOST": _numeric(plan.host),
            "MS_SCHED_PORT": str(plan.port), "MS_TOPO_TIMEOUT": str(plan.timeout), "RANK_SIZE": str(plan.ranks),
        }  # fmt: skip
        if plan.node_rank == 0:
            meet = ["-c", "import mindspore.communication as c; c.init()"]
            with open(self.logs / "scheduler.log", "w", encoding="utf-8") as log:
                self.scheduler = subprocess.Popen([sys.executable, *meet], stdout=log, stderr=subprocess.STDOUT,
                                                  env={**shared, "MS_ROLE": "MS_SCHED"}, stdin=subprocess.DEVNULL)
        for local in range(plan.local):
            rank = plan.node_rank * plan.local + local
            own = {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": str(rank), "RANK_ID": str(rank), "DEVICE_ID": str(local)}
            self.processes[rank] = self._started(rank, {**shared, **own})


class TorchLauncher(Launcher):
    """Ranks of torch, each given its rank by variables and their meeting point, as torchrun does.

    Args:
        plan, command, logs, machines, trains: see `Launcher`.
        environment: more variables for them.
    """

    def __init__(self, plan: Plan, command: list[str], logs: Path, machines: Machines | None = None, *,
                 trains: bool = False, environment: dict[str, str] | None = None) -> None:
        super().__init__(plan, command, logs, machines, trains=trains)
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
            self.processes[rank] = self._started(rank, environment)


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


def _how(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"


def _numeric(host: str) -> str:
    """The address of a host, as MindSpore wants it."""
    try:
        return socket.gethostbyname(host)
    except socket.gaierror:
        raise UserError("this host is not known", where="--master", value=host) from None


@contextmanager
def _kept_environment() -> Iterator[None]:
    """Variables that this process sets for others go once these have them, so that what it starts later is none of
    them."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def figures_in(log: Path) -> dict[str, Any]:
    """The JSON line at the end of a rank's log, {} if there is none."""
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
