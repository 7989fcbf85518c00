"""`refresh` of a dynamic table is that of a vocabulary; and by the verb, from one log to the next."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from recsys.data.vocabulary import Vocabulary
from recsys.tables.dynamic import DynamicTable, Entries
from recsys.tables.refresh import refresh_table
from tests.recsys.tables.test_host import HOST, _dynamic, settings_of, train


@pytest.mark.parametrize("most", [0, 25])
def test_a_vocabulary_refreshes_alike(most):
    """Five rounds of new counts: the same values stay, leave and come; those that stay keep rows and values."""
    generator = np.random.default_rng(most)
    table, vocabulary = DynamicTable(2, most=most), Vocabulary({"f": []}, {"f": []})
    for now in range(1, 6):
        keys = np.unique(generator.integers(0, 60, 40))
        counts = generator.integers(1, 9, len(keys)).astype(np.float32)
        before = table.entries()
        refresh_table(table, keys, counts, decay=0.5, least=3.0, now=now)
        vocabulary.refresh("f", {f"{key:03d}": float(n) for key, n in zip(keys, counts, strict=True)}, most or 10**6,
                           decay=0.5, minimum_count=3.0)
        expected = {int(value): count for value, count in zip(vocabulary.values["f"], vocabulary.counts["f"],
                                                              strict=True) if not value.startswith("\x00")}
        found = table.entries()
        assert dict(zip(found.keys.tolist(), found.counts.tolist(), strict=True)) == pytest.approx(expected)
        both = np.intersect1d(before.keys, found.keys)
        for name in ("rows", "values"):
            old, new = (getattr(part, name)[np.argsort(part.keys)][np.isin(np.sort(part.keys), both)]
                        for part in (before, found))
            np.testing.assert_array_equal(old, new)
        assert len(found) == len(table) and set(Entries.NAMES) <= set(vars(found))


@pytest.mark.slow
def test_the_verb_moves_ids_and_training_goes_on(tmp_path, graph_mode):
    from recsys.refresh import run

    words = [*HOST, "train.keep_best=null", "train.validate_every=4", *_dynamic(settings_of())]
    first, settings = train(tmp_path / "run", *words, "train.steps=4")
    arguments = SimpleNamespace(run=str(tmp_path / "run"), output=str(tmp_path / "next"), decay=0.5, minimum_count=9.0)
    other = settings.model_copy(deep=True)
    other.data.synthetic.seed = 2
    figures = run(other, arguments)
    assert figures["evicted"]["user_id"] + figures["reset"]["user_id"] > 0
    resumed, _ = train(tmp_path / "after", *words, "train.steps=8", "data.synthetic.seed=2",
                       f"train.start_from={tmp_path / 'next'}")
    assert resumed["steps"] == 8 and np.isfinite(resumed["logloss"]) and json.dumps(figures)
