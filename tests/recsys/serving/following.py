"""Clients of a server that follows a run, while versions come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from recsys.live.versions import Delta, read_current, read_delta
from recsys.serving.engine import Engine
from recsys.serving.follow import Follower, load_current
from recsys.serving.settings import EngineSettings


def answers_while_versions_come(live: Path, rows: int, shapes: EngineSettings, asks: list, publish: Callable[[], int],
                                clients: int, updates: int) -> tuple[list[tuple[int, np.ndarray, int]],
                                                                     dict[int, Delta]]:
    """(number of the ask, scores_CK, version) of every answer, and each version's delta.

    Args:
        live: folder of the versions, of which the first is there.
        rows: samples of one call at most.
        shapes: of the engine.
        asks: requests in numbers.
        publish: writes a version; its number.
        clients: that ask at once, over and over.
        updates: versions to publish.
    """
    trained, current = load_current(live, rows)
    engine = Engine(trained, shapes)
    engine.start()
    follower = Follower(engine, current, 0.01)
    follower.start()
    stop, answers, deltas = threading.Event(), [], {}

    def client(number: int) -> None:
        while not stop.is_set():
            ask = asks[number % len(asks)]
            answers.append((number % len(asks), *engine.submit(ask.ids, ask.numbers).result(60)))

    with ThreadPoolExecutor(clients) as pool:
        done = [pool.submit(client, number) for number in range(clients)]
        for number in range(updates):
            version = publish()
            deltas[version] = read_delta(read_current(live).chain[-1][1])
            deadline = time.monotonic() + 60
            # Now and then several versions come between two looks.
            while number % 4 and engine.version < version:
                assert time.monotonic() < deadline
                time.sleep(0.002)
        while engine.version < version:
            time.sleep(0.002)
        time.sleep(0.2)
        stop.set()
        for one in done:
            one.result()  # raises what a client met
    follower.stop()
    engine.stop()
    assert {answered for *_, answered in answers} >= {updates + 1} and len(answers) > updates
    return answers, deltas
