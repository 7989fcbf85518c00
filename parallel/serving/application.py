"""The web application around a server's handlers: routes, API key, foreign pages, errors in one shape, metrics."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from parallel.common.errors import UserError
from parallel.common.progress import info
from parallel.common.structured import BadText, parse_json
from parallel.serving.bodies import Bodies
from parallel.serving.connections import Shape
from parallel.serving.errors import ClientGone, Refusal
from parallel.serving.metrics import HttpMetrics
from parallel.serving.queue import Busy
from parallel.serving.settings import HttpSettings

Handler = Callable[[Any], Awaitable[Any]]
Result = TypeVar("Result")
_CLIENT_GONE = 499  # nobody reads it; in metrics only


def require(extra: str = "serve", packages: tuple[str, ...] = ("fastapi", "uvicorn", "httptools", "prometheus_client")
            ) -> None:
    """Raises a `UserError` where the packages of an extra are missing."""
    import importlib.util

    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"serving needs the package {package}", where=extra, hint=f'pip install -e ".[{extra}]"')


class Front:
    """What comes before the handlers of one server.

    Args:
        settings: bounds, API key, origins.
        metrics: of the server.
        shape: of errors.
    """

    def __init__(self, settings: HttpSettings, metrics: HttpMetrics, shape: Shape) -> None:
        self.settings, self.metrics, self.shape = settings, metrics, shape
        self.bodies = Bodies(settings)
        self.key = os.environ.get(settings.api_key_variable) or None
        metrics.gauge("bodies", "Bodies that are being read", lambda: len(self.bodies))

    def application(self, title: str, start: Callable[[], None] = lambda: None,
                    end: Callable[[], None] = lambda: None) -> Any:
        """A FastAPI application without routes; `start` and `end` are called in the event loop."""
        from fastapi import FastAPI
        from starlette.exceptions import HTTPException
        from starlette.middleware.cors import CORSMiddleware

        @contextlib.asynccontextmanager
        async def lifespan(_: Any):
            start()
            yield
            await asyncio.get_running_loop().run_in_executor(None, end)

        app = FastAPI(title=title, lifespan=lifespan, openapi_url=None)
        app.router.redirect_slashes = False

        async def elsewhere(request: Any, error: Any) -> Any:
            message = {404: f"there is no {request.url.path} here", 405: f"{request.method} is not for this path"}
            refusal = Refusal(error.status_code, message.get(error.status_code, str(error.detail)),
                              code={404: "not_found", 405: "method_not_allowed"}.get(error.status_code))
            return self.refused(refusal, error.headers)

        app.add_exception_handler(HTTPException, elsewhere)
        if self.settings.cors_origins:
            app.add_middleware(CORSMiddleware, allow_origins=self.settings.cors_origins, allow_methods=["*"],
                               allow_headers=["*"])
        return app

    def route(self, app: Any, path: str, method: str, handler: Handler, is_open: bool = False, counted: bool = False
              ) -> None:
        """Adds a handler: it is given a Starlette request and returns a response, or raises `Refusal`.

        Args:
            is_open: whether the API key is not asked for.
            counted: whether requests and their times count in the metrics.
        """
        async def run(request: Any) -> Any:
            begun = time.perf_counter()
            try:
                self._admit(request, is_open)
                response = await handler(request)
            except Refusal as refusal:
                response = self.refused(refusal)
            except ClientGone:
                from starlette.responses import Response

                response = Response(status_code=_CLIENT_GONE)
            except Exception:  # noqa: BLE001 - a defect: written to the log, and to the client in its own shape
                info(f"a defect of the server:\n{traceback.format_exc()}")
                response = self.refused(Refusal(500, "the server failed", kind="server_error", code="internal_error"))
            response.headers["x-request-id"] = uuid.uuid4().hex
            if counted:
                self.metrics.requests.labels(str(response.status_code)).inc()
                self.metrics.seconds.observe(time.perf_counter() - begun)
            return response

        # Plain routes: the body is read by `Bodies`, so FastAPI's own reading of parameters would only take time.
        app.add_route(path, run, methods=[method])

    def refused(self, refusal: Refusal, headers: Any = None) -> Any:
        """The answer that says no."""
        from starlette.responses import JSONResponse

        return JSONResponse(self.shape(refusal), refusal.status, {**refusal.headers, **(headers or {})})

    def _admit(self, request: Any, is_open: bool) -> None:
        # A browser says where a page that calls comes from; a foreign one could start work here though it may not
        # read the answer.
        if request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            origin, allowed = request.headers.get("origin"), self.settings.cors_origins
            is_link = request.method == "GET" and request.headers.get("sec-fetch-mode") == "navigate"
            if not is_link and "*" not in allowed and origin not in allowed:
                raise Refusal(403, "pages of other origins may not call this server; see the key cors_origins",
                              code="origin_not_allowed")
        if self.key is None or is_open:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key.encode()):
            raise Refusal(401, "the API key is missing or wrong", kind="authentication_error", code="invalid_api_key")

    async def json(self, request: Any) -> Any:
        """The body of a request, parsed.

        Raises:
            Refusal: 400 not JSON, 408, 413.
            ClientGone: the client hung up.
        """
        raw = await self.bodies.read(request)
        try:
            return parse_json(raw)
        except BadText as error:
            raise Refusal(400, f"the body is no JSON to read: {error}", code="invalid_json") from None


async def unless_gone(request: Any, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled when the client hangs up. For requests whose body has been read.

    Raises:
        ClientGone: it did.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(hung_up(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for one in (task, gone):
            one.cancel()


async def hung_up(request: Any) -> None:
    """Returns when the client of a request whose body has been read hangs up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Reloader:
    """Reloads one after the other, asked for by POST /reload or SIGHUP.

    Args:
        reload: blocks, returns figures with `version`, raises `UserError`.
        metrics: counts them.
    """

    def __init__(self, reload: Callable[[], dict], metrics: HttpMetrics) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._reload, self._metrics = reload, metrics
        self._thread = ThreadPoolExecutor(1, "reload")

    async def __call__(self) -> dict:
        """The figures of a reload.

        Raises:
            Refusal: 409, the old model goes on.
        """
        try:
            figures = await asyncio.get_running_loop().run_in_executor(self._thread, self._reload)
        except (UserError, Busy) as error:
            self._metrics.reloads.labels("refused").inc()
            info(f"not reloaded: {error}")
            raise Refusal(409, str(error), code="not_reloaded") from None
        self._metrics.reloads.labels("done").inc()
        info("reloaded: " + ", ".join(f"{name} {value}" for name, value in figures.items()))
        return figures

    def on_hangup(self) -> None:
        """SIGHUP reloads; to be called in the event loop."""
        import signal

        loop, tasks = asyncio.get_running_loop(), set()

        async def quietly() -> None:
            with contextlib.suppress(Refusal):
                await self()

        def hangup() -> None:
            task = loop.create_task(quietly())
            tasks.add(task)  # a task that nobody holds may vanish
            task.add_done_callback(tasks.discard)

        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not in the main thread
            loop.add_signal_handler(signal.SIGHUP, hangup)
