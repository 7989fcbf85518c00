"""Verb `serve`: ranking over HTTP.

    POST /rank     {"user": {...}, "candidates": [{...}, ...], "top_k": 10}  (see recsys/serving/requests.py)
                   -> {"ranking": [{"candidate": 3, "score": 0.41, "scores": {"click": 0.41}}, ...], "version": 1}
                   or Arrow streams (see recsys/serving/arrow_body.py)
    GET  /health   {"status": "ok", "version": 1, "checkpoint": ..., "waiting": 0}
    GET  /metrics  Prometheus
    POST /reload   the newest checkpoint of the folder that is served; SIGHUP does the same

A bad request is one line: 400 not JSON, 408 too slow, 413 too long, 422 wrong content. 503: the queue is full or the
time ran out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.common.errors import UserError
from parallel.common.progress import info
from parallel.common.structured import BadText, parse_json
from parallel.serving.application import Front, Reloader, require, unless_gone
from parallel.serving.errors import UNAVAILABLE, Refusal, one_line
from parallel.serving.metrics import SECONDS, HttpMetrics
from parallel.serving.queue import Busy
from parallel.serving.run import address, bind, serve
from recsys.layers.tasks import Formula
from recsys.passes.sharded import is_sharded
from recsys.serving import arrow_body
from recsys.serving.feature_store import FeatureStore, StoreAway
from recsys.serving.requests import Ask, read_request
from recsys.serving.settings import ServeSettings
from recsys.serving.workers import ARROW, JSON, Peers, Place, run_workers, shared_listener
from recsys.versions.pinned import Versions
from recsys.versions.request_log import RequestLog

if TYPE_CHECKING:
    from recsys.settings import Run

_SHORT_BYTES = 1 << 16  # some 2 ms


class Metrics(HttpMetrics):
    """What Prometheus reads."""

    def __init__(self, engine: Any) -> None:
        super().__init__("ranker")
        from prometheus_client import Counter, Histogram

        kept = {"registry": self.registry}
        self.candidates = Counter("ranker_candidates", "Candidates scored", **kept)
        self.batch_requests = Histogram("ranker_batch_requests", "Requests of a batch", buckets=(1, 2, 4, 8, 16, 32),
                                        **kept)
        self.batch_seconds = Histogram("ranker_batch_seconds", "Time of a batch", buckets=SECONDS, **kept)
        self.gauge("waiting", "Requests in the queue", lambda: engine.waiting)
        self.gauge("model_version", "Rises with every reload", lambda: engine.version)
        self.gauge("cached_users", "User states kept", lambda: len(engine.cache))
        self.gauge("cache_hits", "Lookups that found a user's state", lambda: engine.cache.hits)
        self.gauge("cache_misses", "Lookups that did not", lambda: engine.cache.misses)

        self.versions = Counter("ranker_versions", "Versions that a run published, by outcome", ["outcome"], **kept)

    def took_version(self, outcome: str) -> None:
        """Of a follower: done or refused."""
        self.versions.labels(outcome).inc()

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
        self.inside, self.most_inside = 0, settings.engine.queue + settings.engine.requests + settings.threads
        self.fusion = Formula(settings.fusion, engine.trained.columns.labels) if settings.fusion else None
        self.metrics = Metrics(engine)
        self.front = Front(settings, self.metrics, one_line)
        self.versions = Versions(engine, folder)
        self.log = RequestLog(settings.request_log, settings.request_log_mb << 20) if settings.request_log else None
        self.reload = Reloader(lambda: engine.reload(folder), self.metrics)
        engine.observe = self.metrics.observe
        self.follower: Any = None
        self.store = FeatureStore(settings.features.redis, engine.trained) if settings.features.redis else None
        if self.store is not None:
            self.metrics.gauge("features_asked", "Records asked of the feature store", lambda: self.store.asked)
            self.metrics.gauge("features_unknown", "Records that it did not have", lambda: self.store.unknown)
        self.peers: Peers | None = None

    def follow(self, follower: Any) -> None:
        """Takes the versions of a run from now on; /reload looks for one at once."""
        self.follower = follower
        self.reload = Reloader(follower.reload, self.metrics)
        follower.start()

    def begin(self) -> None:
        """What needs the event loop: the other workers, and SIGHUP."""
        self.reload.on_hangup()
        if self.peers is not None:
            self.starting = asyncio.get_running_loop().create_task(self.peers.start())

    def stop(self) -> None:
        """Takes no more versions; what was taken is answered."""
        if self.follower is not None:
            self.follower.stop()
        self.engine.stop()

    async def answer(self, request: Any) -> dict:
        """The answer to a call of /rank. Only a request whose body has come takes a place, and of these only so many
        are held at once as could be scored or wait.

        Raises:
            Refusal, ClientGone: as `rank` and `Bodies.read`.
        """
        raw, kind = await self.front.bodies.read(request), JSON
        if request.headers.get("content-type", "").startswith(arrow_body.MEDIA_TYPE):
            kind = ARROW
        if self.inside >= self.most_inside:
            raise _busy(f"{self.inside} requests are being answered already")
        self.inside += 1
        try:
            return await unless_gone(request, self._ranked(raw, kind))
        finally:
            self.inside -= 1

    async def _ranked(self, raw: bytes, kind: int) -> dict:
        """`rank`, by the worker that the user belongs to."""
        if self.peers is None:
            return await self.rank(raw, kind)
        try:
            owner = self.peers.place.owner(user_of(raw, kind, self.engine.trained, self.settings.max_candidates))
        except (BadText, UserError):
            owner = self.peers.place.index  # says here what is wrong with it
        return await self.peers.answer(owner, raw, kind)

    async def rank(self, raw: bytes, kind: int = JSON) -> dict:
        """The answer to a request's body.

        Raises:
            Refusal: 400 not JSON, 422 wrong content, 503 no place or no time.
        """
        seconds = self.settings.engine.timeout_seconds
        for _ in range(2):
            # In this order, since a reload sets them the other way round.
            version, encoding_version, trained = self.engine.version, self.engine.encoding_version, self.engine.trained
            try:
                ask = await self._understood(raw, trained, kind)
            except BadText as error:
                raise Refusal(400, f"the body is no JSON to read: {error}") from None
            except UserError as error:
                raise Refusal(422, str(error)) from None
            except StoreAway as error:
                raise _busy(str(error)) from None
            try:
                result = self.engine.submit(ask.ids, ask.numbers)
                scores, scored_by = await asyncio.wait_for(asyncio.wrap_future(result), seconds)
            except Busy as error:
                raise _busy(str(error)) from None
            except asyncio.TimeoutError:
                raise _busy(f"not done within {seconds} seconds") from None
            # A request that was read with another vocabulary than that of a reload since is read again.
            if scored_by == version or encoding_version == self.engine.encoding_version:
                break
        if self.log is not None and scored_by == version:
            self.log.add(raw if ask.body is None else json.dumps(ask.body, default=str).encode(), trained, scores)
        return {"ranking": self._ranking(scores, ask.top_k), "version": scored_by}

    async def change_version(self, request: Any, change: str) -> dict:
        """Pins the version that the body names, goes back to the one before, or lets go.

        Raises:
            Refusal: 400 no JSON, 409 there is no such version, or it does not fit.
        """
        raw = await self.front.bodies.read(request)
        try:
            body = parse_json(raw) if raw else {}
            name = body.get("version") if isinstance(body, dict) else None
            if change == "pin" and not isinstance(name, str):
                raise UserError('the body names a version: {"version": "step_00000100"}')
            return await self.everywhere(change, name)
        except BadText as error:
            raise Refusal(400, f"the body is no JSON to read: {error}") from None
        except UserError as error:
            raise Refusal(409, str(error)) from None

    async def everywhere(self, call: str, name: str | None = None) -> dict:
        """`control` here, and then by the other workers."""
        result = await self.control(call, name)
        if self.peers is not None:
            await self.peers.control_others({"call": call, "name": name})
        return result

    async def control(self, call: str, name: str | None) -> dict:
        """Reloads ("reload"), or pins, goes back or lets go ("pin", "rollback", "unpin"), in this process.

        Raises:
            Refusal, UserError: it cannot be done; the model that is served goes on.
        """
        if call == "reload":
            return await self.reload()
        own = self.versions
        work = {"pin": lambda: own.pin(name), "rollback": own.rollback, "unpin": own.release}[call]
        return await asyncio.get_running_loop().run_in_executor(self.pool, work)

    async def _understood(self, raw: bytes, trained: Any, kind: int = JSON) -> Ask:
        """See `_parse`. A short body is read here at once: handing it to a thread and back would take as long."""
        most = self.settings.max_candidates
        if self.store is None and (kind == JSON or self.log is None):
            return await self._quickly(len(raw), _parse, raw, trained, most, kind)
        body = await self._quickly(len(raw), _object, raw, most, kind)
        if self.store is not None:
            body = await self.store.fill(body, trained)
        ask = await self._quickly(len(raw), read_request, body, trained, most)
        return replace(ask, body=body) if self.log is not None else ask

    async def _quickly(self, size: int, work: Any, *arguments: Any) -> Any:
        if size <= _SHORT_BYTES:
            return work(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self.pool, work, *arguments)

    def _ranking(self, scores_CK: np.ndarray, top_k: int) -> list[dict]:
        """The best candidates by the first task, or the formula, the earlier one first where scores are equal."""
        labels = self.engine.trained.columns.labels
        fused_C = scores_CK[:, 0] if self.fusion is None else self.fusion(scores_CK)
        order = np.argsort(-fused_C, kind="stable")[:top_k]
        return [{"candidate": int(index), "score": float(fused_C[index]) if np.isfinite(fused_C[index]) else None,
                 "scores": {label: float(scores_CK[index, task]) for task, label in enumerate(labels)}}
                for index in order]

    def health(self) -> dict:
        """State of the server."""
        trained = self.engine.trained
        return {"status": "ok", "version": self.engine.version, "checkpoint": str(trained.path),
                "model": trained.settings.model.name, "separated": self.engine.scorer.separated,
                "waiting": self.engine.waiting, "cache_hit_rate": round(self.engine.cache.hit_rate, 4),
                **({"worker": self.peers.place.index} if self.peers is not None else {}),
                **(self.follower.figures() if self.follower is not None else {})}


def _busy(message: str) -> Refusal:
    return Refusal(UNAVAILABLE, message, kind="server_error", retry_after=1.0)


def _parse(raw: bytes, trained: Any, most: int, kind: int = JSON) -> Ask:
    """The request in numbers; raises `BadText`, or a `UserError` where it is no request."""
    if kind == ARROW:
        return arrow_body.read_arrow(raw, trained, most)
    return read_request(parse_json(raw), trained, most)


def _object(raw: bytes, most: int, kind: int) -> Any:
    return arrow_body.body_of(raw, most) if kind == ARROW else parse_json(raw)


def user_of(raw: bytes, kind: int, trained: Any, most: int) -> Any:
    """What identifies a request's user: the id, where the run's `data.user` is in it, else all of the user's fields."""
    body = _object(raw, most, kind)
    user = body.get("user") if isinstance(body, dict) else None
    if not isinstance(user, dict):
        return None
    name = trained.columns.user
    return user.get(name, user)


def application(service: Service) -> Any:
    """The FastAPI application."""
    from fastapi.responses import JSONResponse, Response

    front = service.front
    app = front.application("Ranker", service.begin, service.stop)

    async def rank(request: Any) -> Response:
        answer = await service.answer(request)
        if arrow_body.MEDIA_TYPE in request.headers.get("accept", ""):
            return Response(arrow_body.write_answer(answer), media_type=arrow_body.MEDIA_TYPE)
        return JSONResponse(answer)

    async def reload(_: Any) -> Response:
        return JSONResponse(await service.everywhere("reload"))

    async def health(_: Any) -> Response:
        return JSONResponse(service.health())

    async def metrics(_: Any) -> Response:
        text, media_type = service.metrics.text()
        return Response(text, media_type=media_type)

    front.route(app, "/rank", "POST", rank, counted=True)
    front.route(app, "/reload", "POST", reload)
    async def versions(_: Any) -> Response:
        return JSONResponse(service.versions.state())

    def changing(change: str) -> Any:
        async def handler(request: Any) -> Response:
            return JSONResponse(await service.change_version(request, change))

        return handler

    front.route(app, "/versions", "GET", versions)
    for change in ("pin", "rollback", "unpin"):
        front.route(app, f"/{change}", "POST", changing(change))
    front.route(app, "/health", "GET", health, is_open=True)
    front.route(app, "/metrics", "GET", metrics)
    return app


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb `serve`."""
    parser.add_argument("--checkpoint", metavar="DIR",
                        help="the run or checkpoint to serve, float or quantized; reloads look for a newer one there "
                        "(may be missing where --config is a run's file: its output.directory)")
    parser.add_argument("--run-config", metavar="FILE",
                        help="settings of the run (default: those kept in the checkpoint)")


def run(settings: ServeSettings, arguments: argparse.Namespace) -> dict:
    """Verb `serve`: until SIGTERM or SIGINT; then what was taken is answered.

    Raises:
        UserError: a package is missing, the port is taken, or the checkpoint cannot be served.
    """
    require()
    run_settings = None if isinstance(settings, ServeSettings) else settings
    if run_settings is not None:
        settings = run_settings.serve
        arguments.checkpoint = arguments.checkpoint or run_settings.output.directory
    if arguments.checkpoint is None:
        raise UserError("say what to serve", where="--checkpoint", hint="name a run or a checkpoint")
    if is_sharded():
        return _run_sharded(run_settings, settings, arguments)
    place = Place.mine()
    if settings.workers > 1 and place is None:
        return run_workers(settings, f"serve {arguments.checkpoint}")
    from parallel.training.device import start_device
    from recsys.saved_model import load
    from recsys.serving.engine import Engine

    listener = bind(settings) if place is None else shared_listener(settings, place.port)
    start_device()
    rows, current = max(settings.engine.candidates[-1], settings.engine.requests), None
    if settings.follow:
        from recsys.serving.follow import Follower, live_folder, load_current

        trained, current = load_current(live_folder(arguments.checkpoint), rows)
    else:
        trained = load(arguments.checkpoint, arguments.run_config, rows)
    service = _started(Engine(trained, settings.engine), settings, arguments.checkpoint)
    if place is not None:
        service.peers = Peers(place, service.rank, service.control)
    if current is not None:
        service.follow(Follower(service.engine, current, settings.follow_seconds, service.metrics.took_version))
    return _served(service, listener)


def _run_sharded(run_settings: Run, settings: ServeSettings, arguments: argparse.Namespace) -> dict:
    """One of the processes of a launch."""
    from recsys.serving.sharded import open_engine

    engine = open_engine(run_settings, settings, arguments.checkpoint, arguments.run_config)
    if engine is None:
        return {}
    try:
        return _served(_started(engine, settings, arguments.checkpoint), bind(settings))
    finally:
        engine.ranker.close()


def _started(engine: Any, settings: ServeSettings, folder: str) -> Service:
    engine.start(lambda graph: info(f"compiled {graph}"))
    return Service(engine, settings, folder)


def _served(service: Service, listener: Any) -> dict:
    """Until a signal; the verb's figures."""
    engine, trained = service.engine, service.engine.trained
    what = f"serving {trained.settings.model.name} of {trained.path} on {address(listener)}"
    serve(application(service), listener, service.settings, one_line, lambda: info(what))
    service.stop()
    return {"version": engine.version, "cache_hit_rate": engine.cache.hit_rate}
