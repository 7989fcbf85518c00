"""Estimates of serving: bounds that follow from the sizes alone, and how they move."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from parallel.__main__ import VERBS
from parallel.common.command import main
from parallel.common.errors import UserError
from parallel.common.settings import load_settings
from parallel.planning.cluster import ClusterSettings
from parallel.planning.planner import cluster_file
from parallel.planning.serving import Decoder, fewest, served

ROOT = Path(__file__).parents[3]
MODEL = Decoder(layers=40, width=5120, heads=40, inner=20480, vocabulary=40000, context=1024, batch=8, chunk=256,
                whole_vocabulary=False)


@pytest.fixture(scope="module")
def cluster():
    return load_settings(ClusterSettings, cluster_file("ascend910"))


def test_a_step_takes_at_least_the_reading_of_the_weights(cluster):
    for op, stages in ((1, 1), (4, 1), (8, 2)):
        one = served(MODEL, cluster, op, stages)
        weights = 40 * (4 * 5120**2 + 2 * 5120 * 20480) * 2
        assert one.weight_bytes == pytest.approx(weights / op / stages, rel=0.2) and one.devices == op * stages
        least = weights / op / (cluster.memory_bandwidth_gb * 1e9)  # stages work one after the other
        assert MODEL.batch / one.tokens_per_second > least


def test_more_sequences_give_more_tokens_and_a_larger_cache(cluster):
    few, many = (served(replace(MODEL, batch=batch), cluster, 4, 1) for batch in (8, 32))
    assert many.tokens_per_second > 2 * few.tokens_per_second and many.cache_bytes == 4 * few.cache_bytes


def test_the_fewest_devices_are_the_fewest_that_fit(cluster):
    least = fewest(MODEL, cluster)
    assert least.fits and least.devices == 2
    assert not served(MODEL, cluster, 1, 1).fits
    with pytest.raises(UserError, match="lower generate.batch_size"):
        fewest(replace(MODEL, batch=256, context=1 << 20), cluster)


@pytest.mark.parametrize(("size", "cluster", "devices"), [("13b", "ascend910", 2), ("13b", "ascend910b", 1),
                                                          ("200b", "ascend910", 16), ("200b", "ascend910b", 8)])
def test_the_verb_tells_how_many_devices_hold_a_published_size(capsys, size, cluster, devices):
    words = ["estimate", "--serve", "--config", str(ROOT / f"configs/pangu/{size}.yaml"), "--cluster", cluster]
    assert main("parallel", VERBS, words) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert figures["fewest"]["devices"] == devices and figures["tokens_per_second"] > 0
    assert 0 < figures["fewest"]["first_token_seconds"] < 10


def test_what_is_for_training_is_refused(capsys):
    words = ["estimate", "--serve", "--config", str(ROOT / "configs/pangu/13b.yaml"), "--html", "x"]
    assert main("parallel", VERBS, words) == 2
    assert "is for training" in capsys.readouterr().err
