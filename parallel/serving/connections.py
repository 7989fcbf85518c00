"""uvicorn's HTTP protocol with bounds on what a client may leave open: heads, pipelines, connections, answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from parallel.serving.errors import TOO_SLOW, Refusal
from parallel.serving.settings import HttpSettings

MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 256
MAX_PIPELINE = 64
_LINGER_SECONDS = 5.0  # an answer that came before the end of the body waits so long for the rest
_LAST_REQUEST_SECONDS = 0.3  # a connection that is open when the server ends may still send one request

Shape = Callable[[Refusal], dict]


def guarded_protocol(settings: HttpSettings, shape: Shape) -> type[GuardedProtocol]:
    """The protocol class of one server; `shape` makes the body of an error."""
    return type("Protocol", (GuardedProtocol,),
                {"settings": settings, "shape": staticmethod(shape), "waiting": {}})


class GuardedProtocol(HttpToolsProtocol):
    """One connection. It waits (for a request, for the rest of its head) or is busy with one.

    Class attributes: `settings`; `shape`; `waiting`, the connections that wait, the longest first.
    """

    settings: HttpSettings
    shape: Shape
    waiting: dict[GuardedProtocol, None]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._in_head = self._ending = False
        self._fed = self._fed_body = 0  # bytes of the message that comes, and those of its body
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # -- the connection -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Makes room for the new connection, or turns it away."""
        super().connection_made(transport)
        if len(self.connections) > self.settings.connections:
            if not self.waiting:
                transport.abort()
                return
            next(iter(self.waiting)).disconnect()
        self._wait(self.settings.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the timers."""
        self._busy()
        self._stop_write_timer()
        super().connection_lost(exc)

    def disconnect(self) -> None:
        """Closes at once; what was not sent is dropped."""
        self._busy()
        self.transport.abort()

    def _wait(self, seconds: float) -> None:
        self._busy()
        self.waiting[self] = None
        self._timer = self.loop.call_later(seconds, self._waited)

    def _busy(self) -> None:
        self.waiting.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _waited(self) -> None:
        if self._in_head:
            seconds = self.settings.header_seconds
            self.refuse(Refusal(TOO_SLOW, f"the head of the request did not come within {seconds:g} seconds",
                                code="request_timeout"))
        elif not self.transport.is_closing():
            self.transport.close()

    # -- requests -----------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Feeds the parser, as long as heads and trailers are not endless."""
        if self.transport.is_closing():
            return
        self._fed += len(data)
        super().data_received(data)
        # Bodies in small chunks have more around them than in them.
        if self._fed - self._fed_body > MAX_HEAD_BYTES + 16 * self._fed_body:
            self.refuse(Refusal(431, f"the head of the request is longer than {MAX_HEAD_BYTES} bytes",
                                code="headers_too_large"))

    def on_message_begin(self) -> None:
        """The first byte of a request; what came together with it is not counted."""
        super().on_message_begin()
        self._in_head, self._fed, self._fed_body = True, 0, 0
        if self in self.waiting and self.cycle is not None:  # a first head has its time from the connection's begin
            self._wait(self.settings.header_seconds)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Of a head or a trailer."""
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            raise ValueError("too many headers")

    def on_headers_complete(self) -> None:
        """A request begins, or joins the pipeline."""
        if len(self.pipeline) >= MAX_PIPELINE:
            raise ValueError("too many requests that wait on one connection")
        super().on_headers_complete()
        self._in_head = False
        self._busy()
        if self._ending:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """A chunk of a body."""
        self._fed_body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is complete; where it was answered before, the connection waits for the next request."""
        super().on_message_complete()
        self._fed = self._fed_body = 0
        if self.cycle.response_complete:
            self.cycle.more_body = False
            self._wait(self.settings.idle_seconds)

    def on_response_complete(self) -> None:
        """The next of the pipeline begins, or the connection waits."""
        super().on_response_complete()
        if self.transport.is_closing() or not self.cycle.response_complete:
            return
        if self.cycle.more_body:  # the client still sends what nobody will read
            self._wait(_LINGER_SECONDS)
        elif self._ending:
            self.transport.close()
        else:
            self._wait(self.settings.header_seconds if self._in_head else self.settings.idle_seconds)

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for a request that is not HTTP."""
        self.refuse(Refusal(400, msg, code="invalid_http"))

    def refuse(self, refusal: Refusal) -> None:
        """Answers for the application, and closes."""
        self._busy()
        if self.transport.is_closing():
            return
        body = json.dumps(self.shape(refusal)).encode()
        # In the middle of another answer nothing can be sent.
        if self.cycle is None or self.cycle.response_complete:
            head = f"content-type: application/json\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
            self.transport.write(STATUS_LINE[refusal.status] + head.encode() + body)
        self.transport.close()

    # -- answers and the end ------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """The server ends: what has begun is answered, and what comes this moment."""
        self._ending = True
        if self.cycle is None or self.cycle.response_complete:
            self._wait(_LAST_REQUEST_SECONDS)
        else:
            self.cycle.keep_alive = False

    def pause_writing(self) -> None:
        """The client does not read: it gets some time."""
        super().pause_writing()
        self._stop_write_timer()
        self._write_timer = self.loop.call_later(self.settings.write_seconds, self.disconnect)

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        self._stop_write_timer()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
