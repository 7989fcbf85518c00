"""Reading of request bodies before anything else is done with a request: bounded in size, time, rate and number."""

from __future__ import annotations

import asyncio
from typing import Any

from parallel.serving.errors import TOO_LONG, TOO_SLOW, ClientGone, Refusal
from parallel.serving.settings import HttpSettings

_LOOK_SECONDS = 0.25


class _Reading:
    """One body on its way."""

    def __init__(self, task: asyncio.Task, started: float) -> None:
        self.task, self.started, self.size, self.reason = task, started, 0, ""

    def stop(self, reason: str) -> None:
        if not self.reason:
            self.reason = reason
            self.task.cancel()


class Bodies:
    """The bodies that are being read; all calls come from one event loop.

    Args:
        settings: the bounds.
    """

    def __init__(self, settings: HttpSettings) -> None:
        self.settings = settings
        self._readings: dict[_Reading, None] = {}  # in the order in which they began
        self._looking = False

    def __len__(self) -> int:
        return len(self._readings)

    async def read(self, request: Any) -> bytes:
        """The body of a Starlette request.

        Raises:
            Refusal: 413 as soon as it is longer than allowed, 408 when it comes too slowly, or has come the longest of
                as many as may come at once when another begins.
            ClientGone: the client hung up before its end.
        """
        most = self.settings.max_body_bytes
        if _declared(request) > most:
            raise _too_long(most)
        if len(self._readings) >= self.settings.bodies:
            oldest = next(iter(self._readings))
            del self._readings[oldest]
            oldest.stop(f"{self.settings.bodies} bodies were coming, and this one had been coming the longest")
        loop = asyncio.get_running_loop()
        reading = _Reading(asyncio.current_task(), loop.time())
        self._readings[reading] = None
        self._look_later(loop)
        try:
            return await _whole(request.receive, reading, most)
        except asyncio.CancelledError:
            if not reading.reason:
                raise
            if hasattr(reading.task, "uncancel"):
                reading.task.uncancel()
            raise Refusal(TOO_SLOW, reading.reason, code="request_timeout") from None
        finally:
            self._readings.pop(reading, None)

    def _look_later(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._looking:
            self._looking = True
            loop.call_later(_LOOK_SECONDS, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._looking = False
        now, keep = loop.time(), self.settings
        for reading in list(self._readings):
            seconds = now - reading.started
            if seconds > keep.body_seconds:
                reading.stop(f"the body did not come within {keep.body_seconds:g} seconds")
            elif seconds > keep.body_grace_seconds and reading.size < keep.body_rate * seconds:
                reading.stop(f"the body came slower than {keep.body_rate} bytes a second")
        if self._readings:
            self._look_later(loop)


async def _whole(receive: Any, reading: _Reading, most: int) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        reading.size += len(part)
        if reading.size > most:
            raise _too_long(most)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts) if len(parts) > 1 else part


def _declared(request: Any) -> int:
    try:
        return int(request.headers.get("content-length", 0))
    except ValueError:  # the parser refuses such before
        return 0


def _too_long(most: int) -> Refusal:
    return Refusal(TOO_LONG, f"the body is longer than {most} bytes", code="request_too_large")
