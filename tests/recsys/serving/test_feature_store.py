"""Requests that name ids only, with features in a real Redis; Arrow bodies; the bounds of the cache."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pyarrow as pa
import pytest

from parallel.common.errors import UserError
from recsys.saved_model import load
from recsys.serving import arrow_body
from recsys.serving.feature_store import FeatureStore, StoreAway
from recsys.serving.requests import read_request
from recsys.serving.settings import RedisFeatures
from recsys.serving.state_cache import StateCache
from tests.recsys.redis_server import RedisServer
from tests.recsys.runs import body_of, make_run

pytestmark = pytest.mark.usefixtures("graph_mode")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple:
    """(trained, log) of a run."""
    folder = tmp_path_factory.mktemp("small") / "run"
    _, log = make_run(folder, "dlrm_mlp", "model.hidden=[8]")
    return load(folder), log


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    found = RedisServer(tmp_path_factory.mktemp("redis"))
    yield found
    found.close()


def split(trained, body: dict) -> tuple[dict, dict, dict]:
    """(body with ids and the moment only, the user's record, items' records) of a whole request."""
    sides = {feature.source: feature.side for feature in trained.features}
    user = {"user_id": body["user"]["user_id"], **{k: v for k, v in body["user"].items() if sides[k] == "context"}}
    record = {name: value for name, value in body["user"].items() if name not in user}
    items = {item["item_id"]: {k: v for k, v in item.items() if k != "item_id"} for item in body["candidates"]}
    thin = {**body, "user": user, "candidates": [{"item_id": item["item_id"]} for item in body["candidates"]]}
    return thin, record, items


def fill(store, bodies: list, trained) -> list:
    async def all_of_them():
        try:
            return [await store.fill(body, trained) for body in bodies]
        finally:
            await store.close()

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("form", ["json", "hash"])
def test_ids_alone_are_the_same_request(small, server, form):
    trained, log = small
    server.client.flushall()
    bodies = [body_of(trained, log, seed, 6) for seed in range(5)]
    thin = []
    for number, body in enumerate(bodies):
        body["user"]["user_id"] = number
        for place, item in enumerate(body["candidates"]):
            item["item_id"] = 6 * number + place
        less, record, items = split(trained, body)
        thin.append(less)
        records = {f"user:{number}": record, **{f"item:{key}": value for key, value in items.items()}}
        for key, value in records.items():
            if form == "json":
                server.client.set(key, json.dumps(value))
            else:
                server.client.hset(key, mapping={k: json.dumps(v) if isinstance(v, list) else str(v)
                                                 for k, v in value.items()})
    store = FeatureStore(RedisFeatures(url=server.url, form=form), trained)
    for body, found in zip(bodies, fill(store, [*thin, *thin], trained)[5:], strict=True):
        one, other = read_request(body, trained, 20), read_request(found, trained, 20)
        assert np.array_equal(one.ids, other.ids) and np.array_equal(one.numbers, other.numbers)
    assert store.asked == 5 * 7 + 5  # items are kept, users asked for anew


def test_what_the_request_gives_goes_before_what_redis_has(small, server):
    trained, log = small
    server.client.flushall()
    body = body_of(trained, log, 1, 2)
    thin, record, _ = split(trained, body)
    server.client.set(f"user:{thin['user']['user_id']}", json.dumps({**record, "age": 1, "nothing": 3}))
    thin["user"]["age"] = 7
    store = FeatureStore(RedisFeatures(url=server.url), trained)
    found, = fill(store, [thin], trained)
    assert found["user"]["age"] == 7 and "nothing" not in found["user"]
    assert found["candidates"][0]["author"] is None and store.unknown == len({i["item_id"] for i in thin["candidates"]})
    with pytest.raises(UserError, match="no features in the store"):
        fill(FeatureStore(RedisFeatures(url=server.url, unknown="refuse"), trained), [thin], trained)


@pytest.mark.parametrize("identity", [None, [1], {"a": 1}, True, "x" * 10_000, 1.5])
def test_what_is_no_id_is_one_line(small, server, identity):
    trained, log = small
    thin, _, _ = split(trained, body_of(trained, log, 1, 2))
    thin["user"]["user_id"] = identity
    with pytest.raises(UserError, match="needs an id"):
        fill(FeatureStore(RedisFeatures(url=server.url), trained), [thin], trained)


def test_a_record_that_is_damaged_and_a_server_that_is_away(small, server):
    trained, log = small
    thin, _, _ = split(trained, body_of(trained, log, 1, 2))
    server.client.set(f"user:{thin['user']['user_id']}", "[1")
    with pytest.raises(UserError, match="no JSON object"):
        fill(FeatureStore(RedisFeatures(url=server.url), trained), [thin], trained)
    with pytest.raises(StoreAway):
        fill(FeatureStore(RedisFeatures(url="redis://127.0.0.1:1/0"), trained), [thin], trained)
    # What is no request is left for `read_request` to refuse.
    assert fill(FeatureStore(RedisFeatures(url=server.url), trained), [[1]], trained) == [[1]]


# ---------------------------------------------------------------- Arrow


def test_arrow_and_json_are_the_same_request(small):
    trained, log = small
    for seed in range(4):
        body = body_of(trained, log, seed, 5)
        raw = arrow_body.write_request(body["user"], body["candidates"], 3)
        one, other = arrow_body.read_arrow(raw, trained, 20), read_request(body, trained, 20)
        assert np.array_equal(one.ids, other.ids) and np.array_equal(one.numbers, other.numbers)
        assert one.top_k == other.top_k == 3 and one.ids.dtype == other.ids.dtype
        assert arrow_body.body_of(raw, 20) == body
    answer = {"ranking": [{"candidate": 2, "score": 0.5, "scores": {"click": 0.5}}], "version": 7}
    table = pa.ipc.open_stream(arrow_body.write_answer(answer)).read_all()
    assert table.to_pylist() == [{"candidate": 2, "score": 0.5, "click": 0.5}]
    assert table.schema.metadata[b"version"] == b"7"


def test_arrow_bodies_that_are_no_request_are_one_line(small):
    trained, log = small
    body = body_of(trained, log, 0, 3)
    good = arrow_body.write_request(body["user"], body["candidates"])
    table = pa.Table.from_pylist([{"a": "x" * 1000}] * 3)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    packed = sink.getvalue().to_pybytes()
    bad = [b"", b"{}", good[:-40], good[:len(good) // 2], good + b"x", packed, b"\xff" * 100,
           arrow_body.write_request(body["user"], []), arrow_body.write_request(body["user"], body["candidates"] * 9),
           arrow_body.write_request({"user_id": 1}, body["candidates"])]
    for raw in bad:
        with pytest.raises(UserError) as refused:
            arrow_body.read_arrow(raw, trained, 20)
        assert "\n" not in str(refused.value)
    generator = np.random.default_rng(0)
    for _ in range(300):
        raw = bytearray(good)
        for place in generator.integers(0, len(raw), 3):
            raw[place] = generator.integers(0, 256)
        try:
            ask = arrow_body.read_arrow(bytes(raw), trained, 20)
            assert ask.ids.shape[0] <= 20
        except UserError:
            pass


# ---------------------------------------------------------------- cache


def test_the_cache_is_bounded_in_bytes_and_age():
    now = [0.0]
    cache = StateCache(100, 1000, 10.0, lambda: now[0])
    for number in range(20):
        cache.put(bytes([number]) * 10, np.zeros(90, np.uint8))
    assert len(cache) == 10 and cache.bytes == 1000 and cache.get(bytes([5]) * 10) is None
    assert cache.get(bytes([19]) * 10) is not None
    cache.put(bytes([19]) * 10, np.zeros(40, np.uint8))
    assert cache.bytes == 950
    now[0] = 11.0
    assert cache.get(bytes([19]) * 10) is None and len(cache) == 9
    cache.put(b"a", np.zeros(5000, np.uint8))  # larger than all of it
    assert len(cache) == 0 and cache.bytes == 0
    cache.put(b"a", np.zeros(10, np.uint8))
    cache.clear()
    assert cache.bytes == 0
