"""Requests read quickly are read as the log is."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa

from parallel.common.errors import UserError
from recsys.data.encode import Columns
from recsys.data.features import Feature, assign_columns, expand
from recsys.data.vocabulary import Vocabulary
from recsys.saved_model import Trained
from recsys.serving import requests

READ = [Feature(name="i", values="integer", rows=9, side="user"), Feature(name="v", side="user"),
        Feature(name="h", values="hash", rows=50, side="user"),
        Feature(name="item", side="item"), Feature(name="b", type="numeric", boundaries=[-1.0, 0.5, 3.0], side="item"),
        Feature(name="n", type="numeric", transform="value", side="item"),
        Feature(name="l", type="numeric", transform="log", side="item"),
        Feature(name="m", type="multi", values="integer", rows=9, length=3, side="item"),
        Feature(name="w", type="multi", values="hash", rows=9, length=2, side="user"),
        Feature(name="s", type="sequence", target="item", length=4, side="cross"),
        Feature(name="again", column="i", values="integer", rows=20, side="user")]


def made_up() -> Trained:
    """A model's features without a model."""
    features = expand(READ)
    vocabulary = Vocabulary({"v": ["a", "7", "é"], "item": ["3", "x", "1", "2"]}, {}, {}, {"n": (0.5, 2.0),
                                                                                          "l": (0.1, 0.7)})
    spec = assign_columns(features, 4, vocabulary.sizes())
    return Trained(Path("x"), None, features, Columns([]), vocabulary, spec)


def test_quick_columns_are_those_of_the_log(monkeypatch):
    """Values of all types: what is read quickly is what the log's encoder reads, and what it refuses is refused."""
    trained = made_up()
    features = trained.features
    odd = [None, True, 2.0, "2", "", -1, 10**30, 2**60, "\ud800", [1], {}, 1e400, "no", 9]
    usual = {"i": (0, 8), "v": ("a", "7", 7, "new", "é"), "h": ("a", "b", ""), "item": (1, 3, 99, "x"),
             "b": (0, 0.5, -3.0, 10), "n": (1, -2.5, 1e400), "l": (0, -7, 3.5), "m": ([], [1, 8, 3, 4], [9]),
             "w": (["a"], ["b", "c", "d"]), "s": ([1, 2, 3, "x", 2], [], ["x"], [77, 1])}
    generator, agreed, refused, quick = random.Random(0), 0, 0, 0

    def read(body):
        try:
            made = requests._encode(trained, features, body, "candidates")
        except UserError as error:
            return str(error)
        return [array.tolist() for array in made]

    for trial in range(600):
        rows = [{name: generator.choice(values) for name, values in usual.items()} for _ in range(1 + trial % 3)]
        if trial % 2:
            name = generator.choice(list(usual))
            value = generator.choice([generator.choice(odd), [generator.choice(odd)]])
            rows[0] = {**rows[0], name: value}
        got = read(rows)
        with monkeypatch.context() as patch:
            patch.setattr(requests, "quick_column", lambda *_: None)
            wanted = read(rows)
        if isinstance(wanted, str):
            assert isinstance(got, str), (wanted, rows)
            refused += 1
        else:
            assert got == wanted
            agreed += 1
        quick += sum(requests.quick_column(f, [row[f.source] for row in rows], trained) is not None for f in features)
    assert agreed > 300 and refused > 30 and quick > 3000


def random_array(generator: random.Random, rows: int) -> pa.Array:
    """A column of any of the types that clients have, sometimes a slice of a longer one."""
    before, after = generator.choice((0, 2)), generator.choice((0, 1))
    whole = generator.choice((pa.int8(), pa.uint8(), pa.int32(), pa.int64(), pa.uint64()))
    kind = generator.choice((whole, pa.float32(), pa.float64(), pa.string(), pa.bool_(), pa.list_(whole),
                             pa.large_list(whole), pa.list_(pa.string()), pa.dictionary(pa.int8(), pa.string())))

    def value(kind: pa.DataType):
        if generator.random() < 0.1:
            return None
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return [value(kind.value_type) for _ in range(generator.randrange(6))]
        if pa.types.is_floating(kind):
            return generator.choice((0.0, -7.0, 3.5, 1e30, float("inf"), float("nan")))
        if pa.types.is_boolean(kind):
            return generator.random() < 0.5
        if pa.types.is_integer(kind):
            return generator.choice((0, 1, 3, 8, 9, 77) if kind.bit_width == 8 or "uint" in str(kind) else
                                    (0, 1, 3, 8, -1, 77))
        return generator.choice(("a", "7", "x", "é", ""))

    values = [value(kind) for _ in range(before + rows + after)]
    if generator.random() < 0.5:  # without what is missing
        values = [generator.choice([v for v in values if v is not None] or [None]) if v is None else v for v in values]
    return pa.array(values, kind)[before:before + rows]


def test_quick_arrays_are_those_of_the_log(monkeypatch):
    """Columns of all types: as the log's encoder reads them, and refused where it refuses."""
    trained, generator, agreed, refused, quick = made_up(), random.Random(1), 0, 0, 0

    def read(feature, column):
        try:
            return [array.tolist() for array in requests._encode(trained, [feature], {feature.source: column}, "user")]
        except UserError as error:
            return str(error)

    for _ in range(1200):
        feature, column = generator.choice(trained.features), random_array(generator, generator.randrange(1, 4))
        got = read(feature, column)
        quick += requests.quick_array(feature, column, trained) is not None
        with monkeypatch.context() as patch:
            patch.setattr(requests, "quick_array", lambda *_: None)
            wanted = read(feature, column)
        assert got == wanted, (feature.name, column)
        agreed, refused = agreed + isinstance(got, list), refused + isinstance(got, str)
    assert agreed > 200 and refused > 200 and quick > 100
