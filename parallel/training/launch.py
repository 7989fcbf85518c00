"""Verb `launch`: a run as many processes, on one node or several, through msrun's own process manager.

Every rank writes its log to `<output.directory>/logs/rank_<r>.log`; rank 0's is shown as well. When a rank fails, the
others are ended and the exit code is that of the first that failed. SIGTERM and SIGINT go to all ranks, which save and
stop.
"""

from __future__ import annotations

import argparse
import json
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

from parallel.common.errors import UserError
from parallel.common.progress import info
from parallel.task import load_run

DEFAULT_PORT = 8118
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 30.0
_TAIL_LINES = 12
_CHATTER = re.compile(r"\[(INFO|WARNING)\] ")  # of MindSpore, which would push the error out of sight


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines that take part (default 1)")
    parser.add_argument("--node-rank", type=int, default=0, metavar="R", help="number of this machine, from 0")
    parser.add_argument("--master", default=f"127.0.0.1:{DEFAULT_PORT}", metavar="HOST:PORT",
                        help=f"address of machine 0 and a free port there (default 127.0.0.1:{DEFAULT_PORT})")
    parser.add_argument("--nproc", type=int, metavar="P",
                        help="processes on each machine (default: devices of the parallel block / nodes)")
    parser.add_argument("--run", dest="what", default="train", metavar="VERB",
                        help="what to run: a verb of the model's package (default train)")
    parser.add_argument("--resume", nargs="?", const="auto", metavar="DIR",
                        help="go on from a checkpoint; without DIR from the newest of output.directory")
    parser.add_argument("--compile-only", action="store_true",

                        help="compile the graphs of all distinct ranks, run nothing")
    parser.add_argument("--timeout", type=int, default=300, metavar="S",
                        help="seconds to wait for all processes to meet (default 300)")


def run(settings: None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Starts this machine's processes, waits for them and returns rank 0's figures with "ranks", "failed_rank", "logs".

    A single process takes this one's place, without msrun.

    Raises:
        UserError: flags that contradict each other, a port in use, a config file with an error.
    """
    overrides, resume = list(arguments.overrides), arguments.resume
    if resume is not None and "=" in resume:
        # `--resume key=value`: the flag's optional DIR took the first override.
        overrides, resume = [resume, *overrides], "auto"
    if resume is not None:
        overrides.append(f"output.resume={resume}")
    module, run_settings = load_run(arguments.config, overrides)
    if arguments.compile_only:
        _compile_only(arguments.config, overrides)
    plan = Plan.of(arguments, run_settings.parallel.devices, run_settings.parallel)
    package = module.__name__.partition(".")[0]
    command = ["-m", package, arguments.what, "--config", str(arguments.config), *overrides]
    if plan.ranks == 1:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *command])
    logs = Path(run_settings.output.directory) / "logs"
    return Launcher(plan, command, logs).run()


def _compile_only(config: str, overrides: list[str]) -> None:
    command = ["-m", "parallel", "dryrun", "--config", str(config), "--ranks", "all-distinct", *overrides]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *command])


class Plan:
    """How many processes, where, and who is called when: the numbers msrun needs."""

    def __init__(self, nodes: int, node_rank: int, host: str, port: int, local: int, timeout: int) -> None:
        self.nodes, self.node_rank, self.host, self.port = nodes, node_rank, host, port
        self.local, self.timeout = local, timeout

    @property
    def ranks(self) -> int:
        """Processes on all machines."""
        return self.nodes * self.local

    @classmethod
    def of(cls, arguments: argparse.Namespace, devices: int | None, parallel: Any) -> Plan:
        """Checks the flags against each other and the parallel block."""
        nodes, node_rank = arguments.nodes, arguments.node_rank
        if nodes < 1 or not 0 <= node_rank < nodes:
            raise UserError(f"must lie in [0, {nodes})", where="--node-rank", value=node_rank)
        host, _, port = arguments.master.rpartition(":")
        if not host or not port.isdigit() or not 1024 <= int(port) < 65536:
            raise UserError("must be HOST:PORT with a port of 1024 to 65535", where="--master", value=arguments.master)
        if nodes > 1 and node_rank > 0 and host in ("localhost",):
            raise UserError("must name machine 0", where="--master", value=arguments.master)
        local = arguments.nproc or cls._default_local(devices, parallel, nodes)
        if local < 1:
            raise UserError("must be at least 1", where="--nproc", value=local)
        parallel.resolve(nodes * local)
        return cls(nodes, node_rank, host, int(port), local, arguments.timeout)

    @staticmethod
    def _default_local(devices: int | None, parallel: Any, nodes: int) -> int:
        if devices is None and -1 in (parallel.data, parallel.op):
            raise UserError("the parallel block leaves the number of devices open", where="--nproc",
                            hint="give --nproc or parallel.devices")
        devices = devices or parallel.world
        if devices % nodes:
            raise UserError(f"{devices} devices do not divide over them", where="--nodes", value=nodes)
        return devices // nodes


class Launcher:
    """Starts the scheduler (on machine 0) and this machine's ranks, and watches over them.

    Args:
        plan: numbers and addresses.
        command: arguments of the Python interpreter.
        logs: folder of the logs.
    """

    def __init__(self, plan: Plan, command: list[str], logs: Path) -> None:
        self.plan, self.command, self.logs = plan, command, logs
        self.processes: dict[int, subprocess.Popen] = {}
        self.scheduler: subprocess.Popen | None = None
        self.signalled = False

    def run(self) -> dict[str, Any]:
        """Until all ranks have ended; the exit code is 0 or that of the first rank that failed."""
        if self.plan.node_rank == 0:
            _check_port(self.plan.host, self.plan.port)
        self.logs.mkdir(parents=True, exist_ok=True)
        before = {number: signal.signal(number, self._forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._start()
            first = self.plan.node_rank * self.plan.local
            info(f"started ranks {first} to {first + self.plan.local - 1} of {self.plan.ranks}; logs in {self.logs}")
            failed = self._watch()
        finally:
            self._end_all()
            for number, old in before.items():
                signal.signal(number, old)
        return self._report(failed)

    def _start(self) -> None:
        from mindspore.parallel.cluster.process_entity import _ProcessManager

        plan = self.plan
        with _quiet_stdout(), _kept_environment():
            # msrun starts "python": let that be ours.
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

    def _watch(self) -> tuple[int, int] | None:
        """(rank, exit code) of the first to fail, or None when all have ended well."""
        shown = _Follower(self.log(0)) if 0 in self.processes else None
        try:
            while True:
                codes = {rank: process.poll() for rank, process in self.processes.items()}
                for rank, code in codes.items():
                    if code not in (None, 0):
                        return rank, code
                if all(code == 0 for code in codes.values()):
                    return None
                if self.scheduler is not None and self.scheduler.poll() not in (None, 0) and not self.signalled:
                    return -1, self.scheduler.returncode
                time.sleep(_POLL_SECONDS)
        finally:
            if shown is not None:
                shown.close()

    def log(self, rank: int) -> Path:
        """Log file of a rank."""
        return self.logs / f"rank_{rank}.log"

    def _forward(self, number: int, frame: Any) -> None:
        self.signalled = True
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
        if failed is not None:
            name = "the scheduler" if rank == -1 else f"rank {rank}"
            log = self.logs / "scheduler.log" if rank == -1 else self.log(rank)
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
            info(f"error: {name} {how}; the other ranks were ended. The end of {log}:")
            for line in [line for line in _last_lines(log, 4 * _TAIL_LINES) if not _CHATTER.match(line)][-_TAIL_LINES:]:
                info(f"  {line}")
        # A shell shows a death by signal n as 128 + n.
        return {**_figures(self.log(0)), "exit_code": code if code >= 0 else 128 - code, "ranks": self.plan.ranks,
                "failed_rank": rank, "logs": str(self.logs)}


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
                text = file.read()
                if text:
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
    """msrun tells the processes who they are by this process's own variables: they go once the processes have them, so
    that what this process starts later is no worker."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _check_port(host: str, port: int) -> None:
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except socket.gaierror:
        raise UserError("this host is not known", where="--master", value=host) from None
    except OSError as error:
        raise UserError(f"cannot listen here: {error.strerror}", where="--master", value=f"{host}:{port}",
                        hint="choose a free port of this machine (machine 0 listens)") from None


def _figures(log: Path) -> dict[str, Any]:
    """The JSON line at the end of rank 0's log, {} if there is none."""
    for line in reversed(_last_lines(log)):
        if line.startswith("{"):
            with suppress(ValueError):
                return json.loads(line)
    return {}


def _last_lines(path: Path, count: int = _TAIL_LINES) -> list[str]:
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - (64 << 10)))
        return file.read().decode("utf-8", "replace").splitlines()[-count:]
