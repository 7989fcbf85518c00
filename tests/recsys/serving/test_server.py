"""Serving over HTTP: answers, refusals, back-pressure, reloads."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from parallel.common.structured import BadText
from parallel.serving.errors import one_line
from parallel.serving.queue import Busy
from parallel.serving.run import bind, make_server
from recsys.saved_model import describe, load
from recsys.serving.requests import read_request
from recsys.serving.settings import EngineSettings
from recsys.serving.state_cache import StateCache
from tests.recsys.runs import body_of, plain
from tests.servers import says_where

STUCK = EngineSettings(requests=1, candidates=[4, 16], queue=3, timeout_seconds=1.5, cache_users=5)

pytestmark = pytest.mark.usefixtures("graph_mode")


class StuckEngine:
    """An engine whose thread never takes anything."""

    version, encoding_version, waiting, full = 1, 1, 0, False

    def __init__(self, trained) -> None:
        self.trained, self.cache = trained, StateCache(0)

    def submit(self, ids: np.ndarray, numbers: np.ndarray):
        from concurrent.futures import Future

        if self.full:
            raise Busy("64 requests wait already")
        return Future()

    def stop(self) -> None:
        """Nothing runs."""


@pytest.fixture(scope="module")
def server(run):
    """(address, process) of a live server on a free port."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("prometheus_client")
    words = ["port=0", "max_candidates=20", "max_body_bytes=20000", "engine.requests=4", "engine.candidates=[16]",
             "engine.queue=64", "engine.timeout_seconds=30"]
    process, address = says_where("recsys", "serve", "--checkpoint", str(run[0]), *words)
    yield address, process
    process.kill()
    process.wait()


def ask(address: str, path: str, body: bytes | None = None) -> tuple[int, dict | str]:
    """(code, answer) of a GET, or of a POST where there is a body."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address + path, data=body), timeout=60) as answer:
            code, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        code, text = error.code, error.read().decode()
    return code, json.loads(text) if text[:1] in "{[" else text


def odd_values(address: str, body: dict) -> int:
    """Sends every feature with values as clients send them: taken, or 422; how many were taken."""
    taken, large = 0, 2**63 + 3
    for side in ("user", "candidates"):
        given = body["user"] if side == "user" else body["candidates"][0]
        for name in given:
            codes = []
            for value in (large, str(large), 1e39, -1e300, 2**64, -1, 1.5, True, None, "１２", "\ud83d", [[1]],
                          [{"a": 1}], {"a": 1}, [large], "x" * 5000, "\u2028"):
                inner = {**given, name: value}
                text = json.dumps({**body, side: inner if side == "user" else [inner]})
                code, answer = ask(address, "/rank", text.encode())
                assert code in (200, 422), (name, value, answer)
                codes.append(code)
                taken += code == 200
            # A number and its digits are one id; text for a list is divided as in a log.
            assert codes[0] == codes[1] or isinstance(given[name], list), name
            assert codes[11:14] == [422] * 3, name
    return taken


def test_over_http(run, server):
    address, process = server
    folder, settings, log = run
    trained = load(folder)
    bodies = [body_of(trained, log, seed, 1 + seed % 20) for seed in range(30)]
    code, health = ask(address, "/health")
    assert code == 200 and health["status"] == "ok" and health["separated"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: ask(address, "/rank", json.dumps(body).encode()), bodies))
    for body, (code, answer) in zip(bodies, answers, strict=True):
        assert code == 200
        read = read_request(body, trained, 20)
        scores = plain(trained.model, read.ids, read.numbers)[:, 0]
        best = np.argsort(-scores, kind="stable")[:3]
        assert len(answer["ranking"]) == min(3, len(scores))
        np.testing.assert_allclose([one["score"] for one in answer["ranking"]], scores[best], rtol=0, atol=1e-6)
    bad = {b"{": 400, b"[NaN]": 400, b"\xff": 400, b"[" * 15000: 400, b"{}": 422,
           json.dumps({**bodies[0], "top_k": -1}).encode(): 422, b" " * 30000: 413}
    for body, expected in bad.items():
        code, answer = ask(address, "/rank", body)
        assert code == expected and "\n" not in answer["error"], (body[:20], answer)
    good = 30 + odd_values(address, bodies[1])
    version = health["version"]
    code, answer = ask(address, "/versions")
    assert code == 200 and answer["versions"] == [answer["current"]] and answer["pinned"] is None
    for path, body, what in (("/rollback", b"", "no version before"), ("/pin", b'{"version": "x"}', "no such version"),
                             ("/pin", b"{}", "names a version")):
        code, output = ask(address, path, body)
        assert code == 409 and what in json.dumps(output)
    name = answer["current"]
    assert ask(address, "/pin", json.dumps({"version": name}).encode())[1]["pinned"] == name
    assert ask(address, "/reload", b"")[0] == 409
    assert ask(address, "/unpin", b"")[1]["pinned"] is None
    version += 1
    code, answer = ask(address, "/reload", b"")
    assert code == 200 and answer["version"] == version + 1
    process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 30
    while ask(address, "/health")[1]["version"] < version + 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    code, text = ask(address, "/metrics")
    assert code == 200 and f'ranker_requests_total{{code="200"}} {good}.0' in text
    assert f"ranker_model_version {version + 2}.0" in text and 'ranker_reloads_total{outcome="done"} 2.0' in text
    process.terminate()
    out, _ = process.communicate(timeout=30) if process.stderr.closed else (process.stdout.read(), None)
    assert process.wait(30) == 0 and json.loads(out.strip().splitlines()[-1])["version"] == version + 2


def test_back_pressure_is_503(run):
    """HTTP before an engine that does not answer, or takes nothing more."""
    pytest.importorskip("fastapi")
    from recsys.serving.server import Service, application
    from recsys.serving.settings import ServeSettings

    trained = describe(run[0])
    engine = StuckEngine(trained)
    settings = ServeSettings(port=0, threads=1, engine=STUCK, bodies=4, body_grace_seconds=1.0)
    service, listener = Service(engine, settings, run[0]), bind(settings)
    server = make_server(application(service), listener, settings, one_line)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        body = json.dumps(body_of(trained, run[2], 0, 2)).encode()
        code, answer = ask(address, "/rank", body)
        assert code == 503 and "within 1.5 seconds" in answer["error"]
        engine.full = True
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(address + "/rank", data=body), timeout=30)
        assert refused.value.code == 503 and refused.value.headers["Retry-After"] == "1"
        assert 'ranker_requests_total{code="503"} 2.0' in ask(address, "/metrics")[1]
        # Clients that never send their bodies hold no place and keep nobody out: the oldest are turned away for new
        # ones, the others in time.
        host, port = listener.getsockname()[:2]
        head = b"POST /rank HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
        slow = [socket.create_connection((host, port)) for _ in range(30)]
        for connection in slow:
            connection.sendall(head)
        code, answer = ask(address, "/rank", body)
        assert code == 503 and "wait already" in answer["error"]
        assert all(connection.recv(12) == b"HTTP/1.1 408" for connection in slow)
        assert service.inside == len(service.front.bodies) == 0
        for connection in slow:
            connection.close()
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("rise, passes", [(0, 1), (1, 2)])
def test_a_request_is_read_again_only_after_a_reload_with_another_vocabulary(run, rise, passes):
    pytest.importorskip("prometheus_client")
    from concurrent.futures import Future

    from recsys.serving.server import Service
    from recsys.serving.settings import ServeSettings

    class Reloading(StuckEngine):
        """A reload comes between reading and scoring of the first pass."""

        asked = 0

        def submit(self, ids: np.ndarray, numbers: np.ndarray) -> Future:
            self.version, self.encoding_version, self.asked = 2, 1 + rise, self.asked + 1
            done: Future = Future()
            done.set_result((np.full((len(ids), 1), 0.25 * self.asked), self.version))
            return done

    engine = Reloading(describe(run[0]))
    service = Service(engine, ServeSettings(), run[0])
    body = json.dumps(body_of(engine.trained, run[2], 0, 3)).encode()
    answer = asyncio.run(service.rank(body))
    assert (answer["version"], engine.asked) == (2, passes)
    assert answer["ranking"][0]["score"] == 0.25 * passes


def test_long_bodies_are_read_in_a_thread_short_ones_at_once(run, monkeypatch):
    pytest.importorskip("prometheus_client")
    from recsys.serving import server
    from recsys.serving.settings import ServeSettings

    trained, readers = describe(run[0]), []
    service = server.Service(StuckEngine(trained), ServeSettings(), run[0])
    parse = server._parse
    monkeypatch.setattr(server, "_parse", lambda *words: (readers.append(threading.current_thread().name),
                                                          parse(*words))[1])
    body = json.dumps(body_of(trained, run[2], 0, 3)).encode()
    short = asyncio.run(service._understood(body, trained))
    monkeypatch.setattr(server, "_SHORT_BYTES", len(body) - 1)
    long = asyncio.run(service._understood(body, trained))
    assert readers[0] == threading.current_thread().name and readers[1].startswith("requests")
    np.testing.assert_array_equal(short.ids, long.ids)
    with pytest.raises(BadText):
        asyncio.run(service._understood(b"{" * len(body), trained))


def test_a_port_that_is_taken_is_one_line(run, capsys):
    pytest.importorskip("uvicorn")
    from parallel.common.command import main
    from recsys.__main__ import VERBS

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main("recsys", VERBS, ["serve", "--checkpoint", str(run[0]), f"port={port}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "choose another port" in error[0]
