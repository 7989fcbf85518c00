"""Logs counted and encoded on Spark, or by several processes, are byte for byte those of this process."""

from __future__ import annotations

import random

import pytest

from parallel.common.errors import UserError
from parallel.common.settings import validate
from recsys.data import spark_passes
from recsys.data.log import prepare
from recsys.settings import DataSettings

FEATURES = [
    {"name": "user", "side": "user", "minimum_count": 2},
    {"name": "age", "type": "numeric", "side": "user", "buckets": 7},
    {"name": "price", "type": "numeric", "side": "item", "transform": "log"},
    {"name": "item", "side": "item", "values": "hash", "rows": 50},
    {"name": "tags", "type": "multi", "side": "item", "length": 3},
]


class Here:
    """Stands for a session: tasks run one after the other, the last unit first."""

    @property
    def sparkContext(self):  # noqa: N802 - Spark's name
        return self

    def parallelize(self, units, parts):
        self.units = units
        return self

    def map(self, task):
        self.task = task
        return self

    def collect(self):
        return [self.task(unit) for unit in reversed(self.units)][::-1]


@pytest.fixture
def log(tmp_path):
    generator = random.Random(0)
    folder = tmp_path / "log"
    folder.mkdir()
    for shard in range(4):
        rows = ["user,age,price,item,tags,click,time"]
        for number in range(300 if shard != 2 else 0):
            age = "" if number % 11 == 0 else generator.randrange(90)
            label = generator.choice("0011") if number % 37 else "x"
            rows.append(f"u{generator.randrange(60)},{age},{generator.random() * 1e3:.9f},i{generator.randrange(99)},"
                        f"t{generator.randrange(9)} t{generator.randrange(9)},{label},{generator.randrange(10**6)}")
        (folder / f"part_{shard}.csv").write_text("\n".join(rows) + "\n")
    return folder


def encoded(log, cache, **more) -> dict:
    """Bytes of every file of the encoded log."""
    data = validate(DataSettings, {"reader": "csv", "path": str(log), "labels": ["click"], "user": "user",
                                   "time": "time", "features": FEATURES, "cache": str(cache), "on_bad_row": "skip",
                                   **more})
    directory = prepare(data, 8).directory
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("split", ["order", "time", "random"])
def test_units_in_any_order_give_the_same_log(log, tmp_path, monkeypatch, split):
    monkeypatch.setattr(spark_passes, "_session", lambda data: Here())
    local = encoded(log, tmp_path / "local", split={"by": split})
    assert encoded(log, tmp_path / "spark", split={"by": split}, engine="spark") == local
    assert len(local["train.labels"]) > 1000 and len(local["test.labels"]) > 100


def test_a_split_by_files_and_one_file(log, tmp_path, monkeypatch):
    monkeypatch.setattr(spark_passes, "_session", lambda data: Here())
    split = {"by": "files", "validation_path": str(log / "part_0.csv"), "test_path": str(log / "part_1.csv")}
    assert encoded(log, tmp_path / "a", split=split) == encoded(log, tmp_path / "b", split=split, engine="spark")


def test_two_processes_that_read_a_file_each_make_the_same_log(log, tmp_path):
    local = encoded(log, tmp_path / "one", split={"by": "time"})
    assert encoded(log, tmp_path / "two", split={"by": "time"}, workers=2) == local
    with pytest.raises(UserError, match=r"part_\d.csv, row \d+: label that is not 0 or 1|text that is not a number"):
        encoded(log, tmp_path / "error", split={"by": "time"}, workers=2, on_bad_row="error")


def test_times_of_two_forms_in_two_files_are_refused(log, tmp_path, monkeypatch):
    monkeypatch.setattr(spark_passes, "_session", lambda data: Here())
    first = log / "part_0.csv"
    head, *rows = first.read_text().splitlines()
    first.write_text("\n".join([head, *(row.rpartition(",")[0] + ",2024-01-02 03:04:05" for row in rows)]) + "\n")
    # Files do not know of each other, so that no rows are left out as one process would.
    with pytest.raises(UserError, match="mixes numbers and dates"):
        encoded(log, tmp_path / "spark", split={"by": "time"}, engine="spark")


@pytest.mark.slow
def test_on_a_real_spark(log, tmp_path):
    pytest.importorskip("pyspark")
    spark = {"master": "local[2]", "driver_memory": "700m"}
    local = encoded(log, tmp_path / "local", split={"by": "time"})
    assert encoded(log, tmp_path / "spark", split={"by": "time"}, engine="spark", spark=spark) == local
    with pytest.raises(UserError, match="label that is not 0 or 1|text that is not a number"):
        encoded(log, tmp_path / "error", split={"by": "random"}, engine="spark", spark=spark, on_bad_row="error")
    from pyspark.sql import SparkSession

    SparkSession.getActiveSession().stop()
