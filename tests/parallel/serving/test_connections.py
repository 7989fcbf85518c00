"""What a server puts up with on its sockets: heads, bodies, pipelines, connections, answers nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from parallel.serving.application import Front, unless_gone  # noqa: E402
from parallel.serving.errors import Refusal, one_line  # noqa: E402
from parallel.serving.metrics import HttpMetrics  # noqa: E402
from parallel.serving.run import bind, make_server  # noqa: E402
from parallel.serving.settings import HttpSettings  # noqa: E402


@contextlib.contextmanager
def server(handler=None, **settings):
    """(front, connect) of a live server with POST /echo."""
    made = HttpSettings(**{"port": 0, "drain_seconds": 5.0, **settings})
    front = Front(made, HttpMetrics("test"), one_line)
    app = front.application("Test")

    async def echo(request):
        from starlette.responses import JSONResponse

        return JSONResponse(await front.json(request))

    front.route(app, "/echo", "POST", handler or echo, counted=True)
    listener = bind(made)
    running = make_server(app, listener, made, one_line)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    host, port = listener.getsockname()[:2]
    thread.start()
    connections = []

    def connect(data=b""):
        connections.append(socket.create_connection((host, port), timeout=10))
        connections[-1].sendall(data)
        return connections[-1]

    try:
        yield front, connect
    finally:
        for connection in connections:
            connection.close()
        running.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def post(body, path="/echo", length=None, more=""):
    return (f"POST {path} HTTP/1.1\r\nHost: x\r\n{more}"
            f"Content-Length: {len(body) if length is None else length}\r\n\r\n").encode() + body


def heads(connection, count=1):
    """Status codes of the next answers, until all came or the server closed."""
    raw = b""
    while raw.count(b"HTTP/1.1 ") < count or not raw.split(b"HTTP/1.1 ")[-1].count(b"\r\n\r\n"):
        part = connection.recv(65536)
        if not part:
            break
        raw += part
    return [int(answer[:3]) for answer in raw.split(b"HTTP/1.1 ")[1:]]


def closed(connection):
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


def test_a_body_in_parts_and_a_pipeline_are_answered():
    with server() as (front, connect):
        slow = connect(post(b'{"a": ', length=9))
        time.sleep(0.1)
        assert len(front.bodies) == 1
        slow.sendall(b"1} ")
        assert heads(slow) == [200] and len(front.bodies) == 0
        many = connect(post(b"[1]") * 30)
        assert heads(many, 30) == [200] * 30


def test_slow_bodies_are_turned_away_by_rate_time_and_number():
    with server(body_grace_seconds=0.3, body_rate=1000, body_seconds=1.0) as (front, connect):
        started = time.monotonic()
        assert heads(connect(post(b"{", length=100))) == [408] and time.monotonic() - started < 2
        steady = connect(post(b"[", length=10**6))
        codes = []
        reader = threading.Thread(target=lambda: codes.extend(heads(steady)))
        reader.start()
        with contextlib.suppress(OSError):  # fast enough, but far too long on its way
            for _ in range(40):
                steady.sendall(b" " * 200)
                time.sleep(0.05)
        reader.join(10)
        assert codes == [408]
    with server(bodies=3, body_grace_seconds=30, body_rate=0) as (front, connect):
        waiting = [connect(post(b"{", length=100)) for _ in range(3)]
        while len(front.bodies) < 3:
            time.sleep(0.005)
        assert heads(connect(post(b"{}"))) == [200], "slow clients keep nobody out"
        assert heads(waiting[0]) == [408] and len(front.bodies) == 2


def test_long_bodies_and_long_heads():
    with server(max_body_bytes=2000, header_seconds=0.5) as (_, connect):
        assert heads(connect(post(b" " * 1900 + b"1"))) == [200]
        over = connect(post(b" " * 5000) + post(b"[2]"))
        assert heads(over, 2) == [413, 200], "what follows a refused body is answered"
        chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
        assert heads(connect(b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + 2 * chunk)) == [413]
        endless = connect(b"POST /echo HTTP/1.1\r\nX: ")
        with contextlib.suppress(OSError):
            for _ in range(50):
                endless.sendall(b"y" * 10_000)
        assert closed(endless)
        assert heads(connect(b"POST /echo HTTP/1.1\r\n" + b"A: b\r\n" * 300)) == [400]
        assert heads(connect(b"POST /ec")) == [408], "a head that does not come"
        assert closed(connect())
        for nonsense in (b"\x16\x03\x01\x02\x00" * 5, b"GET\r\n\r\n", b"POST /echo HTTP/9.9\r\n\r\n",
                         b"POST /echo HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"GET http://[ HTTP/1.1\r\n\r\n"):
            assert heads(connect(nonsense)) == [400]


def test_the_oldest_idle_connection_makes_room():
    with server(connections=4) as (_, connect):
        idle = [connect() for _ in range(4)]
        time.sleep(0.1)
        assert heads(connect(post(b"{}"))) == [200]
        assert closed(idle[0])
        idle[3].sendall(post(b"{}"))
        assert heads(idle[3]) == [200]


def test_too_long_a_pipeline_is_disconnected():
    release = threading.Event()

    async def wait(request):
        from starlette.responses import JSONResponse

        while not release.is_set():
            await asyncio.sleep(0.01)
        return JSONResponse({})

    with server(wait) as (_, connect):
        greedy = connect(post(b"{}") * 500)
        time.sleep(0.1)
        release.set()
        assert closed(greedy)


def test_a_client_that_reads_nothing_is_disconnected():
    async def flood(request):
        from starlette.responses import Response

        await request.body()
        return Response(b"x" * (64 << 20))

    with server(flood, write_seconds=0.3) as (_, connect):
        lazy = connect(post(b"{}"))
        time.sleep(1.5)
        got = 0
        with contextlib.suppress(ConnectionError):
            while part := lazy.recv(1 << 20):
                got += len(part)
        assert got < 64 << 20


def test_work_ends_when_the_client_hangs_up(capfd):
    ended = threading.Event()

    async def work(request):
        async def forever():
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()
        await front.bodies.read(request)
        await unless_gone(request, forever())

    with server(work) as (front, connect):
        connection = connect(post(b"{}"))
        time.sleep(0.1)
        connection.close()
        assert ended.wait(5)
    assert "Traceback" not in capfd.readouterr().err


def test_hanging_up_in_the_middle_of_a_body_logs_nothing(capfd):
    with server() as (front, connect):
        for _ in range(5):
            connect(post(b"{", length=50)).close()
        deadline = time.monotonic() + 5
        while len(front.bodies) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(front.bodies) == 0
    assert "Traceback" not in capfd.readouterr().err


def test_errors_have_one_shape_and_a_defect_is_reported(capfd):
    async def broken(request):
        await request.body()
        raise ZeroDivisionError

    with server(broken) as (front, connect):
        for data, code in ((post(b"{}"), 500), (post(b"{}", path="/none"), 404), (b"GET /echo HTTP/1.1\r\n\r\n", 405)):
            connection = connect(data)
            raw = b""
            while b"\r\n\r\n" not in raw or not raw.endswith(b"}"):
                raw += connection.recv(65536)
            assert raw.startswith(f"HTTP/1.1 {code}".encode())
            assert set(json.loads(raw.split(b"\r\n\r\n")[1])) == {"error"}
        assert b'code="500"} 1.0' in front.metrics.text()[0]
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_refusals_say_when_to_come_again():
    assert Refusal(429, "full", retry_after=0.2).headers == {"retry-after": "1"}
