"""Multi-head attention, sharded by heads over the op axis: written out, or by Ascend's FlashAttentionScore.

Shapes: B batch, S sequence, D width, H heads, K = D / H head width, N = B S tokens, L documents of a record at most.

| form | what tells attention who sees whom | dropout on the probabilities |
|---|---|---|
| written_out | AttentionBias [B, 1, S, S], added to the scores | Dropout |
| packed | DocumentEnds [B L]: where each document ends, all records one after the other | none |
| masked | HiddenPositions [B, 1, S, S], a byte each, for all heads | DropoutBits, a bit each |
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.operations.nn_ops import FlashAttentionScore

from parallel.common.errors import UserError
from parallel.layers.dropout import Dropout, DropoutBits
from parallel.layers.linear import Linear
from parallel.layers.parameter import needs_one_type
from parallel.sharding.layout import Axes, Layer, OpSharding

MASKED = -10000.0
HEAD_WIDTH_STEP, LARGEST_HEAD_WIDTH = 16, 512
"""FlashAttentionScore takes head widths that are multiples of the one up to the other."""
MOST_SEQUENCES = 1024
"""Documents of all records of one call in the packed form."""
Form = Literal["written_out", "packed", "masked"]
_TRIANGLE = 2048
_CAUSAL = 2
_ALL = 2147483647


class AttentionBias(Layer):
    """bias_B1SS = (1 - visible) * -10000: what is added to the scores, made once for all layers.

    It takes documents_BS int32, the number of each position's document: a position sees those before it, and itself,
    in its own document. So the host sends S numbers a sample and not S x S. It also takes the mask itself, mask_BSS
    (1 = visible, 0 = hidden), for masks of another kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.invert, self.weigh = ops.ExpandDims(), ops.Sub(), ops.Mul()
        self.own, self.other = ops.ExpandDims(), ops.ExpandDims()
        self.same, self.both = ops.Equal(), ops.LogicalAnd()
        self.cast = ops.Cast()

    def construct(self, visible: Tensor) -> Tensor:
        if visible.ndim == 2:
            visible = self.mask(visible)
        visible_B1SS = self.expand(self.cast(visible, mstype.float32), 1)
        return self.weigh(self.invert(1.0, visible_B1SS), MASKED)

    def mask(self, documents_BS: Tensor) -> Tensor:
        """bool [B, S, S]: same document, and not after."""
        same_BSS = self.same(self.own(documents_BS, 2), self.other(documents_BS, 1))
        return self.both(same_BSS, lower_triangle(documents_BS.shape[1]))

    def sharding(self) -> list[OpSharding]:
        plane = ("batch", None, None, None)
        square, row, column = ("batch", None, None), ("batch", None), (None, None, None)
        return [OpSharding(self.own, (row,)), OpSharding(self.other, (row,)), OpSharding(self.same, (square, square)),
                OpSharding(self.both, (square, column)), OpSharding(self.expand, (square,)),
                OpSharding(self.invert, ((), plane)), OpSharding(self.weigh, (plane, ()))]


class HiddenPositions(AttentionBias):
    """hidden_B1SS uint8: 1 where a position may not look. It takes what `AttentionBias` takes."""

    def __init__(self) -> None:
        super().__init__()
        self.hide = ops.LogicalNot()

    def construct(self, visible: Tensor) -> Tensor:
        if visible.ndim == 2:
            visible = self.mask(visible)
        hidden = self.hide(self.expand(self.cast(visible, mstype.bool_), 1))
        return self.cast(hidden, mstype.uint8)

    def sharding(self) -> list[OpSharding]:
        return [*super().sharding(), OpSharding(self.hide, (("batch", None, None, None),))]


class DocumentEnds(Layer):
    """ends_M int64, M = B L: after how many tokens of this rank's records each document ends, record after record.

    A record with fewer than L documents has its own end for the missing ones, which FlashAttentionScore takes as
    documents of length 0. It takes documents_BS int32, numbered 0, 1, 2, ... in each record.

    Args:
        most: L. Records with more documents must be kept away (`pangu.data.dataset.PackedDataset`).
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.data = most, 1
        self.expand, self.cast, self.reshape = ops.ExpandDims(), ops.Cast(), ops.Reshape()
        self.before, self.count, self.shift = ops.LessEqual(), ops.ReduceSum(), ops.Add()

    def construct(self, documents_BS: Tensor) -> Tensor:
        batch, length = documents_BS.shape
        before_BSL = self.before(self.expand(documents_BS, 2), document_numbers(self.most))
        own_BL = self.cast(self.count(self.cast(before_BSL, mstype.float32), 1), mstype.int32)
        ends_BL = self.shift(own_BL, first_tokens(batch, batch // self.data, length))
        return self.cast(self.reshape(ends_BL, (-1,)), mstype.int64)

    def apply_sharding(self, axes: Axes) -> None:
        # The partitioner cuts the ends by ranks and leaves their values alone: they count from the rank's own first.
        self.data = axes.sizes["batch"]
        super().apply_sharding(axes)

    def sharding(self) -> list[OpSharding]:
        cube, rows = ("batch", None, None), ("batch", None)
        return [OpSharding(self.expand, (rows,)), OpSharding(self.before, (cube, (None, None, None))),
                OpSharding(self.count, (cube,)), OpSharding(self.shift, (rows, rows))]


@ops.constexpr
def document_numbers(most: int) -> Tensor:
    """int32 [1, 1, L]: 0, 1, 2, ..."""
    return _document_numbers(most)


@functools.cache
def _document_numbers(most: int) -> Tensor:
    return Tensor(np.arange(most, dtype=np.int32).reshape(1, 1, most))


@ops.constexpr
def first_tokens(batch: int, own: int, length: int) -> Tensor:
    """int32 [B, 1]: which of its rank's tokens a record's first is, where a rank has `own` records."""
    return _first_tokens(batch, own, length)


@functools.cache
def _first_tokens(batch: int, own: int, length: int) -> Tensor:
    return Tensor((np.arange(batch, dtype=np.int32) % own * length).reshape(batch, 1))


@ops.constexpr
def lower_triangle(length: int) -> Tensor:
    """bool [1, S, S], a constant of the graph: True where the column is not after the row."""
    return _lower_triangle(length)


@functools.cache
def _lower_triangle(length: int) -> Tensor:
    # One tensor for all layers, so that the compiler and the planner see the same mask everywhere.
    return Tensor(np.tri(length, dtype=bool)[None])


class AttentionCore(Layer):
    """softmax(q k^T / sqrt(K) + bias) v for every head, without the projections.

    Args:
        head_width: K.
        dropout: rate on the probabilities.
        softmax_dtype: float32 as the released code, float16 as its later default.

    The paper prints sqrt(D); all code divides by sqrt(K), and so does this. The division is done on q, which is K/S
    the work and keeps float16 scores small.
    """

    def __init__(self, head_width: int, *, dropout: float, softmax_dtype: mstype = mstype.float32) -> None:
        super().__init__()
        self.factor, self.softmax_dtype = 1.0 / math.sqrt(head_width), softmax_dtype
        self.scale, self.mask, self.softmax = ops.Mul(), ops.Add(), ops.Softmax(axis=-1)
        self.rows = RowSoftmax() if mindspore.get_context("device_target") == "CPU" else None
        self.casts = needs_one_type()
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()
        self.cast = ops.Cast()
        self.dropout = Dropout(dropout, ("batch", "heads", None, None))

    def construct(self, query_BHSK: Tensor, key_BHSK: Tensor, value_BHSK: Tensor, bias_B1SS: Tensor,
                  keys: tuple[Tensor, Tensor] | None = None) -> Tensor:
        factor = ops.cast(self.factor, query_BHSK.dtype) if self.casts else self.factor
        score_BHSS = self.scores(self.scale(query_BHSK, factor), key_BHSK)
        score_BHSS = self.mask(self.cast(score_BHSS, self.softmax_dtype), self.cast(bias_B1SS, self.softmax_dtype))
        weight_BHSS = self.rows(score_BHSS) if self.rows is not None else self.softmax(score_BHSS)
        weight_BHSS = self.dropout(self.cast(weight_BHSS, value_BHSK.dtype), keys)
        return self.mix(weight_BHSS, value_BHSK)

    def sharding(self) -> list[OpSharding]:
        heads = ("batch", "heads", None, None)
        return [OpSharding(self.scale, (heads, ())), OpSharding(self.scores, (heads, heads)),
                OpSharding(self.softmax, (heads,)), OpSharding(self.mask, (heads, ("batch", None, None, None))),
                OpSharding(self.mix, (heads, heads))]


class PackedCore(Layer):
    """What `AttentionCore` computes, for documents that lie one after the other, [N, H, K] each: FlashAttentionScore in
    its layout TND, which neither keeps scores nor computes those between documents.

    Args:
        heads: H.
        head_width: K.
        most: L.

    Source: FlashAttentionScore with actual_seq_qlen (docs/mindspore_notes.md).
    """

    def __init__(self, heads: int, head_width: int, most: int) -> None:
        super().__init__()
        self.flash = FlashAttentionScore(head_num=heads, scale_value=1.0 / math.sqrt(head_width), pre_tokens=_ALL,
                                         next_tokens=0, input_layout="TND", sparse_mode=_CAUSAL)
        self.flash.documents = most  # of a record: what the planner needs to know how long records are

    def construct(self, query_NHK: Tensor, key_NHK: Tensor, value_NHK: Tensor, ends_M: Tensor) -> Tensor:
        return self.flash(query_NHK, key_NHK, value_NHK, None, None, None, upper_triangle(), None, ends_M, ends_M)[3]

    def sharding(self) -> list[OpSharding]:
        rows = ("tokens", "heads", None)
        return [OpSharding(self.flash, (rows, rows, rows, (None, None), ("tokens",), ("tokens",)))]


class MaskedCore(Layer):
    """What `AttentionCore` computes, by FlashAttentionScore in its layout BNSD with a mask [B, 1, S, S] and the mask of
    dropout as bits: the same mask as the written-out form's, so nothing differs but rounding.

    Args:
        heads: H.
        head_width: K.
        dropout: rate on the probabilities.
    """

    def __init__(self, heads: int, head_width: int, dropout: float) -> None:
        super().__init__()
        scale = {"head_num": heads, "scale_value": 1.0 / math.sqrt(head_width), "input_layout": "BNSD"}
        self.flash, self.dropping = FlashAttentionScore(**scale), FlashAttentionScore(keep_prob=1.0 - dropout, **scale)
        self.dropout = DropoutBits(dropout, heads)

    def construct(self, query_BHSK: Tensor, key_BHSK: Tensor, value_BHSK: Tensor, hidden_B1SS: Tensor,
                  keys: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if not self.training:
            return self.flash(query_BHSK, key_BHSK, value_BHSK, None, None, None, hidden_B1SS)[3]
        if keys is None:
            raise ValueError("dropout needs the keys of the rows in training")
        bits = self.dropout(keys, query_BHSK.shape[0], query_BHSK.shape[2])
        return self.dropping(query_BHSK, key_BHSK, value_BHSK, None, bits, None, hidden_B1SS)[3]

    def sharding(self) -> list[OpSharding]:
        heads, mask = ("batch", "heads", None, None), ("batch", None, None, None)
        return [OpSharding(self.flash, (heads, heads, heads, mask)),
                OpSharding(self.dropping, (heads, heads, heads, heads, mask))]


@ops.constexpr
def upper_triangle() -> Tensor:
    """uint8 [2048, 2048]: the compressed mask of the causal mode, whatever the length, 1 above the diagonal."""
    return _upper_triangle()


@functools.cache
def _upper_triangle() -> Tensor:
    return Tensor(np.triu(np.ones((_TRIANGLE, _TRIANGLE), np.uint8), 1))


class RowSoftmax(nn.Cell):
    """Softmax over the last dim with the gradient p (g - sum(p g)) written by hand.

    The sum is a product with a column of ones: on the CPU MindSpore's ReduceSum over 2 million scores takes 7 ms, the
    product 1 ms.
    """

    def __init__(self) -> None:
        super().__init__()
        self.softmax, self.matmul = ops.Softmax(axis=-1), ops.MatMul()

    def construct(self, x: Tensor) -> Tensor:
        return self.softmax(x)

    def bprop(self, x: Tensor, p: Tensor, gradient: Tensor) -> tuple[Tensor]:
        shape = p.shape
        p_MS, gradient_MS = ops.reshape(p, (-1, shape[-1])), ops.reshape(gradient, (-1, shape[-1]))
        sum_M1 = self.matmul(p_MS * gradient_MS, ops.ones((shape[-1], 1), p.dtype))
        return (ops.reshape(p_MS * (gradient_MS - sum_M1), shape),)


class Attention(Layer):
    """Multi-head attention with query, key, value and output projections, biases on all four.

    Args:
        width: D.
        heads: H, a divisor of D.
        qkv_std: sigma of the three input projections.
        output_std: sigma of the output projection.
        dropout: rate on the probabilities.
        compute_dtype: type of the matmuls.
        softmax_dtype: type of the softmax (of the written-out form).
        form: see the head of this file.
        most_documents: L, of the packed form.

    Raises:
        UserError: H does not divide D.

    Source: PanGu-alpha eq. 2, 3 and 5; the query layer calls it with another query input than key and value input.
    """

    def __init__(self, width: int, heads: int, *, qkv_std: float, output_std: float, dropout: float,
                 compute_dtype: mstype = mstype.float32, softmax_dtype: mstype = mstype.float32,
                 form: Form = "written_out", most_documents: int = 1) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"heads must divide hidden_size {width}", where="model.heads", value=heads)
        self.width, self.heads, self.head_width = width, heads, width // heads
        column = {"style": "column", "std": qkv_std, "compute_dtype": compute_dtype}
        self.query = Linear(width, width, **column)
        self.key = Linear(width, width, **column)
        self.value = Linear(width, width, **column)
        self.output = Linear(width, width, style="row", std=output_std, compute_dtype=compute_dtype)
        self.packed = form == "packed"
        if form == "packed":
            self.core = PackedCore(heads, self.head_width, most_documents)
        elif form == "masked":
            self.core = MaskedCore(heads, self.head_width, dropout)
        else:
            self.core = AttentionCore(self.head_width, dropout=dropout, softmax_dtype=softmax_dtype)
        self.reshape, self.split_heads, self.merge_heads = ops.Reshape(), ops.Transpose(), ops.Transpose()

    def construct(self, query_ND: Tensor, memory_ND: Tensor, told: Tensor,
                  keys: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """told: what `mask_of(form)` makes of the documents."""
        if self.packed:
            shape = (-1, self.heads, self.head_width)
            mixed_NHK = self.core(self.reshape(self.query(query_ND), shape), self.reshape(self.key(memory_ND), shape),
                                  self.reshape(self.value(memory_ND), shape), told)
            return self.output(self.reshape(mixed_NHK, (-1, self.width)))
        batch = told.shape[0]
        query_BHSK = self.to_heads(self.query(query_ND), batch)
        key_BHSK = self.to_heads(self.key(memory_ND), batch)
        value_BHSK = self.to_heads(self.value(memory_ND), batch)
        return self.output(self.from_heads(self.core(query_BHSK, key_BHSK, value_BHSK, told, keys)))

    def to_heads(self, x_ND: Tensor, batch: int) -> Tensor:
        """[N, D] -> [B, H, S, K]."""
        return self.split_heads(self.reshape(x_ND, (batch, -1, self.heads, self.head_width)), (0, 2, 1, 3))

    def from_heads(self, x_BHSK: Tensor) -> Tensor:
        """[B, H, S, K] -> [N, D]."""
        return self.reshape(self.merge_heads(x_BHSK, (0, 2, 1, 3)), (-1, self.width))

    def sharding(self) -> list[OpSharding]:
        if self.packed:
            return []
        return [OpSharding(self.split_heads, (("batch", None, "heads", None),)),
                OpSharding(self.merge_heads, (("batch", "heads", None, None),))]


def mask_of(form: Form, most_documents: int = 1) -> Layer:
    """The cell that makes of documents_BS what attention in this form is told.

    Args:
        form: see the head of this file.
        most_documents: L, of the packed form.
    """
    if form == "packed":
        return DocumentEnds(most_documents)
    return HiddenPositions() if form == "masked" else AttentionBias()


def form_of(wanted: Literal["auto", "flash", "written_out"], *, dropout: float, compute_dtype: mstype, head_width: int,
            length: int) -> Form:
    """The form that attention takes on the device that MindSpore is set to.

    `auto` takes FlashAttentionScore in bfloat16: CANN has it for the chips that have that type (Atlas A2 and later),
    and not for the Ascend 910 that trains in float16 (docs/mindspore_notes.md).

    Args:
        dropout: rate on the probabilities.
        length: S.

    Raises:
        UserError: `flash` on a device that has no such operator, or for sizes that it does not take.
    """
    if wanted == "written_out" or (wanted == "auto" and compute_dtype != mstype.bfloat16):
        return "written_out"
    problem = _why_not_flash(dropout, head_width, length)
    if problem is None:
        return "masked" if dropout else "packed"
    if wanted == "auto":
        return "written_out"
    raise UserError(problem, where="model.attention", value=wanted, hint="leave it at auto, or take written_out")


def _why_not_flash(dropout: float, head_width: int, length: int) -> str | None:
    if mindspore.get_context("device_target") != "Ascend":
        return "FlashAttentionScore is an operator of Ascend"
    if head_width % HEAD_WIDTH_STEP or head_width > LARGEST_HEAD_WIDTH:
        return f"FlashAttentionScore takes heads whose width is a multiple of 16 up to 512, not {head_width}"
    if dropout and length % 8:
        return f"the mask of its dropout is in bytes, which a sequence_length of {length} does not fill"
    return None
