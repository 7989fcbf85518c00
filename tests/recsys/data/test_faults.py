"""Logs as people have them: quotes, times, names of files, large numbers; each kind with the right value."""

from __future__ import annotations

import bz2
import datetime

import numpy as np
import pytest

from parallel.common.errors import UserError
from parallel.common.files import write_json
from recsys.data.log import prepare
from recsys.data.readers._files import csv_tables, shards
from recsys.data.vocabulary import Vocabulary
from recsys.settings import DataSettings

FEATURES = [{"name": "user", "side": "user"}, {"name": "item", "side": "item"}]
HEAD = "user,item,price,click"


def rows_of(file, **options):
    return [row for table, _ in csv_tables(file, **options) for row in table.to_pylist()]


def log(tmp_path, path, **more):
    return prepare(DataSettings(reader="csv", path=str(path), features=FEATURES, labels=["click"],
                                cache=str(tmp_path / "cache"), **more), 4)


def test_quoted_line_ends_across_blocks(tmp_path):
    cell = '"' + "描述" * 60 + '\n3"'
    file = tmp_path / "b.csv"
    file.write_text(f"{HEAD}\n" + "".join(
        f"u{i % 9},{cell if i % 2 else f'i{i % 7}'},0.5,{i % 2}\n" for i in range(30_000)))
    rows = rows_of(file)
    assert len(rows) == 30_000 and rows[1]["item"] == "描述" * 60 + "\n3" and rows[29_998]["item"] == "i3"


@pytest.mark.parametrize(("first", "second", "at"), [('"15 inch', '22" tv', 250), ('"15 inch', '22" tv', 110),
                                                     ('"15 inch', '"22 tv', 250), ('"15 inch', "x", 250)])
def test_a_stray_quote_loses_no_rows(tmp_path, first, second, at):
    cells = {100: first, at: second}
    file = tmp_path / "t.tsv"
    file.write_text("\t".join(HEAD.split(",")) + "\n" + "".join(
        f"u{i}\t{cells.get(i, f'i{i}')}\t0.5\t{i % 2}\n" for i in range(1, 401)))
    with pytest.raises(UserError, match="row 100.*quoted: false"):
        rows_of(file, delimiter="\t")
    rows = rows_of(file, delimiter="\t", quoted=False)
    assert len(rows) == 400 and rows[99]["item"] == first
    assert sum(map(len, log(tmp_path, file, delimiter="\t", quoted=False).parts.values())) == 400


@pytest.mark.parametrize("delimiter", ["\t", ","])
@pytest.mark.parametrize("column", [0, 1, 3])
@pytest.mark.parametrize("apart", [1, 2, 5])
def test_two_stray_quotes_that_fit_swallow_no_rows(tmp_path, delimiter, column, apart):
    rows = [["u7", f"i{i}", "", f"{i % 2}"] for i in range(40)]
    rows[20][column] = '"' + rows[20][column]
    rows[20 + apart][column] += '"'
    file = tmp_path / "t.tsv"
    file.write_text("\n".join(delimiter.join(row) for row in [HEAD.split(","), *rows]))
    with pytest.raises(UserError, match=f"row 21.*over {apart + 1} lines"):
        rows_of(file, delimiter=delimiter)


@pytest.mark.parametrize("cell", ["a, b\nc, d, e", "a\nb, c, d, e\nf", "a\nb, c\nd, e\nf, g\nh, i\nj",
                                  "1,2\n3,4", "one, two, three\nfour"])
def test_lines_of_prose_are_one_cell(tmp_path, cell):
    file = tmp_path / "p.csv"
    file.write_text(f"{HEAD}\n" + f'u1,"{cell}",0.5,1\n' * 20)
    assert [row["item"] for row in rows_of(file)] == [cell] * 20


@pytest.mark.parametrize("charset", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_charset(tmp_path, charset):
    file = tmp_path / "B.CSV.bz2"
    file.write_bytes(bz2.compress(f"{HEAD}\n用户,i,0.5,1\n".encode(charset)))
    assert rows_of(shards(tmp_path, (".csv",))[0]) == [{"user": "用户", "item": "i", "price": "0.5", "click": "1"}]
    file.write_bytes(bz2.compress(f"{HEAD}\n用户,i,0.5,1\n".encode("utf-16") + b"\x00\xd8"))
    with pytest.raises(UserError, match="UTF-16 that its byte order mark says"):
        rows_of(file)


@pytest.mark.parametrize("delimiter", ["，", "||", "", '"', "\n"])
def test_cells_are_parted_by_one_ascii_character(delimiter):
    with pytest.raises(UserError, match="one ASCII character"):
        DataSettings(delimiter=delimiter)


def test_quotes_inside_plain_cells_are_text_and_doubled_ones_are_one(tmp_path):
    file = tmp_path / "q.csv"
    file.write_bytes(('\ufeffuser,item,price,click\r\nu1,22" tv,0.5,0\r\n\r\nu2,"a ""b"", c",0.5,1\r\n'
                      '"u3","",1,"0"\r\n').encode())
    rows = rows_of(file)
    assert [(row["user"], row["item"]) for row in rows] == [("u1", '22" tv'), ("u2", 'a "b", c'), ("u3", None)]


@pytest.mark.parametrize(("line", "message"), [
    ("u9,i9,0.5", "row 3.*3 cells where the table has 4"), ("u9,i9,0.5,1,2", "row 3.*5 cells"),
    ('u9,"i9,0.5,1', "row 3.*no end"), ('u9,"i"9,0.5,1', "row 3.*behind the end")])
def test_the_row_is_named_as_in_the_file(tmp_path, line, message):
    file = tmp_path / "w.csv"
    file.write_text(f'{HEAD}\nu1,"a\nb",0.5,0\nu2,i2,0.5,1\n{line}\n')
    with pytest.raises(UserError, match=message):
        rows_of(file)


def test_the_row_is_named_whatever_the_split(tmp_path):
    file = tmp_path / "n.csv"
    file.write_text(f"{HEAD}\n" + "".join(f"u,i,{'wrong' if i == 70 else i},{i % 2}\n" for i in range(1, 101)))
    features = [*FEATURES, {"name": "price", "side": "item", "type": "numeric", "transform": "value"}]
    for by in ("random", "order"):
        with pytest.raises(UserError, match="row 70"):
            prepare(DataSettings(reader="csv", path=str(file), features=features, labels=["click"],
                                 cache=str(tmp_path / by), split={"by": by}), 4)


@pytest.mark.parametrize("name", ["train[1].csv", "日志 [2024]/a.csv", "日志 [2024]/*.csv", "日志 [2024]", "t*[1].csv",
                                  "a?b.csv"])
def test_a_path_is_a_path_before_it_is_a_pattern(tmp_path, name):
    for made in ("train[1].csv", "日志 [2024]/a.csv", "a?b.csv", "t*[1].csv"):
        (tmp_path / made).parent.mkdir(exist_ok=True)
        (tmp_path / made).write_text(HEAD)
    assert len(shards(tmp_path / name, (".csv",))) == 1
    assert len(shards(tmp_path / "t*.csv", (".csv",))) == 2


@pytest.mark.parametrize("form", ["%Y-%m-%d %H:%M:%S", "%Y/%m/%d %H:%M", "%Y-%m-%dT%H:%M:%S+08:00",
                                  "%Y年%m月%d日 %H:%M", "epoch", "parquet"])
def test_a_split_by_time_knows_every_usual_time(tmp_path, form):
    order = np.random.default_rng(0).permutation(100)
    begin = datetime.datetime(2024, 1, 1)
    times = [begin + datetime.timedelta(hours=int(hour)) for hour in order]
    if form == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        path, reader = tmp_path / "t.parquet", "parquet"
        parquet.write_table(pa.table({"user": ["u"] * 100, "item": [str(i) for i in order], "at": times,
                                      "click": [0, 1] * 50}), path)
    else:
        path, reader = tmp_path / "t.csv", "csv"
        written = [int((at - begin).total_seconds()) if form == "epoch" else at.strftime(form) for at in times]
        path.write_text("user,item,click,at\n" + "".join(
            f"u,{i},{n % 2},{at}\n" for n, (i, at) in enumerate(zip(order, written, strict=True))))
    made = prepare(DataSettings(
        reader=reader, path=str(path), labels=["click"], time="at", split={"by": "time"}, cache=str(tmp_path / "c"),
        features=[{"name": "user", "side": "user"},
                  {"name": "item", "side": "item", "values": "integer", "rows": 100}]), 4)
    hours = {part: np.asarray(rows.ids[:])[:, made.spec.slots["item"].start] - made.spec.slots["item"].offset - 2
             for part, rows in made.parts.items()}
    assert sorted(hours["train"]) == list(range(80))
    assert sorted(hours["validation"]) == list(range(80, 90)) and sorted(hours["test"]) == list(range(90, 100))


@pytest.mark.parametrize(("bad", "message"), [("soon", "row 3.*neither"), ("", "row 3.*no time"),
                                              ("2024-13-45", "row 3"), ("17", "row 3")])
def test_a_time_that_cannot_be_read_is_a_bad_row(tmp_path, bad, message):
    path = tmp_path / "t.csv"
    path.write_text("user,item,click,at\n" + "".join(
        f"u,i,{n % 2},{bad if n == 2 else f'2024-01-01 {n % 24:02}:00'}\n" for n in range(40)))
    options = {"time": "at", "split": {"by": "time"}}
    with pytest.raises(UserError, match=message):
        log(tmp_path, path, **options)
    made = log(tmp_path, path, on_bad_row="skip", **options)
    assert sum(map(len, made.parts.values())) == 39 and sum(made.report["skipped"].values()) == 1


def test_a_number_that_float32_does_not_hold_names_its_row(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text(f"{HEAD}\n" + "".join(f"u,i,{'1e200' if n == 95 else n},{n % 2}\n" for n in range(1, 101)))
    features = [*FEATURES, {"name": "price", "side": "item", "type": "numeric", "transform": "value"}]
    with pytest.raises(UserError, match=r"float32.*'price'.*1e\+200") as caught:
        prepare(DataSettings(reader="csv", path=str(path), features=features, labels=["click"],
                             cache=str(tmp_path / "c")), 4)
    assert "row 95" in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [
    ("moments", 1e308), ("moments", {"price": [1.0]}), ("values", {"user": ["a", -1]}), ("values", {"user": [["a"]]}),
    ("values", None), ("counts", {"user": [1.0]}), ("counts", {"user": "ab"}), ("boundaries", {"price": ["x"]})])
def test_a_vocabulary_of_another_shape_is_one_line(tmp_path, key, value):
    whole = {"values": {"user": ["a", "b"]}, "counts": {"user": [2, 1.0]}, "boundaries": {}, "moments": {}}
    write_json(tmp_path / "v.json", whole, sealed=False)
    assert Vocabulary.load(tmp_path / "v.json").counts == {"user": [2.0, 1.0]}
    write_json(tmp_path / "v.json", {**whole, key: value})
    with pytest.raises(UserError, match="v.json"):
        Vocabulary.load(tmp_path / "v.json")


def test_ids_of_64_bits_without_sign(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    ids = [2**63 + 3, 2**64 - 1] * 20
    parquet.write_table(pa.table({"user": pa.array(ids, pa.uint64()), "item": ["i"] * 40, "click": [0, 1] * 20}),
                        tmp_path / "u.parquet")
    made = prepare(DataSettings(reader="parquet", path=str(tmp_path / "u.parquet"), features=FEATURES,
                                labels=["click"], cache=str(tmp_path / "c")), 4)
    assert set(made.vocabulary.values["user"]) == {str(2**63 + 3), str(2**64 - 1)}
