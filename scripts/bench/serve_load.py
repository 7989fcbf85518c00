"""Many clients at once on a live server: requests a second, latency, errors.

Starts `python -m recsys serve` on a free port for a checkpoint (made of start values where none is named: speed does
not depend on what was learned), lets clients, each on a connection of its own, ask one request after the other, and
asks for a reload in the middle.

    python scripts/bench/serve_load.py [--checkpoint DIR] [--config configs/recsys/tokenmixer_large_ug_sep.yaml]
                                       [--clients 64] [--seconds 20] [--candidates 100] [--users 1000]

Last line of stdout: JSON with requests_per_s, p50_ms, p99_ms, errors (answers other than 200, 503 among them), and what
the server says of its cache. The clients run in a process of their own on the same cores.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

from turns import environment, threads  # noqa: E402


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="run or checkpoint, float or quantized")
    parser.add_argument("--config", default="configs/recsys/tokenmixer_large_ug_sep.yaml",
                        help="without --checkpoint: the model, with start values")
    parser.add_argument("--int8", action="store_true", help="without --checkpoint: quantized")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--users", type=int, default=1000, help="different users")
    parser.add_argument("words", nargs="*", help="keys of serve, for example engine.cache_users=0")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = arguments.checkpoint or start_values(arguments.config, Path(scratch), arguments.int8)
        figures = load(checkpoint, arguments)
    print(json.dumps(figures))


def start_values(config: str, folder: Path, int8: bool) -> str:
    """A run's folder with a checkpoint of start values, made in a process of its own."""
    subprocess.run([sys.executable, "-c", MAKE, config, str(folder)], env=environment(), cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL)
    if not int8:
        return str(folder / "run")
    subprocess.run([sys.executable, "-m", "recsys", "quantize", "--checkpoint", str(folder / "run"), "--output",
                    str(folder / "int8"), "--part", "none"], env=environment(), cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return str(folder / "int8")


MAKE = """
import sys
from pathlib import Path
from parallel.layers.parameter import initialize
from parallel.task import load_run
from parallel.checkpoint.full import save_checkpoint
from recsys.build import loss_network
from recsys.data.log import prepare
folder = Path(sys.argv[2])
_, settings = load_run(sys.argv[1], [f"data.cache={folder}/data", "data.synthetic.samples=2000"])
log = prepare(settings.data, settings.model.embedding_size)
model = loss_network(settings, log.spec, len(log.labels)).model
initialize(model, 1)
save_checkpoint(folder / "run" / "checkpoints", 1, list(model.get_parameters()), (),
                {"run": settings.model_dump(mode="json")})
log.vocabulary.save(folder / "run" / "vocabulary.json")
"""


def load(checkpoint: str, arguments: argparse.Namespace) -> dict:
    """Figures of one server under all clients."""
    with serving(checkpoint, arguments.clients, arguments.words) as address:
        return hammer(address, requests(checkpoint, arguments), arguments)


@contextlib.contextmanager
def serving(checkpoint: str, clients: int, words: list[str]) -> Iterator[str]:
    """A server of a ranker for this many clients, in a process of its own; gives its HOST:PORT."""
    words = ["port=0", "engine.timeout_seconds=30", f"engine.queue={2 * clients}", *words]
    process = subprocess.Popen([sys.executable, "-m", "recsys", "serve", "--checkpoint", checkpoint, *words],
                               env={**environment(), "COLUMNS": "400"}, cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    try:
        address = next((line.split("http://")[1].strip() for line in process.stderr if "http://" in line), None)
        if address is None:
            raise SystemExit("error: the server did not start")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield address
    finally:
        process.terminate()
        process.wait()


def requests(checkpoint: str, arguments: argparse.Namespace) -> list[bytes]:
    """Random requests as JSON, one for each user."""
    from recsys.saved_model import describe

    features, generator = describe(checkpoint).features, random.Random(0)

    def value(feature) -> object:
        rows = (feature.rows or 10) - 1
        if feature.type == "numeric":
            return generator.random()
        return [generator.randint(0, rows) for _ in range(8)] if feature.is_list else generator.randint(0, rows)

    return [json.dumps({"user": {f.source: value(f) for f in features if f.side != "item"},
                        "candidates": [{f.source: value(f) for f in features if f.side == "item"}
                                       for _ in range(arguments.candidates)], "top_k": 10}).encode()
            for _ in range(min(arguments.users, 1000))]


def hammer(address: str, bodies: list[bytes], arguments: argparse.Namespace) -> dict:
    """All clients until the time is over."""
    times: list[float] = []
    codes: dict[int, int] = {}
    lock, begun = threading.Lock(), time.monotonic()

    def client(seed: int) -> None:
        generator, connection = random.Random(seed), http.client.HTTPConnection(address, timeout=60)
        while time.monotonic() - begun < arguments.seconds:
            start = time.perf_counter()
            try:
                connection.request("POST", "/rank", generator.choice(bodies))
                answer = connection.getresponse()
                answer.read()
                code = answer.status
            except OSError:
                code = 0
                connection.close()
            with lock:
                times.append(1e3 * (time.perf_counter() - start))
                codes[code] = codes.get(code, 0) + 1

    pool = [threading.Thread(target=client, args=(seed,)) for seed in range(arguments.clients)]
    for thread in pool:
        thread.start()
    time.sleep(arguments.seconds / 2)
    reload = http.client.HTTPConnection(address, timeout=60)
    reload.request("POST", "/reload")
    reloaded = reload.getresponse().status
    for thread in pool:
        thread.join()
    seconds = time.monotonic() - begun
    reload = http.client.HTTPConnection(address, timeout=60)
    reload.request("GET", "/health")
    health = json.loads(reload.getresponse().read())
    times.sort()
    good = codes.get(200, 0)
    return {"requests_per_s": good / seconds, "candidates_per_s": good * arguments.candidates / seconds,
            "p50_ms": times[len(times) // 2], "p95_ms": times[int(0.95 * len(times))],
            "p99_ms": times[int(0.99 * len(times))], "errors": sum(codes.values()) - good, "codes": codes,
            "clients": arguments.clients, "candidates": arguments.candidates, "seconds": seconds,
            "reload": reloaded, "version": health["version"], "cache_hit_rate": health["cache_hit_rate"],
            "threads": threads(), "unit": "ms"}


if __name__ == "__main__":
    main()
