"""Listening, and serving until a signal; then what was accepted is finished."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from typing import Any

from parallel.common.errors import UserError
from parallel.serving.connections import Shape, guarded_protocol
from parallel.serving.settings import HttpSettings

_BACKLOG = 1024


def bind(settings: HttpSettings) -> socket.socket:
    """The socket of the address: taken, but refusing connections until `serve`, so that a client sees when it can ask.

    Raises:
        UserError: the address cannot be had.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise _taken(settings, error) from None
    return listener


def address(listener: socket.socket) -> str:
    """http://host:port."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(app: Any, listener: socket.socket, settings: HttpSettings, shape: Shape) -> Any:
    """A uvicorn server for `server.run(sockets=[listener])`; from here on connections wait for it.

    Raises:
        UserError: another process has begun to listen here.
    """
    import uvicorn

    try:
        listener.listen(_BACKLOG)
    except OSError as error:
        raise _taken(settings, error) from None
    # Whole seconds: uvicorn waits that long for connections to end after a signal.
    return uvicorn.Server(uvicorn.Config(
        app, http=guarded_protocol(settings, shape), ws="none", log_level="error", access_log=False,
        server_header=False, backlog=_BACKLOG, timeout_keep_alive=int(settings.idle_seconds) + 1,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds))))


def serve(app: Any, listener: socket.socket, settings: HttpSettings, shape: Shape,
          ready: Callable[[], None] = lambda: None) -> None:
    """Serves until SIGTERM or SIGINT, in the main thread; `ready` is called as soon as clients may connect.

    Raises:
        UserError: another process has begun to listen here.
    """
    server = make_server(app, listener, settings, shape)
    # uvicorn ends gracefully and then raises the signal again; by then all is answered, and the figures are wanted.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    ready()
    server.run(sockets=[listener])


def _taken(settings: HttpSettings, error: OSError) -> UserError:
    return UserError(f"cannot listen here: {error.strerror}", where=f"{settings.host}:{settings.port}",
                     hint="choose another port")
