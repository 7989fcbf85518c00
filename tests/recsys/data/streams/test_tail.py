"""A growing folder: csv that grows, parquet that comes, files that come too late or go too soon."""

from __future__ import annotations

import threading
import time

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from parallel.common.errors import UserError
from tests.recsys.data.streams.events import clicks
from tests.recsys.data.streams.reading import make_source, read, same


def csv_lines(events: list[dict]) -> str:
    return "".join(",".join([str(e["user_id"]), e["item_id"], " ".join(e["tags"]), repr(e["price"]), str(e["time"]),
                             str(e["click"])]) + "\n" for e in events)


HEADER = "user_id,item_id,tags,price,time,click\n"


@pytest.fixture
def folder(tmp_path):
    found = tmp_path / "log"
    found.mkdir()
    return found


def words(folder, *more):
    return "data.reader=tail", f"data.path={folder}", "data.stream.end_after_idle_seconds=0.4", *more


def test_files_are_read_while_they_come_and_grow(folder, tmp_path):
    events = clicks(96)

    def write():
        with (folder / "day1.csv").open("w") as file:
            for part in (HEADER[:9], HEADER[9:], csv_lines(events[:20]), csv_lines(events[20:30])[:-4],
                         csv_lines(events[20:30])[-4:]):
                file.write(part)
                file.flush()
                time.sleep(0.05)
        table = pa.Table.from_pylist(events[30:80])
        parquet.write_table(table, folder / "_day2.parquet", row_group_size=7)
        (folder / "_day2.parquet").rename(folder / "day2.parquet")
        (folder / "day3.csv").write_text(HEADER + csv_lines(events[80:])[:-1])
        (folder / "day4.csv").write_text(HEADER)

    writer = threading.Thread(target=write)
    writer.start()
    batches, states = read(make_source(tmp_path / "run", *words(folder)), 6)
    writer.join()
    assert len(batches) == 6
    for step in (1, 2, 5):
        assert same(read(make_source(tmp_path / "run", *words(folder)), 6 - step, step, states[step])[0],
                    batches[step:])
    # Csv and parquet of the same events are the same rows.
    other = tmp_path / "whole"
    other.mkdir()
    parquet.write_table(pa.Table.from_pylist(events), other / "all.parquet")
    assert same(read(make_source(tmp_path / "other", *words(other)), 6)[0], batches)


def test_a_file_that_comes_too_late_or_goes_too_soon_is_an_error(folder, tmp_path):
    events = clicks(64)
    (folder / "b.csv").write_text(HEADER + csv_lines(events[:20]))
    source = make_source(tmp_path, *words(folder, "data.stream.end_after_idle_seconds=5"))
    stream = source.batches(0)
    next(stream)
    state = source.state(1)
    (folder / "a.csv").write_text(HEADER + csv_lines(events[20:40]))
    with pytest.raises(UserError, match="before one that was read already"):
        next(stream)
    (folder / "b.csv").unlink()
    (folder / "c.csv").write_text(HEADER + csv_lines(events[40:]))
    with pytest.raises(UserError, match="is gone"):
        read(make_source(tmp_path, *words(folder)), 1, 1, state)
    assert len(read(make_source(tmp_path, *words(folder, "data.stream.gap=skip")), 1, 1, state)[0]) == 1


def test_half_a_parquet_file_and_no_folder_are_one_line(folder, tmp_path):
    (folder / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="complete parquet"):
        read(make_source(tmp_path, *words(folder)), 1)
    with pytest.raises(UserError, match="needs a folder"):
        make_source(tmp_path, "data.reader=tail", "data.path=nowhere")


def rows_of(source, steps=1):
    """The rows that come out of a transport."""
    source.transport.open(source.transport.begin())
    found = []
    while events := source.transport.poll({"folder"}, 7, 0.0):
        found += [event.row for event in events]
    return found


def test_quoted_cells_are_read_as_the_reader_of_files_reads_them(folder, tmp_path):
    written = '1,"a, b\nc ""d""",x,0.5,1,0\r\n2,22" tv,,0.1,2,1\r\n\r\n3,c,,0.1,3,1'
    (folder / "a.csv").write_bytes(("\ufeff" + HEADER + written).encode())
    (folder / "b.csv").write_text(HEADER)
    rows = rows_of(make_source(tmp_path, *words(folder)))
    assert [(row["user_id"], row["item_id"]) for row in rows] == [("1", 'a, b\nc "d"'), ("2", '22" tv'), ("3", "c")]


@pytest.mark.parametrize("second", ['22" tv', '"22 tv', "x"])
def test_a_stray_quote_loses_no_rows_of_a_stream(folder, tmp_path, second):
    lines = csv_lines(clicks(60)).split("\n")
    lines[9], lines[29] = lines[9].replace("item", '"item', 1), lines[29].replace("item", second, 1)
    (folder / "a.csv").write_text(HEADER + "\n".join(lines))
    (folder / "b.csv").write_text(HEADER)
    with pytest.raises(UserError, match="quote"):
        rows_of(make_source(tmp_path, *words(folder)))
    assert len(rows_of(make_source(tmp_path, *words(folder, "data.quoted=false")))) == 60


def test_a_row_of_another_length_is_told(folder, tmp_path):
    (folder / "a.csv").write_text(HEADER + "1,a,x,0.5,1,0\n1,a,x,0.5,1\n")
    with pytest.raises(UserError, match=f"byte {len(HEADER) + 14}.*|5 cells"):
        rows_of(make_source(tmp_path, *words(folder)))


@pytest.mark.parametrize("form", ["%Y-%m-%d %H:%M:%S", "%Y/%m/%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S+00:00"])
def test_dates_of_events_are_times(folder, tmp_path, form):
    events = clicks(32)
    text = csv_lines(events)
    for event in events:
        text = text.replace(f",{event['time']},", f",{time.strftime(form, time.gmtime(event['time']))},")
    (folder / "a.csv").write_text(HEADER + text)
    source = make_source(tmp_path, *words(folder))
    read(source, 2)
    assert source.event_time(2) == events[-1]["time"]


@pytest.mark.parametrize("bad", ["soon", "", "2024-13-45 00:00"])
def test_a_time_that_cannot_be_read_is_a_bad_event(folder, tmp_path, bad):
    lines = csv_lines(clicks(33)).split("\n")
    lines[3] = ",".join([*lines[3].split(",")[:4], bad, "1"])
    (folder / "a.csv").write_text(HEADER + "\n".join(lines))
    with pytest.raises(UserError, match="column 'time'"):
        read(make_source(tmp_path, *words(folder)), 2)
    source = make_source(tmp_path / "skip", *words(folder, "data.on_bad_row=skip"))
    assert len(read(source, 2)[0]) == 2 and source.finish(2)["events_skipped"] == 1
