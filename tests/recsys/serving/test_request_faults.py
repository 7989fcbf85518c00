"""Requests with numbers and values as clients send them: equal to training, or 422; never a server's error."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from parallel.common.errors import UserError
from parallel.common.structured import parse_json
from recsys.data.columns import columns_of, features_of
from recsys.data.log import prepare
from recsys.data.readers import reader
from recsys.serving.requests import read_request
from recsys.settings import DataSettings

LARGE = 2**63 + 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    (folder / "log.csv").write_text("uid,vid,price,tags,click\n" + "".join(
        f"{LARGE if i % 3 else i},{i % 7},{i / 3:.2f},a|b{i % 3},{i % 2}\n" for i in range(60)))
    data = DataSettings.model_validate({
        "reader": "csv", "path": str(folder / "log.csv"), "labels": ["click"], "cache": str(folder / "cache"),
        "features": [{"name": "uid", "side": "user"}, {"name": "vid", "side": "item", "values": "integer", "rows": 100},
                     {"name": "price", "side": "item", "type": "numeric", "transform": "value"},
                     {"name": "tags", "side": "item", "type": "multi", "length": 4, "separator": "|"}]})
    log = prepare(data, 4)
    return SimpleNamespace(features=features_of(data), spec=log.spec, vocabulary=log.vocabulary,
                           columns=columns_of(data, reader("csv")))


def ask(trained, user="1", price="1", tags="[]"):
    body = f'{{"user": {{"uid": {user}}}, "candidates": [{{"vid": 3, "price": {price}, "tags": {tags}}}]}}'
    return read_request(parse_json(body), trained, 10)


def test_ids_of_64_bits_without_sign_are_those_of_the_log(trained):
    number, text, other = (ask(trained, user=user).ids for user in (str(LARGE), f'"{LARGE}"', str(LARGE + 1)))
    assert (number == text).all() and (number != other).any()


@pytest.mark.parametrize("price", ["1e39", "-1e300", "1" + "0" * 300, "1" + "0" * 390])
def test_a_number_that_float32_does_not_hold_is_refused(trained, price):
    with pytest.raises(UserError, match="float32"):
        ask(trained, price=price)
    assert np.isfinite(ask(trained, price="3e38").numbers).all()


def test_a_refusal_names_the_candidate_and_its_feature(trained):
    good, bad = '{"vid": 3, "price": 1, "tags": []}', '{"vid": 3, "price": %s, "tags": %s}'
    for price, tags, feature in (("1e39", "[]", "price"), ('"much"', "[]", "price"), ("1", "[[1]]", "tags")):
        body = f'{{"user": {{"uid": 1}}, "candidates": [{good}, {good}, {bad % (price, tags)}]}}'
        with pytest.raises(UserError) as caught:
            read_request(parse_json(body), trained, 10)
        assert "candidates[2]" in str(caught.value) and feature in str(caught.value), str(caught.value)


@pytest.mark.parametrize("tags", ["[[1]]", '[{"a": 1}]', '["a", ["b"]]', "3", '{"a": 1}'])
def test_a_list_holds_single_values(trained, tags):
    with pytest.raises(UserError, match="list"):
        ask(trained, tags=tags)


HOSTILE = [-1, -(2**63) - 1, 2**63, 2**64 + 5, -(10**40), "x" * 10_000, "x" * 10_001, "007", " 7", "名", "\x00", "1e3"]


@pytest.mark.parametrize("kind", [{}, {"values": "hash", "rows": 1000}, {"values": "dynamic"},
                                  {"values": "integer", "rows": 100}])
@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: str(value)[:12].encode().hex())
def test_a_hostile_id_lands_where_the_log_puts_it(trained, kind, value):
    """In a row that depends on its text, in both alike; an id outside a table of numbers is refused by both."""
    import pyarrow as pa

    from recsys.data.encode import Columns, Encoder
    from recsys.data.features import Feature, assign_columns
    from recsys.data.vocabulary import Vocabulary

    features = [Feature(name="uid", side="user", **kind), Feature(name="vid", side="item", values="integer", rows=9)]
    vocabulary = Vocabulary({"uid": ["1", "x" * 10_000, "007"]}, {}, {}, {})
    made = SimpleNamespace(features=features, spec=assign_columns(features, 4, vocabulary.sizes()), columns=Columns([]),
                           vocabulary=vocabulary)
    log = pa.table({"uid": pa.array([str(value)]), "vid": pa.array(["3"])})

    def read(way) -> list | None:
        try:
            return way()
        except UserError:
            return None

    trains = read(lambda: Encoder(features, Columns([]), "error").encode(log, made.spec, vocabulary, "log", 0)[0]
                  .ids.tolist())
    serves = read(lambda: read_request({"user": {"uid": value}, "candidates": [{"vid": 3}]}, made, 10).ids.tolist())
    assert trains == serves and (trains is None) == (kind.get("values") == "integer" and value != "007")
