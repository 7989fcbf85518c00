"""A runtime that runs node by node: its kernels, its fullest moment, its pipeline, and how points are scored."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from parallel.planning.planner import planner_for
from parallel.planning.runtime.kernels import Kernel
from parallel.planning.runtime.settings import ProductSettings, RuntimeSettings
from parallel.planning.timeline import timeline
from scripts.bench.gpu import planner_points
from scripts.bench.gpu.planner_points import rank_correlation, summary

ROOT = Path(__file__).parents[3]
POINTS = ROOT / "scripts" / "bench" / "gpu" / "points"
SMALL = {"pangu": ["model.hidden_size=64", "model.heads=4", "model.layers=3", "model.sequence_length=64",
                   "model.vocabulary_size=512"], "rankmixer": ["model.width=64"],
         "tokenmixer_large": ["model.width=64", "model.layers=2"]}


def planned(config: str, *words: str):
    """(planner, resolved layout, estimate) on the H200 of the cluster file."""
    planner, settings = planner_for(POINTS / f"{config}.yaml", [*SMALL[config], *words], "h200")
    layout = settings.parallel.resolve()
    return planner, layout, planner.evaluate(layout)


@pytest.mark.parametrize("config", ["pangu", "rankmixer"])
def test_products_are_those_of_the_count(config):
    planner, layout, _ = planned(config)
    for cost in planner.cost(layout, 1).costs:
        for work in (cost.forward, cost.backward):
            found = sum(2 * kernel.shape[1] * kernel.shape[2] * kernel.shape[3] * kernel.shape[4] * times
                        for kernel, times in work.started.items() if kernel.kind in ("product", "weight"))
            assert found <= work.flops
            if not any(kernel.kind.startswith("attention") for kernel in work.started) and config == "pangu":
                assert found == work.flops


def test_attention_and_cross_entropy_are_a_few_kernels():
    planner, layout, _ = planned("pangu", "train.global_batch_size=4")
    forward, backward = Counter(), Counter()
    for cost in planner.cost(layout, 1).costs:
        forward.update(cost.forward.started)
        backward.update(cost.backward.started)
    shape = (4 * 4, 64, 16)
    assert forward[Kernel("attention", 0, shape)] == backward[Kernel("attention_grad", 0, shape)] == 3
    logits = 4 * 64 * 512 * 2
    assert forward[Kernel("rows", logits)] == backward[Kernel("rows_grad", 2 * logits)] == 1


def test_recomputation_and_stages_hold_less_and_accumulation_does_not():
    words = ("train.global_batch_size=16",)
    plain = planned("pangu", *words)[2].fullest
    assert planned("pangu", *words, "parallel.recompute.policy=full")[2].fullest.total < plain.total
    staged = planned("pangu", *words, "parallel.pipeline.stages=2", "parallel.pipeline.micro_batches=4")[2]
    assert staged.fullest.activations < plain.activations
    assert planned("pangu", *words, "train.accumulation=2")[2].fullest.activations == pytest.approx(
        plain.activations, rel=1e-3)


def test_tiles_of_a_product_come_in_waves():
    runtime = RuntimeSettings(products=ProductSettings(tflops=100, units=10, tile=(128, 256), bandwidth_gb=1e9))
    one = runtime.product_seconds("bfloat16", 1, 1280, 256, 512)
    assert one == pytest.approx(2 * 1280 * 256 * 512 / 100e12)
    assert runtime.product_seconds("bfloat16", 1, 128, 256, 512) == one
    assert runtime.product_seconds("bfloat16", 1, 1288, 256, 512) == pytest.approx(2 * one)


def test_gradients_of_weights_after_the_message_shorten_the_pipeline():
    forward, backward = [[1.0], [1.0]], [[2.0], [2.0]]
    plain = timeline("1f1b", forward, backward, 4)
    late = timeline("1f1b", forward, backward, 4, 0.0, [[1.0], [1.0]])
    assert plain.end == 15.0
    assert late.end == 14.0


def test_scores_of_points():
    def row(name, measured, predicted, choice=False, noise=0.0):
        return {"name": name, "step_ms": measured, "predicted_ms": predicted, "time_error": predicted / measured - 1,
                "memory_error": 0.1, "noise": noise, "choice": choice}

    rows = [row("a", 10.0, 11.0, True), row("b", 11.0, 10.0, True), row("c", 20.0, 20.0)]
    found = summary(rows)
    assert found["mean_time_error"] == pytest.approx((0.1 + 1 / 11) / 3)
    assert (found["first_choice"], found["fastest"], found["worst_point"]) == ("b", "a", "a")
    assert found["regret"] == pytest.approx(0.1)
    assert rank_correlation(rows) == pytest.approx(1 / 3)
    assert rank_correlation([row("a", 10.0, 11.0, noise=0.2), *rows[1:]]) == 1.0  # a and b differ by noise


def test_points_on_the_page_are_those_of_the_raw_output(capsys, monkeypatch):
    """The planner of today is still the one that was held against the points, and the page says what came out."""
    raw, page = ROOT / "docs" / "measurements" / "raw" / "planner", ROOT / "docs" / "measurements" / "gpu_planner.md"
    monkeypatch.setattr("sys.argv", ["planner_points.py", "score", "--set", "held_out", "--predicted",
                                     str(raw / "predicted.json"), "--measured", str(raw / "held_out.jsonl")])
    assert planner_points.main() == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["points"] == 26
    text = page.read_text(encoding="utf-8")
    for value in (f"{100 * found['mean_time_error']:.1f} %", f"{100 * found['worst_time_error']:.1f} %",
                  f"{100 * found['mean_memory_error']:.1f} %", f"{found['rank_correlation']:.3f}"):
        assert f"| {value} |" in text
    told = json.loads((raw / "predicted.json").read_text(encoding="utf-8"))["points"]
    for name, config, words in (("p1536_b8", "pangu", ["train.global_batch_size=8"]),
                                ("t768_b512", "tokenmixer_large", ["train.global_batch_size=512"])):
        planner, settings = planner_for(POINTS / f"{config}.yaml", words, "h200")
        estimate = planner.evaluate(settings.parallel.resolve())
        assert 1e3 * estimate.step_seconds == pytest.approx(told[name]["step_ms"], rel=1e-3)
        assert estimate.fullest.total / 1e9 == pytest.approx(told[name]["memory_gb"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "words"), [
    ("pangu", ()), ("pangu", ("parallel.recompute.policy=full",)), ("pangu", ("parallel.op=2",)),
    ("pangu", ("parallel.data=2", "parallel.optimizer.shard=-1")), ("rankmixer", ()), ("tokenmixer_large", ()),
])  # fmt: skip
def test_fullest_moment_is_that_of_the_program(config, words, tmp_path):
    pytest.importorskip("torch")
    from parallel.__main__ import VERBS
    from parallel.common.command import main
    from tests.parallel.planning.counting import most_held

    sizes = {"pangu": ["model.hidden_size=256", "model.heads=4", "model.layers=3", "model.sequence_length=256",
                       "model.vocabulary_size=4096", "train.global_batch_size=16"],
             "rankmixer": ["model.width=128", "train.global_batch_size=256"],
             "tokenmixer_large": ["model.width=128", "model.layers=2", "train.global_batch_size=256"]}[config]
    file = str(POINTS / f"{config}.yaml")
    assert main("parallel", VERBS, ["export", "--graphs", "step", "--processes", "1", "--config", file, "--output",
                                    str(tmp_path / "program"), *sizes, *words]) == 0
    planner, settings = planner_for(file, [*sizes, *words], "h200")
    told = planner.evaluate(settings.parallel.resolve()).fullest.total - 1e6 * planner.cluster.runtime.workspace_mb
    assert told == pytest.approx(most_held(tmp_path / "program"), rel=0.08)
