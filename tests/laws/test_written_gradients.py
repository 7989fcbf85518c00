"""Law: the gradients written by hand for the CPU are those that MindSpore derives from the plain composition."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.2])
def test_training_gradients_equal_derived_ones(dropout):
    import mindspore as ms
    from mindspore import ParameterTuple, Tensor, ops
    from mindspore.nn.utils import no_init_parameters

    from pangu.config import ModelConfig
    from pangu.model import PanGuAlpha, TrainingLoss
    from parallel.layers.attention import AttentionCore
    from parallel.layers.dropout import connect_dropout
    from parallel.layers.norm import LayerNorm
    from parallel.layers.parameter import initialize

    ms.set_context(mode=ms.GRAPH_MODE)
    batch, length, vocabulary = 2, 12, 40
    records = np.random.default_rng(0).integers(0, vocabulary, (batch, length + 1)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    mask = np.tile(np.tril(np.ones((length, length), np.float32)), (batch, 1, 1))
    results = []
    for by_hand in (True, False):
        with no_init_parameters():
            model = PanGuAlpha(ModelConfig(
                layers=2, hidden_size=16, heads=2, vocabulary_size=vocabulary, sequence_length=length, dropout=dropout,
                embedding_std=0.5, linear_std=0.4, ffn_std=0.3))
        initialize(model, 7)
        network = TrainingLoss(model)
        connect_dropout(network, 1)
        if not by_hand:
            network.together = network.cross_entropy.full = None
            for _, cell in network.cells_and_names():
                if isinstance(cell, AttentionCore):
                    cell.rows = None
                if isinstance(cell, LayerNorm):
                    cell.written_out = None
        network.set_train(True)
        parameters = network.trainable_params()
        loss, gradients = ops.value_and_grad(network, None, ParameterTuple(parameters))(
            Tensor(records), Tensor(positions), Tensor(mask), Tensor(np.arange(6, 6 + batch, dtype=np.int32)))
        named = {p.name: g.asnumpy() for p, g in zip(parameters, gradients, strict=True)}
        results.append((float(loss.asnumpy()), named))
    (loss, ours), (expected_loss, expected) = results
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert all(np.abs(value).max() > 0 for name, value in expected.items() if not name.endswith("key.bias"))
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, atol=2e-6, err_msg=name)
