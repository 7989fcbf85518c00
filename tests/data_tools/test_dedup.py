"""Deduplication: recall, no false merges, Spark = local, independence of parts and order, skew, odd texts."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from data_tools.dedup.plan import DedupSettings
from data_tools.dedup.step import run_dedup
from data_tools.documents import plan_splits
from data_tools.engines.local import LocalEngine
from data_tools.parts import OutputLayout
from data_tools.records import ReadSettings
from tests.data_tools.planted import (
    edit,
    make_text,
    oracle_jaccard,
    oracle_set,
    planted_corpus,
    read_jsonl,
    write_jsonl,
)

THRESHOLD, MARGIN = 0.8, 0.05


def dedup(inputs: list[Path], output: Path, engine=None, read: ReadSettings | None = None, **settings):
    read = read or ReadSettings()
    splits = plan_splits([str(path) for path in inputs], read)
    return run_dedup(DedupSettings(**settings), read, splits, OutputLayout.under(output, "dedup"), output / ".work",
                     engine or LocalEngine(1), "jsonl")


def rows(folder: Path) -> tuple[list, list]:
    """(kept, removed) as sorted tuples of everything that must be equal."""
    kept = sorted((d["id"], d["text"], d["source"]) for d in read_jsonl(folder))
    gone = read_jsonl(folder / "removed")
    removed = sorted((d["id"], d["kept_id"], d["similarity"], d["rule"], d["text"]) for d in gone)
    return kept, removed


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    documents = planted_corpus(seed=3, bases=60)
    path = write_jsonl(folder / "in.jsonl", documents)
    figures, clusters = dedup([path], folder / "out")
    return documents, path, folder / "out", figures, clusters


def test_recall_above_and_no_merge_below_the_threshold(planted):
    documents, _, output, figures, clusters = planted
    text = {d["id"]: d["text"] for d in documents}
    kept, removed = {d["id"] for d in read_jsonl(output)}, read_jsonl(output / "removed")
    cluster = {id: id for id in kept} | {d["id"]: d["kept_id"] for d in removed}
    assert set(cluster) == set(text) and set(cluster.values()) <= kept
    found = wanted = 0
    for base in range(60):
        family = [id for id in text if id.startswith(f"{base}-") and not id.endswith("twin")]
        for a, b in itertools.combinations(family, 2):
            if oracle_jaccard(text[a], text[b]) >= THRESHOLD + MARGIN:
                wanted += 1
                found += cluster[a] == cluster[b]
    assert wanted > 150 and found >= 0.99 * wanted
    for document in removed:
        if document["id"].endswith("twin"):
            continue
        family = [id for id in cluster if cluster[id] == document["kept_id"] and "twin" not in id]
        family.remove(document["id"])
        nearest = max(oracle_jaccard(text[document["id"]], text[id]) for id in family)
        assert nearest >= THRESHOLD - MARGIN, document["id"]
    assert clusters["clusters"] == len({d["kept_id"] for d in removed})
    assert figures.documents_in == len(documents) == figures.documents_out + len(removed)


def test_similarity_is_the_real_jaccard(planted):
    documents, _, output, *_ = planted
    text = {d["id"]: d["text"] for d in documents}
    checked = 0
    for document in read_jsonl(output / "removed"):
        if not {"twin"} & {document["id"].split("-")[-1], document["kept_id"].split("-")[-1]}:
            real = oracle_jaccard(text[document["id"]], text[document["kept_id"]])
            assert document["similarity"] == pytest.approx(real, abs=1e-12)
            checked += 1
    assert checked > 50


def test_copies_moved_paragraphs_and_traditional_twins_are_found(planted):
    documents, _, output, *_ = planted
    text = {d["id"]: d["text"] for d in documents}
    removed = {d["id"]: d for d in read_jsonl(output / "removed")}
    kept = {d["id"] for d in read_jsonl(output)}
    for base in range(0, 60, 5):
        group = {f"{base}-{kind}" for kind in ("base", "copy", "twin")}
        assert len(group & kept) <= 1, group
        moved = oracle_jaccard(text[f"{base}-base"], text[f"{base}-moved"])
        assert moved < THRESHOLD + MARGIN or f"{base}-moved" in removed or not group & kept
    assert any(d["rule"] == "exact_duplicate" and d["similarity"] == 1.0 for d in removed.values())


def test_short_documents_are_kept_and_only_their_copies_go(planted):
    _, _, output, *_ = planted
    kept = [d["text"] for d in read_jsonl(output) if d["source"] == "short"]
    assert sorted(kept) == sorted(["好", "是", "中国", "人们", "", "。"])


def test_spark_equals_local_row_for_row(planted, spark_engine, tmp_path):
    _, path, output, figures, clusters = planted
    spark_figures, spark_clusters = dedup([path], tmp_path / "spark", spark_engine)
    assert rows(tmp_path / "spark") == rows(output)
    assert spark_clusters == clusters
    assert spark_figures.by_rule == figures.by_rule


def test_spark_splits_skewed_buckets_as_local_does(spark_engine, tmp_path):
    """Many texts that share a long boilerplate fall into the same buckets, far above the limits."""
    rng = random.Random(5)
    boilerplate = make_text(rng, 500)
    documents = [{"id": f"d{n}", "text": boilerplate + edit(rng, boilerplate[:120], n % 7 / 6), "source": "s"}
                 for n in range(230)]
    path = write_jsonl(tmp_path / "in.jsonl", documents)
    local, clusters = dedup([path], tmp_path / "local", bucket_limit=70)
    assert clusters["split_buckets"] > 0
    spark, spark_clusters = dedup([path], tmp_path / "spark", spark_engine, bucket_limit=70)
    assert rows(tmp_path / "local") == rows(tmp_path / "spark") and spark_clusters == clusters
    whole, _ = dedup([path], tmp_path / "whole")
    assert whole.documents_out < 100
    assert local.by_rule["near_duplicate"] >= 0.97 * whole.by_rule["near_duplicate"]


@pytest.mark.slow
def test_spark_with_nothing_to_find(spark_engine, tmp_path):
    for name, texts in (("none", []), ("few", ["好", "好", "是", make_text(random.Random(1), 50)])):
        documents = [{"id": str(number), "text": text, "source": "s"} for number, text in enumerate(texts)]
        path = write_jsonl(tmp_path / f"{name}.jsonl", documents)
        _, clusters = dedup([path], tmp_path / name / "local")
        _, spark_clusters = dedup([path], tmp_path / name / "spark", spark_engine)
        assert rows(tmp_path / name / "spark") == rows(tmp_path / name / "local")
        assert spark_clusters == clusters and clusters["clusters"] == len(texts) // 4


def test_star_components_equal_those_of_the_driver(spark_engine):
    from data_tools.dedup.components import connected_components
    from data_tools.dedup.spark import star_components

    rng = np.random.default_rng(2)
    chain = np.stack([np.arange(0, 12), np.arange(1, 13)], axis=1)
    edges = np.concatenate([chain, rng.integers(20, 60, (25, 2))])
    edges = edges[edges[:, 0] != edges[:, 1]]
    rows = [(bytes([int(u)]), bytes([int(v)])) for u, v in edges]
    frame = spark_engine.session.createDataFrame(rows, "u binary, v binary")
    found = {row["node"][0]: row["label"][0] for row in star_components(frame).collect()}
    labels = connected_components(60, edges)
    assert found == {node: labels[node] for node in np.unique(edges)}
    assert len(set(found.values())) > 3


def test_independent_of_parts_order_and_workers(planted, two_workers, tmp_path):
    documents, _, output, *_ = planted
    shuffled = list(documents)
    random.Random(9).shuffle(shuffled)
    for number in range(3):
        write_jsonl(tmp_path / "in" / f"{number}.jsonl", shuffled[number::3])
    figures, clusters = dedup([tmp_path / "in"], tmp_path / "out", two_workers, ReadSettings(split_bytes=40_000))
    assert len(list((tmp_path / "out").glob("part-*.jsonl"))) > 5
    assert rows(tmp_path / "out") == rows(output)
    assert clusters == planted[4]


def test_the_preferred_source_is_kept_then_the_longest(tmp_path):
    text = make_text(random.Random(1), 500)
    documents = [{"id": "a", "text": text, "source": "web"}, {"id": "b", "text": text + "完", "source": "web"},
                 {"id": "c", "text": text, "source": "books"}]
    path = write_jsonl(tmp_path / "in.jsonl", documents)
    dedup([path], tmp_path / "longest")
    assert [d["id"] for d in read_jsonl(tmp_path / "longest")] == ["b"]
    dedup([path], tmp_path / "books", sources=["books"])
    assert [d["id"] for d in read_jsonl(tmp_path / "books")] == ["c"]
    assert {d["kept_id"] for d in read_jsonl(tmp_path / "books" / "removed")} == {"c"}


def test_documents_of_one_id_are_kept_apart(tmp_path):
    rng = random.Random(4)
    first, second = make_text(rng, 300), make_text(rng, 300)
    documents = [{"id": "x", "text": first, "source": "s"}, {"id": "x", "text": second, "source": "s"},
                 {"id": "x", "text": first, "source": "s"}]
    figures, _ = dedup([write_jsonl(tmp_path / "in.jsonl", documents)], tmp_path / "out")
    assert figures.documents_out == 2
    assert {d["text"] for d in read_jsonl(tmp_path / "out")} == {first, second}


def test_many_identical_and_one_giant_document(tmp_path):
    rng = random.Random(6)
    same, giant = make_text(rng, 200), make_text(rng, 400_000)
    documents = [{"id": f"{n:05d}", "text": same, "source": "s"} for n in range(5000)]
    documents += [{"id": "giant", "text": giant, "source": "s"}, {"id": "giant2", "text": giant[:-500], "source": "s"}]
    figures, clusters = dedup([write_jsonl(tmp_path / "in.jsonl", documents)], tmp_path / "out")
    assert {d["id"] for d in read_jsonl(tmp_path / "out")} == {"00000", "giant"}
    assert clusters["clusters"] == 2 and clusters["largest_cluster"] == 5000 and clusters["candidate_pairs"] == 1


def test_a_rerun_does_nothing_and_new_settings_do_all(planted, tmp_path):
    _, path, *_ = planted
    first, _ = dedup([path], tmp_path / "out")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.jsonl")}
    again, _ = dedup([path], tmp_path / "out")
    assert again.parts_reused == 1 and again.documents_out == first.documents_out
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.jsonl")} == before
    stricter, _ = dedup([path], tmp_path / "out", threshold=0.95)
    assert stricter.parts_reused == 0 and stricter.documents_out > first.documents_out


def test_command_line(planted, tmp_path, capsys):
    from data_tools.__main__ import VERBS
    from parallel.common.command import main

    documents, path, *_ = planted
    words = ["dedup", "--input", str(path), "--output"]
    assert main("data_tools", VERBS, [*words, str(tmp_path / "out"), "--threshold", "0.9", "--workers", "1"]) == 0
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert {"documents_in", "documents_out", "clusters", "seconds", "mb_per_second"} <= set(line)
    assert line["documents_in"] == len(documents)
    assert main("data_tools", VERBS, [*words, str(tmp_path / "o"), "--threshold", "2"]) == 2
    assert not (tmp_path / "o").exists()


def test_oracle_knows_its_own_normal_form():
    assert oracle_set("ＡＢ　cd…", 5) == {"abcd.", "bcd..", "cd..."}
