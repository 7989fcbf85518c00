"""One of many encodes a log, the others wait and map what it made."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from recsys.data import log
from recsys.data.log import prepare
from recsys.settings import DataSettings, SyntheticSettings


def test_of_several_one_encodes(tmp_path, monkeypatch):
    data = DataSettings(cache=str(tmp_path), synthetic=SyntheticSettings(samples=9000))
    made, begin, encode = [], threading.Barrier(3), log._encode_to
    monkeypatch.setattr(log, "_encode_to", lambda *arguments: made.append(encode(*arguments)))

    def run(_: int) -> int:
        begin.wait()
        return int(np.asarray(prepare(data, 16).parts["train"].ids, np.int64).sum())

    # The lock is of an open file, so threads stand for processes.
    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(run, range(3)))) == 1
    assert len(made) == 1
