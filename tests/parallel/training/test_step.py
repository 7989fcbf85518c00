"""The training step: splitting a batch and non-finite steps change nothing, clip and loss scale as defined."""

import numpy as np
import pytest
from mindspore import Tensor

from parallel.training.step import GlobalNorm, sum_of_squares
from tests.parallel.toy import DYNAMIC, Batches, make_step, run, settings, values

MOVING = {"iteration", "loss_scale", "loss_scale_clean_steps"}


@pytest.fixture(scope="module")
def batches():
    source = Batches()
    return [source.batch(index) for index in range(4)]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_micro_batches_equal_the_undivided_batch(batches, dropout):
    full, sharded = make_step(settings(), dropout), make_step(settings(accumulation=4), dropout)
    expected, got = run(full, batches), run(sharded, batches)
    np.testing.assert_allclose(got, expected, rtol=2e-5)
    assert dropout == 0.0 or abs(expected[0][0] - run(make_step(settings()), batches[:1])[0][0]) > 1e-3
    for name, value in values(full).items():
        if name not in MOVING:
            np.testing.assert_allclose(values(sharded)[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_non_finite_step_changes_nothing_but_the_scale():
    source = Batches(broken=(2,))
    step = make_step(settings(loss_scale=DYNAMIC))
    run(step, [source.batch(0), source.batch(1)])
    before = values(step)
    loss, norm, finite, scale, _ = run(step, [source.batch(2)])[0]
    after = values(step)
    assert not finite and not np.isfinite(norm) and np.isnan(loss) and scale == 2.0**10
    assert {name for name in before if not np.array_equal(before[name], after[name])} <= MOVING
    assert after["loss_scale"] == 2.0**9 and after["step"] == 2 and after["iteration"] == 3
    assert after["loss_scale_clean_steps"] == 0
    scales = [row[3] for row in run(step, [source.batch(index) for index in range(3, 8)])]
    assert scales == [2.0**9] * 3 + [2.0**10] * 2, "the scale doubles after a clean window of 3"
    assert values(step)["step"] == 7


def test_loss_scale_does_not_change_the_result(batches):
    plain, scaled = make_step(settings()), make_step(settings(loss_scale=DYNAMIC))
    np.testing.assert_allclose(np.array(run(scaled, batches))[:, :3], np.array(run(plain, batches))[:, :3], rtol=1e-6)


def test_clipping_bounds_the_update_and_reports_the_norm_before(batches):
    # Adam's first moment after one step is 0.1 times the clipped gradient.
    free, clipped = make_step(settings(clip_norm=None)), make_step(settings(clip_norm=0.01))
    norm_free, norm_clipped = run(free, batches[:1])[0][1], run(clipped, batches[:1])[0][1]
    assert norm_free == norm_clipped > 0.01
    moments = [np.concatenate([v.ravel() for k, v in values(s).items() if k.startswith("adam_m.")])
               for s in (free, clipped)]
    np.testing.assert_allclose(np.linalg.norm(moments[0]), 0.1 * norm_free, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(moments[1]), 0.1 * 0.01, rtol=1e-5)


def test_gradient_agrees_with_differences(batches):
    step = make_step(settings(clip_norm=None))
    run(step, batches[:1])
    gradient = values(step)["adam_m.weight2"] / 0.1
    for index in [(0, 0), (3, 2), (9, 1)]:
        losses = []
        for change in (-1e-2, 1e-2):
            other = make_step(settings())
            moved = other.network.weight2.asnumpy().copy()
            moved[index] += change
            other.network.weight2.set_data(Tensor(moved))
            losses.append(float(other.network(*map(Tensor, batches[0]))[0].asnumpy()))
        np.testing.assert_allclose(gradient[index], (losses[1] - losses[0]) / 2e-2, rtol=2e-3)


def test_global_norm_divides_replicated_gradients():
    rng = np.random.default_rng(0)
    gradients = [rng.standard_normal(shape).astype(np.float32) for shape in ((3, 4), (5,), ())]
    got = GlobalNorm([1, 4, 2])(tuple(map(Tensor, gradients))).asnumpy()
    expected = np.sqrt(sum((g.astype(np.float64)**2).sum() / k for g, k in zip(gradients, (1, 4, 2), strict=True)))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_sum_of_squares_of_many_elements_is_accurate():
    x = np.random.default_rng(0).standard_normal((4000, 256)).astype(np.float32)
    np.testing.assert_allclose(sum_of_squares(Tensor(x)).asnumpy(), (x.astype(np.float64)**2).sum(), rtol=1e-6)
