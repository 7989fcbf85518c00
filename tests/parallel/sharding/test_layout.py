"""Layers say which named axis shards each dim; the strategies that follow are those of PanGu-alpha's code."""

from __future__ import annotations

import pytest
from mindspore.nn.utils import no_init_parameters

from pangu.config import ModelConfig
from pangu.model import PanGuAlpha, TrainingLoss
from parallel.sharding.config import ParallelConfig
from parallel.sharding.layout import Layer, apply_sharding

DATA, OP = 4, 2


@pytest.fixture(scope="module")
def network():
    with no_init_parameters():
        network = TrainingLoss(PanGuAlpha(ModelConfig(layers=2, hidden_size=16, heads=2, vocabulary_size=32,
                                                      sequence_length=8)))
    return apply_sharding(network, ParallelConfig(data=DATA, op=OP))


def test_strategies_of_the_released_code(network):
    layer = network.model.layers[0]
    attention, core, ffn = layer.attention, layer.attention.core, layer.feed_forward
    expected = {
        attention.query.matmul: ((DATA, 1), (OP, 1)),
        attention.query.add: ((DATA, OP), (OP,)),
        attention.output.matmul: ((DATA, OP), (1, OP)),
        attention.output.add: ((DATA, 1), (1,)),
        attention.split_heads: ((DATA, 1, OP, 1),),
        core.scores: ((DATA, OP, 1, 1), (DATA, OP, 1, 1)),
        core.mask: ((DATA, OP, 1, 1), (DATA, 1, 1, 1)),
        core.softmax: ((DATA, OP, 1, 1),),
        ffn.mapping.matmul: ((DATA, 1), (OP, 1)),
        ffn.projection.matmul: ((DATA, OP), (1, OP)),
        layer.norm1.normalise: ((DATA, 1), (1,), (1,)),
        layer.add1.add: ((DATA, 1), (DATA, 1)),
        network.model.embedding.word.gather: ((OP, 1), (DATA, 1)),
        network.model.embedding.position.gather: ((1, 1), (DATA, 1)),
        network.model.head.matmul: ((DATA, 1), (OP, 1)),
        network.cross_entropy.exp: ((DATA, OP),),
    }
    for primitive, strategy in expected.items():
        assert primitive.attrs["in_strategy"] == strategy, primitive


def test_norms_and_biases_after_a_sum_stay_unsharded_under_optimizer_sharding(network):
    full = {name for name, item in network.parameters_and_names() if not item.parallel_optimizer}
    for name, _ in network.parameters_and_names():
        expected = ".norm" in f".{name}" or name.endswith(("output.bias", "projection.bias", "table"))
        assert (name in full) == expected, name


def test_sequence_parallelism_shards_the_residual_stream_over_both_axes(network):
    with no_init_parameters():
        other = PanGuAlpha(ModelConfig(layers=2, hidden_size=16, heads=2, vocabulary_size=32, sequence_length=8))
    apply_sharding(other, ParallelConfig(data=DATA, op=OP, sequence=True))
    layer = other.layers[0]
    assert layer.norm1.normalise.attrs["in_strategy"] == ((DATA * OP, 1), (1,), (1,))
    assert layer.attention.output.matmul.attrs["out_strategy"] == ((DATA * OP, 1),)


def test_every_primitive_of_a_layer_with_tensors_has_a_layout(network):
    """A primitive without a strategy is placed by MindSpore's guess; only those that follow their input may be."""
    from mindspore import ops

    followers = {"Cast", "Reshape", "Shape"}
    for name, cell in network.cells_and_names():
        if not isinstance(cell, Layer):
            continue
        declared = {id(item.primitive) for item in cell.sharding()}
        for primitive in cell._primitives.values():
            if isinstance(primitive, ops.Primitive) and primitive.name not in followers:
                assert id(primitive) in declared, f"{name}: {primitive.name}"
