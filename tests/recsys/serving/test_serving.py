"""Serving: batching changes nothing, the cache never mixes users, reloads lose nothing, bad requests are one line."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from parallel.checkpoint.folder import write_plain_json
from parallel.common.errors import UserError
from parallel.common.files import read_json
from parallel.serving.queue import Busy
from recsys.saved_model import describe, load
from recsys.serving.engine import Engine
from recsys.serving.requests import read_request
from recsys.serving.settings import EngineSettings
from recsys.serving.state_cache import StateCache, user_key
from tests.recsys.runs import add_checkpoint, body_of, make_run, plain

SMALL = EngineSettings(requests=3, candidates=[4, 16], queue=64, timeout_seconds=60.0, cache_users=5)


pytestmark = pytest.mark.usefixtures("graph_mode")


@pytest.fixture(scope="module")
def engine(run):
    made = Engine(load(run[0]), SMALL)
    made.start()
    yield made
    made.stop()


def requests_of(log, count: int, seed: int, most: int = 9) -> list[tuple[np.ndarray, np.ndarray]]:
    """Requests out of the log's rows: each has the user columns of its first row."""
    from recsys.ug_sep.sides import UserCandidateSplit

    generator, rows, user = np.random.default_rng(seed), log.parts["train"], UserCandidateSplit.of(log.spec).user
    asked = []
    for _ in range(count):
        index = generator.integers(0, len(rows), int(generator.integers(1, most + 1)))
        ids, numbers = np.array(rows.ids[index]), np.array(rows.numbers[index])
        ids[:, list(user.ids)] = ids[:1, list(user.ids)]
        numbers[:, list(user.numbers)] = numbers[:1, list(user.numbers)]
        asked.append((ids, numbers))
    return asked


# ---------------------------------------------------------------- engine


def test_how_requests_are_batched_changes_nothing(run, engine):
    asked = requests_of(run[2], 9, 0) + requests_of(run[2], 1, 1, most=1) + [
        tuple(np.repeat(array[:1], 40, 0) for array in requests_of(run[2], 1, 2)[0])]
    alone = [engine.scorer.score([item])[0] for item in asked]
    for order in (range(11), (10, 3, 0, 7, 1, 2, 9, 5, 4, 6, 8)):
        futures = [(index, engine.submit(*asked[index])) for index in order]
        for index, future in futures:
            np.testing.assert_allclose(future.result()[0], alone[index], rtol=0, atol=1e-6)
    together = engine.scorer.score(asked[:3])
    for one, other in zip(alone, together, strict=False):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
    for item, scores in zip(asked, alone, strict=True):
        np.testing.assert_allclose(scores, plain(engine.trained.model, *item), rtol=0, atol=1e-6)
        assert scores.shape == (len(item[0]), 1)


def test_an_uncached_user_of_few_candidates_is_one_graph(run, engine, monkeypatch):
    """... whose state later requests use; what is large, and what comes together with others, takes two."""
    scorer, ran = engine.scorer, []
    monkeypatch.setattr(scorer, "cache", StateCache(5))
    for name in ("request_pass", "user_pass", "candidate_pass"):
        graph = getattr(scorer, name)
        monkeypatch.setattr(scorer, name, lambda *inputs, name=name, graph=graph: ran.append(name) or graph(*inputs))

    def passes(*batch) -> list[str]:
        ran.clear()
        scores.append(scorer.score(list(batch)))
        return list(ran)

    scores, (one, other) = [], requests_of(run[2], 2, 3)
    other[1][:, list(scorer.sides.user.numbers)] += 1.0
    assert passes(one) == ["request_pass"]
    assert passes(one) == ["candidate_pass"] and passes(one, other) == ["user_pass", "candidate_pass"]
    scorer.cache.clear()
    monkeypatch.setattr("recsys.serving.engine.FEW", 3)
    assert passes(one) == ["user_pass", "candidate_pass"]
    monkeypatch.setattr("recsys.serving.engine.FEW", 16)
    many = tuple(np.repeat(array, 17, 0)[:17] for array in other)
    assert passes(many) == ["user_pass", "candidate_pass", "candidate_pass"]
    for found in scores[1:4]:
        np.testing.assert_allclose(found[0], scores[0][0], rtol=0, atol=1e-6)


def test_unseparated_models_are_served_too(tmp_path):
    _, log = make_run(tmp_path / "run", "dlrm_mlp")
    engine = Engine(load(tmp_path / "run"), replace_settings(requests=4, candidates=[8, 32]))
    engine.start()
    try:
        assert not engine.scorer.separated
        asked = requests_of(log, 6, 5)
        # All answers first: MindSpore runs a cell in one thread at a time, and the scoring thread has this one.
        answers = [future.result()[0] for future in [engine.submit(*item) for item in asked]]
        for item, scores in zip(asked, answers, strict=True):
            np.testing.assert_allclose(scores, plain(engine.trained.model, *item), rtol=0, atol=1e-6)
    finally:
        engine.stop()


def replace_settings(**changes) -> EngineSettings:
    return EngineSettings.model_validate({**SMALL.model_dump(), **changes})


def test_the_cache_under_fire_gives_everyone_their_own_state(run, engine):
    """Threads ask for more users than the cache holds, so that states come and go all the time."""
    asked = requests_of(run[2], 12, 7)
    expected = [engine.scorer.score([item])[0] for item in asked]
    hits = engine.cache.hits
    wrong = []

    def hammer(seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(60):
            index = generator.choice((0, 1, 2, generator.randrange(12)))
            if np.abs(engine.score(*asked[index]) - expected[index]).max() > 1e-6:
                wrong.append(index)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert engine.cache.hits > hits and len(engine.cache) <= SMALL.cache_users


def test_cache_alone():
    cache = StateCache(2)
    user = (np.array([1, 2], np.int32), np.array([0.5], np.float32))
    keys = [user_key(version, *user) for version in (1, 2)] + [user_key(1, user[0], user[1] + 1)]
    assert len(set(keys)) == 3
    for number, key in enumerate(keys):
        cache.put(key, np.array([number]))
    assert cache.get(keys[0]) is None and cache.get(keys[2])[0] == 2 and cache.get(keys[1])[0] == 1
    cache.put(keys[0], np.array([0]))
    assert cache.get(keys[2]) is None  # the one used longest ago went
    assert cache.hit_rate == 2 / 4
    with pytest.raises(ValueError, match="read-only"):
        cache.get(keys[1])[0] = 5
    cache.clear()
    assert len(cache) == 0

    def hammer(seed: int) -> bool:
        generator = random.Random(seed)
        for _ in range(3000):
            number = generator.randrange(6)
            found = cache.get(user_key(1, np.array([number], np.int32), user[1]))
            if found is not None and found[0] != number:
                return False
            cache.put(user_key(1, np.array([number], np.int32), user[1]), np.array([number]))
        return len(cache) <= 2

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(hammer, range(2)))


def test_a_reload_under_load_loses_nothing(run, engine):
    folder, settings, log = run
    asked = requests_of(log, 6, 11)
    old = [engine.scorer.score([item])[0] for item in asked]
    version = engine.version
    add_checkpoint(folder, settings, log, 2, seed=2)
    answers, stop = [], threading.Event()

    def ask(seed: int) -> None:
        generator = random.Random(seed)
        while not stop.is_set():
            index = generator.randrange(6)
            scores, scored_by = engine.submit(*asked[index]).result()
            answers.append((index, scores, scored_by))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    message = engine.reload(folder)
    time.sleep(0.2)
    stop.set()
    for thread in threads:
        thread.join()
    assert message["version"] == version + 1 and message["checkpoint"].endswith("step_00000002")
    new = [plain(engine.trained.model, *item) for item in asked]
    assert engine.trained.path.name == "step_00000002"
    np.testing.assert_allclose(plain(load(folder).model, *asked[0]), new[0], rtol=0, atol=1e-6)
    assert all(np.abs(one - other).max() > 1e-4 for one, other in zip(old, new, strict=True))
    assert {scored_by for _, _, scored_by in answers} == {version, version + 1}
    for index, scores, scored_by in answers:
        np.testing.assert_allclose(scores, (old if scored_by == version else new)[index], rtol=0, atol=1e-6)


def test_a_reload_of_another_model_is_refused_and_the_old_one_goes_on(run, engine, tmp_path):
    make_run(tmp_path / "other", "tokenmixer_large_ug_sep", "model.width=96")
    version = engine.version
    with pytest.raises(UserError, match="another model"):
        engine.reload(tmp_path / "other")
    assert engine.version == version
    assert engine.score(*requests_of(run[2], 1, 3)[0]).shape[1] == 1


def test_a_quantized_model_is_served_and_reloaded(run, tmp_path):
    from parallel.common.command import main
    from recsys.__main__ import VERBS

    folder, settings, log = run
    for step in (1, 2):
        if not (folder / "checkpoints" / f"step_{step:08d}").is_dir():
            add_checkpoint(folder, settings, log, step, seed=step)
        assert main("recsys", VERBS, ["quantize", "--checkpoint", str(folder / "checkpoints" / f"step_{step:08d}"),
                                      "--output", str(tmp_path / f"q{step}"), "--part", "none"]) == 0
    engine = Engine(load(tmp_path / "q1"), replace_settings(requests=1, candidates=[16]))
    engine.start()
    try:
        item = requests_of(log, 1, 4)[0]
        for name in ("q1", "q2"):
            if name == "q2":
                engine.reload(tmp_path / name)
            np.testing.assert_allclose(engine.score(*item), plain(load(tmp_path / name).model, *item), rtol=0,
                                       atol=1e-6)
        with pytest.raises(UserError, match="not quantized in the same way"):
            engine.reload(folder)
    finally:
        engine.stop()


def test_a_full_queue_and_a_late_request_are_busy(run):
    engine = Engine(load(run[0]), replace_settings(requests=1, candidates=[16], queue=2, timeout_seconds=0.3))
    engine.start()
    try:
        gate, item = threading.Event(), requests_of(run[2], 1, 6)[0]
        score = engine.scorer.score
        engine.scorer.score = lambda batch: (gate.wait(), score(batch))[1]
        first = engine.submit(*item)
        while engine.waiting:
            time.sleep(0.01)
        waiting = [engine.submit(*item) for _ in range(2)]
        with pytest.raises(Busy, match="2 requests wait"):
            engine.submit(*item)
        waiting[0].cancel()
        time.sleep(0.4)
        gate.set()
        assert first.result()[0].shape[1] == 1
        with pytest.raises(Busy, match="too long"):
            waiting[1].result()
        assert engine.score(*item).shape[1] == 1  # and it goes on
    finally:
        engine.stop()
    with pytest.raises(Busy, match="ending"):
        engine.submit(*item)


def test_a_defect_is_reported_to_those_who_wait_and_ends_nothing(run, engine):
    item = requests_of(run[2], 1, 8)[0]
    score, engine.scorer.score = engine.scorer.score, lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        engine.score(*item)
    engine.scorer.score = score
    assert engine.score(*item).shape[1] == 1


# ---------------------------------------------------------------- requests


def test_a_request_reads_as_the_log_does(run):
    """Rows of the log, given as JSON, become the same numbers that training saw."""
    from recsys.data.batches import gather
    from recsys.data.readers import reader

    folder, settings, log = run
    trained = describe(folder)
    table, _ = next(iter(reader("synthetic").read(settings.data, None)))
    rows = table.slice(0, 5).to_pylist()
    ids, numbers, _ = gather(log.parts["train"], slice(0, 5))
    for index, row in enumerate(rows):
        user = {f.source: row[f.source] for f in trained.features if f.side == "user"}
        rest = {f.source: row[f.source] for f in trained.features if f.side != "user"}
        ask = read_request({"user": user, "candidates": [rest]}, trained, 10)
        np.testing.assert_array_equal(ask.ids[0], ids[index])
        np.testing.assert_allclose(ask.numbers[0], numbers[index], rtol=1e-6)


@pytest.mark.parametrize(("change", "message"), [
    (lambda b: [], "object with user and candidates"),
    (lambda b: {**b, "topk": 3}, "did you mean 'top_k'?"),
    (lambda b: {**b, "top_k": 0}, "above 0"),
    (lambda b: {**b, "top_k": True}, "above 0"),
    (lambda b: {**b, "user": 3}, "user: must be an object"),
    (lambda b: {**b, "candidates": []}, "1 to 10"),
    (lambda b: {**b, "candidates": b["candidates"] * 20}, "1 to 10"),
    (lambda b: {**b, "candidates": [3]}, "list of objects"),
    (lambda b: {**b, "candidates": [b["candidates"][0], {}]}, "candidates[1]: feature"),
    (lambda b: {**b, "user": {**b["user"], "history": 5}}, "'history' must be a list"),
    (lambda b: {**b, "user": {**b["user"], "budget": "much"}}, "not a number"),
    (lambda b: {**b, "user": {**b["user"], "budget": [1]}}, "single value"),
    (lambda b: {**b, "user": {**b["user"], "user_id": {"a": 1}}}, "single value"),
    (lambda b: {**b, "user": {**b["user"], "user_id": 10**30}}, "user"),
    (lambda b: {**b, "user": {**b["user"], "user_id": -5}}, "outside the table"),
    (lambda b: {**b, "user": {**b["user"], "user_id": "\ud800"}}, "cannot be read"),
    (lambda b: {**b, "user": {**b["user"], "history": ["\ud800"]}}, "cannot be read"),
    (lambda b: {**b, "user": {key: value for key, value in b["user"].items() if key != "age"}}, "'age' is missing"),
])
def test_a_bad_request_is_one_line(run, change, message):
    trained = describe(run[0])
    body = body_of(trained, run[2], 0, 2)
    assert read_request(body, trained, 10).ids.shape == (2, trained.spec.id_columns)
    with pytest.raises(UserError) as caught:
        read_request(change(body), trained, 10)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_values_are_allowed(run):
    trained = describe(run[0])
    body = body_of(trained, run[2], 0, 2)
    body["user"] = dict.fromkeys(body["user"])
    body["candidates"][0] = dict.fromkeys(body["candidates"][0])
    ask = read_request(body, trained, 10)
    slot = trained.spec.slots["user_id"]
    assert (ask.ids[:, slot.start] == slot.offset).all()


def test_without_settings_in_the_checkpoint_it_says_so(run, tmp_path):
    import shutil

    copy = tmp_path / "checkpoint"
    shutil.copytree(run[0] / "checkpoints" / "step_00000001", copy)
    state = read_json(copy / "state.json")
    state.pop("run")
    write_plain_json(copy / "state.json", state)
    with pytest.raises(UserError, match="--config"):
        describe(copy)


def test_a_reload_shows_whether_requests_read_otherwise(run, engine):
    folder, settings, log = run
    encoding_version, version = engine.encoding_version, engine.version
    path = add_checkpoint(folder, settings, log, 3, seed=3)
    engine.reload(path)
    assert (engine.encoding_version, engine.version) == (encoding_version, version + 1)
    other = type(log.vocabulary)(moments={"none": (0.0, 2.0)})
    other.save(path / "vocabulary.json")
    engine.reload(path)
    assert (engine.encoding_version, engine.version) == (encoding_version + 1, version + 2)
    (path / "vocabulary.json").unlink()
