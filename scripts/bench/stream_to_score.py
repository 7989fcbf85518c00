"""Time from an event to a score that knows it: stream, training step, version, server.

Starts a real redis-server (scripts/redis_server.sh), `python -m recsys train data.reader=redis_stream` on it, which
publishes a version every few steps, and `python -m recsys serve follow=true` beside it. A writer adds clicks at a
fixed rate with the time as their event time. An event is known to the server as soon as an answer of /rank comes from
a version whose event time is not before the event's; a client asks all the while. The peer named for the ratio is the
aim, 10 s.

    python scripts/bench/stream_to_score.py [--rate 500] [--seconds 30] [--every-steps 5] [--batch 64]

Last line of stdout: JSON with p50_s, p95_s and max_s from event to score, versions, errors of the client, and events
trained on. Redis, trainer, server, writer and client share the same cores.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

from serve_redis import Redis  # noqa: E402
from turns import environment, threads  # noqa: E402

AIM = 10.0
FEATURES = ("[{name: user_id, side: user, values: integer, rows: 10000}, {name: item_id, side: item, values: integer, "
            "rows: 10000}, {name: hour, side: context, values: integer, rows: 24}]")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=500.0, help="events a second")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--every-steps", type=int, default=5, help="steps between versions")
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, Redis(Path(scratch)) as redis:
        print(json.dumps(measure(Path(scratch) / "run", redis, arguments)))


def measure(run: Path, redis: Redis, arguments: argparse.Namespace) -> dict:
    """Figures of one run."""
    stop = threading.Event()
    writer = threading.Thread(target=write, args=(redis, arguments, stop), daemon=True)
    writer.start()
    trainer = start("train", "model.name=dcnv2", f"data.features={FEATURES}", "data.reader=redis_stream",
                    f"data.stream.redis.url={redis.url}", "data.time=time", "data.labels=[click]",
                    f"train.global_batch_size={arguments.batch}", "train.steps=1000000", f"output.directory={run}",
                    "train.sparse_optimizer={name: adagrad, learning_rate: 0.05}", "output.checkpoint_every=1000",
                    f"publish.every_steps={arguments.every_steps}", "output.tensorboard=false",
                    "output.loss_curve=false")
    server = None
    try:
        wait_for(run / "live" / "current.json", trainer)
        server = start("serve", "--checkpoint", str(run), "follow=true", "port=0", "engine.candidates=[8]",
                       "follow_seconds=0.05", "engine.timeout_seconds=30")
        address = next((line.split("http://")[1].strip() for line in server.stderr if "http://" in line), None)
        if address is None:
            raise SystemExit("error: the server did not start")
        threading.Thread(target=server.stderr.read, daemon=True).start()
        return ask(address, run, arguments)
    finally:
        stop.set()
        for process in (server, trainer):
            if process is not None:
                process.kill()
                process.wait()


def start(verb: str, *words: str) -> subprocess.Popen:
    """A command of this project; a trainer's output is thrown away."""
    return subprocess.Popen([sys.executable, "-m", "recsys", verb, *words], env=environment(), cwd=ROOT, text=True,
                            stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE if verb == "serve" else subprocess.DEVNULL)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until the trainer has published."""
    while not path.is_file():
        if process.poll() is not None:
            raise SystemExit("error: the trainer ended")
        time.sleep(0.05)


def write(redis: Redis, arguments: argparse.Namespace, stop: threading.Event) -> None:
    """Adds events at the rate, ten times a second."""
    generator, begun, written = random.Random(0), time.time(), 0
    while not stop.is_set():
        pipe = redis.client.pipeline(transaction=False)
        while written < (time.time() - begun) * arguments.rate:
            event = {"user_id": generator.randrange(10_000), "item_id": generator.randrange(10_000),
                     "hour": generator.randrange(24), "click": int(generator.random() < 0.2), "time": time.time()}
            pipe.xadd("events", {"event": json.dumps(event)})
            written += 1
        pipe.execute()
        stop.wait(0.1)


def ask(address: str, run: Path, arguments: argparse.Namespace) -> dict:
    """From an event to the first answer that knows it: of every version ten events, evenly between the newest of the
    version before (that an answer came from) and its own newest."""
    connection = http.client.HTTPConnection(address, timeout=60)
    body = json.dumps({"user": {"user_id": 1, "hour": 3},
                       "candidates": [{"item_id": item} for item in range(5)]}).encode()
    lags, seen, errors, asked, versions, before = [], 0, 0, 0, 0, None
    begun = time.monotonic()
    while time.monotonic() - begun < arguments.seconds:
        connection.request("POST", "/rank", body)
        answer = connection.getresponse()
        text, now, asked = answer.read(), time.time(), asked + 1
        if answer.status != 200:
            errors += 1
            continue
        version = json.loads(text)["version"]
        if version != seen:
            seen = version
            connection.request("GET", "/health")
            health = json.loads(connection.getresponse().read())
            newest = health["event_time"] if health["version"] == version else None
            if newest is not None and before is not None:
                versions += 1
                lags += [now - before - (newest - before) * part / 10 for part in range(1, 11)]
            before = newest if newest is not None else before
        time.sleep(0.005)
    lags.sort()
    if not lags:
        raise SystemExit("error: no version came; raise --seconds or --rate")
    state = json.loads((run / "live" / "current.json").read_text())
    return {"p50_s": lags[len(lags) // 2], "p95_s": lags[int(0.95 * len(lags))], "max_s": lags[-1],
            "ratio": lags[len(lags) // 2] / AIM, "peer": f"the aim of {AIM} s", "versions": versions,
            "answers": asked, "errors": errors, "events": state["step"] * arguments.batch,
            "rate": arguments.rate, "every_steps": arguments.every_steps, "threads": threads(), "unit": "s"}


if __name__ == "__main__":
    main()
