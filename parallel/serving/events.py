"""Server-sent events: an answer that goes on while it is made, and ends its work when the client hangs up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from parallel.common.progress import info
from parallel.serving.application import hung_up
from parallel.serving.connections import Shape
from parallel.serving.errors import Refusal

_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no")]


class EventStream:
    """A response for Starlette: every object becomes one `data:` event, then `data: [DONE]`.

    Args:
        objects: what to send; a `Refusal` that it raises becomes an event with `error`.
        shape: of errors.
        end: called once when all is sent, the client is gone, or anything else ends it.
    """

    status_code = 200

    def __init__(self, objects: AsyncIterator[dict], shape: Shape, end: Callable[[], None]) -> None:
        self.objects, self.shape, self.end = objects, shape, end
        self.headers: dict[str, str] = {}
        self.background = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        from starlette.requests import Request

        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(hung_up(Request(scope, receive)))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self.end()
            for task in (sending, gone):
                task.cancel()

    async def _send(self, send: Any) -> None:
        more = [(name.encode(), value.encode()) for name, value in self.headers.items()]
        await send({"type": "http.response.start", "status": self.status_code, "headers": _HEADERS + more})
        try:
            async for item in self.objects:
                await send({"type": "http.response.body", "body": event(item), "more_body": True})
        except Refusal as refusal:
            await send({"type": "http.response.body", "body": event(self.shape(refusal)), "more_body": True})
        except Exception as error:  # noqa: BLE001 - the head is sent, so only an event can report it
            info(f"a defect ended a stream: {error!r}")
            failure = Refusal(500, "the server failed", kind="server_error", code="internal_error")
            await send({"type": "http.response.body", "body": event(self.shape(failure)), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def event(item: Any) -> bytes:
    """One event."""
    return b"data: " + json.dumps(item, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
