"""Features, vocabulary, readers, splits and batches; every kind of bad input."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from parallel.common.errors import UserError
from recsys.data.batches import Batches, gather, in_order
from recsys.data.encode import strings
from recsys.data.features import FIRST_KNOWN, Feature, assign_columns, expand
from recsys.data.log import prepare
from recsys.data.readers import known_readers, reader
from recsys.data.readers._history import Histories
from recsys.data.vocabulary import Vocabulary
from recsys.settings import DataSettings

LINES = """click,user,age,item,tags,seen,price
1,u1,20,i1,a b,i2 i1,1.5
0,u2,30,i2,,i1,2.5
0,u1,,i3,c,,x
1,u3,50,i1,a c b d,i1 i2 i3 i4,-4
"""

FEATURES = [
    {"name": "user", "side": "user", "minimum_count": 2},
    {"name": "age", "type": "numeric", "boundaries": [25, 40], "side": "user"},
    {"name": "item", "side": "item"},
    {"name": "tags", "type": "multi", "side": "item", "length": 3, "values": "hash", "rows": 50},
    {"name": "seen", "type": "sequence", "side": "cross", "target": "item", "pooling": "attention", "length": 3},
]


def data(tmp_path, text=LINES, name="log.csv", features=FEATURES, **more):
    path = tmp_path / name
    path.write_text(text)
    more = {"reader": "csv", "path": str(path), "labels": ["click"], "user": "user", "features": features,
            "split": {"by": "order", "fractions": [1.0, 0.0, 0.0]}, **more}
    return DataSettings(cache=str(tmp_path / "cache"), **more)


def local(log, name):
    """The feature's rows, counted from its own first row."""
    slot = log.spec.slots[name]
    ids = gather(log.parts["train"], slice(None))[0]
    return ids[:, slot.start:slot.start + slot.length] - slot.offset


def test_every_type_is_encoded_by_hand(tmp_path):
    log = prepare(data(tmp_path), 4)
    assert log.vocabulary.values["user"] == ["u1"]
    assert log.vocabulary.values["item"] == ["i1", "i2", "i3"]
    assert local(log, "user").ravel().tolist() == [2, 1, 2, 1]
    assert local(log, "age").ravel().tolist() == [2, 3, 0, 4]
    assert local(log, "item").ravel().tolist() == [2, 3, 4, 2]
    assert local(log, "seen").tolist() == [[0, 3, 2], [0, 0, 2], [0, 0, 0], [3, 4, 1]]
    tags = local(log, "tags")
    assert (tags[0, :2] > 1).all() and tags[0, 2] == 0
    assert (tags[1] == 0).all()
    assert tags[3, 0] == tags[0, 0] and len(set(tags[3])) == 3
    assert log.parts["train"].labels.ravel().tolist() == [1, 0, 0, 1]
    users = log.parts["train"].users
    assert users[0] == users[2] and len(set(users)) == 3
    assert log.report["missing"]["tags"] == 1 and log.report["unseen"]["user"] == 2


def test_tables_of_several_widths_and_shared_rows(tmp_path):
    wide = [dict(f, width=8) if f["name"] in ("item", "age") else f for f in FEATURES]
    log = prepare(data(tmp_path, features=wide), 4)
    narrow = prepare(data(tmp_path), 4)
    assert set(log.spec.tables) == {4, 8} and log.spec.slots["seen"].width == 8
    for name in log.spec.slots:
        assert np.array_equal(local(log, name), local(narrow, name))
        slot = log.spec.slots[name]
        assert slot.offset + slot.rows <= log.spec.tables[slot.width]


def test_numbers_are_standardised_or_divided_at_quantiles(tmp_path):
    generator = np.random.default_rng(0)
    price = generator.normal(3.0, 2.0, 1000)
    rows = "\n".join(f"{i % 2},{value},{value}" for i, value in enumerate(price))
    features = [{"name": "p", "type": "numeric", "transform": "log", "side": "item"},
                {"name": "q", "type": "numeric", "buckets": 4, "side": "item"}]
    log = prepare(data(tmp_path, f"click,p,q\n{rows}\n", features=features, user=None), 4)
    numbers = gather(log.parts["train"], slice(None))[1][:, 0]
    wanted = np.sign(price) * np.log1p(np.abs(price))
    assert np.allclose(numbers, (wanted - wanted.mean()) / wanted.std(), atol=1e-5)
    assert np.bincount(local(log, "q").ravel())[2:].tolist() == [250] * 4


@pytest.mark.parametrize(("change", "message"), [
    (("click,user", "klick,user"), "column 'click' is missing; did you mean 'klick'"),
    (("\n1,u1", "\n2,u1"), "row 1: label that is not 0 or 1 in column 'click'"),
    (("\n1,u1", "\nNaN,u1"), "label that is not 0 or 1"),
    (("\n1,u1", "\nyes,u1"), "text that is not a number in column 'click'"),
    (("u1,20", "u1,twenty"), "row 1: text that is not a number in column 'age' (got 'twenty')"),
    (("0,u2,30,i2,,i1,2.5", "0,u2,30"), "not a well-formed table"),
])
def test_bad_input_is_one_clear_line(tmp_path, change, message):
    with pytest.raises(UserError, match="csv") as caught:
        prepare(data(tmp_path, LINES.replace(*change)), 4)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*"))


def test_bad_rows_are_skipped_and_counted_where_configured(tmp_path, capsys):
    text = LINES.replace("\n1,u1", "\n3,u1").replace("u2,30", "u2,old")
    made = data(tmp_path, text, on_bad_row="skip")
    for _ in range(2):  # encoded, then mapped
        log = prepare(made, 4)
        assert "rows skipped: 1 (click: label that is not 0 or 1), 1 (age" in capsys.readouterr().err
    assert len(log.parts["train"]) == 2
    assert log.report["skipped"] == {"click: label that is not 0 or 1": 1, "age: text that is not a number": 1}
    (log.directory / "train.users").unlink()
    with pytest.raises(UserError, match="encoded log is damaged"):
        prepare(made, 4)


def test_columns_of_a_wrong_type_are_one_clear_line(tmp_path):
    def refused(**columns):
        base = {"click": [0, 1, 1], "user": ["a", "b", "a"], "age": [1.0, 2.0, 3.0], "item": ["i", "j", "i"],
                "tags": [["x"]] * 3, "seen": [["i"]] * 3}
        parquet.write_table(pa.table({**base, **columns}), tmp_path / "log.parquet")
        with pytest.raises(UserError) as caught:
            prepare(data(tmp_path).model_copy(update={"reader": "parquet", "path": str(tmp_path / "log.parquet")}), 4)
        assert "\n" not in str(caught.value) and "log.parquet" in str(caught.value)
        return str(caught.value)

    assert "column 'user' holds no single values" in refused(user=[["a"], ["b"], ["a"]])
    assert "column 'item' holds no single values" in refused(item=[b"\xff", b"\xfe", b"\xff"])
    assert "column 'age' is not numeric" in refused(age=[{"years": 1}] * 3)
    assert "column 'tags' holds no lists" in refused(tags=[1, 2, 3])
    assert "label that is not 0 or 1 in column 'click'" in refused(click=[0, None, 1])
    text = LINES.replace("click,user,age", "click,user,user")
    with pytest.raises(UserError, match="several columns 'user'"):
        prepare(data(tmp_path, text), 4)


def test_ids_that_come_as_floats_are_the_same_values_in_every_chunk():
    full = strings(pa.array([3.0, 1e20, 4.5, None, float("nan"), float("inf"), -0.0]), "id", "here").to_pylist()
    assert full[0] == "3" and full[2] == "4.5" and full[3] is full[4] is None and full[5] == "inf"
    assert float(full[1]) == 1e20 and full[6] == "0"
    assert strings(pa.array([3, None]), "id", "here").to_pylist() == ["3", None]


def test_readers_say_what_is_wrong_with_their_files(tmp_path):
    def refused(name, message, **more):
        with pytest.raises(UserError, match=message) as caught:
            prepare(DataSettings(reader=name, cache=str(tmp_path / "c"), **more), 4)
        assert "\n" not in str(caught.value)

    for name in ("criteo", "avazu", "kuairand", "movielens", "frappe", "taac"):
        refused(name, "needs a path")
        with pytest.raises(UserError, match="data.path"):
            prepare(DataSettings(reader=name, path=str(tmp_path / "nowhere"), cache=str(tmp_path / "c")), 4)
    for name, file in (("criteo", "a.csv"), ("avazu", "a.csv"), ("frappe", "a.libfm"), ("taac", "a.parquet")):
        path = tmp_path / file
        path.write_bytes(b"\xfe\xfd rubbish\x00,1\n2,3\n")
        refused(name, "well-formed|UTF-8|parquet", path=str(path))
        path.write_bytes(b"")
        refused(name, "no row is left|empty", path=str(path))
    for suffix in ("inter", "user", "item"):
        (tmp_path / f"x.{suffix}").write_text("")
    refused("movielens", "the file is empty", path=str(tmp_path))
    refused("csv", "reader csv makes no histories", path=str(tmp_path), history=3,
            features=[{"name": "user", "side": "user"}])


def test_a_changed_file_behind_a_pattern_is_read_anew(tmp_path):
    made = data(tmp_path).model_copy(update={"path": str(tmp_path / "*.csv")})
    assert len(prepare(made, 4).parts["train"]) == 4
    (tmp_path / "more.csv").write_text(LINES)
    assert len(prepare(made, 4).parts["train"]) == 8


def test_an_id_over_the_table(tmp_path):
    features = [{"name": "user", "values": "integer", "rows": 3, "side": "user"}]
    text = "click,user\n1,2\n0,3\n1,\n"
    with pytest.raises(UserError, match=r"row 2: id outside the table \(0 to 2\) in column 'user' \(got '3'\)"):
        prepare(data(tmp_path, text, features=features), 4)
    log = prepare(data(tmp_path, text, features=features, on_bad_row="skip"), 4)
    assert local(log, "user").ravel().tolist() == [4, 0]


def test_empty_shards_and_empty_logs(tmp_path, capsys):
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "a.csv").write_text(LINES)
    (folder / "b.csv").write_text("")
    (folder / "c.csv").write_text(LINES.splitlines()[0] + "\n")
    with gzip.open(folder / "d.csv.gz", "wt") as file:
        file.write(LINES)
    log = prepare(data(tmp_path).model_copy(update={"path": str(folder)}), 4)
    assert len(log.parts["train"]) == 8
    assert "b.csv: empty" in capsys.readouterr().err
    with pytest.raises(UserError, match="no row is left"):
        prepare(data(tmp_path, LINES.splitlines()[0] + "\n", name="head.csv"), 4)
    with pytest.raises(UserError, match="no .csv or"):
        prepare(data(tmp_path).model_copy(update={"path": str(tmp_path / "nowhere")}), 4)


def test_a_damaged_archive(tmp_path):
    path = tmp_path / "x.csv.gz"
    path.write_bytes(gzip.compress(LINES.encode() * 50)[:-20])
    with pytest.raises(UserError, match="cannot be read to its end"):
        prepare(data(tmp_path).model_copy(update={"path": str(path)}), 4)


def test_parquet_with_native_lists_equals_csv(tmp_path):
    table = pa.table({
        "click": [1, 0, 0, 1], "user": ["u1", "u2", "u1", "u3"], "age": [20.0, 30.0, None, 50.0],
        "item": ["i1", "i2", "i3", "i1"], "tags": [["a", "b"], [], ["c"], ["a", "c", "b", "d"]],
        "seen": [["i2", "i1"], ["i1"], None, ["i1", "i2", "i3", "i4"]]})
    parquet.write_table(table, tmp_path / "log.parquet")
    one = prepare(data(tmp_path), 4)
    other = prepare(data(tmp_path).model_copy(update={"reader": "parquet", "path": str(tmp_path / "log.parquet")}), 4)
    assert np.array_equal(one.parts["train"].ids, other.parts["train"].ids)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="not a complete parquet file"):
        prepare(data(tmp_path).model_copy(update={"reader": "parquet", "path": str(tmp_path / "bad.parquet")}), 4)


@pytest.mark.parametrize("by", ["order", "random", "time"])
def test_splits_cover_every_row_once(tmp_path, by):
    generator = np.random.default_rng(1)
    when = generator.permutation(500)
    text = "click,item,t\n" + "\n".join(f"{i % 2},{i},{t}" for i, t in enumerate(when)) + "\n"
    features = [{"name": "item", "values": "integer", "rows": 500, "side": "item"}]
    log = prepare(data(tmp_path, text, features=features, user=None, time="t",
                       split={"by": by, "fractions": [0.6, 0.2, 0.2]}), 4)
    items = {name: (part.ids.ravel() - FIRST_KNOWN) for name, part in log.parts.items()}
    assert sorted(np.concatenate(list(items.values()))) == list(range(500))
    assert abs(len(items["train"]) - 300) <= (40 if by == "random" else 0)
    if by == "order":
        assert items["train"].max() < items["validation"].min() < items["test"].min()
    if by == "time":
        assert when[items["train"]].max() < when[items["validation"]].min()
        assert when[items["validation"]].max() < when[items["test"]].min()


def test_the_vocabulary_knows_training_rows_only(tmp_path):
    text = LINES + "0,u9,20,i9,a,i1,1\n"
    log = prepare(data(tmp_path, text, split={"by": "order", "fractions": [0.8, 0.0, 0.2]}), 4)
    assert "i9" not in log.vocabulary.values["item"]
    slot = log.spec.slots["item"]
    assert log.parts["test"].ids[0, slot.start] - slot.offset == 1


def test_a_new_log_is_read_with_a_given_vocabulary(tmp_path):
    first = prepare(data(tmp_path), 4)
    later = prepare(data(tmp_path, LINES.replace("i1,", "i3,"), name="later.csv"), 4,
                    first.directory / "vocabulary.json")
    assert later.vocabulary.values == first.vocabulary.values
    assert local(later, "item").ravel().tolist() == [4, 3, 4, 4]


def test_batches_depend_on_seed_and_number_alone(tmp_path):
    log = prepare(DataSettings(cache=str(tmp_path), synthetic={"samples": 1000, "users": 50, "items": 30}), 4)
    rows = log.parts["train"]
    source = Batches(rows, 64, 7)
    uninterrupted = [batch for batch, _ in zip(source.batches(0), range(30), strict=False)]
    for start in (1, 11, 12, 29):
        again = next(Batches(rows, 64, 7).batches(start))
        assert all(np.array_equal(a, b) for a, b in zip(again, uninterrupted[start], strict=True))
    other = next(Batches(rows, 64, 8).batches(0))
    assert not np.array_equal(other[0], uninterrupted[0][0])
    halves = [next(Batches(rows, 64, 7, rank, 2).batches(3)) for rank in range(2)]
    assert np.array_equal(np.concatenate([half[0] for half in halves]), uninterrupted[3][0])
    with pytest.raises(UserError, match="only 800 rows"):
        Batches(rows, 1000, 1)


def test_a_rank_reads_its_shards_alone_and_batches_are_the_same_for_any_ranks(tmp_path):
    log = prepare(DataSettings(cache=str(tmp_path), synthetic={"samples": 1000, "users": 50, "items": 30}), 4)
    rows = log.parts["train"]

    def batches(rank: int, ranks: int, start: int = 0, together: int = 1) -> list:
        source = Batches(rows, 80, 7, rank, ranks, log.spec, together=together, shards=4)
        return [batch for batch, _ in zip(source.batches(start), range(30 - start), strict=False)]

    for together in (1, 4):
        whole = batches(0, 1, together=together)
        assert all(np.array_equal(a, b) for a, b in zip(batches(0, 1, 13, together)[0], whole[13], strict=True))
        for ranks in (2, 4):
            parts = [batches(rank, ranks, together=together) for rank in range(ranks)]
            for step, batch in enumerate(whole):
                for column, values in enumerate(batch):
                    assert np.array_equal(np.concatenate([part[step][column] for part in parts]), values)
    read = [np.concatenate([*Batches(rows, 80, 7, rank, 2, shards=4)._orders(3, 0)]) for rank in range(2)]
    assert read[0].max() < 400 <= read[1].min() and sorted(np.concatenate(read)) == list(range(800))
    for shards, ranks in ((3, 1), (4, 8), (5, 2)):
        with pytest.raises(UserError, match="divide"):
            Batches(rows, 80, 7, 0, ranks, shards=shards)


def test_some_values_are_shown_as_unseen_alike_on_every_rank(tmp_path):
    features = [{"name": "item", "values": "integer", "rows": 500, "side": "item", "unseen_rate": 0.4}]
    text = "click,item\n" + "\n".join(f"{i % 2},{i if i % 5 else ''}" for i in range(500)) + "\n"
    log = prepare(data(tmp_path, text, features=features, user=None), 4)
    rows = log.parts["train"]
    plain = next(Batches(rows, 250, 7).batches(1))[0]
    hidden = next(Batches(rows, 250, 7, spec=log.spec).batches(1))[0]
    changed = plain != hidden
    assert (hidden[changed] == 1).all() and (plain[changed] > 1).all()
    assert 0.3 < changed.sum() / (plain > 1).sum() < 0.5
    uninterrupted = Batches(rows, 250, 7, spec=log.spec).batches(0)
    assert next(uninterrupted) is not None and np.array_equal(next(uninterrupted)[0], hidden)
    halves = [next(Batches(rows, 250, 7, rank, 2, log.spec).batches(1))[0] for rank in range(2)]
    assert np.array_equal(np.concatenate(halves), hidden)


def test_one_epoch_sees_each_row_once_and_in_order_fills_the_last_batch(tmp_path):
    log = prepare(DataSettings(cache=str(tmp_path), synthetic={"samples": 1000, "users": 50, "items": 30}), 4)
    rows = log.parts["train"]
    index = np.concatenate(list(Batches(rows, 80, 3)._orders(0, 0)))
    assert sorted(index) == list(range(800))
    parts = list(in_order(rows, 96))
    assert [real for _, _, real in parts] == [96] * 8 + [32]
    assert all(arrays[0].shape[0] == 96 for arrays, _, _ in parts)
    assert np.array_equal(np.concatenate([arrays[0][:real] for arrays, _, real in parts]), rows.ids)


def test_an_open_vocabulary_admits_and_evicts(tmp_path):
    vocabulary = Vocabulary({"item": ["a", "b", "c"]}, {"item": [10.0, 4.0, 1.0]})
    reset = vocabulary.refresh("item", {"d": 6.0, "a": 1.0, "e": 1.0}, rows=3, decay=0.5, minimum_count=2.0)
    assert vocabulary.values["item"] == ["a", "b", "d"] and reset == [4]
    assert vocabulary.counts["item"] == [6.0, 2.0, 6.0]
    feature = Feature(name="item", side="item", rows=3)
    assert vocabulary.rows_of(feature, pa.array(["a", "c", "d", None])).tolist() == [2, 1, 4, 0]
    reset = vocabulary.refresh("item", {}, rows=3, decay=0.5, minimum_count=2.0)
    assert reset == [] and vocabulary.rows_of(feature, pa.array(["b", "d"])).tolist() == [1, 4]
    vocabulary.save(tmp_path / "v.json")
    assert Vocabulary.load(tmp_path / "v.json") == vocabulary
    (tmp_path / "bad.json").write_text(json.dumps({"values": {}}))
    with pytest.raises(UserError, match="not a vocabulary"):
        Vocabulary.load(tmp_path / "bad.json")


def test_feature_lists_are_checked():
    item = Feature(name="item", side="item", values="hash", rows=10)
    with pytest.raises(UserError, match="two features"):
        expand([item, item])
    with pytest.raises(UserError, match="did you mean 'item'"):
        expand([item, Feature(name="s", type="sequence", side="cross", target="itme")])
    with pytest.raises(UserError, match="needs rows"):
        Feature(name="x", side="item", values="hash")
    with pytest.raises(UserError, match="not a user feature"):
        Feature(name="x", type="sequence", side="user", target="item", pooling="attention")
    many = expand([Feature(name="f", side="user", values="hash", rows=5, repeat=3), item])
    spec = assign_columns(many, 8)
    assert [f.name for f in spec.ordered] == ["f_0", "f_1", "f_2", "item"]
    assert spec.tables == {8: 64} and spec.id_columns == 4
    with pytest.raises(UserError, match="share one width"):
        assign_columns([Feature(name=name, type="numeric", transform="value", side="item", width=width)
                        for name, width in (("a", 4), ("b", 8))], 8)
    with pytest.raises(UserError, match="there is no feature"):
        prepare(DataSettings(reader="synthetic", features=[]), 8)
    with pytest.raises(UserError, match="not known yet"):
        assign_columns([Feature(name="open", side="item")], 8)


def test_readers_of_published_layouts(tmp_path):
    assert {"criteo", "avazu", "kuairand", "movielens", "frappe", "taac", "csv", "parquet"} <= set(known_readers())
    with pytest.raises(UserError, match="did you mean 'movielens'"):
        reader("movielans")
    criteo = tmp_path / "train.txt"
    criteo.write_text("".join("\t".join([str(i % 2), *(str(i * j) for j in range(13)), *(f"c{i % 3}{j}" for j in
                                                                                         range(26))]) + "\n"
                              for i in range(20)))
    frappe = tmp_path / "train.libfm"
    frappe.write_text("".join(f"{1 if i % 2 else -1} " + " ".join(f"{i % 4 + 10 * j}:1" for j in range(10)) + "\n"
                              for i in range(20)))
    avazu = tmp_path / "avazu.csv"
    names = ["id", "click", "hour", "C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id",
             "app_domain", "app_category", "device_id", "device_ip", "device_model", "device_type",
             "device_conn_type", *(f"C{i}" for i in range(14, 22))]
    avazu.write_text(",".join(names) + "\n" + "".join(
        ",".join([str(i), str(i % 2), "14102100", *(f"v{i % 3}" for _ in names[3:])]) + "\n" for i in range(20)))
    kuairand = tmp_path / "kuairand"
    kuairand.mkdir()
    (kuairand / "log_standard_1.csv").write_text("user_id,video_id,hourmin,time_ms,is_click,tab\n" + "".join(
        f"{i % 3},{i % 5},{930 + i},{1000 + i},{i % 2},1\n" for i in range(20)))
    profile = ["user_active_degree", "follow_user_num_range", "fans_user_num_range", "friend_user_num_range",
               "register_days_range", *(f"onehot_feat{i}" for i in range(18))]
    (kuairand / "user_features_1.csv").write_text("user_id," + ",".join(profile) + "\n" + "".join(
        f"{i}," + ",".join("x" for _ in profile) + "\n" for i in range(3)))
    (kuairand / "video_features_basic_1.csv").write_text(
        "video_id,author_id,video_type,upload_type,music_id,visible_status,video_duration,tag\n"
        + "".join(f"{i},a,n,u,m,1,{i}.5,\"1,2\"\n" for i in range(5)))
    taac = tmp_path / "taac.parquet"
    parquet.write_table(pa.table({"user_id": [1, 2] * 10, "item_id": list(range(20)), "context_x": [0.5] * 20,
                                  "seq_click": [[1, 2, 3]] * 20, "label": [0, 1] * 10,
                                  "timestamp": list(range(20)), "odd": [1] * 20}), taac)
    for name, path in {"criteo": criteo, "frappe": frappe, "avazu": avazu, "kuairand": kuairand, "taac": taac}.items():
        log = prepare(DataSettings(reader=name, path=str(path), cache=str(tmp_path / "c")), 4)
        rows = log.parts
        assert sum(len(part) for part in rows.values()) == 20, name
        assert 0 < sum(part.labels.sum() for part in rows.values()) < 20, name
        tag = log.spec.slots.get("tag")
        assert tag is None or (rows["train"].ids[:, tag.start:tag.start + 2] > tag.offset).all()


def test_movielens_is_chronological_and_joined(tmp_path):
    (tmp_path / "x.inter").write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
                                      "1\t10\t4\t300\n2\t11\t3\t100\n1\t11\t5\t200\n")
    (tmp_path / "x.user").write_text("user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
                                     "1\t20\tM\ta\t111\n2\t40\tF\tb\t222\n")
    (tmp_path / "x.item").write_text("item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
                                     "10\tT\t1990\tDrama Comedy\n11\tU\t1991\tAction\n")
    made = DataSettings(reader="movielens", path=str(tmp_path), cache=str(tmp_path / "c"))
    tables = list(reader("movielens").read(made, tmp_path))
    assert tables[0][0].column("label").to_pylist() == [0, 1, 1]
    assert tables[0][0].column("class").to_pylist() == ["Action", "Action", "Drama Comedy"]
    with pytest.raises(UserError, match="no \\*.inter file"):
        list(reader("movielens").read(made, tmp_path / "c"))


def test_histories_hold_what_was_liked_strictly_before(tmp_path):
    (tmp_path / "x.inter").write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
                                      "1\t10\t4\t100\n1\t11\t5\t100\n1\t12\t1\t200\n2\t10\t5\t250\n"
                                      "1\t13\t5\t300\n1\t10\t5\t400\n")
    (tmp_path / "x.user").write_text("user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
                                     "1\t20\tM\ta\t111\n2\t40\tF\tb\t222\n")
    (tmp_path / "x.item").write_text("item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
                                     + "".join(f"{i}\tT\t1990\tDrama\n" for i in range(10, 14)))
    made = DataSettings(reader="movielens", path=str(tmp_path), cache=str(tmp_path / "c"), history=2,
                        split={"by": "order", "fractions": [0.8, 0.1, 0.1]})
    table, _ = next(iter(reader("movielens").read(made, tmp_path)))
    rows = dict(zip(zip(table.column("user_id").to_pylist(), table.column("item_id").to_pylist(), strict=True),
                    table.column("history").to_pylist(), strict=True))
    assert rows["1", "11"] == [] and rows["1", "12"] == ["10", "11"] and rows["2", "10"] == []
    assert table.column("history").to_pylist()[-1] == ["11", "13"]
    slot = prepare(made, 4).spec.slots["history"]
    assert slot.length == 2 and slot.feature.target == "item_id" and slot.feature.pooling == "attention"
    both = made.model_copy(update={"passed": 3, "like_rate": True})
    table, _ = next(iter(reader("movielens").read(both, tmp_path)))
    assert table.column("history").to_pylist()[-1] == ["11", "13"]
    assert table.column("passed").to_pylist()[-1] == ["12"] and not any(table.column("passed").to_pylist()[:4])
    assert table.column("like_rate").to_pylist() == [None, None, 3 / 4, None, 3 / 5, 4 / 6]
    assert prepare(both, 4).spec.slots["passed"].length == 3


def test_histories_of_a_log_out_of_order_are_refused():
    histories = Histories(DataSettings(history=3))
    columns = pa.array(["u", "u"]), pa.array(["1", "2"]), np.array([5, 4]), np.array([1, 1])
    with pytest.raises(UserError, match="order of time"):
        histories.add(pa.table({"x": [1, 2]}), *columns, "log.csv")


def test_frappe_as_published(tmp_path):
    """The three libfm files by their published names, in the published form: label 1 or -1, ten one-hot fields in the
    order of the converter, indices running on over the fields; nothing is renamed or rewritten."""
    generator, sizes = np.random.default_rng(1), [30, 60, 7, 7, 2, 3, 2, 9, 8, 20]
    starts = np.cumsum([0, *sizes[:-1]])
    for part, count in (("train", 60), ("validation", 20), ("test", 20)):
        lines = []
        for _ in range(count):
            fields = [start + generator.integers(size) for start, size in zip(starts, sizes, strict=True)]
            lines.append(f"{generator.choice(['1', '-1'])} " + " ".join(f"{field}:1" for field in fields))
        (tmp_path / f"frappe.{part}.libfm").write_text("\n".join(lines) + ("\n" if part != "test" else ""))
    split = {"by": "files", "validation_path": str(tmp_path / "frappe.validation.libfm"),
             "test_path": str(tmp_path / "frappe.test.libfm")}
    log = prepare(DataSettings(reader="frappe", path=str(tmp_path / "frappe.train.libfm"), split=split,
                               cache=str(tmp_path / "cache")), 4)
    assert {name: len(part) for name, part in log.parts.items()} == {"train": 60, "validation": 20, "test": 20}
    assert set(np.unique(log.parts["train"].labels)) == {0.0, 1.0} and len(log.spec.slots) == 10
    for name, start, size in zip(("user", "item", "daytime"), starts, sizes, strict=False):
        assert {int(value) for value in log.vocabulary.values[name]} <= set(range(start, start + size))
    assert len(np.unique(log.parts["train"].users)) > 10
