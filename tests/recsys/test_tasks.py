"""Several tasks: heads of shared experts, products along a funnel, masks, weights, numbers, losses over a user's
samples, calibration, and one score out of many; each against NumPy."""

from __future__ import annotations

import json

import numpy as np
import pytest
from mindspore import Tensor

from parallel.common.errors import UserError
from parallel.layers.parameter import initialize
from recsys.layers.heads import Calibration, MixtureOfExperts, ProgressiveExtraction
from recsys.layers.losses import Answers, FunnelLoss, ListwiseLoss, PairwiseLoss
from recsys.layers.tasks import Formula, TaskPlan
from recsys.settings import TaskSettings

pytestmark = pytest.mark.usefixtures("pynative")
FUNNEL = [TaskSettings(name="click"), TaskSettings(name="buy", given="click"),
          TaskSettings(name="convert", only_where="click"),
          TaskSettings(name="watch", kind="regression", transform="log", loss="huber"),
          TaskSettings(name="stars", kind="regression")]


def sigmoid(z):
    return 1.0 / (1.0 + np.exp(-z))


def batch(rows: int = 40):
    generator = np.random.default_rng(2)
    logits = (3.0 * generator.standard_normal((rows, 5))).astype(np.float32)
    labels = (generator.random((rows, 5)) < 0.4).astype(np.float32)
    labels[:, 1] *= labels[:, 0]
    labels[:, 3:] = generator.exponential(5.0, (rows, 2))
    labels[::7, 0] = np.nan
    labels[3, 3] = np.nan
    return logits, labels, generator.random((rows, 1)).astype(np.float32)


def test_funnel_loss_is_the_written_one():
    logits, labels, weights = batch()
    plan = TaskPlan.of(FUNNEL, 5)
    cell = FunnelLoss(plan, np.array([[False], [True], [False], [True], [False]]))
    found = cell(Tensor(logits), Tensor(np.concatenate([labels, weights], 1))).asnumpy()
    z, p = logits.astype(np.float64), sigmoid(logits.astype(np.float64))

    def entropy(y, q):
        return -(y * np.log(q) + (1 - y) * np.log1p(-q))

    y, there = np.nan_to_num(labels), ~np.isnan(labels)
    error = np.abs(z[:, 3] - np.log1p(y[:, 3]))
    expected = np.stack([
        entropy(y[:, 0], p[:, 0]) * there[:, 0],
        entropy(y[:, 1], p[:, 0] * p[:, 1]) * weights[:, 0],
        entropy(y[:, 2], p[:, 2]) * y[:, 0],
        np.where(error < 1, error**2 / 2, error - 0.5) * there[:, 3] * weights[:, 0],
        (z[:, 4] - y[:, 4])**2 / 2], 1)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_answers_in_the_graph_are_those_of_the_engine():
    logits, labels, _ = batch()
    plan = TaskPlan.of(FUNNEL, 5)
    expected = plan.predictions(logits)
    np.testing.assert_allclose(Answers(plan)(Tensor(logits)).asnumpy(), expected, rtol=2e-5, atol=1e-6)
    odds = sigmoid(logits.astype(np.float64))
    np.testing.assert_allclose(expected[:, 1], odds[:, 0] * odds[:, 1])
    np.testing.assert_allclose(expected[:, 3], np.expm1(logits[:, 3].astype(float)))
    assert (expected[:, 1] <= expected[:, 0]).all()
    counted = plan.counted(labels)
    assert (counted[:, 2] == (labels[:, 0] == 1)).all() and not counted[0, 0] and counted[1, 4]


def test_a_funnel_of_three():
    tasks = [TaskSettings(name="a"), TaskSettings(name="b", given="a"), TaskSettings(name="c", given="b")]
    plan = TaskPlan.of(tasks, 3)
    logits = np.array([[0.3, -0.2, 1.0]])
    np.testing.assert_allclose(plan.predictions(logits)[0], np.cumprod(sigmoid(logits[0])))


@pytest.mark.parametrize(("tasks", "what"), [
    ([TaskSettings(name="a", given="b"), TaskSettings(name="b", given="a")], "circle"),
    ([TaskSettings(name="a", given="clck"), TaskSettings(name="click")], "did you mean 'click'"),
    ([TaskSettings(name="a", only_where="w"), TaskSettings(name="w", kind="regression")], "binary")])
def test_impossible_tasks_are_one_line(tasks, what):
    with pytest.raises(UserError, match=what):
        TaskPlan.of(tasks, 2)


def test_losses_over_a_users_samples():
    generator = np.random.default_rng(4)
    z, y = generator.standard_normal((30, 1)).astype(np.float32), (generator.random((30, 1)) < 0.4).astype(np.float32)
    users = generator.integers(0, 5, (30, 1)).astype(np.float32)
    pairs = [np.log1p(np.exp(z[j, 0] - z[i, 0])) for i in range(30) for j in range(30)
             if users[i] == users[j] and y[i] > y[j]]
    inputs = Tensor(z), Tensor(y), Tensor(users)
    assert float(PairwiseLoss()(*inputs).asnumpy()) == pytest.approx(np.mean(pairs), rel=1e-5)
    lists = [np.log(np.exp(z[users == users[i]]).sum()) - z[i, 0] for i in range(30) if y[i] == 1]
    assert float(ListwiseLoss()(*inputs).asnumpy()) == pytest.approx(np.mean(lists), rel=1e-5)
    nothing = Tensor(z), Tensor(np.zeros_like(y)), Tensor(users)
    assert float(PairwiseLoss()(*nothing).asnumpy()) == 0.0 == float(ListwiseLoss()(*nothing).asnumpy())


def test_experts_are_mixed_by_their_gates():
    x = np.random.default_rng(1).standard_normal((6, 8)).astype(np.float32)
    cell = MixtureOfExperts(8, 3, 5, 2)
    initialize(cell, 1)
    found = [out.asnumpy() for out in cell(Tensor(x))]
    values = {name: p.asnumpy() for name, p in cell.parameters_and_names()}

    def layer(prefix, inputs):
        return inputs @ values[f"{prefix}.weight"].T + values[f"{prefix}.bias"]

    experts = np.stack([np.maximum(layer(f"shared.experts.{e}.linear", x), 0) for e in range(3)], 1)
    for task in range(2):
        gate = np.exp(layer(f"gates.{task}.linear", x))
        np.testing.assert_allclose(found[task], np.einsum("be,beh->bh", gate / gate.sum(1, keepdims=True), experts),
                                   atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_progressive_extraction_keeps_a_tasks_own_experts_from_the_others():
    """On the last level the gradient of task 0 reaches the shared experts and its own, never those of task 1; on the
    first level it reaches them all (through the shared part)."""
    from mindspore import ops

    cell = ProgressiveExtraction(8, 2, 5, 2, levels=2)
    initialize(cell, 1)
    x = Tensor(np.random.default_rng(1).standard_normal((64, 8)).astype(np.float32))
    parameters = list(cell.trainable_params())
    gradients = ops.grad(lambda value: cell(value)[0].sum(), None, parameters)(x)
    reached = {p.name for p, g in zip(parameters, gradients, strict=True) if np.abs(g.asnumpy()).max() > 0}
    names = {p.name for p in parameters}
    assert not {name for name in reached if name.startswith(("own.1.1.", "gates.1.1."))}
    assert {name for name in names if name.startswith(("own.1.0.", "shared.1.", "own.0.1."))} & reached


def test_calibration_moves_the_rate_and_not_the_network():
    from mindspore import ops

    cell = Calibration(2)
    initialize(cell, 1)
    logits = Tensor(np.random.default_rng(1).standard_normal((9, 2)).astype(np.float32))
    np.testing.assert_allclose(cell(logits).asnumpy(), logits.asnumpy(), atol=1e-6)
    assert np.abs(ops.grad(lambda value: cell(value).sum())(logits).asnumpy()).max() == 0.0
    cell.scale.set_data(Tensor(np.array([[-3.0, 2.0]], np.float32)))
    assert (np.diff(np.sort(cell(logits).asnumpy(), 0), axis=0) >= 0).all()


def test_formula():
    scores = np.array([[0.2, 10.0], [0.5, 1.0], [0.0, 3.0]])
    formula = Formula("click ** 0.5 * log1p(watch) - min(click, 0.1)", ["click", "watch"])
    np.testing.assert_allclose(formula(scores), scores[:, 0]**0.5 * np.log1p(scores[:, 1])
                               - np.minimum(scores[:, 0], 0.1))
    assert Formula("log(click - 1)", ["click"])(scores)[0] == -np.inf
    assert Formula("2", ["click"])(scores).tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("text", ["__import__('os')", "click.real", "clik", "click if 1 else 2", "click(", "[1]", "",
                                  "(lambda: 1)()", "log(click, click, click, 1)", "'a' * 9", "9**9**9**9 * buy",
                                  "(" * 500 + "1" + ")" * 500])
def test_what_is_no_formula_is_refused(text):
    with pytest.raises(UserError):
        Formula(text, ["click"])


def test_tasks_from_the_log_to_the_figures(tmp_path, graph_mode):
    """A CSV log with a funnel, a watch time, missing labels and weights: trained, evaluated, and fused at serving."""
    from parallel.task import load_run
    from recsys.saved_model import load
    from recsys.serving.engine import Engine
    from recsys.serving.server import Service
    from recsys.serving.settings import EngineSettings, ServeSettings
    from recsys.train import run

    generator = np.random.default_rng(3)
    lines = ["user,item,click,buy,watch,weight"]
    for _ in range(600):
        user, item = generator.integers(0, 20), generator.integers(0, 15)
        click = int(generator.random() < sigmoid((user % 5) - 2.0))
        buy = "" if generator.random() < 0.1 else int(click and generator.random() < sigmoid(item % 4 - 2.0))
        watch, weight = 3.0 * (user % 5) + generator.random(), generator.random()
        lines.append(f"{user},{item},{click},{buy},{watch:.2f},{weight:.2f}")
    (tmp_path / "log.csv").write_text("\n".join(lines))
    tasks = [{"name": "click", "pairwise": 0.5, "listwise": 0.1}, {"name": "buy", "given": "click"},
             {"name": "watch", "kind": "regression", "transform": "log"}]
    features = [{"name": "user", "side": "user", "rows": 30, "values": "integer"},
                {"name": "item", "side": "item", "rows": 30, "values": "integer"}]
    _, settings = load_run("configs/recsys/dlrm_mlp.yaml", [
        "data.reader=csv", f"data.path={tmp_path / 'log.csv'}", "data.labels=[click, buy, watch]",
        "data.number_labels=[watch]", "data.missing_labels=true", "data.label_weights={buy: weight}", "data.user=user",
        f"data.features={json.dumps(features)}", f"model.tasks={json.dumps(tasks)}", "model.hidden=[16]",
        "model.head={kind: ple, experts: 2, hidden: 8, calibration: true}", "train.global_batch_size=64",
        "train.steps=40", "train.validate_every=20", "train.optimizer.learning_rate=0.02", "data.split.by=random",
        f"data.cache={tmp_path / 'data'}", f"output.directory={tmp_path / 'run'}", "output.tensorboard=false",
        "output.loss_curve=false", "train.peak_tflops=1.0"])
    figures = run(settings)
    assert figures["xauc_watch"] > 0.8 and figures["auc"] > 0.6 and 0.0 < figures["ne_buy"] < 1.5
    engine = Engine(load(tmp_path / "run"), EngineSettings(candidates=[8]))
    ids = np.array([[7 + 2, 3 + 2 + engine.trained.spec.slots["item"].offset]], np.int32)
    scores = engine.scorer.score([(ids, np.zeros((1, 1), np.float32))])[0]
    assert scores[0, 1] <= scores[0, 0] and scores[0, 2] > -1.0
    service = Service(engine, ServeSettings(fusion="buy * watch ** 2"), tmp_path / "run")
    first, second, third = service._ranking(np.array([[0.9, 0.1, 1.0], [0.2, 0.1, 3.0], [0.3, 0.0, -np.inf]]), 3)
    assert (first["candidate"], second["candidate"], third["candidate"]) == (1, 0, 2)
    assert first["score"] == pytest.approx(0.9) and third["score"] is None and first["scores"]["watch"] == 3.0
