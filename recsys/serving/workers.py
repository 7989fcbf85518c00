"""Several processes behind one port, each with the model; a user's requests are scored by one of them.

The kernel hands connections to the processes (SO_REUSEPORT). Whichever reads a request knows from the user's id whose
it is and passes the body on over a socket in a private folder, so a user's state is computed and kept once. When that
process does not answer, the reader scores the request itself: the state is then missing, the answer is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError
from parallel.common.progress import info
from parallel.common.structured import parse_json
from parallel.serving.errors import Refusal
from parallel.serving.settings import HttpSettings
from recsys.serving.settings import ServeSettings

_VARIABLE = "RANKER_WORKER"
_HEAD = struct.Struct("<IB")
_LONGEST = 64 << 20
JSON, ARROW, CONTROL = 0, 1, 2


class Place:
    """Which of how many workers this process is, and where the others are.

    Args:
        index, count: of the workers.
        folder: of their sockets.
        port: that all serve on.
    """

    def __init__(self, index: int, count: int, folder: str, port: int) -> None:
        self.index, self.count, self.folder, self.port = index, count, Path(folder), port

    @classmethod
    def mine(cls) -> Place | None:
        """As the parent gave it; None in a process that serves alone, and in the parent."""
        text = os.environ.get(_VARIABLE)
        return cls(*parse_json(text)) if text else None

    def socket(self, index: int) -> str:
        """Path of a worker's socket."""
        return str(self.folder / f"{index}.socket")

    def owner(self, user: Any) -> int:
        """The worker of a user."""
        return zlib.crc32(json.dumps(user, sort_keys=True, ensure_ascii=True).encode()) % self.count


def shared_listener(settings: HttpSettings, port: int | None = None) -> socket.socket:
    """A socket that other processes may bind too.

    Raises:
        UserError: the address cannot be had.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((settings.host, settings.port if port is None else port))
    except OSError as error:
        listener.close()
        raise UserError(f"cannot listen here: {error.strerror}", where=f"{settings.host}:{settings.port}",
                        hint="choose another port") from None
    return listener


# ---------------------------------------------------------------- the parent


def run_workers(settings: ServeSettings, what: str) -> dict:
    """Starts the workers, starts one anew that dies, and ends them at SIGTERM or SIGINT."""
    _nobody_listens(settings)
    listener = shared_listener(settings)  # never listens: it keeps the port
    port = listener.getsockname()[1]
    ending, restarts = [], 0

    def end(*_: Any) -> None:
        ending.append(True)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    with tempfile.TemporaryDirectory(prefix="ranker-") as folder:
        workers = [_start(index, settings.workers, folder, port) for index in range(settings.workers)]
        info(f"{settings.workers} processes {what}")
        try:
            while not ending:
                for index, worker in enumerate(workers):
                    if worker.poll() is None:
                        continue
                    if worker.returncode == 2:  # a mistake of the user's, which the worker has reported
                        return {"exit_code": 2, "workers": settings.workers}
                    restarts += 1
                    info(f"worker {index} ended with {worker.returncode}; it is started anew")
                    workers[index] = _start(index, settings.workers, folder, port)
                    time.sleep(0.5)
                time.sleep(0.1)
        finally:
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    worker.terminate()
            for worker in workers:
                worker.wait()
            listener.close()
    return {"workers": settings.workers, "restarts": restarts}


def _nobody_listens(settings: HttpSettings) -> None:
    """A port that another server shares by SO_REUSEPORT could be bound, and each would get some of the requests."""
    if settings.port:
        probe = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise UserError(f"cannot listen here: {error.strerror}", where=f"{settings.host}:{settings.port}",
                            hint="choose another port") from None
        finally:
            probe.close()


def _start(index: int, count: int, folder: str, port: int) -> subprocess.Popen:
    environment = {**os.environ, _VARIABLE: json.dumps([index, count, folder, port])}
    return subprocess.Popen([sys.executable, "-m", "recsys", *sys.argv[1:]], env=environment,
                            stdout=subprocess.DEVNULL)


# ---------------------------------------------------------------- a worker


class Peers:
    """The other workers, as seen from one; for one event loop.

    Args:
        place: this worker's.
        rank: scores a body here: `await rank(raw, kind) -> dict`.
        control: does here what concerns every worker: `await control(call, name)`.
    """

    def __init__(self, place: Place, rank: Any, control: Any = None) -> None:
        self.place, self.rank, self.control = place, rank, control
        self.free: dict[int, list] = {index: [] for index in range(place.count)}
        self.server: Any = None
        self.passed_on = self.fallen_back = 0

    async def start(self) -> None:
        """Takes bodies from the others."""
        path = self.place.socket(self.place.index)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self.server = await asyncio.start_unix_server(self._serve, path)

    async def answer(self, owner: int, raw: bytes, kind: int) -> dict:
        """The owner's answer to a body, or this worker's where that does not answer.

        Raises:
            Refusal: as `rank`.
        """
        if owner == self.place.index:
            return await self.rank(raw, kind)
        try:
            status, body = await self._ask(owner, raw, kind)
        except (OSError, EOFError):
            self.fallen_back += 1
            return await self.rank(raw, kind)
        self.passed_on += 1
        if status != 200:
            raise Refusal(status, body["message"], kind=body["kind"], retry_after=body["retry_after"])
        return body

    async def control_others(self, call: dict) -> None:
        """`control` in every other worker; one that is away reads the newest model when it starts anew."""
        for other in range(self.place.count):
            if other != self.place.index:
                with contextlib.suppress(OSError, EOFError):
                    status, body = await self._ask(other, json.dumps(call).encode(), CONTROL)
                    if status != 200:
                        info(f"worker {other} did not {call['call']}: {body['message']}")

    async def _ask(self, owner: int, raw: bytes, kind: int) -> tuple[int, dict]:
        free = self.free[owner]
        reader, writer = free.pop() if free else await asyncio.open_unix_connection(self.place.socket(owner))
        try:
            writer.write(_HEAD.pack(len(raw), kind) + raw)
            await writer.drain()
            size, _ = _HEAD.unpack(await reader.readexactly(_HEAD.size))
            status, body = parse_json(await reader.readexactly(size))
        except BaseException:
            writer.close()  # an answer that nobody waits for must not be the next one's
            raise
        free.append((reader, writer))
        return status, body

    async def _answered(self, raw: bytes, kind: int) -> list:
        try:
            if kind != CONTROL:
                return [200, await self.rank(raw, kind)]
            call = parse_json(raw)
            return [200, await self.control(call["call"], call["name"])]
        except Refusal as refusal:
            return [refusal.status, {"message": str(refusal), "kind": refusal.kind, "retry_after": refusal.retry_after}]
        except UserError as error:
            return [409, {"message": str(error), "kind": "invalid_request_error", "retry_after": None}]

    async def _serve(self, reader: Any, writer: Any) -> None:
        try:
            while True:
                size, kind = _HEAD.unpack(await reader.readexactly(_HEAD.size))
                if size > _LONGEST:
                    return
                raw = await reader.readexactly(size)
                text = json.dumps(await self._answered(raw, kind)).encode()
                writer.write(_HEAD.pack(len(text), 0) + text)
                await writer.drain()
        except (EOFError, OSError):
            pass
        finally:
            writer.close()
