"""Optimizers against a NumPy oracle in float64, three steps each, in one graph; schedules against formulas."""

import math

import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from parallel.common.errors import UserError
from parallel.training.optimizers.dense import Adam, is_decayed
from parallel.training.optimizers.run import Optimizer
from parallel.training.schedules import LearningRate
from parallel.training.settings import OptimizerSettings, ScheduleSettings

STEPS, RATE = 3, 0.05
SHAPES = {"dense.weight": (4, 3), "dense.bias": (3,), "layernorm1.gamma": (4,)}
CASES = {
    "adamw": {"name": "adamw", "weight_decay": 0.1, "epsilon": 1e-3},
    "adamw_release": {"name": "adamw", "weight_decay": 0.1, "bias_correction": False},
    "adamw_half": {"name": "adamw", "weight_decay": 0.1},
    "adam": {"name": "adam", "weight_decay": 0.0, "betas": (0.8, 0.9)},
    "lamb": {"name": "lamb", "weight_decay": 0.1},
    "adagrad": {"name": "adagrad", "initial_accumulator": 0.1, "epsilon": 1e-7},
    "rmsprop": {"name": "rmsprop", "epsilon": 1e-7},
    "rmsprop_momentum": {"name": "rmsprop", "momentum": 0.7, "decay": 0.8},
}


def rate_at(step):
    return RATE * step / 4 if step < 4 else RATE


def own_settings(case):
    schedule = ScheduleSettings(name="constant", warmup_steps=4)
    return OptimizerSettings(learning_rate=RATE, schedule=schedule, **CASES[case])


def start(case):
    rng = np.random.default_rng(0)
    dtype = np.float16 if case == "adamw_half" else np.float32
    return {f"{case}.{name}": rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def gradients(step):
    rng = np.random.default_rng(100 + step)
    return [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES.values()]


class Update(nn.Cell):
    """All optimizers at once: one compile for the whole file."""

    def __init__(self, optimizers):
        super().__init__(auto_prefix=False)
        self.optimizers = nn.CellList(optimizers, auto_prefix=False)

    def construct(self, step, *gradients):
        rates = ()
        for optimizer in self.optimizers:
            rates = rates + (optimizer(gradients, step),)
        return rates


@pytest.fixture(scope="module")
def updated():
    parameters = {case: [Parameter(Tensor(v), name=k) for k, v in start(case).items()] for case in CASES}
    optimizers = {case: Optimizer(parameters[case], own_settings(case), 10) for case in CASES}
    update = Update(list(optimizers.values()))
    rates = []
    for step in range(1, STEPS + 1):
        rates.append([float(r.asnumpy()) for r in update(Tensor(np.int32(step)), *map(Tensor, gradients(step)))])
    return parameters, optimizers, rates


def oracle(case):
    """Parameters after STEPS steps, counted from step 1 (the warm-up's rate at step 0 is 0)."""
    own, result = own_settings(case), []
    for i, (name, value) in enumerate(start(case).items()):
        p = value.astype(np.float64)
        m, v, u = np.zeros_like(p), np.full_like(p, own.initial_accumulator if own.name == "adagrad" else 0.0), 0.0
        decay = own.weight_decay if name.endswith("dense.weight") else 0.0
        for step in range(1, STEPS + 1):
            g, rate, t = gradients(step)[i].astype(np.float64), rate_at(step), step + 1
            if own.name in ("adamw", "adam", "lamb"):
                m = own.betas[0] * m + (1 - own.betas[0]) * g
                v = own.betas[1] * v + (1 - own.betas[1]) * g * g
                c1, c2 = (1 - own.betas[0]**t, 1 - own.betas[1]**t) if own.bias_correction else (1.0, 1.0)
                direction = m / c1 / (np.sqrt(v / c2) + own.epsilon) + decay * p
                trust = np.linalg.norm(p) / np.linalg.norm(direction) if own.name == "lamb" else 1.0
                p = p - rate * trust * direction
            elif own.name == "adagrad":
                v = v + g * g
                p = p - rate * g / (np.sqrt(v) + own.epsilon)
            else:
                v = own.decay * v + (1 - own.decay) * g * g
                u = own.momentum * u + g / (np.sqrt(v) + own.epsilon)
                p = p - rate * u
        result.append(p)
    return result


@pytest.mark.parametrize("case", CASES)
def test_three_steps_equal_the_oracle(updated, case):
    tolerance = 3e-3 if case == "adamw_half" else 2e-5
    for parameter, expected in zip(updated[0][case], oracle(case), strict=True):
        assert np.abs(expected - start(case)[parameter.name]).max() > 0.02
        np.testing.assert_allclose(parameter.asnumpy(), expected, rtol=tolerance, atol=tolerance / 10,
                                   err_msg=parameter.name)


def test_states_are_float32_and_named(updated):
    states = updated[1]["adamw_half"].states()
    assert sorted(s.name for s in states) == sorted(f"{k}.adamw_half.{n}" for k in ("adam_m", "adam_v") for n in SHAPES)
    assert all(s.asnumpy().dtype == np.float32 and not s.requires_grad for s in states)
    assert [s.name for s in updated[1]["rmsprop"].states()] == [f"rmsprop_s.rmsprop.{n}" for n in SHAPES]


def test_rates_follow_the_warmup(updated):
    np.testing.assert_allclose(updated[2], [[rate_at(step)] * len(CASES) for step in (1, 2, 3)], rtol=1e-6)


@pytest.mark.parametrize(("name", "decayed"), [
    ("backbone.blocks.0.attention.dense1.weight", True), ("backbone.word_embedding.embedding_table", True),
    ("backbone.blocks.0.layernorm1.gamma", False), ("query_layer.norm1.beta", False), ("norm.gamma", False),
    ("feed_forward.mapping.bias", False), ("x.gamma", False), ("tower.normal_weight", True),
])
def test_no_decay_filter(name, decayed):
    assert is_decayed(name) is decayed


def test_groups_give_each_parameter_its_optimizer():
    names = ("table.user", "tower.weight", "table.item")
    parameters = [Parameter(Tensor(np.ones((2, 2), np.float32)), name=name) for name in names]
    flat = ScheduleSettings(name="constant", warmup_steps=0)
    sparse = OptimizerSettings(name="adagrad", learning_rate=0.5, schedule=flat)
    dense = OptimizerSettings(name="rmsprop", learning_rate=0.25, schedule=flat)
    optimizer = Optimizer(parameters, dense, 10, [(lambda p: p.name.startswith("table."), sparse)])
    states = {"rmsprop_s.tower.weight", "adagrad_a.table.user", "adagrad_a.table.item"}
    assert {state.name for state in optimizer.states()} == states
    rate = optimizer(tuple(Tensor(np.full((2, 2), g, np.float32)) for g in (1.0, -2.0, 4.0)), Tensor(np.int32(0)))
    assert float(rate.asnumpy()) == 0.25
    got = [parameter.asnumpy()[0, 0] for parameter in parameters]
    np.testing.assert_allclose(got, [1 - 0.5, 1 + 0.25 / math.sqrt(0.1), 1 - 0.5], rtol=1e-5)


def test_schedules():
    def expected(name, step, decay=50, warmup=8, peak=2e-3, end=1e-4):
        if step < warmup:
            return peak * step / warmup
        x = min(step, decay) / decay
        return {"cosine": end + 0.5 * (peak - end) * (1 + math.cos(math.pi * x)),
                "linear": end + (peak - end) * (1 - x), "constant": peak}[name]

    class All(nn.Cell):
        def __init__(self):
            super().__init__()
            schedules = [ScheduleSettings(name=n, warmup_steps=8, decay_steps=d, end_learning_rate=1e-4)
                         for n in ("cosine", "linear", "constant") for d in (50, None)]
            own = [OptimizerSettings(learning_rate=2e-3, schedule=schedule) for schedule in schedules]
            self.rates = nn.CellList([LearningRate(settings, 40) for settings in own])

        def construct(self, step):
            rates = ()
            for rate in self.rates:
                rates = rates + (rate(step),)
            return rates

    rates = All()
    for step in (0, 1, 7, 8, 9, 30, 45, 50, 900):
        got = [float(r.asnumpy()) for r in rates(Tensor(np.int32(step)))]
        wanted = [expected(n, step, d) for n in ("cosine", "linear", "constant") for d in (50, 40)]
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-10)


def test_bad_settings():
    with pytest.raises(UserError, match="no decoupled weight decay"):
        Adam([], OptimizerSettings(name="adam", weight_decay=0.1))
    with pytest.raises(UserError, match="betas"):
        OptimizerSettings(betas=(0.9, 1.0))
    with pytest.raises(UserError, match="no trainable parameter"):
        Optimizer([], OptimizerSettings(), 10)
    with pytest.raises(UserError, match="ends above its start"):
        OptimizerSettings(learning_rate=1e-5, schedule=ScheduleSettings(end_learning_rate=1e-4))
