"""Requests read quickly are read as the log is."""

from __future__ import annotations

import random
from pathlib import Path

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


def test_quick_columns_are_those_of_the_log(monkeypatch):
    """Values of all types: what is read quickly is what the log's encoder reads, and what it refuses is refused."""
    features = expand(READ)
    vocabulary = Vocabulary({"v": ["a", "7", "é"], "item": ["3", "x", "1", "2"]}, {}, {}, {"n": (0.5, 2.0),
                                                                                           "l": (0.1, 0.7)})
    spec = assign_columns(features, 4, vocabulary.sizes())
    trained = Trained(Path("x"), None, features, Columns([]), vocabulary, spec)
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
