"""Verb `serve`: ranking over HTTP.

    POST /rank     {"user": {...}, "candidates": [{...}, ...], "top_k": 10}  (see recsys/serving/requests.py)
                   -> {"ranking": [{"candidate": 3, "score": 0.41, "scores": {"click": 0.41}}, ...], "version": 1}
    GET  /health   {"status": "ok", "version": 1, "checkpoint": ..., "waiting": 0}
    GET  /metrics  Prometheus
    POST /reload   the newest checkpoint of the folder that is served; SIGHUP does the same

A bad request is one line: 400 not JSON, 408 too slow, 413 too long, 422 wrong content. 503: the queue is full or the
time ran out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from parallel.common.errors import UserError
from parallel.common.progress import note
from recsys.serving.requests import Ask, read_request
from recsys.serving.settings import ServeSettings

_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_SHORT_BYTES = 1 << 16  # some 2 ms


def require() -> None:
    """Raises a `UserError` where the packages of the extra `serve` are missing."""
    import importlib.util

    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"serving needs the package {package}", where="serve", hint='pip install -e ".[serve]"')


class Metrics:
    """What Prometheus reads, in a registry of its own."""

    def __init__(self, engine: Any) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        kept = {"registry": self.registry}
        self.requests = Counter("ranker_requests", "Requests by the code of the answer", ["code"], **kept)
        self.seconds = Histogram("ranker_request_seconds", "Time of a request", buckets=_BUCKETS, **kept)
        self.candidates = Counter("ranker_candidates", "Candidates scored", **kept)
        self.batch_requests = Histogram("ranker_batch_requests", "Requests of a batch", buckets=(1, 2, 4, 8, 16, 32),
                                        **kept)
        self.batch_seconds = Histogram("ranker_batch_seconds", "Time of a batch", buckets=_BUCKETS, **kept)
        self.reloads = Counter("ranker_reloads", "Reloads by outcome", ["outcome"], **kept)
        for name, what, read in (
                ("ranker_waiting", "Requests in the queue", lambda: engine.waiting),
                ("ranker_model_version", "Rises with every reload", lambda: engine.version),
                ("ranker_cached_users", "User states kept", lambda: len(engine.cache)),
                ("ranker_cache_hits", "Lookups that found a user's state", lambda: engine.cache.hits),
                ("ranker_cache_misses", "Lookups that did not", lambda: engine.cache.misses)):
            Gauge(name, what, **kept).set_function(read)

    def observe(self, name: str, value: float) -> None:
        """Of the engine."""
        if name == "batch_candidates":
            self.candidates.inc(value)
        else:
            getattr(self, name).observe(value)


class Service:
    """An engine behind HTTP.

    Args:
        engine: started.
        settings: bounds.
        folder: where reloads look for the newest checkpoint.
    """

    def __init__(self, engine: Any, settings: ServeSettings, folder: str | Path) -> None:
        self.engine, self.settings, self.folder = engine, settings, folder
        self.pool = ThreadPoolExecutor(settings.threads, "requests")
        self.reloader = ThreadPoolExecutor(1, "reload")
        self.inside, self.most_inside = 0, settings.engine.queue + settings.engine.requests + settings.threads
        self.metrics = Metrics(engine)
        engine.observe = self.metrics.observe

    async def answer(self, request: Any) -> tuple[int, dict]:
        """(code, answer) of a call of /rank. Only so many bodies are held at once as could be scored or wait."""
        if self.inside >= self.most_inside:
            return 503, {"error": f"{self.inside} requests are being answered already"}
        self.inside += 1
        try:
            raw = await asyncio.wait_for(_read(request, self.settings.max_body_bytes),
                                         self.settings.engine.timeout_seconds)
            if raw is None:
                return 413, {"error": f"the body is longer than {self.settings.max_body_bytes} bytes"}
            return await self.rank(raw)
        except asyncio.TimeoutError:
            return 408, {"error": f"the body did not come within {self.settings.engine.timeout_seconds} seconds"}
        finally:
            self.inside -= 1

    async def rank(self, raw: bytes) -> tuple[int, dict]:
        """(code, answer) of a request's body."""
        from recsys.serving.engine import Busy

        for _ in range(2):
            # In this order, since a reload sets them the other way round.
            version, reading, trained = self.engine.version, self.engine.reading, self.engine.trained
            try:
                ask = await self._understood(raw, trained)
            except UserError as error:
                return 422, {"error": str(error)}
            if ask is None:
                return 400, {"error": "the body is not JSON"}
            try:
                result = self.engine.submit(ask.ids, ask.numbers)
                scores, scored_by = await asyncio.wait_for(asyncio.wrap_future(result),
                                                           self.settings.engine.timeout_seconds)
            except Busy as error:
                return 503, {"error": str(error)}
            except asyncio.TimeoutError:
                return 503, {"error": f"not done within {self.settings.engine.timeout_seconds} seconds"}
            # A request that was read with another vocabulary than that of a reload since is read again.
            if scored_by == version or reading == self.engine.reading:
                break
        return 200, {"ranking": self._ranking(scores, ask.top_k), "version": scored_by}

    async def _understood(self, raw: bytes, trained: Any) -> Ask | None:
        """See `_parse`. A short body is read here at once: handing it to a thread and back would take as long."""
        arguments = raw, trained, self.settings.max_candidates
        if len(raw) <= _SHORT_BYTES:
            return _parse(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self.pool, _parse, *arguments)

    def _ranking(self, scores_CK: np.ndarray, top_k: int) -> list[dict]:
        """The best candidates by the first task, the earlier one first where scores are equal."""
        labels = self.engine.trained.columns.labels
        order = np.argsort(-scores_CK[:, 0], kind="stable")[:top_k]
        return [{"candidate": int(index), "score": float(scores_CK[index, 0]),
                 "scores": {label: float(scores_CK[index, task]) for task, label in enumerate(labels)}}
                for index in order]

    async def reload(self) -> tuple[int, dict]:
        """(code, answer): takes the newest checkpoint of the folder."""
        try:
            figures = await asyncio.get_running_loop().run_in_executor(self.reloader, self.engine.reload, self.folder)
        except UserError as error:
            self.metrics.reloads.labels("refused").inc()
            note(f"not reloaded: {error}")
            return 409, {"error": str(error)}
        self.metrics.reloads.labels("done").inc()
        note(f"reloaded: version {figures['version']}, {figures['checkpoint']}")
        return 200, figures

    def health(self) -> dict:
        """State of the server."""
        trained = self.engine.trained
        return {"status": "ok", "version": self.engine.version, "checkpoint": str(trained.path),
                "model": trained.settings.model.name, "separated": self.engine.scorer.separated,
                "waiting": self.engine.waiting, "cache_hit_rate": round(self.engine.cache.hit_rate, 4)}


def _parse(raw: bytes, trained: Any, most: int) -> Ask | None:
    """The request in numbers, None where it is not JSON; raises a `UserError` where it is no request."""
    try:
        body = json.loads(raw, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return read_request(body, trained, most)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


async def _read(request: Any, most: int) -> bytes | None:
    """The body, or None as soon as it is longer than `most`."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            return None
        parts.append(part)
    return b"".join(parts)


def application(service: Service) -> Any:
    """The FastAPI application."""
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    @contextlib.asynccontextmanager
    async def lifespan(_: Any):
        loop = asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not in the main thread
            loop.add_signal_handler(signal.SIGHUP, lambda: loop.create_task(service.reload()))
        yield
        service.engine.stop()

    app = FastAPI(title="Ranker", lifespan=lifespan, openapi_url=None)

    async def rank(request: Request) -> Response:
        begun = time.perf_counter()
        code, answer = await service.answer(request)
        service.metrics.requests.labels(str(code)).inc()
        service.metrics.seconds.observe(time.perf_counter() - begun)
        return JSONResponse(answer, code, {"Retry-After": "1"} if code == 503 else None)

    async def reload(_: Request) -> Response:
        code, answer = await service.reload()
        return JSONResponse(answer, code)

    async def health(_: Request) -> Response:
        return JSONResponse(service.health())

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    # Plain routes: the body is read by `Service`, so FastAPI's own reading of parameters would only take time.
    for path, method, run_one in (("/rank", "POST", rank), ("/reload", "POST", reload), ("/health", "GET", health),
                                  ("/metrics", "GET", metrics)):
        app.add_route(path, run_one, methods=[method])
    return app


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb `serve`."""
    parser.add_argument("--checkpoint", metavar="DIR", required=True,
                        help="the run or checkpoint to serve, float or quantized; reloads look for a newer one there")
    parser.add_argument("--run-config", metavar="FILE",
                        help="settings of the run (default: those kept in the checkpoint)")


def run(settings: ServeSettings, arguments: argparse.Namespace) -> dict:
    """Verb `serve`: until SIGTERM or SIGINT; then what was taken is answered.

    Raises:
        UserError: a package is missing, the port is taken, or the checkpoint cannot be served.
    """
    require()
    import uvicorn

    from parallel.training.device import start_device
    from recsys.saved_model import load
    from recsys.serving.engine import Engine

    listener = _listen(settings)
    start_device()
    trained = load(arguments.checkpoint, arguments.run_config)
    engine = Engine(trained, settings.engine)
    engine.start(lambda graph: note(f"compiled {graph}"))
    service = Service(engine, settings, arguments.checkpoint)
    host, port = listener.getsockname()[:2]
    note(f"serving {trained.settings.model.name} of {trained.path} on http://{host}:{port}")
    server = uvicorn.Server(uvicorn.Config(application(service), log_level="warning", access_log=False))
    # uvicorn ends gracefully and then raises the signal again; by then all is answered, and the figures are wanted.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listener])
    engine.stop()
    return {"version": engine.version, "cache_hit_rate": engine.cache.hit_rate}


def _listen(settings: ServeSettings) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise UserError(f"cannot listen here: {error.strerror}", where=f"{settings.host}:{settings.port}",
                        hint="choose another port") from None
    return listener
