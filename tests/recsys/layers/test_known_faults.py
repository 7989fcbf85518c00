"""Faults that other rankers of this kind were found to have, each as a law of this project: a router without a gradient
of the task where one expert is chosen, experts as wide as the dense network, loads that are balanced over all tokens
together while each token's samples crowd on one expert, start values that depend on how weights are stacked."""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from parallel.__main__ import VERBS as PARALLEL_VERBS
from parallel.common.command import main
from parallel.layers.experts.moe import SparsePertokenMoE
from parallel.layers.grouped import GroupedLinear, GroupedSwiGLU
from parallel.layers.parameter import initialize
from parallel.task import load_run
from recsys.__main__ import VERBS
from recsys.build import loss_network, sample_batch, spec_of
from recsys.data.log import prepare
from recsys.saved_model import load

pytestmark = pytest.mark.usefixtures("pynative")


def test_every_router_learns_from_the_task_where_one_expert_is_chosen():
    """Of the whole model's loss, without any balance term."""
    _, settings = load_run("configs/recsys/tokenmixer_large_moe.yaml", [
        "model.moe.experts=4", "model.moe.active=2", "model.layers=2", "model.width=16", "model.ratio=2.0",
        "model.down_gain=1.0", "model.auxiliary_weight=0", "model.embedding_std=1.0"])
    spec = spec_of(settings)
    network = loss_network(settings, spec, 1)
    initialize(network, 1)
    parameters = list(network.trainable_params())
    batch = [Tensor(array) for array in sample_batch(spec, 64, 1, 1)]
    gradients = ops.grad(network, None, parameters)(*batch)
    routers = {p.name: g.asnumpy() for p, g in zip(parameters, gradients, strict=True) if "router" in p.name}
    assert len(routers) == 4
    for name, gradient in routers.items():
        assert (np.abs(gradient).max(axis=(1, 2)) > 0).all(), f"{name}: a token's router has no gradient"


@pytest.mark.parametrize("experts", [2, 4, 8])
def test_experts_together_are_the_dense_network(experts):
    dense = GroupedSwiGLU(3, 16, 32)
    sparse = SparsePertokenMoE(3, 16, 32, experts=experts, active=2)
    size = sum(p.size for p in dense.get_parameters())
    routers = sparse.router.weight.size
    assert sum(p.size for p in sparse.get_parameters()) - routers == size
    assert sparse.gate_weight.shape == (3, experts - 1, 16, 32 // experts)


def test_balance_is_refused_where_its_loss_would_have_to_pass_between_stages(capsys):
    words = ["dryrun", "--config", "configs/recsys/tokenmixer_large_moe.yaml", "parallel.pipeline.stages=2",
             "model.moe.balance=0.1"]
    assert main("parallel", PARALLEL_VERBS, words) == 2
    assert "error: model.moe.balance: the loss that balances loads" in capsys.readouterr().err


def test_tokens_that_crowd_on_different_experts_are_not_balanced():
    """Token 0 takes expert 0 and token 1 expert 1: over all tokens together both experts have half of the samples."""
    moe = SparsePertokenMoE(2, 8, 24, experts=3, active=2)
    initialize(moe, 1)
    x = Tensor((1.0 + np.random.default_rng(1).random((2, 64, 8))).astype(np.float32))

    def lean(*by_token: tuple[float, float]) -> float:
        moe.router.weight.set_data(Tensor(np.repeat(np.array(by_token, np.float32)[:, None], 8, 1)))
        return float(moe.balance(x).asnumpy())

    crowded = lean((1.0, 0.0), (0.0, 1.0))
    assert crowded == pytest.approx(2.0, abs=1e-3) == lean((1.0, 0.0), (1.0, 0.0))
    assert lean((0.1, 0.0), (0.0, 0.1)) < 1.8
    lean((0.1, 0.0), (0.0, 0.1))
    gradient = ops.grad(lambda: moe.balance(x), None, moe.router.weight)().asnumpy().sum(1)
    # Each token is drawn away from the expert that it crowds on.
    assert gradient[0, 0] > 1e-3 > -1e-3 > gradient[0, 1] and gradient[1, 1] > 1e-3 > -1e-3 > gradient[1, 0]
    even = Tensor(np.concatenate([x.asnumpy(), -x.asnumpy()], 1))
    moe.router.weight.set_data(Tensor(np.repeat(np.array([(1.0, 0.0), (0.0, 1.0)], np.float32)[:, None], 8, 1)))
    assert float(moe.balance(even).asnumpy()) == pytest.approx(1.0, abs=1e-3)


def loads_of(folder, balance: float) -> list[np.ndarray]:
    """Shares of the samples [T, R] that every token's experts get in each network of a run by the command."""
    words = ["--config", "configs/recsys/tokenmixer_large_moe.yaml", "model.moe.experts=4", "model.moe.active=2",
             "model.width=16", "model.ratio=2.0", f"model.moe.balance={balance}", "data.synthetic.samples=6000",
             "data.synthetic.users=200", "data.synthetic.items=100", "train.global_batch_size=128", "train.steps=45",
             "train.validate_every=45", f"output.directory={folder / str(balance)}", f"data.cache={folder / 'data'}",
             "output.tensorboard=false", "output.loss_curve=false", "train.peak_tflops=1"]
    assert main("recsys", VERBS, ["train", *words]) == 0
    _, settings = load_run(words[1], words[2:])
    rows = prepare(settings.data, settings.model.embedding_size).parts["test"]
    model, loads = load(folder / str(balance)).model, []

    def look(cell, inputs):
        chosen_TBA = cell.route(inputs[0])[1].asnumpy()
        loads.append(np.stack([np.bincount(own.reshape(-1), minlength=3) / own.size for own in chosen_TBA]))

    for _, cell in model.cells_and_names():
        if isinstance(cell, SparsePertokenMoE):
            cell.register_forward_pre_hook(look)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    model(Tensor(np.asarray(rows.ids[:512])), Tensor(np.asarray(rows.numbers[:512])))
    return loads


@pytest.mark.slow
def test_balance_spreads_every_tokens_samples_in_a_run(tmp_path):
    crowded, spread = loads_of(tmp_path, 0.0), loads_of(tmp_path, 0.2)
    assert len(crowded) == len(spread) == 4
    largest = [np.mean([load.max(1) for load in loads]) for loads in (crowded, spread)]
    assert largest[0] > 0.6 and largest[1] < 0.5, largest


@pytest.mark.parametrize(("tokens", "experts"), [(2, 2), (16, 2), (2, 8), (16, 8)])
def test_start_values_do_not_know_how_weights_are_stacked(tokens, experts):
    """The spread is Xavier's of one matrix [D, F], whatever the number of tokens and experts before it."""
    sparse = SparsePertokenMoE(tokens, 64, 512, experts=experts, active=2, down_gain=1.0)
    initialize(sparse, 1)
    inner = 512 // experts
    for weight in (sparse.gate_weight, sparse.up_weight, sparse.down_weight):
        assert weight.asnumpy().std() == pytest.approx(math.sqrt(2.0 / (64 + inner)), rel=0.05)
    linear = GroupedLinear(tokens, 64, 128)
    initialize(linear, 1)
    assert linear.weight.asnumpy().std() == pytest.approx(math.sqrt(2.0 / (64 + 128)), rel=0.05)
