"""Slow, broken and hostile clients of a ranker's server: those who ask well are answered meanwhile, and the server
tells no traceback."""

from __future__ import annotations

import http.client
import json
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from campaigns.base import Campaign
from campaigns.kills import ROOT
from campaigns.mutations import mutated_bytes

LIMIT = 300.0
HALF = 150


def run(campaign: Campaign) -> None:
    """One server, unfinished bodies beside good requests, then nonsense on the wire."""
    if campaign.short:
        return
    folder, rng = campaign.folder / "clients", campaign.part("clients")
    if not (folder / "run").exists():
        shutil.rmtree(folder, ignore_errors=True)
        train(folder)
    port = _free_port()
    log = folder / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen([sys.executable, "-m", "recsys", "serve", "--checkpoint", str(folder / "run"),
                                   f"port={port}"], stdout=subprocess.DEVNULL, stderr=file, cwd=ROOT)
    try:
        if not wait(port):
            campaign.fail("clients", f"the server did not start: {log.read_text()[-2000:]}")
            return
        body = example(folder)
        slow = [half_body(port, body) for _ in range(HALF)]
        codes = asked(port, body, 40)
        campaign.count("client good beside slow", len(codes))
        if codes.count(200) < 38:
            campaign.fail("clients", f"{HALF} unfinished bodies starved good requests: {codes}")
        for connection in slow:
            connection.close()  # hangs up in the middle
        done = 0
        while campaign.more(done, 0) and done < 2000:
            nonsense(port, body, rng)
            campaign.count("client hostile")
            done += 1
        codes = asked(port, body, 10)
        if codes != [200] * 10:
            campaign.fail("clients", f"after nonsense the server answers {codes}")
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            campaign.fail("clients", "the server did not end within 60 seconds of SIGTERM")
    told = log.read_text(encoding="utf-8", errors="replace")
    if "Traceback" in told:
        campaign.fail("clients", told[told.index("Traceback"):][:3000])


def train(folder: Path) -> None:
    """A small ranker."""
    folder.mkdir(parents=True)
    subprocess.run([sys.executable, "-m", "recsys", "train", "--config", "configs/recsys/rankmixer.yaml",
                    "data.synthetic.samples=2000", "data.synthetic.users=60", "data.synthetic.items=40",
                    "train.global_batch_size=64", "train.steps=3", "output.tensorboard=false",
                    f"data.cache={folder}/cache", f"output.directory={folder}/run"], check=True, capture_output=True,
                   cwd=ROOT)


def example(folder: Path) -> bytes:
    """A good request: every feature missing."""
    from recsys.saved_model import describe

    trained = describe(folder / "run")
    user = {f.source: None for f in trained.features if f.side == "user"}
    item = {f.source: None for f in trained.features if f.source not in user}
    return json.dumps({"user": user, "candidates": [item, item]}).encode()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait(port: int) -> bool:
    """Whether the server answers within the limit."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return True
        except OSError:
            time.sleep(0.5)
    return False


def half_body(port: int, body: bytes) -> socket.socket:
    """A connection that sends half of a body and stops."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    head = f"POST /rank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body[:len(body) // 2])
    return connection


def asked(port: int, body: bytes, count: int) -> list[int]:
    """Codes of good requests, four at once."""
    codes: list[int] = []

    def ask() -> None:
        for _ in range(-(-count // 4)):
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                connection.request("POST", "/rank", body, {"Content-Type": "application/json"})
                codes.append(connection.getresponse().status)
            except OSError:
                codes.append(0)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return codes[:count]


def nonsense(port: int, body: bytes, rng: random.Random) -> None:
    """Something that is no good request: wrong bytes, wrong lengths, a client that goes away."""
    wrong = mutated_bytes(body, rng)
    length = rng.choice((len(wrong), len(wrong), 0, len(wrong) * 2, 10**12, -1))
    path = rng.choice(("/rank", "/", "/reload/../rank"))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
    data = head.encode() + wrong
    if rng.random() < 0.2:
        data = mutated_bytes(data, rng)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(data[:rng.randrange(1, len(data) + 1)])
            if rng.random() < 0.5:
                connection.settimeout(0.3)
                connection.recv(4096)
    except OSError:
        return
