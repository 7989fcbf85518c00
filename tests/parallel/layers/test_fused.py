"""The C++ primitives of the per-token networks and norms equal the plain operations, forward and backward."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from parallel.layers import fused
from parallel.layers.experts.moe import SparsePertokenMoE
from parallel.layers.experts.relu_moe import ReluMoE
from parallel.layers.grouped import GroupedFeedForward, GroupedLinear, GroupedSwiGLU
from parallel.layers.norm import LayerNorm, RMSNorm
from parallel.layers.parameter import initialize
from parallel.training.optimizers.run import Optimizer
from parallel.training.settings import OptimizerSettings, TrainSettings
from parallel.training.step import TrainStep

TOKENS, BATCH, WIDTH, INNER = 3, 300, 16, 48  # more rows than a block has
RELU = {"router": "dtsi", "budget": 0.5, "penalty": 1e-8, "penalty_step": 1.2}
NETWORKS = {
    "linear": lambda: GroupedLinear(TOKENS, WIDTH, 24),
    "linear_without_bias": lambda: GroupedLinear(TOKENS, WIDTH, 5, bias=False),
    "feed_forward": lambda: GroupedFeedForward(TOKENS, WIDTH, INNER),
    "feed_forward_narrower": lambda: GroupedFeedForward(TOKENS, WIDTH, INNER, outputs=12),
    "swiglu": lambda: GroupedSwiGLU(TOKENS, WIDTH, INNER, down_gain=1.0),
    "sparse_two_of_six": lambda: SparsePertokenMoE(TOKENS, WIDTH, INNER, experts=6, active=3, down_gain=1.0),
    "sparse_one_of_three": lambda: SparsePertokenMoE(TOKENS, WIDTH, INNER, experts=4, active=2, down_gain=1.0),
    "sparse_all": lambda: SparsePertokenMoE(TOKENS, WIDTH, INNER, experts=4, active=4, down_gain=1.0, outputs=20),
    "relu_experts": lambda: ReluMoE(TOKENS, WIDTH, INNER, experts=4, **RELU),
    # Wider and deeper than a panel of the kernels, and no multiple of a tile.
    "relu_experts_wide": lambda: ReluMoE(TOKENS, WIDTH, 4 * 290, experts=4, outputs=21, **RELU),
    "relu_experts_far": lambda: ReluMoE(TOKENS, WIDTH, 4 * 8200, experts=4, **RELU),  # oneDNN's products
    "layer_norm": lambda: LayerNorm(WIDTH),
    "rms_norm": lambda: RMSNorm(WIDTH),
}

pytestmark = pytest.mark.skipif(fused.library(ms.float32) is None, reason="no C++ compiler, or no oneDNN")


class Weighed(nn.Cell):
    """A scalar that depends on every output differently."""

    def __init__(self, network: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.sum = network, ops.ReduceSum()

    def construct(self, x, weights):
        y = self.network(x)
        if isinstance(y, tuple):
            y = y[0]
        return self.sum(y * weights)


def pair(name, monkeypatch):
    """(fused, plain) networks with the same parameters, none of them at 0."""
    one = NETWORKS[name]()
    monkeypatch.setenv("PANGU_KERNELS", "0")
    other = NETWORKS[name]()
    monkeypatch.delenv("PANGU_KERNELS")
    assert one.fused is not None and other.fused is None
    generator = np.random.default_rng(3)
    for network in (one, other):
        initialize(network, 5)
    for a, b in zip(one.get_parameters(), other.get_parameters(), strict=True):
        moved = Tensor(a.asnumpy() + 0.1 * generator.standard_normal(a.shape).astype(np.float32))
        if a.requires_grad:
            a.set_data(moved), b.set_data(moved)
    if name.startswith("relu_experts"):
        shut(one), shut(other)
    return one, other


def shut(network):
    """Brings the routers to where about half of the gates are shut, one expert's all, and one's none."""
    for router in (network.infer_router, network.train_router):
        bias = np.zeros(router.bias.shape, np.float32)
        bias[:, :, 0], bias[:, :, 1] = -50.0, 50.0
        router.bias.set_data(Tensor(bias))


def results(network, x, training):
    network.set_train(training)
    y = network(x)
    y = y[0] if isinstance(y, tuple) else y
    weights = Tensor(np.random.default_rng(1).standard_normal(y.shape).astype(np.float32))
    full = Weighed(network)
    full.set_train(training)
    parameters = ms.ParameterTuple(network.trainable_params())
    own, rest = ops.grad(full, 0, parameters)(x, weights)
    return {"y": y.asnumpy(), "dx": own.asnumpy(),
            **{p.name: g.asnumpy() for p, g in zip(parameters, rest, strict=True)}}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_primitive_equals_plain_operations(name, training, monkeypatch):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    x = Tensor(np.random.default_rng(0).standard_normal((TOKENS, BATCH, WIDTH)).astype(np.float32) * 2.0)
    one, other = pair(name, monkeypatch)
    ours, theirs = results(one, x, training), results(other, x, training)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        scale = max(1.0, np.abs(value).max())
        np.testing.assert_allclose(ours[key], value, atol=1e-5 * scale, err_msg=key)
        if training and key != "factor":  # whose gradient is 0 where the budget is met
            assert np.abs(value).max() > 0, key


@pytest.mark.parametrize("training", [True, False])
def test_experts_add_up_blocks_of_rows(training, monkeypatch):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    x = Tensor(np.random.default_rng(0).standard_normal((TOKENS, 1100, WIDTH)).astype(np.float32))
    one, other = pair("relu_experts", monkeypatch)
    ours, theirs = results(one, x, training), results(other, x, training)
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, atol=1e-5 * max(1.0, np.abs(value).max()), err_msg=key)


def test_large_inputs_stay_finite(monkeypatch):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    x = Tensor(np.random.default_rng(0).standard_normal((TOKENS, 8, WIDTH)).astype(np.float32) * 1e4)
    for name in ("feed_forward", "swiglu", "sparse_two_of_six"):
        one, other = pair(name, monkeypatch)
        ours, theirs = results(one, x, True), results(other, x, True)
        for key, value in theirs.items():
            assert np.isfinite(ours[key]).all(), (name, key)
            # Behind a saturated softmax dx is a difference of large numbers.
            if name != "sparse_two_of_six" or key == "y":
                np.testing.assert_allclose(ours[key], value, atol=2e-5 * np.abs(value).max(), err_msg=f"{name} {key}")


def test_same_in_one_graph(monkeypatch):
    x = Tensor(np.random.default_rng(0).standard_normal((TOKENS, BATCH, WIDTH)).astype(np.float32))
    one, other = pair("sparse_two_of_six", monkeypatch)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    expected = results(other, x, True)
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        got = results(one, x, True)
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    for key, value in expected.items():
        np.testing.assert_allclose(got[key], value, atol=1e-5 * max(1.0, np.abs(value).max()), err_msg=key)


def test_result_does_not_depend_on_the_run(monkeypatch):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    x = Tensor(np.random.default_rng(0).standard_normal((TOKENS, BATCH, WIDTH)).astype(np.float32))
    for name in ("feed_forward", "relu_experts", "sparse_two_of_six", "layer_norm"):
        one, _ = pair(name, monkeypatch)
        first = results(one, x, True)
        for _ in range(3):
            again = results(one, x, True)
            assert all(np.array_equal(first[key], again[key]) for key in first), name


def test_kernels_are_for_float32_on_the_cpu_only(monkeypatch):
    assert fused.library(ms.float16) is None
    monkeypatch.setenv("PANGU_KERNELS", "0")
    assert fused.library(ms.float32) is None


def test_exchange_and_residual_equal_numpy_with_their_gradients():
    ms.set_context(mode=ms.PYNATIVE_MODE)
    generator = np.random.default_rng(0)
    path = fused.library(ms.float32)
    x, change = (generator.standard_normal(shape).astype(np.float32) for shape in ((3, 150, 4, 5), (4, 150, 3, 5)))
    exchange, add = fused.FusedTokenMix(path), fused.FusedAdd(path)
    assert np.array_equal(exchange(Tensor(x)).asnumpy(), x.transpose(2, 1, 0, 3))
    dx = ops.grad(lambda x: (exchange(x) * Tensor(change)).sum())(Tensor(x))
    assert np.array_equal(dx.asnumpy(), change.transpose(2, 1, 0, 3))
    y = generator.standard_normal(x.shape).astype(np.float32)
    assert np.array_equal(add(Tensor(x), Tensor(y)).asnumpy(), x + y)
    dx, dy = ops.grad(lambda x, y: (add(x, y) * Tensor(y)).sum(), (0, 1))(Tensor(x), Tensor(y))
    assert np.array_equal(dx.asnumpy(), y) and np.allclose(dy.asnumpy(), x + 2 * y, atol=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_training_step_moves_parameters_as_the_plain_one(schedule, monkeypatch):
    class Loss(nn.Cell):
        def __init__(self):
            super().__init__()
            self.network, self.table = GroupedLinear(2, 3, 4), ms.Parameter(Tensor(np.ones((2, 5, 3), np.float32)))

        def construct(self, x):
            return ops.square(self.network(self.table * x)).mean()

    settings = TrainSettings(clip_norm=None)
    own = {"learning_rate": 0.1, "schedule": {"name": schedule, "warmup_steps": 0}}
    x, results = Tensor(np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)), []
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        for kernels in ("1", "0"):
            monkeypatch.setenv("PANGU_KERNELS", kernels)
            loss = Loss()
            initialize(loss, 1)
            groups = [(lambda p: p.name.endswith("table"), OptimizerSettings(name="adamw", weight_decay=0.5, **own))]
            optimizer = Optimizer(loss.trainable_params(), OptimizerSettings(name="adam", weight_decay=0.0, **own), 10,
                                  groups)
            assert all((cell.kernel is not None) == (kernels == "1") for cell in optimizer.cells_of_groups)
            step = TrainStep(loss, optimizer, settings)
            before = {p.name: p.asnumpy().copy() for p in loss.trainable_params()}
            rates = [step(x)[4].asnumpy() for _ in range(3)]
            step(Tensor(np.full(x.shape, np.nan, np.float32)))
            assert step.step.asnumpy() == 3 and step.iteration.asnumpy() == 4
            results.append({p.name: p.asnumpy().copy() for p in [*loss.trainable_params(), *optimizer.states()]})
            assert all(np.abs(results[-1][name] - value).max() > 0.05 for name, value in before.items())
            results[-1]["rates"] = np.array(rates)
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    for name, value in results[1].items():
        np.testing.assert_allclose(results[0][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
