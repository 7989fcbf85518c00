"""Filters and classifiers: sensitive words, spam, quality, and what train-classifier learns."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from data_tools.classifier.hashed_ngrams import LinearClassifier, hashed_counts
from data_tools.classifier.settings import TrainClassifierSettings
from data_tools.classifier.train import judge, read_examples, train_local, train_spark
from data_tools.documents import plan_splits
from data_tools.engines.local import LocalEngine
from data_tools.parts import OutputLayout, run_step
from data_tools.records import Document, ReadSettings
from data_tools.rules._aho_corasick import KeywordFinder
from data_tools.steps.filter import FilterSettings, FilterStep, keep_by_pareto, lomax, uniform
from parallel.common.errors import UserError
from tests.data_tools.planted import make_text, read_jsonl, write_jsonl


def run_filter(tmp_path: Path, documents: list[dict], settings: FilterSettings):
    path = write_jsonl(tmp_path / "in.jsonl", documents)
    step = FilterStep(settings)
    figures = run_step(step, plan_splits([str(path)], ReadSettings()), OutputLayout.under(tmp_path / "out", "filter"),
                       LocalEngine(1), "jsonl", ReadSettings())
    return figures, [d["id"] for d in read_jsonl(tmp_path / "out")], read_jsonl(tmp_path / "out" / "removed")


def test_more_than_three_sensitive_words_remove(tmp_path):
    (tmp_path / "words.txt").write_text("坏词\n恶语\n", "utf-8")
    documents = [{"id": str(count), "text": "一段正文，" + "坏词" * count, "source": "s"} for count in range(6)]
    documents.append({"id": "mixed", "text": "坏词恶语坏词恶语", "source": "s"})
    settings = FilterSettings(sensitive={"words_file": str(tmp_path / "words.txt")})
    figures, kept, removed = run_filter(tmp_path, documents, settings)
    assert kept == ["0", "1", "2", "3"] and figures.by_rule == {"sensitive_words": 3}
    assert {d["id"] for d in removed} == {"4", "5", "mixed"} and removed[0]["evidence"].startswith("4 hits: 坏词")


def test_sensitive_words_can_be_counted_once_each(tmp_path):
    (tmp_path / "words.txt").write_text("坏词\n恶语\n", "utf-8")
    settings = FilterSettings(sensitive={"words_file": str(tmp_path / "words.txt"), "distinct": True, "allowed": 1})
    _, kept, _ = run_filter(tmp_path, [{"id": "a", "text": "坏词" * 9, "source": "s"},
                                       {"id": "b", "text": "坏词恶语", "source": "s"}], settings)
    assert kept == ["a"]


def test_keywords_that_overlap_are_all_found():
    finder = KeywordFinder(["甲乙", "乙丙", "ABC"])
    assert finder.count("甲乙丙abc甲乙") == (4, {"甲乙", "乙丙", "abc"})
    with pytest.raises(UserError, match="empty"):
        KeywordFinder([" "])


SPAM = "免费发票代理加盟赚钱优惠点击链接注册送礼金彩票投注".replace("发票", "票据")
GOOD = "历史学家认为这一时期的社会制度与经济结构发生了深刻变化"


def spam_corpus(folder: Path, count: int = 60) -> tuple[Path, Path]:
    rng = random.Random(8)

    def text(alphabet: str) -> str:
        return "".join(rng.choice(alphabet) for _ in range(60)) + make_text(rng, 60, 1)

    good = write_jsonl(folder / "good.jsonl", [{"text": text(GOOD)} for _ in range(count)])
    bad = write_jsonl(folder / "bad.jsonl", [{"text": text(SPAM)} for _ in range(count)])
    return good, bad


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    good, bad = spam_corpus(folder)
    settings = TrainClassifierSettings(buckets=4096)
    training, held_out = read_examples([str(good)], [str(bad)], ReadSettings(), settings)
    return folder, settings, training, held_out, train_local(training, settings)


def test_classifier_separates_held_out_documents(trained):
    _, settings, _, held_out, model = trained
    scores = np.array([model.score(text) for text in held_out.texts])
    assert judge(scores, held_out.labels).roc_auc > 0.99
    matrix = held_out.matrix(settings.buckets)
    assert scores == pytest.approx(1 / (1 + np.exp(-(matrix @ model.weights + model.intercept))), abs=1e-12)


def test_local_training_reaches_the_minimum(trained):
    """At the minimum the gradient of the stated objective is zero, checked by finite differences on a few weights."""
    _, settings, training, _, model = trained
    signs, matrix = 2 * training.labels - 1, training.matrix(settings.buckets).toarray()
    positives = training.labels.mean()
    weight = np.where(training.labels == 1, 0.5 / positives, 0.5 / (1 - positives)) / len(signs)

    def loss(weights, intercept):
        return weight @ np.logaddexp(0, -signs * (matrix @ weights + intercept)) \
            + 0.5 * settings.regularization * weights @ weights

    for place in np.flatnonzero(model.weights)[:5]:
        step = np.zeros(settings.buckets)
        step[place] = 1e-4
        slope = (loss(model.weights + step, model.intercept) - loss(model.weights - step, model.intercept)) / 2e-4
        assert abs(slope) < 1e-4


def test_spark_trains_the_same_classifier(trained, spark_engine):
    _, settings, training, held_out, model = trained
    other = train_spark(training, settings, spark_engine.session)
    scores = [(model.score(text), other.score(text)) for text in held_out.texts]
    assert max(abs(a - b) for a, b in scores) < 0.02


def test_classifier_file_round_trip_and_damage(trained, tmp_path):
    model = trained[-1]
    model.save(tmp_path / "m.npz")
    again = LinearClassifier.load(tmp_path / "m.npz")
    assert np.array_equal(again.weights, model.weights) and again.score("历史") == model.score("历史")
    (tmp_path / "bad.npz").write_bytes((tmp_path / "m.npz").read_bytes()[:-50])
    (tmp_path / "noise.npz").write_bytes(b"noise")
    for name in ("bad.npz", "noise.npz", "none.npz"):
        with pytest.raises(UserError):
            LinearClassifier.load(tmp_path / name)


def test_spam_threshold_and_quality_pareto(trained, tmp_path):
    _, _, _, held_out, model = trained
    model.save(tmp_path / "m.npz")
    documents = [{"id": f"{label:.0f}-{n}", "text": text, "source": "s"}
                 for n, (text, label) in enumerate(zip(held_out.texts, held_out.labels, strict=True))]
    path = str(tmp_path / "m.npz")
    figures, kept, removed = run_filter(tmp_path, documents, FilterSettings(spam={"model": path}))
    assert all(id.startswith("1") for id in kept) and figures.by_rule["spam"] == sum(held_out.labels == 0)
    assert all(d["score"] < 0.5 for d in removed)
    settings = FilterSettings(quality={"model": path, "keep": "pareto"})
    _, kept, _ = run_filter(tmp_path / "q", documents, settings)
    _, again, _ = run_filter(tmp_path / "r", documents[::-1], settings)
    assert sorted(kept) == sorted(again)
    assert sum(id.startswith("1") for id in kept) > sum(id.startswith("0") for id in kept)


def test_pareto_keeps_as_numpy_would():
    """The share kept at each score equals P(pareto > 1 - score) = (2 - score)^-alpha."""
    for score in (0.1, 0.5, 0.9):
        kept = np.mean([keep_by_pareto(score, 9.0, 1, Document(str(n), "", "")) for n in range(4000)])
        assert kept == pytest.approx((2 - score) ** -9.0, abs=0.025)
    draws = np.random.default_rng(1).pareto(9.0, 20000)
    assert np.quantile(draws, 0.9) == pytest.approx(lomax(0.9, 9.0), rel=0.05)
    assert all(0 <= uniform(1, str(n)) < 1 for n in range(999))


def test_precision_recall_of_a_known_ranking():
    report = judge(np.array([0.9, 0.8, 0.8, 0.1]), np.array([1.0, 0.0, 1.0, 0.0]))
    assert (report.recall.tolist(), report.precision.tolist()) == ([0.5, 1.0, 1.0], [1.0, 2 / 3, 0.5])
    assert report.average_precision == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert report.roc_auc == pytest.approx((1 + 1 + 0.5 + 1) / 4)


def test_features_do_not_depend_on_width_or_case():
    a, b = hashed_counts("ＡＢＣ 漢字", 1000, 2), hashed_counts("abc汉字", 1000, 2)
    assert np.array_equal(a[0], b[0]) and a[1] == pytest.approx(b[1]) and (a[1] ** 2).sum() == pytest.approx(1.0)


def test_train_classifier_verb(trained, tmp_path, capsys):
    from data_tools.__main__ import VERBS
    from parallel.common.command import main

    folder = trained[0]
    words = ["train-classifier", "--positives", str(folder / "good.jsonl"), "--negatives", str(folder / "bad.jsonl")]
    assert main("data_tools", VERBS, [*words, "--output", str(tmp_path / "m.npz"), "classifier.buckets=4096"]) == 0
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert line["roc_auc"] > 0.99 and Path(line["report"]).read_text("utf-8").count("data:image/png") == 1
    assert main("data_tools", VERBS, [*words, "--output", str(tmp_path / "m.txt")]) == 2
    assert main("data_tools", VERBS, ["filter", "--input", str(folder), "--output", str(tmp_path / "o")]) == 2
