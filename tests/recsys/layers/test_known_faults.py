"""Faults that other rankers of this kind were found to have, each as a law of this project: a router without a gradient
of the task where one expert is chosen, experts as wide as the dense network, start values that depend on how weights
are stacked."""

from __future__ import annotations

import math

import numpy as np
import pytest
from mindspore import Tensor, ops

from parallel.layers.grouped import GroupedLinear, GroupedSwiGLU
from parallel.layers.moe import SparsePertokenMoE
from parallel.layers.parameter import initialize
from parallel.task import load_run
from recsys.build import loss_network, sample_batch, spec_of

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
