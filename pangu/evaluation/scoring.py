"""Log-likelihood of continuations given their prefixes: what few-shot tasks with choices are decided by.

Shapes: B rows of a batch, S tokens of a row, P slots of the common prefix, M scored tokens (a fixed number at once), D
width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from mindspore import Tensor, nn
from mindspore import dtype as mstype

from pangu.evaluation.prefix_sharing import (
    HeadScores,
    PrefixStates,
    Row,
    Tree,
    TreeHidden,
    group_by_prefix,
    plan_trees,
    prefix_length,
    row_of,
)
from pangu.evaluation.requests import Item, OnScored, ScoreRequest, scored_item, total
from pangu.model import PanGuAlpha

_SHORTEST = 32
_SCORED_AT_ONCE = 256
_LONGEST_TREE = 512  # a longer row costs more attention between siblings than sharing saves
_TOKENS_AT_ONCE = 2048
_NO_LIMIT = 1 << 30
# On the CPU a compiled graph keeps the memory of all its activations as long as it lives: in each layer about this many
# bytes per token and unit of width, and per token, head and token it looks at (measured with MindSpore 2.9).
_BYTES_PER_UNIT, _BYTES_PER_SCORE = 200, 16
_BYTES_OF_A_GRAPH, _BYTES_OF_GRAPHS = 1 << 30, 4 << 30


class Graphs:
    """Cells compiled for one shape each; the least lately used ones are let go when all together hold too much memory.

    Args:
        model: a `PanGuAlpha`.
        limit: bytes that the graphs may hold together.
    """

    def __init__(self, model: PanGuAlpha, limit: int = _BYTES_OF_GRAPHS) -> None:
        self.model, self.limit = model, limit
        self._cells: OrderedDict[tuple, tuple[nn.Cell, int]] = OrderedDict()

    def row_bytes(self, length: int, slots: int = 0) -> int:
        """What a graph holds for each row of `length` tokens after `slots` tokens of the common prefix, about."""
        config = self.model.config
        seen = _BYTES_PER_SCORE * config.heads * (length + slots)
        return config.layers * length * (_BYTES_PER_UNIT * config.hidden_size + seen)

    def rows_at_once(self, length: int, slots: int = 0) -> int:
        """As many rows as one graph may have: about 2,048 tokens, fewer of a large model."""
        return max(1, min(_TOKENS_AT_ONCE // length, _BYTES_OF_A_GRAPH // self.row_bytes(length, slots)))

    def get(self, kind: Callable[[PanGuAlpha], nn.Cell], rows: int, length: int, slots: int = 0) -> nn.Cell:
        """The cell for this shape, made if there is none."""
        key = (kind, rows, length, slots)
        if key not in self._cells:
            size = rows * self.row_bytes(length, slots)
            while self._cells and self.held() + size > self.limit:
                self._cells.popitem(last=False)
            self._cells[key] = kind(self.model), size
        self._cells.move_to_end(key)
        return self._cells[key][0]

    def held(self) -> int:
        """Bytes that the graphs hold, about."""
        return sum(size for _, size in self._cells.values())


class Scorer:
    """Scores continuations in batches whose shapes come from a few buckets, so that few graphs are compiled.

    Args:
        model: a `PanGuAlpha`.
        batch_size: rows per batch; None = as many as make about 2,048 tokens, fewer of a large model.
        share: whether what requests have in common at their beginning is computed once (see
            `pangu.evaluation.prefix_sharing`); the scores are the same.
    """

    def __init__(self, model: PanGuAlpha, batch_size: int | None = None, share: bool = True) -> None:
        model.set_train(False)
        self.config, self.batch_size, self.share = model.config, batch_size, share
        self.graphs, self.head = Graphs(model), HeadScores(model)

    def loglikelihood(self, requests: Sequence[ScoreRequest]) -> list[float]:
        """Sum of log p(token | everything before it) over each continuation, in nats.

        Args:
            requests: (prefix ids, continuation ids). A prefix that makes the two longer than the context loses its
                beginning.

        Raises:
            UserError: an empty prefix or continuation, or a continuation longer than the context.
        """
        return [score for score, _ in self.loglikelihood_and_greedy(requests)]

    def loglikelihood_and_greedy(self, requests: Sequence[ScoreRequest],
                                 on_scored: OnScored | None = None) -> list[tuple[float, bool]]:
        """`loglikelihood` of each continuation, and whether each of its tokens is the likeliest one at its position.

        `on_scored(numbers of requests, their answers)` is called after every batch.
        """
        def report(members: list[int], scores: list[tuple[np.ndarray, np.ndarray]]) -> None:
            if on_scored is not None:
                on_scored(members, [total(*pair) for pair in scores])

        return [total(*pair) for pair in self.token_scores(requests, report)]

    def token_scores(self, requests: Sequence[ScoreRequest],
                     on_scored: Callable[[list[int], list], None] = lambda *_: None
                     ) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each request log p of each token of its continuation, float32, and whether it is the likeliest, bool."""
        items = [scored_item(prefix, continuation, self.config, index)
                 for index, (prefix, continuation) in enumerate(requests)]
        results: list[Any] = [None] * len(items)
        for group in group_by_prefix(items) if self.share else [list(range(len(items)))]:
            for members, scores in self._group([items[index] for index in group]):
                numbers = [group[member] for member in members]
                for number, pair in zip(numbers, scores, strict=True):
                    results[number] = pair
                on_scored(numbers, scores)
        return results

    def _group(self, items: list[Item]) -> Any:
        """Yields (members, their scores) of each batch of items with one common prefix; each length of row comes
        once."""
        if not items:
            return
        prefix = prefix_length(items) if self.share else 0
        states = self._prefix_states(items[0][0][:prefix])
        trees = plan_trees(items, _LONGEST_TREE if self.share else 0, prefix)
        rows = sorted(((row_of(tree, items, prefix), tree) for tree in trees), key=lambda pair: -len(pair[0].ids))
        while rows:
            length = length_bucket(len(rows[0][0].ids), _NO_LIMIT)
            count = self.batch_size or self.graphs.rows_at_once(length, _slots(states))
            batch, rows = rows[:count], rows[count:]
            yield [member for _, tree in batch for member in tree.members], self._score(batch, count, length, states)

    def _prefix_states(self, ids: np.ndarray) -> tuple[Tensor, ...]:
        """Length, keys and values of the common prefix; nothing when there is none."""
        if not len(ids):
            return ()
        slots = length_bucket(len(ids), self.config.sequence_length)
        padded_P = np.full(slots, self.config.pad_id, np.int32)
        padded_P[:len(ids)] = ids
        return (Tensor([len(ids)], mstype.int32),
                *self.graphs.get(PrefixStates, 1, slots)(Tensor(padded_P.reshape(1, -1))))

    def _score(self, rows: list[tuple[Row, Tree]], batch: int, length: int,
               states: tuple[Tensor, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The scores of the members of the trees of one batch, tree after tree."""
        ids_BS, positions_BS, segments_BS = (np.zeros((batch, length), np.int32) for _ in range(3))
        ids_BS[:] = self.config.pad_id
        predicting_at, labels = [], []
        for number, (row, _) in enumerate(rows):
            used = len(row.ids)
            ids_BS[number, :used], positions_BS[number, :used] = row.ids, row.positions
            segments_BS[number, :used] = row.segments
            predicting_at += [part + number * length for part in row.predicting_at]
            labels += row.labels
        cell = self.graphs.get(TreeHidden, batch, length, _slots(states))
        hidden_ND = cell(*(Tensor(array) for array in (ids_BS, positions_BS, segments_BS)), *states).asnumpy()
        nll, likeliest = self._head_scores(hidden_ND[np.concatenate(predicting_at)], np.concatenate(labels))
        ends = np.cumsum([len(part) for part in predicting_at])[:-1]
        return list(zip(np.split(-nll, ends), np.split(likeliest, ends), strict=True))

    def _head_scores(self, rows_XD: np.ndarray, labels_X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """nll after any number of rows, and whether the label is the likeliest there; some rows at once."""
        nll, likeliest = [], []
        for begin in range(0, len(labels_X), _SCORED_AT_ONCE):
            labels = labels_X[begin:begin + _SCORED_AT_ONCE]
            rows_MD = np.zeros((_SCORED_AT_ONCE, rows_XD.shape[1]), np.float32)
            rows_MD[:len(labels)] = rows_XD[begin:begin + _SCORED_AT_ONCE]
            labels_M = np.zeros(_SCORED_AT_ONCE, np.int32)
            labels_M[:len(labels)] = labels
            nll_M, best_M = self.head(Tensor(rows_MD), Tensor(labels_M))
            nll.append(nll_M.asnumpy()[:len(labels)])
            likeliest.append(best_M.asnumpy()[:len(labels)] == labels)
        return np.concatenate(nll), np.concatenate(likeliest)


def _slots(states: tuple[Tensor, ...]) -> int:
    return states[1].shape[2] if states else 0


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
