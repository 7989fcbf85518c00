"""Redis streams: every event once whatever is killed, gaps noticed, delayed labels."""

from __future__ import annotations

import json
import threading
import time

import pytest

from parallel.common.errors import UserError
from tests.recsys.data.streams.events import add, clicks
from tests.recsys.data.streams.reading import make_source, read, same
from tests.recsys.redis_server import RedisServer


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    found = RedisServer(tmp_path_factory.mktemp("redis"))
    yield found
    found.close()


@pytest.fixture
def words(server):
    server.client.flushall()
    return "data.reader=redis_stream", f"data.stream.redis.url={server.url}"


def test_a_run_that_goes_on_from_any_step_reads_the_same_batches(server, words, tmp_path):
    add(server.client, clicks(100))
    uninterrupted, states = read(make_source(tmp_path, *words), 6)
    assert [len(labels) for _, _, labels in uninterrupted] == [16] * 6
    for step in range(1, 6):
        rest, _ = read(make_source(tmp_path, *words), 6 - step, step, states[step])
        assert same(rest, uninterrupted[step:])
    # Killed before its first checkpoint, a run begins where it began.
    assert same(read(make_source(tmp_path, *words), 2)[0], uninterrupted[:2])


def test_each_rank_takes_its_rows_of_every_batch(server, words, tmp_path):
    add(server.client, clicks(40))
    whole, _ = read(make_source(tmp_path, *words), 2)
    parts = [read(make_source(tmp_path, *words, rank=rank, ranks=2), 2)[0] for rank in range(2)]
    for step in range(2):
        assert whole[step][0].tolist() == [*parts[0][step][0].tolist(), *parts[1][step][0].tolist()]


def test_a_server_that_is_killed_loses_no_event_and_doubles_none(server, words, tmp_path):
    events = clicks(480)
    stop = threading.Event()

    def write():
        import redis

        for number, event in enumerate(events, 1):
            while not stop.is_set():
                try:
                    server.client.xadd("events", {"event": json.dumps(event)}, id=f"{number}-0")
                    break
                except redis.exceptions.ResponseError as error:
                    assert "equal or smaller" in str(error)  # it was written, the answer was lost
                    break
                except redis.exceptions.RedisError:
                    time.sleep(0.02)

    writer = threading.Thread(target=write)
    writer.start()
    source, batches = make_source(tmp_path, *words), []
    for batch in source.batches(0):
        batches.append(batch)
        if len(batches) in (4, 15):
            server.kill()
            server.start()
        if len(batches) == 30:
            break
    stop.set()
    writer.join()
    assert server.client.xlen("events") == 480
    assert same(batches, read(make_source(tmp_path / "again", *words), 30)[0])


def test_a_trimmed_stream_is_an_error_not_a_gap(server, words, tmp_path):
    add(server.client, clicks(100))
    _, states = read(make_source(tmp_path, *words), 2)
    server.client.xtrim("events", minid="32-0", approximate=False)  # everything that was read but the last
    assert len(read(make_source(tmp_path, *words), 1, 2, states[2])[0]) == 1
    server.client.xtrim("events", minid="40-0", approximate=False)
    with pytest.raises(UserError, match="trimmed.*never read"):
        read(make_source(tmp_path, *words), 1, 2, states[2])
    batches, _ = read(make_source(tmp_path, *words, "data.stream.gap=skip"), 3, 2, states[2])
    assert len(batches) == 3
    server.client.delete("events")
    with pytest.raises(UserError, match="ends at 0-0, before what was read"):
        read(make_source(tmp_path, *words), 1, 2, states[2])


def test_a_run_killed_before_its_first_checkpoint_notices_a_trim(server, words, tmp_path):
    add(server.client, clicks(100))
    read(make_source(tmp_path, *words), 1)
    server.client.xtrim("events", minid="5-0", approximate=False)
    with pytest.raises(UserError, match="never read"):
        read(make_source(tmp_path, *words), 1)


def test_several_streams_are_merged_by_event_time(server, words, tmp_path):
    events = clicks(96)
    add(server.client, events[::3], "a")
    add(server.client, [*events[1::3], *clicks(1, start=5000)], "b")
    add(server.client, [*events[2::3], *clicks(1, start=5000)], "c")
    add(server.client, clicks(1, start=5000), "a", 1000)
    add(server.client, events, "events")
    merged, states = read(make_source(tmp_path, *words, "data.stream.redis.keys=[a, b, c]"), 6)
    assert same(merged, read(make_source(tmp_path / "one", *words), 6)[0])
    rest, _ = read(make_source(tmp_path, *words, "data.stream.redis.keys=[a, b, c]"), 3, 3, states[3])
    assert same(rest, merged[3:])


def test_bad_events_are_one_line_or_skipped_and_counted(server, words, tmp_path):
    events = clicks(40)
    events[3]["click"], events[5]["item_id"], events[7]["user_id"] = 2, {"a": 1}, "x" * 10_000
    add(server.client, events)
    server.client.xadd("events", {"event": "not JSON"})
    server.client.xadd("events", {"user_id": "3", "item_id": "item 3", "tags": "t1 t2", "price": "0.4", "click": "1"})
    with pytest.raises(UserError, match="no text in column 'item_id'"):
        read(make_source(tmp_path, *words), 1)
    source = make_source(tmp_path, *words, "data.on_bad_row=skip", "train.global_batch_size=19")
    batches, _ = read(source, 2)
    assert len(batches) == 2 and source.finish(2)["events_skipped"] == 4  # also the id outside its table


def test_a_wait_ends_when_the_stream_is_idle(server, words, tmp_path):
    add(server.client, clicks(20))
    begun = time.monotonic()
    assert len(read(make_source(tmp_path, *words, "data.stream.end_after_idle_seconds=0.3"), 5)[0]) == 1
    assert time.monotonic() - begun < 10
    server_away = make_source(tmp_path, *words[:1], "data.stream.redis.url=redis://127.0.0.1:1/0",
                              "data.stream.patience_seconds=0.2")
    with pytest.raises(UserError, match="Redis is away"):
        read(server_away, 1)
