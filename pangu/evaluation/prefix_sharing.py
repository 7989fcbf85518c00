"""Scores continuations that share a prefix: keys and values of the prefix are computed once, and suffixes attend to it
but not to each other.

Requests of one task share the demonstrations in front (the *common prefix*: read once, its keys and values kept), and
the candidates of one instance share more (the *shared* part of a *tree*, read once per tree). A tree is one row: the
shared part, then the suffixes of its requests one after the other, each at the positions it would have alone, none
seeing the others.

Shapes: B trees, S tokens of a tree, P slots of the common prefix, M scored tokens (padded), L layers, H heads, K head
width, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from pangu.evaluation.requests import Item
from pangu.model import DecoderLayer, PanGuAlpha
from parallel.layers.attention import MASKED
from parallel.layers.loss import CrossEntropy

_SMALLEST_SAVING = 8  # tokens of one request; below it a tree of its own is as good
_SHORTEST_PREFIX = 16
_FEWEST_ON_PREFIX = 16  # requests; a tree serves fewer as well


@dataclass
class Tree:
    """Requests with a shared part: `members` are their numbers, `shared` the length of what they share."""

    members: list[int]
    shared: int
    tokens: int
    """Tokens of the row, counted from position 0."""
    shortest: int = 0
    suffixes: list[int] = field(default_factory=list)


def group_by_prefix(items: Sequence[Item]) -> list[list[int]]:
    """Numbers of the items in groups that begin alike; in the last one are those that share too little with others.

    Examples that did not fit are left out in front, so instances with other numbers of examples begin otherwise.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    suffix: list[int] = []
    for index, (ids, first) in enumerate(items):
        begin = tuple(ids[:_SHORTEST_PREFIX].tolist())
        (groups.setdefault(begin, []) if first > _SHORTEST_PREFIX else suffix).append(index)
    large = [members for members in groups.values() if len(members) >= _FEWEST_ON_PREFIX]
    suffix += [index for members in groups.values() if len(members) < _FEWEST_ON_PREFIX for index in members]
    return [*large, sorted(suffix)] if suffix else large


def prefix_length(items: Sequence[Item]) -> int:
    """How many leading ids all items share and none scores; 0 where keeping their states does not pay.

    A token that predicts a scored one stays out of the common prefix, of which only keys and values are kept.
    """
    if len(items) < 2:
        return 0
    shared = min(first for _, first in items) - 1
    head = items[0][0]
    for ids, _ in items[1:]:
        shared = min(shared, _common(head, ids))
        if shared < _SHORTEST_PREFIX:
            return 0
    return shared if shared >= _SHORTEST_PREFIX else 0


def plan_trees(items: Sequence[Item], longest: int, prefix: int = 0) -> list[Tree]:
    """Puts items that begin alike into trees of at most `longest` tokens after the common prefix.

    The last id of an item is only scored, never read, so an item of n ids takes n - 1 positions. Every item is in just
    one tree; an item alone may be longer than `longest`.
    """
    order = sorted(range(len(items)), key=lambda index: items[index][0].tolist())
    trees: list[Tree] = []
    for index in order:
        length = len(items[index][0]) - 1
        if trees and (grown := _grown(trees[-1], items, index, longest, prefix)) is not None:
            trees[-1] = grown
        else:
            trees.append(Tree([index], length, length, length, [length]))
    return trees


def _grown(tree: Tree, items: Sequence[Item], index: int, longest: int, prefix: int) -> Tree | None:
    """`tree` with one more item, or None when that saves little or is too long."""
    length = len(items[index][0]) - 1
    # The shared part may be all of a member, but never holds a token that is not common to all.
    shared = min(tree.shared, _common(items[tree.members[0]][0], items[index][0]), length)
    suffixes = [*tree.suffixes, length]
    tokens = shared + sum(suffix - shared for suffix in suffixes)
    saved = tree.tokens + (length - prefix) - tokens
    if saved < _SMALLEST_SAVING or tokens - prefix > longest:
        return None
    return Tree([*tree.members, index], shared, tokens, min(tree.shortest, length), suffixes)


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """How many leading ids two sequences share."""
    count = min(len(first), len(second))
    differs = first[:count] != second[:count]
    return int(differs.argmax()) if differs.any() else count


@dataclass
class Row:
    """A tree as the network reads it: ids, positions and segments (0 = shared) of its tokens after the common prefix;
    where in the row each member's scored tokens are predicted, and their labels."""

    ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    predicting_at: list[np.ndarray]
    labels: list[np.ndarray]


def row_of(tree: Tree, items: Sequence[Item], prefix: int = 0) -> Row:
    """Shared part and suffixes of a tree in one row."""
    shared = tree.shared
    parts = [(items[tree.members[0]][0][prefix:shared], np.arange(prefix, shared), np.zeros(shared - prefix, np.int64))]
    predicting_at, labels = [], []
    begin = shared - prefix  # where the next suffix begins in the row
    for number, index in enumerate(tree.members, start=1):
        ids, first = items[index]
        length = len(ids) - 1
        parts.append((ids[shared:length], np.arange(shared, length), np.full(length - shared, number)))
        # Token t predicts token t + 1; those before the end of the shared part are in it, the others in this suffix.
        predicting = np.arange(first - 1, length)
        predicting_at.append(np.where(predicting < shared, predicting - prefix, predicting - shared + begin))
        labels.append(ids[first:])
        begin += length - shared
    ids, positions, segments = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Row(ids, positions, segments, predicting_at, labels)


class HeadScores(nn.Cell):
    """nll_M of labels after some rows of hidden states, and the likeliest tokens there: rows_MD float32, labels_M."""

    def __init__(self, model: PanGuAlpha) -> None:
        super().__init__(auto_prefix=False)
        self.model = model
        self.cross_entropy = CrossEntropy(model.config.vocabulary_size, axis="vocabulary")
        self.argmax = ops.Argmax(axis=-1, output_type=mstype.int32)
        self.set_train(False)

    def construct(self, rows_MD: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor]:
        rows_MD = ops.cast(rows_MD, self.model.compute_dtype)
        logits_MV = self.model.logits(rows_MD)
        return self.cross_entropy(logits_MV, labels_M), self.argmax(logits_MV)


class PrefixStates(nn.Cell):
    """Keys and values of the common prefix in every layer: ids_1P -> keys_LHPK, values_LHPK."""

    def __init__(self, model: PanGuAlpha) -> None:
        super().__init__(auto_prefix=False)
        self.model = model
        self.set_train(False)

    def construct(self, ids_1P: Tensor) -> tuple[Tensor, Tensor]:
        model, length = self.model, ids_1P.shape[1]
        row_P = Tensor(np.arange(length, dtype=np.int32))
        bias_11PP = model.bias(ops.cast(row_P.reshape((1, 1, -1)) <= row_P.reshape((1, -1, 1)), mstype.float32))
        hidden_ND = model.embedding(ids_1P, row_P.reshape((1, -1)))
        keys, values = [], []
        for layer in model.layers:
            key_1HPK, value_1HPK = _keys_and_values(layer, hidden_ND)
            keys.append(key_1HPK)
            values.append(value_1HPK)
            hidden_ND = layer(hidden_ND, bias_11PP)
        if model.norm_first:
            hidden_ND = model.norm(hidden_ND)
        key_1HPK, value_1HPK = _keys_and_values(model.query_layer, hidden_ND)
        return ops.concat([*keys, key_1HPK], 0), ops.concat([*values, value_1HPK], 0)


def _keys_and_values(layer: DecoderLayer, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
    normed_ND = layer.norm1(hidden_ND)
    attention = layer.attention
    return attention.to_heads(attention.key(normed_ND), 1), attention.to_heads(attention.value(normed_ND), 1)


class TreeHidden(nn.Cell):
    """hidden_ND, float32, of all tokens of trees (N = B S), with or without a common prefix: what `HeadScores` scores
    rows of.

    Inputs: ids_BS, positions_BS, segments_BS int32; then, with a common prefix, its length [1] int32, keys_LHPK,
    values_LHPK.
    """

    def __init__(self, model: PanGuAlpha) -> None:
        super().__init__(auto_prefix=False)
        self.model = model
        self.set_train(False)

    def construct(self, ids_BS: Tensor, positions_BS: Tensor, segments_BS: Tensor, length_1: Tensor | None = None,
                  keys_LHPK: Tensor | None = None, values_LHPK: Tensor | None = None) -> Tensor:
        visible_BSS = self.visible(segments_BS)
        if keys_LHPK is None:
            hidden_ND = self.model.hidden(ids_BS, positions_BS, visible_BSS)
        else:
            hidden_ND = self.hidden_after_prefix(ids_BS, positions_BS, visible_BSS, length_1, keys_LHPK, values_LHPK)
        return ops.cast(hidden_ND, mstype.float32)

    def visible(self, segments_BS: Tensor) -> Tensor:
        """1 where a token may look: not ahead, at the shared part or its own suffix. Padding is on the right."""
        batch, length = segments_BS.shape
        row_S = Tensor(np.arange(length, dtype=np.int32))
        earlier_1SS = row_S.reshape((1, 1, length)) <= row_S.reshape((1, length, 1))
        seen_B1S = segments_BS.reshape((batch, 1, length))
        related_BSS = ops.logical_or(seen_B1S == 0, seen_B1S == segments_BS.reshape((batch, length, 1)))
        return ops.cast(ops.logical_and(earlier_1SS, related_BSS), mstype.float32)

    def hidden_after_prefix(self, ids_BS: Tensor, positions_BS: Tensor, visible_BSS: Tensor, length_1: Tensor,
                            keys_LHPK: Tensor, values_LHPK: Tensor) -> Tensor:
        """`PanGuAlpha.hidden` whose attention also sees the common prefix's first `length_1` slots."""
        model, (batch, length) = self.model, ids_BS.shape
        slots = keys_LHPK.shape[2]
        kept_P = ops.cast(Tensor(np.arange(slots, dtype=np.int32)) < length_1, mstype.float32)
        prefix_BSP = ops.broadcast_to(kept_P.reshape((1, 1, slots)), (batch, length, slots))
        hidden_BST = 1.0 - ops.concat((prefix_BSP, visible_BSS), 2)
        bias_B1ST = (hidden_BST * MASKED).reshape((batch, 1, length, slots + length))
        hidden_ND = model.embedding(ids_BS, positions_BS)
        for number, layer in enumerate(model.layers):
            hidden_ND = self.layer(layer, hidden_ND, bias_B1ST, keys_LHPK[number], values_LHPK[number], batch)
        if model.norm_first:
            hidden_ND = model.norm(hidden_ND)
        query_ND = ops.cast(model.query_embedding(positions_BS), model.compute_dtype)
        hidden_ND = self.layer(model.query_layer, hidden_ND, bias_B1ST, keys_LHPK[-1], values_LHPK[-1], batch, query_ND)
        if not model.norm_first:
            hidden_ND = model.norm(hidden_ND)
        return hidden_ND

    def layer(self, layer: DecoderLayer, hidden_ND: Tensor, bias_B1ST: Tensor, keys_HPK: Tensor, values_HPK: Tensor,
              batch: int, query_ND: Tensor | None = None) -> Tensor:
        """A `DecoderLayer` that also sees kept keys and values."""
        attention, normed_ND = layer.attention, layer.norm1(hidden_ND)
        if query_ND is None:
            query_ND = normed_ND
        query_BHSK = attention.to_heads(attention.query(query_ND), batch)
        shape = (batch, *keys_HPK.shape)
        keys_BHTK = ops.concat((ops.broadcast_to(keys_HPK, shape),
                                attention.to_heads(attention.key(normed_ND), batch)), 2)
        values_BHTK = ops.concat((ops.broadcast_to(values_HPK, shape),
                                  attention.to_heads(attention.value(normed_ND), batch)), 2)
        mixed_BHSK = attention.core(query_BHSK, keys_BHTK, values_BHTK, bias_B1ST)
        hidden_ND = layer.add1(hidden_ND, attention.output(attention.from_heads(mixed_BHSK)))
        return layer.add2(hidden_ND, layer.feed_forward(layer.norm2(hidden_ND)))
