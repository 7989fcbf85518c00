"""A live server among hostile and slow clients, at SIGTERM and at reloads: good ones are answered, nothing grows."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.pangu.serving.servers import started

pytest.importorskip("fastapi")
GOOD = {"model": "pangu-test", "prompt": "今天天气很好", "max_tokens": 4, "temperature": 0}


@contextmanager
def server(tokenizer, seconds_per_token=0.001, *words):
    """(host, port, process) of a server in a process of its own."""
    process = subprocess.Popen([sys.executable, "-m", "tests.pangu.serving.fake_server", str(tokenizer.model_file),
                                str(seconds_per_token), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    output: list[str] = []
    try:
        line = process.stdout.readline().strip()
        assert line.startswith("http://"), process.stderr.read()
        threading.Thread(target=lambda: output.extend(process.stderr), daemon=True).start()
        host, port = line.removeprefix("http://").split(":")
        yield host, int(port), process, output
    finally:
        process.kill()
        process.wait()


def resident(process) -> int:
    """Bytes in memory."""
    pages = Path(f"/proc/{process.pid}/statm").read_text().split()[1]
    return int(pages) * 4096


def request(body, path="/v1/completions", more="") -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{more}Content-Length: {len(raw)}\r\n\r\n".encode() + raw


async def answer(reader) -> tuple[int, bytes]:
    """(code, body) of the next answer on a connection."""
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
    code = int(head.split(b" ")[1])
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    if fields.get(b"transfer-encoding") == b"chunked":
        body = b""
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
        return code, body
    return code, await reader.readexactly(int(fields.get(b"content-length", 0)))


async def ask(host, port, body, path="/v1/completions") -> tuple[int, bytes]:
    """One request on a connection of its own."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(request(body, path))
        return await answer(reader)
    finally:
        writer.close()


def hostile_body(draw: random.Random) -> bytes:
    """A body that is wrong in some way, or strange, or right after all."""
    strange = [None, True, -1, 0, 1e308, 10**30, "", "长" * 50, [], [[]], {}, {"a": {}}, [None], "\ud800", "\x00", 5.5,
               [5, 6]]
    kind = draw.randrange(7)
    if kind == 0:
        return draw.randbytes(draw.randrange(200))
    raw = json.dumps({**GOOD, "stream": draw.random() < 0.2}).encode()
    if kind == 1:
        return raw[:draw.randrange(len(raw))]
    if kind == 2:
        place = draw.randrange(len(raw))
        return raw[:place] + draw.randbytes(1) + raw[place + 1:]
    if kind == 3:
        opening = draw.choice((b"[", b'{"a":', b'{"prompt":['))
        return opening * draw.randrange(3000)
    if kind == 4:
        return raw[:-1] + b', "seed": ' + b"9" * draw.randrange(1, 6000) + b"}"
    names = ["prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "best_of", "stop", "seed", "logprobs",
             "echo", "logit_bias", "presence_penalty", "stream", "stream_options", "user", "model", "messages"]
    changed = {name: draw.choice(strange) for name in draw.sample(names, draw.randrange(1, 4))}
    return json.dumps({**GOOD, "messages": [{"role": "user", "content": "好"}], **changed}).encode()


async def hostile(host, port, count, seed, codes):
    """`count` hostile bodies over one kept connection after the other."""
    draw, connection = random.Random(seed), None
    for _ in range(count):
        path = draw.choice(("/v1/completions", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"))
        if connection is None:
            connection = await asyncio.open_connection(host, port)
        reader, writer = connection
        writer.write(request(hostile_body(draw), path))
        try:
            code, body = await answer(reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            code, body = 0, b""
        codes[code] = codes.get(code, 0) + 1
        assert code < 500 and code != 0, (code, body)
        if code >= 400:
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        if code == 413 or draw.random() < 0.05:
            writer.close()
            connection = None


async def good(host, port, until, times):
    """A client that asks one thing after the other and gets the same right answer each time."""
    expected = None
    while not until.is_set():
        code, body = await ask(host, port, GOOD)
        assert code == 200, body
        text = json.loads(body)["choices"][0]["text"]
        assert expected in (None, text)
        expected = text
        times.append(code)
        await asyncio.sleep(0.01)


async def left_open(host, port, data, count):
    """Connections that begin and do not go on."""
    made = []
    for _ in range(count):
        connection = await asyncio.open_connection(host, port)
        connection[1].write(data)
        made.append(connection)
    return made


async def campaign(host, port, bodies, clients):
    until, times, codes = asyncio.Event(), [], {}
    goods = [asyncio.ensure_future(good(host, port, until, times)) for _ in range(clients)]
    slow = [*await left_open(host, port, request(b"x" * 500)[:-499], 100),         # unfinished bodies
            *await left_open(host, port, b"POST /v1/comp", 100),                  # unfinished heads
            *await left_open(host, port, b"", 100),                               # nothing at all
            *await left_open(host, port, request(b"")[:-2] + b"X: " + b"y" * 100_000, 10),  # endless heads
            *await left_open(host, port, request(GOOD) * 40, 10)]                 # pipelines
    oversized = request(b"x" * 300_000)
    for reader, writer in await left_open(host, port, oversized, 10):
        assert (await answer(reader))[0] == 413
        writer.close()
    for reader, writer in slow[-10:]:
        assert [(await answer(reader))[0] for _ in range(40)] == [200] * 40, "a pipeline is answered in order"
        writer.close()
    await asyncio.gather(*(hostile(host, port, bodies // 16, seed, codes) for seed in range(16)))
    for reader, _ in slow[:100]:
        assert (await answer(reader))[0] == 408
    until.set()
    await asyncio.gather(*goods)
    for _, writer in slow:
        writer.close()
    return codes, len(times)


@pytest.mark.parametrize(("bodies", "clients"), [(800, 16), pytest.param(10_000, 64, marks=pytest.mark.slow)])
def test_hostile_clients_harm_nobody(tokenizer, bodies, clients):
    words = ["max_body_bytes=200000", "bodies=32", "body_grace_seconds=1", "header_seconds=3", "connections=400"]
    with server(tokenizer, 0.001, *words) as (host, port, process, output):
        asyncio.run(campaign(host, port, 160, 4))
        before = resident(process)
        codes, answered = asyncio.run(campaign(host, port, bodies, clients))
        assert sum(codes.values()) == bodies // 16 * 16 and codes.get(400, 0) > bodies / 4 and codes.get(200, 0)
        assert answered > clients
        assert resident(process) - before < 150 << 20
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert not any("Traceback" in line for line in output), "".join(output)[-2000:]


@pytest.mark.slow
def test_hostile_clients_harm_nobody_beside_the_real_engine(run):
    """The command with its model: 10,000 bodies beside 64 clients; the cache is empty of holders afterwards."""
    words = ["name=pangu-test", "max_body_bytes=200000", "bodies=32", "body_grace_seconds=1", "header_seconds=3",
             "connections=400", "engine.queue=2000"]
    process, address = started(run, *words)
    try:
        host, port = address.removeprefix("http://").split(":")
        asyncio.run(campaign(host, int(port), 160, 4))
        before = resident(process)
        codes, answered = asyncio.run(campaign(host, int(port), 10_000, 64))
        assert sum(codes.values()) == 10_000 and codes.get(400, 0) > 2500 and codes.get(200, 0) and answered > 64
        assert resident(process) - before < 150 << 20
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_sigterm_finishes_what_was_accepted(tokenizer):
    async def run(host, port, process):
        body = {**GOOD, "max_tokens": 60, "ignore_eos": True, "stream": False}
        asked = [asyncio.ensure_future(ask(host, port, {**body, "stream": stream})) for stream in (True, False) * 12]
        await asyncio.sleep(0.4)
        process.send_signal(signal.SIGTERM)
        answers = await asyncio.gather(*asked)
        assert [code for code, _ in answers] == [200] * 24
        for number, (_, raw) in enumerate(answers):
            if number % 2:
                assert json.loads(raw)["usage"]["completion_tokens"] == 60
            else:
                assert raw.endswith(b"data: [DONE]\n\n") and raw.count(b"data: ") > 10
        with pytest.raises(OSError):
            await asyncio.open_connection(host, port)

    with server(tokenizer, 0.02) as (host, port, process, _):
        asyncio.run(run(host, port, process))
        assert process.wait(20) == 0


def test_reloads_lose_no_request(tokenizer):
    async def run(host, port, process):
        until, times = asyncio.Event(), []
        goods = [asyncio.ensure_future(good(host, port, until, times)) for _ in range(8)]
        for version in range(2, 12):
            code, body = await ask(host, port, {}, "/reload")
            assert code == 200 and json.loads(body)["version"] == version
            await asyncio.sleep(0.02)
        process.send_signal(signal.SIGHUP)
        await asyncio.sleep(0.3)
        until.set()
        await asyncio.gather(*goods)
        assert len(times) > 8
        code, body = await ask(host, port, {}, "/reload")
        assert json.loads(body)["version"] == 13

    with server(tokenizer) as (host, port, process, _):
        asyncio.run(run(host, port, process))
