"""On the real corpus in ../shared, with planted duplicates: Spark = local row for row, and recall."""

from __future__ import annotations

import itertools
import json
import lzma
from pathlib import Path

import pytest

from tests.data_tools.planted import oracle_set, planted_corpus, write_jsonl
from tests.data_tools.test_dedup import MARGIN, THRESHOLD, dedup, rows

CORPUS = Path(__file__).resolve().parents[3] / "shared" / "data" / "corpus" / "classics_modern_zh.jsonl.xz"
pytestmark = [pytest.mark.shared_data,
              pytest.mark.skipif(not CORPUS.is_file(), reason="the corpus is not in ../shared beside the checkout")]
BASES = 150


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    with lzma.open(CORPUS, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in itertools.islice(file, 0, 6000, 6000 // BASES)]
    documents = planted_corpus(seed=11, bases=BASES, texts=[text[:1500] for text in texts])
    path = write_jsonl(tmp_path_factory.mktemp("shared") / "in.jsonl", documents)
    output = path.parent / "local"
    dedup([path], output)
    return documents, path, output


def test_recall_and_no_false_merge(corpus):
    documents, _, output = corpus
    sets = {d["id"]: oracle_set(d["text"]) for d in documents
            if not d["id"].endswith("twin") and d["source"] != "short"}
    kept, removed = rows(output)
    cluster = {id: id for id, *_ in kept} | {id: kept_id for id, kept_id, *_ in removed}
    by_base: dict[str, list[str]] = {}
    for id in sets:
        by_base.setdefault(id.split("-")[0], []).append(id)
    found = wanted = 0
    for family in by_base.values():
        for a, b in itertools.combinations(family, 2):
            both = len(sets[a] & sets[b])
            if both and both / (len(sets[a]) + len(sets[b]) - both) >= THRESHOLD + MARGIN:
                wanted += 1
                found += cluster[a] == cluster[b]
    assert wanted > 300 and found >= 0.99 * wanted
    for id, kept_id, *_ in removed:
        if id in sets:
            near = max((len(sets[id] & sets[other]) / max(1, len(sets[id] | sets[other])) for other in sets
                        if other != id and cluster[other] == kept_id), default=1.0)
            assert near >= THRESHOLD - MARGIN, (id, kept_id)


@pytest.mark.slow
def test_spark_equals_local(corpus, spark_engine, tmp_path):
    _, path, output = corpus
    dedup([path], tmp_path / "spark", spark_engine)
    assert rows(tmp_path / "spark") == rows(output)
