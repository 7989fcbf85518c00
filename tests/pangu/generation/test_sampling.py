"""Choosing tokens: every rule against a slow and plain way to say it."""

from __future__ import annotations

import numpy as np
import pytest

from pangu.generation.sampling import Sampler, SamplingRule, candidates, choose, largest, request_generators
from tests.pangu.kernel_model import runner


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def sampler(seed=0, **rule) -> Sampler:
    return Sampler(SamplingRule(**rule), np.random.default_rng(seed))


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(1).normal(0, 2, 3000).astype(np.float32)


def test_greedy_takes_the_largest(logits):
    assert sampler(temperature=0).choose(logits) == logits.argmax()
    assert sampler(top_k=1).choose(logits) == logits.argmax()


@pytest.mark.parametrize("count", [1, 3, 700, 3000, 5000])
def test_largest_are_in_order_and_ties_go_by_id(logits, count):
    assert largest(logits, count).tolist() == np.argsort(-logits, kind="stable")[:count].tolist()
    tied = np.array([1.0, 2.0, 2.0, 0.0, 2.0, 1.0])
    assert largest(tied, 2).tolist() == [1, 2]
    assert largest(tied, 4).tolist() == [1, 2, 4, 0]


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_top_p_keeps_the_token_that_crosses(logits, top_p, temperature):
    tokens, weights = candidates(logits, SamplingRule(temperature=temperature, top_p=top_p))
    p = softmax(logits.astype(np.float64) / temperature)
    order = np.argsort(-p, kind="stable")
    kept = int((np.cumsum(p[order]) < top_p).sum()) + 1
    assert tokens.tolist() == order[:kept].tolist()
    assert p[tokens].sum() >= top_p > p[tokens[:-1]].sum()
    np.testing.assert_allclose(weights / weights.sum(), p[tokens] / p[tokens].sum(), rtol=1e-9)


def test_top_p_after_top_k_is_of_what_top_k_left():
    logits = np.log(np.array([0.1, 0.4, 0.3, 0.2]))
    assert candidates(logits, SamplingRule(top_k=3))[0].tolist() == [1, 2, 3]
    # Of 0.9 in all, 0.4 alone is 0.44 and 0.4 + 0.3 is 0.78.
    assert candidates(logits, SamplingRule(top_k=3, top_p=0.44))[0].tolist() == [1]
    assert candidates(logits, SamplingRule(top_k=3, top_p=0.75))[0].tolist() == [1, 2]
    assert candidates(logits, SamplingRule(top_k=3, top_p=0.78))[0].tolist() == [1, 2, 3]


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    drawer = sampler(temperature=1.0)
    counts = np.bincount([drawer.choose(logits) for _ in range(20000)], minlength=4) / 20000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.012)


def test_penalties_look_at_generated_tokens_only():
    logits = np.array([5.0, 4.9, 4.0])
    one = sampler(temperature=0, frequency_penalty=0.3)
    assert [one.choose(logits) for _ in range(5)] == [0, 1, 0, 1, 0]
    once = sampler(temperature=0, presence_penalty=2.0)
    assert [once.choose(logits) for _ in range(6)] == [0, 1, 2, 0, 0, 0]
    assert logits.tolist() == [5.0, 4.9, 4.0]


def test_streams_do_not_depend_on_the_batch():
    first, second = [7, 8, 9], [4, 4]
    together = [stream.random() for stream in request_generators([first, second, first], 3)]
    alone = [request_generators([ids], 3)[0].random() for ids in (first, second)]
    assert together[:2] == alone
    assert together[2] != together[0]
    assert request_generators([first], 4)[0].random() != alone[0]


@pytest.mark.parametrize("rule", [
    SamplingRule(), SamplingRule(0.7), SamplingRule(1.3, top_k=5), SamplingRule(1.0, top_p=0.5),
    SamplingRule(0.9, top_k=50, top_p=0.8), SamplingRule(3.0, top_p=0.999), SamplingRule(0.0),
    SamplingRule(1.0, top_k=1),
    SamplingRule(1.0, top_k=10_000), SamplingRule(0.8, frequency_penalty=1.5, presence_penalty=0.3)],
                         ids=lambda rule: f"{rule.temperature}-{rule.top_k}-{rule.top_p}-{rule.frequency_penalty}")
def test_the_kernel_draws_what_python_draws(rule):
    """Weights of float32 against float64: both may part only where a number falls upon a border."""
    made = runner(blocks=7)
    generator, vocabulary = np.random.default_rng(5), 1003
    logits = generator.normal(0, 3, (40, vocabulary)).astype(np.float32)
    logits[3] = 1.0  # all alike
    logits[4, 17] = 300.0  # one alone
    logits[5, 20:40] = logits[5, 0]  # ties
    samplers = [Sampler(rule, np.random.default_rng(number), {7: 2.5, 9: -100.0} if number % 3 == 0 else {})
                for number in range(40)]
    for number, sampler in enumerate(samplers):
        for token in generator.integers(0, vocabulary, number % 5):
            sampler.took(int(token))
    differing = 0
    for _ in range(12):
        draws = [sampler.next_draw() for sampler in samplers]
        rows = generator.integers(0, 40, 40).tolist()
        found = made.choose(logits, rows, draws)
        expected = [choose(logits[row], draw) for row, draw in zip(rows, draws, strict=True)]
        differing += sum(a != b for a, b in zip(found, expected, strict=True))
    assert differing <= 1
