"""Rules of single primitives against formulas and numeric gradients."""

from __future__ import annotations

import numpy as np
import pytest

from parallel.proof.replay.numpy_ops import RULES, UPDATES
from tests.parallel.proof.replay.graphs import node

generator = np.random.default_rng(3)


def numeric_gradient(function, x: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """d sum(function(x) * gradient) / dx by central differences in float64."""
    out, step = np.zeros_like(x), 1e-6
    for index in np.ndindex(x.shape):
        moved = [x.copy(), x.copy()]
        moved[0][index] += step
        moved[1][index] -= step
        out[index] = ((function(moved[0]) - function(moved[1])) * gradient).sum() / (2 * step)
    return out


class TestRules:
    def test_layer_norm_gradient(self):
        x, gradient, gamma, beta = (generator.standard_normal(shape) for shape in ((4, 6), (4, 6), (6,), (6,)))
        forward = lambda x: RULES["LayerNorm"](node("LayerNorm"), x, gamma, beta, -1, -1, 1e-5)  # noqa: E731
        _, mean, variance = forward(x)
        dx, dgamma, dbeta = RULES["LayerNormGrad"](node("LayerNormGrad"), x, gradient, variance, mean, gamma, -1, -1,
                                                   1e-5)
        np.testing.assert_allclose(dx, numeric_gradient(lambda x: forward(x)[0], x, gradient), atol=1e-6)
        np.testing.assert_allclose(dbeta, gradient.sum(0))
        by_gamma = lambda g: RULES["LayerNorm"](node("LayerNorm"), x, g, beta, -1, -1, 1e-5)[0]  # noqa: E731
        wanted = (gradient * (x - mean) / np.sqrt(variance + 1e-5)).sum(0)
        np.testing.assert_allclose(by_gamma(gamma + 1.0) - by_gamma(gamma), (x - mean) / np.sqrt(variance + 1e-5))
        np.testing.assert_allclose(dgamma, wanted, atol=1e-6)

    def test_rms_norm_gradient(self):
        x, gradient, gamma = (generator.standard_normal(shape) for shape in ((3, 5), (3, 5), (5,)))
        forward = lambda x: RULES["RmsNorm"](node("RmsNorm"), x, gamma, 1e-6)  # noqa: E731
        dx, _ = RULES["RmsNormGrad"](node("RmsNormGrad"), gradient, x, forward(x)[1], gamma)
        np.testing.assert_allclose(dx, numeric_gradient(lambda x: forward(x)[0], x, gradient), atol=1e-6)

    @pytest.mark.parametrize("op, inner", [("GeLU", None), ("SiLU", None), ("Softmax", None)])
    def test_gradients_of_activations(self, op, inner):
        x, gradient = generator.standard_normal((3, 4)), generator.standard_normal((3, 4))
        y = RULES[op](node(op), x)
        got = {"GeLU": lambda: RULES["GeLUGrad"](node("GeLUGrad"), gradient, x, y),
               "SiLU": lambda: RULES["SiLUGrad"](node("SiLUGrad"), gradient, x),
               "Softmax": lambda: RULES["SoftmaxBackward"](node("SoftmaxBackward"), gradient, y, -1)}[op]()
        np.testing.assert_allclose(got, numeric_gradient(lambda x: RULES[op](node(op), x), x, gradient), atol=1e-6)

    def test_lookup_and_its_gradient(self):
        table, ids = generator.standard_normal((5, 2)), np.array([[0, 4], [4, 1]])
        np.testing.assert_array_equal(RULES["Gather"](node("Gather"), table, ids, 0, 0), table[ids])
        rows = generator.standard_normal((2, 2, 2))
        got = RULES["UnsortedSegmentSum"](node("UnsortedSegmentSum"), rows, np.array([[0, 4], [4, -1]]), 5)
        np.testing.assert_allclose(got[4], rows[0, 1] + rows[1, 0])
        np.testing.assert_allclose(got.sum(0), rows.reshape(4, 2)[:3].sum(0))

    def test_slice_with_masks_and_its_gradient(self):
        x = generator.standard_normal((4, 6, 3))
        numbers = ((0, -3), (0, 0), (1, 1), 1, 3)  # all of dim 0, the last three of dim 1
        part = RULES["StridedSlice"](node("StridedSlice"), x, *numbers)
        np.testing.assert_array_equal(part, x[:, -3:])
        masks = {"begin_mask": 1, "end_mask": 3}
        back = RULES["StridedSliceGrad"](node("StridedSliceGrad", **masks), part, x.shape, *numbers[:3])
        np.testing.assert_array_equal(back[:, -3:], part)
        assert not back[:, :-3].any()
        # ellipsis, one column of the last dim (shrunk), a new dim behind it
        one = RULES["StridedSlice"](node("StridedSlice"), x, (0, 1, 0), (0, 2, 0), (1, 1, 1), 0, 0, 1, 4, 2)
        np.testing.assert_array_equal(one, x[..., 1][..., None])

    def test_gather_with_batch_dims(self):
        table, ids = generator.standard_normal((2, 3, 5, 4)), generator.integers(0, 5, (2, 3, 6))
        got = RULES["Gather"](node("Gather"), table, ids, 2, 2)
        assert got.shape == (2, 3, 6, 4)
        np.testing.assert_array_equal(got[1, 2], table[1, 2][ids[1, 2]])

    def test_cumulative_sum_from_either_end(self):
        x = np.array([[1.0, 2.0, 4.0]])
        for attributes, wanted in (({}, [1, 3, 7]), ({"exclusive": 1}, [0, 1, 3]), ({"reverse": 1}, [7, 6, 4]),
                                   ({"exclusive": 1, "reverse": 1}, [6, 4, 0])):
            assert list(RULES["CumSum"](node("CumSum", **attributes), x, 1)[0]) == wanted

    def test_one_hot_of_a_slice_ignores_foreign_classes(self):
        got = RULES["OneHot"](node("OneHot"), np.array([1, -3, 7]), 4, 1.0, 0.0, -1)
        np.testing.assert_array_equal(got, [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])

    def test_adamw(self):
        p, m, v, g = (generator.random(4).astype(np.float32) for _ in range(4))
        new = UPDATES["AdamWeightDecay"](node("AdamWeightDecay"), p, m, v, 0.1, 0.9, 0.99, 1e-8, 0.01, g)
        m2, v2 = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        np.testing.assert_allclose(new[0], p - 0.1 * (m2 / (np.sqrt(v2) + 1e-8) + 0.01 * p), rtol=1e-5)
