"""Log-likelihood of continuations given their prefixes: what few-shot tasks with choices are decided by.

Shapes: B rows of a batch, S tokens of a row, P trunk slots, M scored tokens of a batch (padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from mindspore import Tensor
from mindspore import dtype as mstype

from pangu.model import PanGuAlpha
from pangu.prefix_sharing import Row, Tree, TreeScores, TrunkStates, lay_row, plan_trees, trunk_length
from parallel.runtime.errors import UserError
from parallel.runtime.progress import Bar

_SHORTEST = 32
_SCORED_AT_ONCE = 64
_LONGEST_TREE = 512  # a longer row costs more attention between siblings than sharing saves
_TOKENS_AT_ONCE = 2048
_NO_LIMIT = 1 << 30

ScoreRequest = tuple[Sequence[int], Sequence[int]]


class Scorer:
    """Scores continuations in batches whose shapes come from a few buckets, so that few graphs are compiled.

    Args:
        model: a `PanGuAlpha`.
        batch_size: rows per batch; None = as many as make about 2,048 tokens.
        share: whether what requests have in common at their beginning is computed once (see `pangu.prefix_sharing`);
            the scores are the same.
    """

    def __init__(self, model: PanGuAlpha, batch_size: int | None = None, share: bool = True) -> None:
        model.set_train(False)
        self.config, self.batch_size, self.share = model.config, batch_size, share
        self.cell, self.trunk_cell = TreeScores(model), TrunkStates(model)

    def loglikelihood(self, requests: Sequence[ScoreRequest], description: str | None = None) -> list[float]:
        """Sum of log p(token | everything before it) over each continuation, in nats.

        Args:
            requests: (prefix ids, continuation ids). A prefix that makes the two longer than the context loses its
                beginning.
            description: shown beside a progress bar; None = no bar.

        Raises:
            UserError: an empty prefix or continuation, or a continuation longer than the context.
        """
        return [float(sum(scores)) for scores, _ in self.token_scores(requests, description)]

    def loglikelihood_and_greedy(self, requests: Sequence[ScoreRequest]) -> list[tuple[float, bool]]:
        """`loglikelihood` of each continuation, and whether each of its tokens is the likeliest one in its place."""
        return [(float(sum(scores)), bool(likeliest.all())) for scores, likeliest in self.token_scores(requests)]

    def token_scores(self, requests: Sequence[ScoreRequest],
                     description: str | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each request log p of each token of its continuation, float32, and whether it is the likeliest, bool."""
        items = [_item(prefix, continuation, self.config, index)
                 for index, (prefix, continuation) in enumerate(requests)]
        if not items:
            return []
        trunk = trunk_length(items) if self.share else 0
        states = self._trunk_states(items[0][0][:trunk])
        trees = plan_trees(items, _LONGEST_TREE if self.share else 0, trunk)
        rows = sorted(((lay_row(tree, items, trunk), tree) for tree in trees), key=lambda pair: -len(pair[0].ids))
        results: list[Any] = [None] * len(items)
        with Bar(len(items), description) if description is not None else nullcontext() as bar:
            while rows:
                length = length_bucket(len(rows[0][0].ids), _NO_LIMIT)
                count = self.batch_size or max(1, _TOKENS_AT_ONCE // length)
                self._score(rows[:count], count, length, states, results)
                if bar is not None:
                    bar.advance(sum(len(tree.members) for _, tree in rows[:count]))
                del rows[:count]
        return results

    def _trunk_states(self, ids: np.ndarray) -> tuple[Tensor, ...]:
        """Length, keys and values of the trunk; nothing when there is none."""
        if not len(ids):
            return ()
        padded_P = np.full(length_bucket(len(ids), self.config.sequence_length), self.config.pad_id, np.int32)
        padded_P[:len(ids)] = ids
        return (Tensor([len(ids)], mstype.int32), *self.trunk_cell(Tensor(padded_P.reshape(1, -1))))

    def _score(self, rows: list[tuple[Row, Tree]], batch: int, length: int, states: tuple[Tensor, ...],
               results: list[Any]) -> None:
        """Fills `results` for the members of the trees of one batch."""
        ids_BS, positions_BS, segments_BS = (np.zeros((batch, length), np.int32) for _ in range(3))
        ids_BS[:] = self.config.pad_id
        places, labels, members = [], [], []
        for number, (row, tree) in enumerate(rows):
            used = len(row.ids)
            ids_BS[number, :used], positions_BS[number, :used] = row.ids, row.positions
            segments_BS[number, :used] = row.segments
            places += [part + number * length for part in row.places]
            labels += row.labels
            members += tree.members
        arrays = [Tensor(array) for array in (ids_BS, positions_BS, segments_BS)]
        nll, likeliest = self._scores(arrays, np.concatenate(places), np.concatenate(labels), states)
        ends = np.cumsum([len(part) for part in places])[:-1]
        for index, *parts in zip(members, np.split(-nll, ends), np.split(likeliest, ends), strict=True):
            results[index] = tuple(parts)

    def _scores(self, arrays: list[Tensor], places: np.ndarray, labels: np.ndarray,
                states: tuple[Tensor, ...]) -> tuple[np.ndarray, np.ndarray]:
        """nll of all places, whose number is padded to a power of two, and whether the label is the likeliest."""
        count = len(places)
        padded = _SCORED_AT_ONCE
        while padded < count:
            padded *= 2
        padding = (0, padded - count)
        nll_M, best_M = self.cell(*arrays, Tensor(np.pad(places, padding).astype(np.int32)),
                                  Tensor(np.pad(labels, padding).astype(np.int32)), *states)
        return nll_M.asnumpy()[:count], best_M.asnumpy()[:count] == labels


def loglikelihood(model: PanGuAlpha, requests: Sequence[ScoreRequest], batch_size: int | None = None) -> list[float]:
    """`Scorer.loglikelihood` once."""
    return Scorer(model, batch_size).loglikelihood(requests)


def length_bucket(length: int, context: int) -> int:
    """The smallest of 32, 64, 96, 128, 192, 256, 384, ... that holds `length`, at most `context`."""
    double = _SHORTEST
    while double < length:
        double *= 2
    middle = double // 4 * 3
    return min(middle if double >= 4 * _SHORTEST and middle >= length else double, context)


def _item(prefix: Sequence[int], continuation: Sequence[int], config: Any, index: int) -> tuple[np.ndarray, int]:
    """All ids (the last is not read, only scored) and the place of the first scored one."""
    where = f"request {index + 1}"
    if not len(prefix) or not len(continuation):
        raise UserError("prefix and continuation each need at least one token", where=where)
    room = config.sequence_length + 1 - len(continuation)
    if room < 1:
        raise UserError(f"the continuation is longer than the context of {config.sequence_length} tokens", where=where,
                        value=len(continuation))
    prefix = list(prefix)[-room:]
    ids = np.asarray([*prefix, *continuation], np.int64)
    if ids.min() < 0 or ids.max() >= config.vocabulary_size:
        raise UserError(f"id outside the vocabulary of {config.vocabulary_size}", where=where, value=int(ids.max()))
    return ids, len(prefix)
