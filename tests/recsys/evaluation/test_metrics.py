"""Metrics against scikit-learn and against loops over users."""

import numpy as np
import pytest

from parallel.common.errors import UserError
from recsys.evaluation.metrics import (
    BINARY_METRICS,
    NUMBER_METRICS,
    Accumulator,
    NumberAccumulator,
    auc,
    bayes_auc,
    calibration,
    calibration_free_ne,
    expected_calibration_error,
    group_auc,
    inversions,
    logloss,
    normalized_entropy,
    rauc,
    segmented_ne,
    xauc,
)


def log_loss(labels, scores):
    from sklearn import metrics  # not at the top: every process that collects tests would wait for it

    return metrics.log_loss(labels, scores)


def roc_auc_score(labels, scores):
    from sklearn import metrics

    return metrics.roc_auc_score(labels, scores)


def random_log(seed, n=3000, users=40, levels=None):
    generator = np.random.default_rng(seed)
    scores = generator.random(n)
    if levels:
        scores = np.round(scores * levels) / levels
    labels = (generator.random(n) < scores * 0.7).astype(np.int64)
    who = generator.integers(0, users, n)
    labels[who == 0] = 0
    labels[who == 1] = 1
    return labels, scores, who


@pytest.mark.parametrize("levels", [None, 7, 1])
@pytest.mark.parametrize("seed", range(4))
def test_auc_equals_scikit_learn(seed, levels):
    labels, scores, _ = random_log(seed, levels=levels)
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize("levels", [None, 5])
@pytest.mark.parametrize("seed", range(4))
def test_group_aucs_equal_a_loop_over_users(seed, levels):
    labels, scores, who = random_log(seed, levels=levels)
    aucs, weights, left_out = [], [], 0
    for user in np.unique(who):
        mine = who == user
        if labels[mine].min() == labels[mine].max():
            left_out += 1
            continue
        aucs.append(roc_auc_score(labels[mine], scores[mine]))
        weights.append(mine.sum())
    result = group_auc(labels, scores, who)
    assert result.uauc == pytest.approx(np.mean(aucs), abs=1e-12)
    assert result.gauc == pytest.approx(np.average(aucs, weights=weights), abs=1e-12)
    assert (result.users, result.left_out) == (len(aucs), left_out)
    assert left_out >= 2


def test_logloss_equals_scikit_learn():
    labels, scores, _ = random_log(1)
    assert logloss(labels, scores) == pytest.approx(log_loss(labels, np.clip(scores, 1e-7, 1 - 1e-7)), abs=1e-12)
    assert np.isfinite(logloss(np.array([1, 0]), np.array([0.0, 1.0])))


def test_one_class_has_no_auc():
    assert np.isnan(auc(np.ones(4), np.arange(4)))
    assert np.isnan(group_auc(np.ones(4), np.arange(4), np.zeros(4)).uauc)
    assert np.isnan(auc(np.zeros(0), np.zeros(0)))


def test_calibration_by_hand():
    labels, p = np.array([1, 0, 0, 1]), np.array([0.5, 0.5, 0.25, 0.75])
    assert calibration(labels, p) == 1.0
    assert expected_calibration_error(labels, p, bins=4) == pytest.approx((abs(1.0 - 1) + 0.25 + 0.25) / 4)


def test_bayes_auc_is_the_mean_auc_of_the_true_probabilities():
    generator = np.random.default_rng(3)
    p = np.round(generator.random(400), 2)
    drawn = [roc_auc_score(generator.random(400) < p, p) for _ in range(600)]
    assert bayes_auc(p) == pytest.approx(np.mean(drawn), abs=0.002)
    pairs = [(p[i] * (1 - p[j]), 1.0 if p[i] > p[j] else 0.5 if p[i] == p[j] else 0.0)
             for i in range(60) for j in range(60) if i != j]
    weights, wins = np.array(pairs).T
    assert bayes_auc(p[:60]) == pytest.approx((weights * wins).sum() / weights.sum(), abs=1e-12)


@pytest.mark.parametrize("spill_bytes", [1 << 30, 5000])
def test_streaming_equals_all_at_once(spill_bytes):
    labels, scores, who = random_log(5, levels=50)
    collected = Accumulator(spill_bytes)
    for begin in range(0, len(labels), 137):
        part = slice(begin, begin + 137)
        collected.update(labels[part], scores[part], who[part])
    result = collected.result()
    assert result["auc"] == auc(labels, scores)
    assert result["uauc"] == pytest.approx(group_auc(labels, scores, who).uauc, abs=1e-12)
    assert result["samples"] == len(labels)


def test_a_diverged_model_has_no_metrics():
    collected = Accumulator()
    collected.update(np.array([1, 0]), np.array([np.nan, 0.5]))
    with pytest.raises(UserError, match="not finite"):
        collected.result()


def test_names_of_metrics_are_frozen():
    """Dashboards and settings rely on them: add names, change none."""
    assert BINARY_METRICS == ("auc", "gauc", "uauc", "logloss", "calibration", "ece", "ne", "calibration_free_ne")
    assert NUMBER_METRICS == ("mse", "mae", "xauc", "rauc")
    labels, scores, who = random_log(0)
    for own, names in ((Accumulator(), BINARY_METRICS), (NumberAccumulator(), NUMBER_METRICS)):
        own.update(labels, scores, who)
        assert tuple(own.result()) == (*names, "samples", "users")


def test_normalized_entropy():
    labels, scores, _ = random_log(1)
    rate = labels.mean()
    assert normalized_entropy(labels, np.full(len(labels), rate)) == pytest.approx(1.0)
    assert normalized_entropy(labels, scores) == pytest.approx(
        log_loss(labels, scores) / log_loss(labels, np.full(len(labels), rate)))
    assert np.isnan(normalized_entropy(np.ones(3), scores[:3]))
    odds = scores / (1 - scores)
    shifted = odds * np.exp(1.5) / (1 + odds * np.exp(1.5))
    assert normalized_entropy(labels, shifted) > normalized_entropy(labels, scores)
    assert calibration_free_ne(labels, shifted) == pytest.approx(calibration_free_ne(labels, scores), abs=1e-6)
    assert calibration_free_ne(labels, scores) <= normalized_entropy(labels, scores)
    found = segmented_ne(labels, scores, labels * 0 + (scores > 0.5))
    assert found[1] == pytest.approx(normalized_entropy(labels[scores > 0.5], scores[scores > 0.5]))


@pytest.mark.parametrize(("seed", "levels"), [(0, None), (1, 4), (2, 1)])
def test_xauc_and_rauc_equal_loops_over_pairs(seed, levels):
    generator = np.random.default_rng(seed)
    values, found = generator.random(60), generator.random(60)
    if levels:
        values, found = np.round(values * levels), np.round(found * levels)
    right = pairs = turned = 0.0
    for i in range(60):
        for j in range(i):
            product = np.sign(values[i] - values[j]) * np.sign(found[i] - found[j])
            turned += product < 0
            if values[i] != values[j]:
                pairs, right = pairs + 1, right + (0.5 if product == 0 else product > 0)
    assert xauc(values, found) == pytest.approx(right / pairs, abs=1e-12)
    assert rauc(values, found) == pytest.approx(1 - turned / (60 * 59 / 2), abs=1e-12)
    assert inversions(found) == sum(found[j] > found[i] for i in range(60) for j in range(i))


def test_xauc_of_clicks_is_auc():
    labels, scores, _ = random_log(3, levels=9)
    assert xauc(labels, scores) == pytest.approx(auc(labels, scores), abs=1e-12)
