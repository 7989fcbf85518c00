"""Rows that are split over ranks: every rank knows all scores, exactly, and so the metrics of one process."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from mindspore import Tensor

from recsys.data.encode import Encoded
from recsys.evaluation.log_metrics import Evaluation
from recsys.evaluation.progressive import Progressive, Window, window_metrics
from recsys.evaluation.score_merging import RankScores
from recsys.layers.tasks import TaskPlan


class Ranks:
    """Backends of one run in threads: `exchange` adds as processes would."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.values = threading.Barrier(ranks), [None] * ranks
        self.backends = [Rank(self, rank, ranks) for rank in range(ranks)]

    def run(self, work) -> list:
        with ThreadPoolExecutor(len(self.backends)) as pool:
            return list(pool.map(work, self.backends))


class Rank:
    """One of them."""

    def __init__(self, group: Ranks, rank: int, ranks: int) -> None:
        self.group, self.rank, self.ranks, self.share = group, rank, ranks, (rank, ranks)

    def exchange(self, values: list[float]) -> list[float]:
        self.group.values[self.rank] = np.array(values, np.float32)
        self.group.barrier.wait(20)
        total = np.sum(self.group.values, 0)
        self.group.barrier.wait(20)
        return total.tolist()

    def scores(self, batch):
        return score(batch[0])


def score(ids: np.ndarray) -> np.ndarray:
    return (0.5 + 0.4 * np.sin(ids * np.float32(1.7))).astype(np.float32)


class Scored:
    """Stands for a model; counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def set_train(self, mode: bool) -> None:
        """As of a cell."""

    def __call__(self, ids, numbers):
        self.asked += 1
        return Tensor(score(ids.asnumpy()))


@pytest.fixture
def rows():
    generator = np.random.default_rng(0)
    count = 103
    return Encoded(generator.integers(0, 60, (count, 2)).astype(np.int32), np.zeros((count, 1), np.float32),
                   generator.integers(0, 2, (count, 2)).astype(np.float32), generator.integers(0, 9, count))


@pytest.mark.parametrize("ranks, limit", [(1, None), (3, None), (4, None), (3, 5)])
def test_metrics_of_rows_that_ranks_score_in_turn_are_those_of_one(rows, ranks, limit):
    alone = Evaluation(None, rows, ["click", "like"], 10, scores=Scored(), plan=TaskPlan.of((), 2), limit=limit)
    expected = alone(0)
    group, asked = Ranks(ranks), []

    def run(backend):
        own = Evaluation(None, rows, ["click", "like"], 10, scores=Scored(), plan=TaskPlan.of((), 2), limit=limit,
                         backend=backend)
        found = own(0)
        asked.append(own.scores.asked)
        return found

    for found in group.run(run):
        assert found == expected and {"auc", "gauc", "uauc", "logloss", "auc_like"} <= set(found)
    assert max(asked) == -(-(limit or 11) // ranks)  # nobody scores what another does


def test_scores_come_back_exactly_whatever_they_are():
    group = Ranks(3)
    values = np.array([[1e-30, 0.1], [0.9999999, 1 / 3], [1e-7, 5e-324]], np.float32)
    for whole in group.run(lambda backend: RankScores(backend).gathered(
            values[backend.rank:backend.rank + 1] if backend.rank != 1 else None, (3, 2), backend.rank)):
        assert np.array_equal(whole, np.where(np.arange(3)[:, None] == 1, 0, values))


def test_progressive_metrics_of_several_ranks_are_those_of_one():
    generator = np.random.default_rng(1)
    batches = [(generator.integers(0, 50, (8, 2)).astype(np.int32), np.zeros((8, 1), np.float32),
                generator.integers(0, 2, (8, 2)).astype(np.float32)) for _ in range(9)]

    def run(backend):
        own = Progressive(backend, ["click", "like"], [20, 50])
        share = 8 // backend.ranks
        for step, batch in enumerate(batches):
            own.before_step(step, [part[backend.rank * share:(backend.rank + 1) * share] for part in batch])
        return own

    one, = Ranks(1).run(run)
    expected = one(9)
    for other in Ranks(2).run(run):
        assert other(9) == expected
    assert set(expected) >= {"auc_20", "ne_50", "calibration_20", "auc", "auc_like", "auc_50_like"}
    labels = np.concatenate([batch[2] for batch in batches])[-20:, 0]
    scores = np.concatenate([score(batch[0]) for batch in batches])[-20:, 0]
    assert expected["auc_20"] == window_metrics(labels, scores)["auc"]
    again, = Ranks(1).run(lambda backend: Progressive(backend, ["click", "like"], [20, 50]))
    again.restore(one.state(9))
    assert again(9) == expected and again.samples == 72


def test_a_window_keeps_the_newest():
    window = Window(5)
    for begin in (0, 3, 4, 11):
        window.add(np.arange(begin, begin + 4, dtype=np.float32), np.ones(4))
    assert window.newest(3)[1].tolist() == [12, 13, 14] and window.newest(9)[1].tolist() == [7, 11, 12, 13, 14]
    window.add(np.arange(20, 40, dtype=np.float32), np.zeros(20))
    assert window.newest(9)[1].tolist() == [35, 36, 37, 38, 39]


@pytest.mark.parametrize("limit, kept", [(None, 100), (2, 80), (3, 100)])
def test_a_validation_looks_at_the_same_rows_whatever_runs_it(limit, kept):
    """A batch of a validation is one of one device, 4 training batches, however many processes share it."""
    from types import SimpleNamespace

    from recsys.training.validation import validation_rows

    rows = Encoded(np.arange(100)[:, None], np.zeros((100, 0)), np.zeros((100, 1)), np.zeros(100))
    settings = SimpleNamespace(train=SimpleNamespace(validation_batches=limit, global_batch_size=10))
    assert validation_rows(settings, rows).ids[:, 0].tolist() == list(range(kept))
