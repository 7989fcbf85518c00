"""Blocks of the rankers against NumPy, and their laws."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from parallel.common.errors import UserError
from parallel.layers.experts.moe import SparsePertokenMoE
from parallel.layers.experts.relu_moe import ReluMoE
from parallel.layers.grouped import GroupedFeedForward, GroupedSwiGLU, TokenLayout
from parallel.layers.norm import LayerNorm, RMSNorm
from parallel.layers.parameter import initialize
from parallel.training.optimizers.budget import BudgetFactors
from recsys.layers.mixing import TokenMixing
from recsys.models.rankmixer.model import RankMixerBlock, RankMixerSettings, ReluMoESettings
from recsys.models.tokenmixer_large.model import SparseMoESettings, TokenMixerBlock, TokenMixerLargeSettings

BATCH = 6
LAYOUT = TokenLayout()


pytestmark = pytest.mark.usefixtures("pynative")


def made(cell, seed=0):
    """`cell` with start values, all of them moved away from 0 and 1 so that each parameter matters."""
    initialize(cell, seed)
    generator = np.random.default_rng(seed)
    for p in cell.get_parameters():
        if p.requires_grad:
            p.set_data(Tensor(p.asnumpy() + 0.1 * generator.standard_normal(p.shape).astype(np.float32)))
    return cell


def stream(tokens, width, seed=1):
    return np.random.default_rng(seed).standard_normal((tokens, BATCH, width)).astype(np.float32)


def values(cell):
    return {p.name: p.asnumpy().astype(np.float64) for p in cell.get_parameters()}


def mix(x, heads):
    tokens, batch, width = x.shape
    parts = [[x[t][:, h * (width // heads):(h + 1) * (width // heads)] for t in range(tokens)] for h in range(heads)]
    return np.stack([np.concatenate(row, 1) for row in parts])


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm(x, p, name):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * p[f"{name}.gamma"] + p[f"{name}.beta"]


def rms_norm(x, p, name):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * p[f"{name}.gamma"]


def swiglu(x, p, name=""):
    out = []
    for t in range(len(x)):
        g = x[t] @ p[f"{name}gate.weight"][t]
        out.append((g / (1 + np.exp(-g)) * (x[t] @ p[f"{name}up.weight"][t])) @ p[f"{name}down.weight"][t])
    return np.stack(out)


def close(actual, wanted, tolerance=1e-5):
    assert np.abs(actual.asnumpy() - wanted).max() <= tolerance * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize(("tokens", "heads"), [(4, 4), (4, 2), (3, 6)])
def test_mixing_is_the_loop_of_the_paper_and_reverting_its_inverse(tokens, heads):
    x = stream(tokens, 12)
    mixed = TokenMixing(tokens, heads, 12)(Tensor(x))
    assert np.array_equal(mixed.asnumpy(), mix(x, heads))
    back = TokenMixing(tokens, heads, 12, reverting=True)(mixed)
    assert np.array_equal(back.asnumpy(), x)
    if tokens == heads:
        assert np.array_equal(TokenMixing(tokens, heads, 12)(mixed).asnumpy(), x)


def test_rankmixer_block_equals_numpy():
    block = made(RankMixerBlock(RankMixerSettings(tokens=4, width=12, ffn_ratio=2), LAYOUT, ms.float32))
    x, p = stream(4, 12), values(block)
    s = layer_norm(mix(x, 4) + x, p, "norm1")
    v = np.stack([gelu(s[t] @ p["network.mapping.weight"][t] + p["network.mapping.bias"][t])
                  @ p["network.projection.weight"][t] + p["network.projection.bias"][t] for t in range(4)])
    y, penalty = block(Tensor(x))
    close(y, layer_norm(v + s, p, "norm2"))
    assert penalty == 0.0


@pytest.mark.parametrize(("variant", "inner"), [("figure_prenorm", False), ("figure_prenorm", True),
                                                ("equation_prenorm", False), ("equation_postnorm", False)])
def test_tokenmixer_block_equals_numpy(variant, inner):
    tokens, heads, width = 4, 2, 12
    settings = TokenMixerLargeSettings(width=width, ratio=2, block_variant=variant, inner_residual=inner, down_gain=1.0)
    block = made(TokenMixerBlock(settings, tokens, heads, LAYOUT, ms.float32))
    x, p = stream(tokens, width), values(block)
    if variant == "figure_prenorm":
        h = mix(rms_norm(x, p, "norm1"), heads)
        h = h + swiglu(rms_norm(h, p, "inner_norm"), p, "first.") if inner else swiglu(h, p, "first.")
        x2 = x + mix(h, tokens)
        wanted = x2 + swiglu(rms_norm(x2, p, "norm2"), p, "second.")
    elif variant == "equation_prenorm":
        h = mix(x, heads)
        h = h + swiglu(rms_norm(h, p, "norm1"), p, "first.")
        wanted = x + swiglu(rms_norm(mix(h, tokens), p, "norm2"), p, "second.")
    else:
        h = mix(x, heads)
        h = rms_norm(swiglu(h, p, "first.") + h, p, "norm1")
        wanted = rms_norm(swiglu(mix(h, tokens), p, "second.") + x, p, "norm2")
    y, penalty = block(Tensor(x))
    close(y, wanted)
    assert penalty == 0.0


def numpy_moe(x, p, chosen, alpha):
    """Sparse-Pertoken MoE sample by sample; also which experts were chosen."""
    out, picks = swiglu(x, p, "shared."), []
    for t in range(x.shape[0]):
        for b in range(x.shape[1]):
            logits = x[t, b] @ p["router.weight"][t]
            gates = np.exp(logits - logits.max())
            gates /= gates.sum()
            best = np.argsort(-gates)[:chosen]
            weights = gates[best] / gates[best].sum() if chosen >= 2 else gates[best]
            picks.append(best)
            for expert, weight in zip(best, weights, strict=True):
                g = x[t, b] @ p["gate_weight"][t, expert]
                hidden = g / (1 + np.exp(-g)) * (x[t, b] @ p["up_weight"][t, expert])
                out[t, b] += alpha * weight * (hidden @ p["down_weight"][t, expert])
    return out, picks


@pytest.mark.parametrize("active", [2, 3])
@pytest.mark.parametrize("dispatch", ["grouped", "capacity", "dropless"])
def test_sparse_pertoken_moe_equals_numpy(active, dispatch):
    moe = made(SparsePertokenMoE(3, 8, 16, experts=4, active=active, dispatch=dispatch, capacity_factor=3.0,
                                 down_gain=1.0))
    x = stream(3, 8)
    wanted, picks = numpy_moe(x.astype(np.float64), values(moe), active - 1, 4 / active)
    close(moe(Tensor(x)), wanted)
    assert len(np.unique(np.concatenate(picks))) == 3


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_capacity_leaves_out_what_does_not_fit(dispatch):
    moe = made(SparsePertokenMoE(1, 8, 18, experts=3, active=2, dispatch=dispatch, capacity_factor=0.5,
                                 down_gain=1.0))
    x = np.abs(stream(1, 8))
    moe.router.weight.set_data(Tensor(np.array([[[1.0, -1.0]] * 8], np.float32)))
    shared = swiglu(x.astype(np.float64), values(moe), "shared.")
    exact, _ = numpy_moe(x.astype(np.float64), values(moe), 1, 3 / 2)
    close(moe(Tensor(x)), exact)  # nothing is left out in inference
    routed = moe.set_train()(Tensor(x)).asnumpy() - shared
    capacity = 2  # ceil(0.5 x 6 rows / 2 experts), and every row wants expert 0
    assert np.abs(routed[0, :capacity]).max(axis=1).min() > 1e-3
    assert np.abs(routed[0, capacity:]).max() < 1e-5


def test_python_on_the_host_is_refused_on_a_device(monkeypatch):
    monkeypatch.setattr(ms, "get_context", lambda key: "Ascend")
    assert SparsePertokenMoE(1, 8, 18, experts=3, active=2).dispatch == "capacity"
    assert SparsePertokenMoE(1, 8, 18, experts=3, active=2, compute_dtype=ms.bfloat16).dispatch == "dropless"
    with pytest.raises(UserError, match="model.moe.dispatch: grouped dispatch runs Python on the host"):
        SparsePertokenMoE(1, 8, 18, experts=3, active=2, dispatch="grouped")


@pytest.mark.parametrize("active", [2, 4])
def test_routers_get_a_gradient(active):
    moe = made(SparsePertokenMoE(3, 8, 16, experts=4, active=active, down_gain=1.0))
    weights = ms.ParameterTuple(moe.trainable_params())
    gradients = ops.grad(lambda x: ops.square(moe(x)).sum(), None, weights)(Tensor(stream(3, 8)))
    for parameter, gradient in zip(weights, gradients, strict=True):
        assert np.abs(gradient.asnumpy()).max() > 0, parameter.name
    router = next(g for p, g in zip(weights, gradients, strict=True) if p.name == "router.weight").asnumpy()
    assert (np.abs(router).max(axis=(1, 2)) > 1e-4).all()


def split_dense(gate, up, down, experts):
    """A dense SwiGLU's matrices ([T, D, F], [T, D, F], [T, F, D]) split into E sub-experts: first enlarge, then sparse.

    Returns the values of a `SparsePertokenMoE`'s parameters by name; its router is 0, so all chosen gates are equal,
    and with every expert active and alpha = E - 1 the outputs are those of the dense network.
    """
    tokens, width, inner = gate.shape
    part = inner // experts

    def columns(weight):
        return weight.reshape(tokens, width, experts, part).transpose(0, 2, 1, 3)

    gates, ups, downs = columns(gate), columns(up), down.reshape(tokens, experts, part, width)
    return {"shared.gate.weight": gates[:, 0], "shared.up.weight": ups[:, 0], "shared.down.weight": downs[:, 0],
            "gate_weight": gates[:, 1:], "up_weight": ups[:, 1:], "down_weight": downs[:, 1:],
            "router.weight": np.zeros((tokens, width, experts - 1), gate.dtype)}


@pytest.mark.parametrize("experts", [2, 4])
def test_a_dense_network_split_into_experts_gives_equal_outputs_with_all_on(experts):
    dense = made(GroupedSwiGLU(3, 8, 16, down_gain=1.0))
    sparse = SparsePertokenMoE(3, 8, 16, experts=experts, active=experts, alpha=experts - 1.0)
    values = split_dense(*(getattr(dense, name).weight.asnumpy() for name in ("gate", "up", "down")), experts)
    for p in sparse.get_parameters():
        p.set_data(Tensor(values.pop(p.name)))
    assert not values
    x = Tensor(stream(3, 8))
    close(sparse(x), dense(x).asnumpy().astype(np.float64), 2e-6)


def test_gradients_of_the_grouped_product_equal_the_capacity_path():
    results = []
    for dispatch in ("grouped", "capacity"):
        moe = made(SparsePertokenMoE(2, 8, 16, experts=4, active=3, dispatch=dispatch, capacity_factor=3.0))
        weights = ms.ParameterTuple(moe.trainable_params())
        run = ops.grad(lambda x, moe=moe: (moe(x) * Tensor(stream(2, 8, 5))).sum(), 0, weights)
        dx, dw = run(Tensor(stream(2, 8)))
        results.append([dx.asnumpy().copy(), *(g.asnumpy().copy() for g in dw)])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_relu_moe_equals_numpy_and_both_routers_learn():
    moe = made(ReluMoE(2, 8, 16, experts=4, router="dtsi", budget=0.5, penalty=0.25, penalty_step=2.0))
    x, p = stream(2, 8), values(moe)

    def gates(name):
        return np.maximum(np.einsum("tbd,tde->tbe", x, p[f"{name}.weight"]) + p[f"{name}.bias"], 0)

    def mixed(gate):
        hidden = gelu(np.einsum("tbd,tdf->tbf", x, p["mapping.weight"]) + p["mapping.bias"]).reshape(2, BATCH, 4, 4)
        down = p["projection.weight"].reshape(2, 4, 4, 8)
        return np.einsum("tbe,tbef,tefd->tbd", gate, hidden, down) + np.einsum("tbe,ted->tbd", gate, p["expert_bias"])

    moe.set_train()
    y, penalty = moe(Tensor(x))
    close(y, mixed((gates("train_router") + gates("infer_router")) / 2))
    assert penalty.asnumpy() == pytest.approx(p["factor"] * gates("infer_router").sum() / BATCH, rel=1e-5)
    used = (gates("infer_router") > 0).mean()
    toward = ops.grad(lambda s: moe(s)[1], None, ms.ParameterTuple([moe.factor]))(Tensor(x))[0]
    assert toward.asnumpy() == pytest.approx(used - 0.5, abs=1e-6)
    BudgetFactors([moe.factor])((toward,), Tensor(0.1), Tensor(0))
    assert moe.factor.asnumpy() == pytest.approx(p["factor"] * (2.0 if used > 0.5 else 0.5))
    weights = ms.ParameterTuple([item for item in moe.trainable_params() if item is not moe.factor])
    gradients = ops.grad(lambda s: ops.square(moe(s)[0]).sum(), None, weights)(Tensor(x))
    for parameter, gradient in zip(weights, gradients, strict=True):
        assert np.abs(gradient.asnumpy()).max() > 0, parameter.name
    moe.set_train(False)
    y, penalty = moe(Tensor(x))
    close(y, mixed(gates("infer_router")))
    assert float(penalty) == 0.0


def test_near_identity_at_the_start():
    block = TokenMixerBlock(TokenMixerLargeSettings(width=32, ratio=2), 4, 4, LAYOUT, ms.float32)
    initialize(block, 3)
    x = stream(4, 32)
    moved = block(Tensor(x))[0].asnumpy() - x
    assert 0 < np.square(moved).mean() < 1e-3


def test_experts_also_stand_in_blocks():
    settings = TokenMixerLargeSettings(width=16, ratio=2, moe=SparseMoESettings(experts=4, active=2))
    block = made(TokenMixerBlock(settings, 4, 2, LAYOUT, ms.float32))
    assert block(Tensor(stream(4, 16)))[0].shape == (4, BATCH, 16)
    settings = RankMixerSettings(tokens=4, width=16, moe=ReluMoESettings(router="single_relu"))
    y, _ = made(RankMixerBlock(settings, LAYOUT, ms.float32))(Tensor(stream(4, 16)))
    assert y.shape == (4, BATCH, 16)


def test_norms_and_feed_forward_equal_numpy():
    x = stream(3, 8)
    for cell, oracle in ((LayerNorm(8), layer_norm), (RMSNorm(8), rms_norm)):
        holder = nn.CellList([made(cell)])
        close(cell(Tensor(x)), oracle(x, {p.name: p.asnumpy() for p in holder.get_parameters()}, "0"))
    network = made(GroupedFeedForward(3, 8, 16))
    p = values(network)
    wanted = gelu(x @ p["mapping.weight"] + p["mapping.bias"]) @ p["projection.weight"] + p["projection.bias"]
    close(network(Tensor(x)), wanted)
