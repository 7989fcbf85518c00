"""Mixture, decontamination and paragraphs across documents."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from data_tools.documents import plan_splits
from data_tools.engines.local import LocalEngine
from data_tools.parts import OutputLayout, run_step
from data_tools.records import ReadSettings
from data_tools.steps.decontaminate import DecontaminateSettings, DecontaminateStep, build_index, evaluation_texts
from data_tools.steps.mix import PRESETS, MixSettings, plan_epochs, run_mix
from data_tools.steps.paragraphs import ParagraphSettings, run_paragraphs
from parallel.common.errors import UserError
from tests.data_tools.planted import make_text, read_jsonl, write_jsonl


def mix(folder, output, read=None, engine=None, **settings):
    read = read or ReadSettings()
    return run_mix(MixSettings(**settings), read, plan_splits([str(folder)], read), OutputLayout.under(output, "mix"),
                   output / ".work", engine or LocalEngine(1), "jsonl")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    rng = random.Random(2)
    for source, count in (("news", 200), ("novel-a", 100), ("novel-b", 100)):
        write_jsonl(folder / f"{source}.jsonl", [
            {"id": f"{source}{n}", "text": make_text(rng, rng.randint(50, 150), 1), "source": source}
            for n in range(count)])
    return folder


def test_presets_are_table_4():
    assert sum(PRESETS["pangu_alpha_200b"].values()) == pytest.approx(100.0)
    assert sum(PRESETS["pangu_alpha_2.6b_13b"].values()) == pytest.approx(100.99)


def test_shares_follow_the_weights_and_epochs_repeat_documents(sources, tmp_path):
    settings = {"weights": {"news": 3, "ebooks": 1}, "categories": {"ebooks": ["novel*"]}, "maximum_epochs": 2.5}
    figures, categories = mix(sources, tmp_path, **settings)
    assert categories["news"]["epochs"] == pytest.approx(2.5)
    assert categories["news"]["share"] == pytest.approx(0.75, abs=0.01)
    copies = Counter(d["id"].split("#")[0] for d in read_jsonl(tmp_path) if d["category"] == "news")
    assert set(copies.values()) == {2, 3} and len(copies) == 200
    ids = [d["id"] for d in read_jsonl(tmp_path)]
    assert len(ids) == len(set(ids)) == figures.documents_out
    categories_in_order = [d["category"] for d in read_jsonl(tmp_path)]
    changes = sum(a != b for a, b in zip(categories_in_order, categories_in_order[1:], strict=False))
    assert changes > 30


def test_the_same_for_a_seed_whatever_the_parts(sources, tmp_path, two_workers):
    settings = {"weights": {"news": 1, "novel-a": 1, "novel-b": 1}, "shard_characters": 5000, "maximum_epochs": 1.0}
    mix(sources, tmp_path / "a", **settings)
    mix(sources, tmp_path / "b", ReadSettings(split_bytes=3000), two_workers, **settings)
    mix(sources, tmp_path / "c", seed=2, **settings)
    assert read_jsonl(tmp_path / "a") == read_jsonl(tmp_path / "b") != read_jsonl(tmp_path / "c")
    assert len(list((tmp_path / "a").glob("part-*"))) > 2


def test_an_output_that_was_changed_is_made_again(sources, tmp_path):
    settings = {"weights": {"news": 1, "novel-a": 1, "novel-b": 1}, "maximum_epochs": 1.0}
    mix(sources, tmp_path, **settings)
    changed, *_ = sorted(path for path in tmp_path.rglob("*.jsonl") if ".work" not in path.parts)
    whole = changed.read_bytes()
    for damaged in (whole[:-1] + b" ", whole[:len(whole) // 2], None):
        changed.unlink() if damaged is None else changed.write_bytes(damaged)
        mix(sources, tmp_path, **settings)
        assert changed.read_bytes() == whole
    before = changed.stat().st_mtime_ns
    mix(sources, tmp_path, **settings)
    assert changed.stat().st_mtime_ns == before  # a whole output is left alone


def test_mistakes_in_the_mixture_are_reported(sources, tmp_path):
    with pytest.raises(UserError, match="novel-a"):
        mix(sources, tmp_path / "a", weights={"news": 1})
    with pytest.raises(UserError, match="no documents in the categories books"):
        plan_epochs(MixSettings(weights={"news": 1, "books": 1}), {"news": 10})
    without_books = MixSettings(weights={"news": 1, "books": 1}, allow_missing=True, maximum_epochs=2)
    assert plan_epochs(without_books, {"news": 10}) == {"news": 2.0}
    with pytest.raises(UserError, match="repeated 8.00 times"):
        plan_epochs(MixSettings(weights={"news": 1}, characters=80), {"news": 10})
    with pytest.raises(UserError, match="no weights"):
        mix(sources, tmp_path / "b")


def decontaminate(folder, evaluation, output, **settings):
    settings = DecontaminateSettings(evaluation=[str(evaluation)], **settings)
    index = output / ".work" / "index.npy"
    build_index(settings, index)
    return run_step(DecontaminateStep(settings, index), plan_splits([str(folder)], ReadSettings()),
                    OutputLayout.under(output, "decontaminate"), LocalEngine(1), "jsonl", ReadSettings())


def test_documents_with_evaluation_texts_go(tmp_path):
    rng = random.Random(3)
    question, clean = make_text(rng, 60, 1), make_text(rng, 200, 1)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "task.json").write_text(json.dumps([{"q": {"text": [question]}, "n": 1}], ensure_ascii=False))
    documents = {"leak": clean[:80] + question[10:34] + clean[80:], "near": clean[:80] + question[10:33] + clean[80:],
                 "clean": clean, "short": "好", "empty": ""}
    path = write_jsonl(tmp_path / "in.jsonl", [{"id": id, "text": text} for id, text in documents.items()])
    figures = decontaminate(path, tmp_path / "eval", tmp_path / "out")
    assert {d["id"] for d in read_jsonl(tmp_path / "out")} == {"near", "clean", "short", "empty"}
    removed = read_jsonl(tmp_path / "out" / "removed")
    assert [d["id"] for d in removed] == ["leak"] and removed[0]["evidence"].startswith("1 n-grams")
    assert figures.by_rule == {"evaluation_overlap": 1}


def test_evaluation_texts_of_every_format(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ["一", {"b": "二"}], "c": 3}\n{"a": "三"}\n', "utf-8")
    (tmp_path / "b.txt").write_text("四\n五\n", "utf-8")
    assert [*evaluation_texts(tmp_path / "a.json"), *evaluation_texts(tmp_path / "b.txt")] == list("一二三四五")
    with pytest.raises(UserError, match="as long as"):
        build_index(DecontaminateSettings(evaluation=[str(tmp_path)]), tmp_path / "i.npy")
    with pytest.raises(UserError, match="no such evaluation"):
        build_index(DecontaminateSettings(evaluation=["nowhere"]), tmp_path / "i.npy")


def test_a_paragraph_stays_in_one_document(tmp_path):
    rng = random.Random(4)
    shared, own = make_text(rng, 80, 1), [make_text(rng, 60, 1) for _ in range(3)]
    documents = [{"id": "web1", "text": f"{own[0]}\n{shared}\n短句", "source": "web"},
                 {"id": "web2", "text": f"{shared}\n{own[1]}\n短句", "source": "web"},
                 {"id": "book", "text": f"{own[2]}\n{shared}\n{shared}", "source": "book"},
                 {"id": "only", "text": shared, "source": "web"}]
    read = ReadSettings(split_bytes=300)
    for order, name in ((documents, "a"), (documents[::-1], "b")):
        path = write_jsonl(tmp_path / name / "in.jsonl", order)
        splits = plan_splits([str(path)], read)
        output = tmp_path / name / "out"
        figures = run_paragraphs(ParagraphSettings(sources=["book"]), read, splits,
                                 OutputLayout.under(output, "paragraphs"),
                                 output / ".work", LocalEngine(1), "jsonl")
        found = {d["id"]: d["text"] for d in read_jsonl(output)}
        assert found == {"web1": f"{own[0]}\n短句", "web2": f"{own[1]}\n短句", "book": documents[2]["text"]}
        assert figures.by_rule == {"repeated_paragraphs": 1} and figures.changed_by_rule["paragraphs"] == 3
