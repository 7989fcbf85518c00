"""Metrics of generated answers, the assignment of blanks and the bootstrap, against worked examples and theory."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pangu.evaluation.metrics import assign, begins_with, bootstrap, exact_match, f1, normalize, rouge, segment
from parallel.common.errors import UserError


def test_segment_mixes_characters_and_words():
    assert segment("在2019年，Nexon公司 (韩国)！") == ["在", "2019", "年", "nexon", "公", "司", "韩", "国"]
    assert segment("，。！ ") == []


def test_both_sides_are_normalized():
    # What the tokenizer makes of full-width text is ASCII.
    assert normalize("ＡＢＣ，１２") == "abc,12"
    assert exact_match("abc,12", ["ＡＢＣ，１２"]) == 1.0
    assert f1("abc12", ["ＡＢＣ１２"]) == 1.0


@pytest.mark.parametrize(("prediction", "references", "expected"), [
    ("北京。", ["北京"], 1.0), ("北京", ["上海", "北京"], 1.0), ("在北京", ["北京"], 0.0), ("", ["北京"], 0.0)])
def test_exact_match(prediction, references, expected):
    assert exact_match(prediction, references) == expected


def test_f1_counts_the_longest_common_run():
    # 4 characters in a row of 6 predicted and of 5 wanted.
    assert f1("他在北京大学", ["北京大学里"]) == pytest.approx(2 * (4 / 6) * (4 / 5) / (4 / 6 + 4 / 5))
    # The same bag in another order shares a run of one only.
    assert f1("乙甲", ["甲乙"]) == pytest.approx(0.5)
    assert f1("甲", ["乙", "甲乙"]) == pytest.approx(2 / 3)
    assert f1("", ["甲"]) == 0.0


def test_begins_with():
    assert begins_with("啄木鸟每天", ["啄木鸟"]) == 1.0
    assert begins_with("“啄木鸟”", ["啄木鸟"]) == 1.0
    assert begins_with("啄木", ["啄木鸟"]) == 0.0
    assert begins_with("啄木", ["。"]) == 0.0


def test_rouge_on_words():
    pytest.importorskip("rouge_chinese")
    assert rouge("今天天气不错", ["今天天气不错"], "rouge-1") == pytest.approx(1.0, abs=1e-6)
    assert rouge("苹果", ["今天天气", "苹果"], "rouge-l") == pytest.approx(1.0, abs=1e-6)
    assert rouge("", ["今天"], "rouge-1") == 0.0
    assert 0 < rouge("今天很热", ["我们今天去"], "rouge-1") < 1


def test_assignment_is_the_best_of_all():
    pytest.importorskip("scipy")
    costs = np.random.default_rng(0).random((4, 5))
    chosen = assign(costs)
    best = min(itertools.permutations(range(5), 4), key=lambda p: sum(costs[i, c] for i, c in enumerate(p)))
    assert tuple(chosen) == best
    # Alone, blanks 0 and 1 would both take choice 0.
    assert assign(np.array([[0.0, 5.0], [1.0, 2.0]])).tolist() == [0, 1]
    with pytest.raises(UserError, match="more blanks"):
        assign(np.zeros((3, 2)))


def test_bootstrap_is_the_known_error_of_a_mean():
    values = np.random.default_rng(1).random(400) < 0.3
    theory = np.sqrt(values.mean() * (1 - values.mean()) / len(values))
    assert bootstrap(values, resamples=4000) == pytest.approx(theory, rel=0.06)
    # Instances that always agree within a passage are worth one: the error grows by the root of their number.
    groups = np.repeat(np.arange(400), 4)
    assert bootstrap(np.repeat(values, 4), groups=groups, resamples=4000) == pytest.approx(theory, rel=0.06)
    assert bootstrap(np.repeat(values, 4), resamples=4000) == pytest.approx(theory / 2, rel=0.06)
    assert bootstrap([0.5]) == 0.0
