"""Cross-entropy: both forms against float64 NumPy, value and gradient."""

import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from parallel.layers.loss import CrossEntropy

N, V = 7, 33


class Gradient(nn.Cell):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss
        self.differentiate = ops.value_and_grad(self.weighted, 0, has_aux=True)

    def weighted(self, logits, labels, weights):
        nll = self.loss(logits, labels)
        return ops.reduce_sum(nll * weights), nll

    def construct(self, logits, labels, weights):
        return self.differentiate(logits, labels, weights)


@pytest.mark.parametrize("written_out", [False, True])
def test_value_and_gradient(written_out):
    rng = np.random.default_rng(0)
    logits_NV = 20 * rng.standard_normal((N, V)).astype(np.float32)
    labels_N, weights_N = rng.integers(0, V, N).astype(np.int32), rng.random(N).astype(np.float32)
    loss = CrossEntropy(V)
    if written_out:
        loss.full = None
    (_, nll_N), gradient_NV = Gradient(loss)(Tensor(logits_NV), Tensor(labels_N), Tensor(weights_N))
    wide_NV = logits_NV.astype(np.float64)
    shifted_NV = wide_NV - wide_NV.max(1, keepdims=True)
    softmax_NV = np.exp(shifted_NV) / np.exp(shifted_NV).sum(1, keepdims=True)
    np.testing.assert_allclose(nll_N.asnumpy(), -np.log(softmax_NV[np.arange(N), labels_N]), rtol=1e-5, atol=1e-6)
    expected_NV = (softmax_NV - np.eye(V)[labels_N]) * weights_N[:, None]
    np.testing.assert_allclose(gradient_NV.asnumpy(), expected_NV, atol=1e-6)


def test_an_impossible_label_gives_a_large_finite_loss_and_an_exact_gradient():
    logits_NV = np.zeros((1, V), np.float32)
    logits_NV[0, 3] = -500.0
    (_, nll_N), gradient_NV = Gradient(CrossEntropy(V))(Tensor(logits_NV), Tensor([3]), Tensor([1.0]))
    assert 80 < nll_N.asnumpy()[0] < 90
    np.testing.assert_allclose(gradient_NV.asnumpy()[0, 3], -1.0)
