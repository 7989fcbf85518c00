"""Choosing the next token from logits: greedy, temperature, top-k, top-p and penalties, on the host, per request.

Every request has a random stream of its own and uses one number of it a token, so what it gets depends on its logits
and its seed alone, not on what else is in the batch. Shapes: V vocabulary.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

_HEAD = 512


@dataclass(frozen=True)
class SamplingRule:
    """How a token is drawn.

    Args:
        temperature: logits are divided by it; 0 = greedy (the most likely token after penalties).
        top_k: only the k most likely tokens are drawn; 0 = all.
        top_p: of those, the fewest whose probability reaches p, the one that crosses it included; 1 = all.
        frequency_penalty: taken from a token's log-probability for every time it was generated in this request.
        presence_penalty: taken once when it was generated at all.

    Source: PanGu-alpha code (`generate`): penalties look at generated tokens only, never at the prompt. There, the
    penalised probabilities go into top-p truncation without adding up to 1, so that a high penalty keeps more tokens,
    and the temperature only moves the truncation; here temperature and penalties act on the logits, and the
    distribution is normalised before each truncation, as is usual (chosen here).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def plain_greedy(self) -> bool:
        """Whether the largest logit is always the answer."""
        return self.greedy and not self.frequency_penalty and not self.presence_penalty


@dataclass(frozen=True)
class Draw:
    """All that the choice of one token depends on beside the logits.

    Args:
        rule: temperature, top_k and top_p of it are used.
        uniform: in [0, 1).
        ids, values: what is added to the logits of which tokens, one after the other.
    """

    rule: SamplingRule
    uniform: float
    ids: np.ndarray
    values: np.ndarray


_NOTHING = np.empty(0, np.int32), np.empty(0, np.float32)


@dataclass
class Sampler:
    """The state of one request: its rule, its random stream and what it has generated.

    Args:
        rule: how a token is drawn.
        generator: the stream.
        bias: added to the logits of these ids before everything else.
    """

    rule: SamplingRule
    generator: np.random.Generator
    bias: Mapping[int, float] = field(default_factory=dict)
    counts: Counter = field(default_factory=Counter)

    @property
    def takes_best(self) -> bool:
        """Whether the model's largest logit is always the answer, so that nothing need be drawn."""
        return self.rule.plain_greedy and not self.bias

    def next_draw(self) -> Draw:
        """How the next token is chosen; takes a number from the stream unless the choice is greedy."""
        rule = self.rule
        ids, values = [_NOTHING[0]], [_NOTHING[1]]
        if self.bias:
            ids.append(np.fromiter(self.bias, np.int32, len(self.bias)))
            values.append(np.fromiter(self.bias.values(), np.float32, len(self.bias)))
        if self.counts and (rule.frequency_penalty or rule.presence_penalty):
            counts = np.fromiter(self.counts.values(), np.float32, len(self.counts))
            ids.append(np.fromiter(self.counts, np.int32, len(self.counts)))
            values.append(-(counts * np.float32(rule.frequency_penalty) + np.float32(rule.presence_penalty)))
        return Draw(rule, 0.0 if rule.greedy else float(self.generator.random()), np.concatenate(ids),
                    np.concatenate(values))

    def took(self, token: int) -> None:
        """The token that was chosen."""
        self.counts[token] += 1

    def choose(self, logits_V: np.ndarray) -> int:
        """The next token.

        Args:
            logits_V: float [V].
        """
        chosen = choose(logits_V, self.next_draw())
        self.took(chosen)
        return chosen


def choose(logits_V: np.ndarray, draw: Draw) -> int:
    """The token that a draw takes from logits [V]."""
    if len(draw.ids):
        logits_V = logits_V.copy()
        np.add.at(logits_V, draw.ids, draw.values)
    if draw.rule.greedy:
        return int(np.argmax(logits_V))
    tokens, weights = candidates(logits_V, draw.rule)
    total = np.cumsum(weights)
    place = int(np.searchsorted(total, draw.uniform * total[-1], side="right"))
    return int(tokens[min(place, len(tokens) - 1)])


def candidates(logits_V: np.ndarray, rule: SamplingRule) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that may be drawn, most likely first (equal ones by id), and their weights (not adding up to 1).

    Args:
        logits_V: float [V], penalties applied.
        rule: with a temperature above 0.
    """
    scaled_V = (logits_V.astype(np.float64) - float(logits_V.max())) / rule.temperature
    weights_V = np.exp(scaled_V)
    size = len(weights_V)
    if rule.top_k and rule.top_k < size:
        tokens = largest(weights_V, rule.top_k)
        kept_total = weights_V[tokens].sum()
    else:
        tokens, kept_total = None, weights_V.sum()
    if rule.top_p < 1.0:
        tokens = _nucleus(weights_V, tokens, kept_total * rule.top_p)
    elif tokens is None:
        tokens = np.arange(size)
    return tokens, weights_V[tokens]


def _nucleus(weights_V: np.ndarray, tokens: np.ndarray | None, enough: float) -> np.ndarray:
    """The fewest of `tokens` (None = all; else already sorted) whose weights reach `enough`."""
    if tokens is None:
        # Sorting a few hundred is nearly always enough; sorting the vocabulary costs milliseconds.
        tokens = largest(weights_V, min(_HEAD, len(weights_V)))
        if weights_V[tokens].sum() < enough:
            tokens = np.argsort(-weights_V, kind="stable")
    reached = np.cumsum(weights_V[tokens])
    return tokens[:int((reached < enough).sum()) + 1]


def largest(weights_V: np.ndarray, count: int) -> np.ndarray:
    """Ids of the `count` largest, largest first, equal ones by id (also at the border)."""
    if count >= len(weights_V):
        return np.argsort(-weights_V, kind="stable")
    border = np.partition(weights_V, len(weights_V) - count)[len(weights_V) - count]
    above = np.flatnonzero(weights_V > border)
    at = np.flatnonzero(weights_V == border)[:count - len(above)]
    found = np.sort(np.concatenate([above, at]))
    return found[np.argsort(-weights_V[found], kind="stable")]


def request_stream(ids: Sequence[int], seed: int, repetition: int = 0) -> np.random.Generator:
    """The random stream of a prompt: a function of `seed`, its ids and how often the same prompt came before.

    So a prompt draws the same alone, in a batch and in another order, while two equal prompts draw differently.
    """
    return np.random.default_rng((seed, zlib.crc32(np.asarray(ids, np.int64).tobytes()), repetition))


def request_generators(prompts: Sequence[Sequence[int]], seed: int) -> list[np.random.Generator]:
    """One random stream per prompt (see `request_stream`)."""
    seen: Counter = Counter()
    streams = []
    for ids in prompts:
        key = zlib.crc32(np.asarray(ids, np.int64).tobytes())
        streams.append(request_stream(ids, seed, seen[key]))
        seen[key] += 1
    return streams
