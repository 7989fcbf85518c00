"""Verb bench: the variants are what they are called, and the figures come out. No timing is judged."""

from __future__ import annotations

import json

import numpy as np
import pytest
from mindspore import Tensor

from parallel.common.command import main
from parallel.task import load_run
from recsys.__main__ import VERBS
from recsys.build import loss_network, sample_batch, spec_of
from recsys.serving import bench

TINY = ["model.layers=1", "model.width=24"]


pytestmark = pytest.mark.usefixtures("graph_mode")


@pytest.mark.parametrize("name", ["tokenmixer_large_ug_sep", "rankmixer_ug_sep"])
def test_variants_have_the_same_tokens(name):
    _, settings = load_run(f"configs/recsys/{name}.yaml", [])
    spec = spec_of(settings)
    plain = loss_network(bench.unseparated(settings, spec), spec, 1).model
    apart = loss_network(bench.separated(settings, "1:1"), spec, 1).model
    assert not hasattr(plain, "user_pass") and hasattr(apart, "user_pass")
    tokens = getattr(plain, "tokens", settings.model.tokens)
    assert tokens == apart.tokens == settings.model.tokens
    assert apart.token_counts[0] == (tokens // 2, tokens // 2)


def test_one_user_for_all_candidates():
    _, settings = load_run("configs/recsys/tokenmixer_large_ug_sep.yaml", [])
    spec = spec_of(settings)
    from recsys.ug_sep.sides import UserCandidateSplit

    ids, numbers, _ = sample_batch(spec, 5, 1, 0)
    made, _ = bench._one_user(spec, ids.copy(), numbers.copy())
    user, group = UserCandidateSplit.of(spec).user, UserCandidateSplit.of(spec).candidate
    assert (made[:, list(user.ids)] == ids[:1, list(user.ids)]).all()
    assert (made[:, list(group.ids)] == ids[:, list(group.ids)]).all() and len(np.unique(made, axis=0)) == 5
    assert Tensor(made).shape == ids.shape


def test_figures_and_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "SWEEP_CANDIDATES", (6,))
    monkeypatch.setattr(bench, "SWEEP_RATIOS", ("1:1",))
    assert main("recsys", VERBS, ["bench", "--config", "configs/recsys/tokenmixer_large_ug_sep.yaml", *TINY,
                                  "--candidates", "6", "--ug-ratio", "1:1", "--rounds", "2", "--skip-matmul", "--sweep",
                                  "--output", str(tmp_path)]) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert {"unseparated_ms", "separated_ms", "ratio", "end_to_end_ratio", "p99_ms"} <= set(figures)
    assert figures["ratio"] == pytest.approx(figures["separated_ms"] / figures["unseparated_ms"])
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert {(row["mode"], row["weights"]) for row in rows} == {
        (mode, kind) for mode in bench.MODES for kind in bench.PRECISIONS} and len(rows) == 6
    assert all(0 < row["min_ms"] <= row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] for row in rows)
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"


def test_the_product_alone(monkeypatch):
    from parallel.layers import int8
    from recsys.quantization import matmul_speed

    if int8.library() is None:
        pytest.skip("no C++ compiler here")
    monkeypatch.setattr(matmul_speed, "_COLD_BYTES", 1 << 16)
    found = matmul_speed.measure((1, 3), ((96, 64),), rounds=3)
    assert [row["rows"] for row in found] == [1, 3] and all(row["ratio"] > 0 for row in found)
    assert matmul_speed.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)


@pytest.mark.parametrize(("words", "message"), [
    (["--config", "configs/recsys/dlrm_mlp.yaml"], "no separation to measure"),
    (["--config", "configs/recsys/tokenmixer_large_ug_sep.yaml", "--ug-ratio", "1"], "two whole numbers"),
    (["--config", "configs/recsys/tokenmixer_large_ug_sep.yaml", "--candidates", "0"], "above 0"),
])
def test_mistakes_are_one_line(words, message, capsys):
    assert main("recsys", VERBS, ["bench", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0], error
