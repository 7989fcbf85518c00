"""Latency of /rank when requests name ids only and the features are in Redis, beside requests that bring them along.

Starts a real redis-server (scripts/redis_server.sh), fills it with features of users and items, starts `python -m
recsys serve` for a checkpoint of start values and lets clients ask, each on a connection of its own. The peer is the
same server asked with all features in the body, JSON and Arrow; all three take turns with servers of their own.

    python scripts/bench/serve_redis.py [--config configs/recsys/tokenmixer_large_ug_sep.yaml] [--clients 64]
                                        [--seconds 10] [--candidates 100] [--users 1000] [--items 5000]
                                        [workers=2 features.redis.item_seconds=0 ...]

Last line of stdout: JSON with requests_per_s, p50_ms, p99_ms and errors of `redis`, `json` and `arrow`, and the ratio
of p50 with Redis to that of JSON with all features. Clients, Redis and server share the same cores.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

from serve_load import serving, start_values  # noqa: E402
from turns import threads  # noqa: E402

JSON, ARROW = "application/json", "application/vnd.apache.arrow.stream"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/recsys/tokenmixer_large_ug_sep.yaml")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--items", type=int, default=5000)
    parser.add_argument("words", nargs="*", help="keys of serve")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = start_values(arguments.config, Path(scratch), False)
        with Redis(Path(scratch)) as redis:
            thin, thick, arrow = bodies(checkpoint, arguments, redis)
            found = {}
            for name, ask, kind, words in (("redis", thin, JSON, [f"features.redis.url={redis.url}"]),
                                           ("json", thick, JSON, []), ("arrow", arrow, ARROW, [])):
                found[name] = served(checkpoint, [*words, *arguments.words], ask, kind, arguments)
    print(json.dumps({**found, "ratio": found["redis"]["p50_ms"] / found["json"]["p50_ms"],
                      "clients": arguments.clients, "candidates": arguments.candidates, "threads": threads(),
                      "unit": "ms"}))


class Redis:
    """A server on a free port."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.url = folder / "redis", f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> Redis:
        import redis

        self.process = subprocess.Popen(["bash", str(ROOT / "scripts" / "redis_server.sh"), str(self.folder),
                                         str(self.port)], stdout=subprocess.DEVNULL)
        self.client = redis.Redis.from_url(self.url)
        for _ in range(500):
            try:
                self.client.ping()
                return self
            except redis.exceptions.ConnectionError:
                time.sleep(0.02)
        raise SystemExit("error: redis-server did not start")

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def bodies(checkpoint: str, arguments: argparse.Namespace, redis: Redis) -> tuple[list, list, list]:
    """(with ids only, with all features as JSON, the same as Arrow); the features are put into Redis."""
    from recsys.saved_model import describe
    from recsys.serving.arrow_body import write_request

    trained, generator = describe(checkpoint), random.Random(0)
    user_id = trained.columns.user
    item_id = next(f.source for f in trained.features if f.side == "item" and f.type == "id")

    def value(feature) -> object:
        rows = (feature.rows or 10) - 1
        if feature.type == "numeric":
            return generator.random()
        return [generator.randint(0, rows) for _ in range(8)] if feature.is_list else generator.randint(0, rows)

    def record(sides: tuple[str, ...], leave: str) -> dict:
        return {f.source: value(f) for f in trained.features if f.side in sides and f.source != leave}

    def numbers(source: str, wanted: int) -> range:
        rows = next((f.rows for f in trained.features if f.source == source), None)
        return range(min(wanted, rows or wanted))  # an id outside its table is refused

    users = {number: record(("user", "cross"), user_id) for number in numbers(user_id, arguments.users)}
    items = {number: record(("item",), item_id) for number in numbers(item_id, arguments.items)}
    pipe = redis.client.pipeline(transaction=False)
    for kind, records in (("user", users), ("item", items)):
        for number, one in records.items():
            pipe.set(f"{kind}:{number}", json.dumps(one))
    pipe.execute()
    thin, thick, arrow = [], [], []
    for number, own in users.items():
        chosen = generator.choices(list(items), k=arguments.candidates)
        moment = record(("context",), "")
        user = {user_id: number, **moment}
        thin.append({"user": user, "candidates": [{item_id: item} for item in chosen], "top_k": 10})
        thick.append({**thin[-1], "user": {**user, **own},
                      "candidates": [{item_id: item, **items[item]} for item in chosen]})
        arrow.append(write_request(thick[-1]["user"], thick[-1]["candidates"], 10))
    return [json.dumps(body).encode() for body in thin], [json.dumps(body).encode() for body in thick], arrow


def served(checkpoint: str, words: list[str], asks: list[bytes], kind: str, arguments: argparse.Namespace) -> dict:
    """Figures of one server under all clients."""
    with serving(checkpoint, arguments.clients, words) as address:
        return hammer(address, asks, kind, arguments)


def hammer(address: str, asks: list[bytes], kind: str, arguments: argparse.Namespace) -> dict:
    """All clients until the time is over; the first second does not count."""
    times: list[float] = []
    wrong, lock, begun = [], threading.Lock(), time.monotonic()

    def client(seed: int) -> None:
        generator, connection = random.Random(seed), http.client.HTTPConnection(address, timeout=60)
        while (now := time.monotonic() - begun) < arguments.seconds + 1:
            start = time.perf_counter()
            try:
                connection.request("POST", "/rank", generator.choice(asks), {"Content-Type": kind})
                answer = connection.getresponse()
                text, status = answer.read(), answer.status
            except OSError as error:
                text, status = str(error), 0
                connection.close()
            with lock:
                if status != 200:
                    wrong.append((status, text))
                elif now > 1:
                    times.append(1e3 * (time.perf_counter() - start))

    pool = [threading.Thread(target=client, args=(seed,)) for seed in range(arguments.clients)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    if not times:
        raise SystemExit(f"error: no answer: {wrong[:1]}")
    times.sort()
    return {"requests_per_s": len(times) / arguments.seconds, "p50_ms": times[len(times) // 2],
            "p99_ms": times[int(0.99 * len(times))], "errors": len(wrong)}


if __name__ == "__main__":
    main()
