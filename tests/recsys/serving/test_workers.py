"""Several processes behind one port: a user's requests are scored by one of them, whoever reads them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from parallel.serving.errors import Refusal
from recsys.saved_model import load
from recsys.serving.workers import JSON, Peers, Place
from tests.recsys.runs import body_of, make_run


def test_bodies_go_to_their_owner_and_are_scored_here_when_it_is_away(tmp_path):
    async def scenario() -> None:
        made = []

        def rank_of(index: int):
            async def rank(raw: bytes, kind: int) -> dict:
                made.append((index, raw))
                if raw == b"bad":
                    raise Refusal(422, "no request", retry_after=None)
                await asyncio.sleep(0.001)
                return {"by": index, "of": raw.decode()}

            return rank

        peers = [Peers(Place(index, 3, str(tmp_path), 0), rank_of(index)) for index in range(3)]
        for one in peers[:2]:
            await one.start()
        answers = await asyncio.gather(*(peers[0].answer(number % 3, str(number).encode(), JSON)
                                         for number in range(60)))
        # Worker 2 never started: worker 0 stands in for it.
        assert [answer["by"] for answer in answers] == [0, 1, 0] * 20
        assert [answer["of"] for answer in answers] == [str(number) for number in range(60)]
        assert peers[0].passed_on == 20 and peers[0].fallen_back == 20
        with pytest.raises(Refusal, match="no request"):
            await peers[0].answer(1, b"bad", JSON)
        peers[1].server.close()

    asyncio.run(scenario())
    place = Place(0, 8, "", 0)
    owners = [place.owner(user) for user in range(800)]
    assert owners == [place.owner(user) for user in range(800)] and min(map(owners.count, range(8))) > 50
    assert place.owner({"a": 1, "b": 2}) == place.owner({"b": 2, "a": 1})


@pytest.mark.slow
@pytest.mark.usefixtures("graph_mode")
def test_by_the_command(tmp_path):
    """Two workers: the same answers, one dies and comes again, SIGTERM ends all."""
    _, log = make_run(tmp_path / "run", "tokenmixer_large_ug_sep")
    process = subprocess.Popen([sys.executable, "-m", "recsys", "serve", "--checkpoint", str(tmp_path / "run"),
                                "port=0", "workers=2", "engine.candidates=[8]", "engine.requests=2"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "GLOG_v": "3"})
    lines = []
    threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")), daemon=True).start()

    def wait(count: int) -> str:
        deadline = time.monotonic() + 180
        while len(found := [line for line in lines if "http://" in line]) < count:
            assert time.monotonic() < deadline and process.poll() is None, lines
            time.sleep(0.1)
        return found[0][found[0].index("http://"):].split()[0]

    def ask(path: str, body: bytes | None = None) -> dict:
        request = urllib.request.Request(address + path, data=body)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    try:
        address = wait(2)
        trained = load(tmp_path / "run")
        bodies = [json.dumps(body_of(trained, log, seed, 5)).encode() for seed in range(10)]
        first = [ask("/rank", body)["ranking"] for body in bodies]
        assert [ask("/rank", body)["ranking"] for body in bodies] == first
        assert {ask("/health")["worker"] for _ in range(60)} == {0, 1}
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[0]), signal.SIGKILL)
        wait(3)
        assert [ask("/rank", body)["ranking"] for body in bodies] == first
        process.terminate()
        assert process.wait(60) == 0
        assert json.loads(process.stdout.read().strip().splitlines()[-1]) == {"workers": 2, "restarts": 1}
    finally:
        process.kill()
