"""Separated layers that change the number of tokens (pyramid), and their separated residual.

Shapes: R rows of U, N rows of G, T = c_u + c_g tokens in, P = p_u + p_g tokens out (and mixing heads), D width, d =
D / P, M = T d, A width of queries and keys.

Source: UG-Sep (arXiv 2602.10455): where the token count changes, a plain residual would bring G into U; it is replaced
by cross-attention whose query is the output of mixing and per-token network, whose keys and values are the layer's
input tokens, under one more mask. The paper's formulas could not be read; here it is O + softmax(q(O) k(X)^T / sqrt(A))
X, one head, projections of their own for every token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from parallel.common.errors import UserError
from parallel.layers.grouped import Add, GroupedLinear, TokenLayout
from parallel.layers.parameter import needs_one_type
from parallel.sharding.layout import Layer, OpSharding
from recsys.settings import RankerSettings
from recsys.ug_sep.compensation import Compensation
from recsys.ug_sep.layers import Beside, Repeat, Shape, Take
from recsys.ug_sep.mixing import TwoSidedMixing
from recsys.ug_sep.ranker import TwoSidedBlock
from recsys.ug_sep.sides import UGSepSettings, pair


def count_pairs(first: Shape, named: list[str], layers: int) -> list[Shape]:
    """(U, G) tokens into the first layer and out of every one.

    Raises:
        UserError: `named` (`model.ug_sep.layers`) says it for another number of layers.
    """
    if named and len(named) != layers:
        raise UserError(f"there are {layers} layers", where="model.ug_sep.layers", value=named,
                        hint="give tokens for each")
    return [first, *(pair(item, "model.ug_sep.layers") for item in named)] if named else [first] * (layers + 1)


class Attend(Layer):
    """y_PNE = softmax(q_PNA k_TNA^T / sqrt(A) + bias_PT) v_TNE, among the tokens of each sample."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.casts = width ** -0.5, needs_one_type()
        self.turn_query, self.turn_key, self.turn_value = ops.Transpose(), ops.Transpose(), ops.Transpose()
        self.turn_back, self.scores, self.mix = ops.Transpose(), ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()
        self.times, self.softmax, self.hide = ops.Mul(), ops.Softmax(-1), ops.Add()

    def construct(self, q_PNA: Tensor, k_TNA: Tensor, v_TNE: Tensor, bias_PT: Tensor | None = None) -> Tensor:
        q_NPA, k_NTA = self.turn_query(q_PNA, (1, 0, 2)), self.turn_key(k_TNA, (1, 0, 2))
        scale = ops.cast(self.scale, q_NPA.dtype) if self.casts else self.scale
        scores_NPT = self.times(self.scores(q_NPA, k_NTA), scale)
        if bias_PT is not None:
            scores_NPT = self.hide(scores_NPT, bias_PT)
        y_NPE = self.mix(self.softmax(scores_NPT), self.turn_value(v_TNE, (1, 0, 2)))
        return self.turn_back(y_NPE, (1, 0, 2))

    def sharding(self) -> list[OpSharding]:
        turned, cube = ((None, "batch", None),), ("batch", None, None)
        return [OpSharding(self.turn_query, turned), OpSharding(self.turn_key, turned),
                OpSharding(self.turn_value, turned), OpSharding(self.scores, (cube, cube)),
                OpSharding(self.times, (cube, ())), OpSharding(self.softmax, (cube,)),
                OpSharding(self.mix, (cube, cube)), OpSharding(self.turn_back, (cube,))]


class PyramidBlock(TwoSidedBlock):
    """From T tokens to P: O = network(Mix(X)), X' = O + attention of O to X.

    With `prenorm` (TokenMixer-Large) X is normalised first and a second per-token network follows, X' + F2(norm X');
    without (RankMixer) the sum is normalised.

    Args:
        before, after: (c_u, c_g) and (p_u, p_g).
        norm: class of the norms.
        network: makes a per-token network, called (settings, tokens, inputs, inner, outputs, layout, compute_dtype).
        inner: its inner width over its input's.
    """

    def __init__(self, settings: RankerSettings, before: Shape, after: Shape, layout: TokenLayout,
                 compute_dtype: mstype, *,
                 norm: Callable, network: Callable, inner: float, prenorm: bool) -> None:
        super().__init__()
        separation, width = settings.ug_sep, settings.width
        (c_u, c_g), (p_u, p_g) = before, after
        if width % (p_u + p_g):
            raise UserError(f"tokens of a layer must divide width {width}", where="model.ug_sep.layers",
                            value=f"{p_u}:{p_g}")
        d, tokens = width // (p_u + p_g), c_u + c_g
        self.before, self.after, self.prenorm = before, after, prenorm
        self.sparse = settings.moe is not None and not prenorm
        self.rows = c_u * d if separation.mixing_mask else tokens * d
        wide = tokens * d
        share = {"compute_dtype": compute_dtype, "stream": layout.stream}
        self.norm1, self.norm2 = norm(width, **share), norm(width, **share) if prenorm else None

        def make(count: int, inputs: int, within: int) -> nn.Cell:
            return network(settings, count, inputs, within, width, layout, compute_dtype)

        self.first_user, self.first_group = (make(p_u, self.rows, round(inner * wide)),
                                             make(p_g, wide, round(inner * wide)))
        self.second_user = make(p_u, width, round(inner * width)) if prenorm else None
        self.second_group = make(p_g, width, round(inner * width)) if prenorm else None
        self.mixing = TwoSidedMixing(before, after, width, layout, separation.mixing_mask)
        self.beside, self.take, self.join_tokens = Beside(2, layout.stream), Take(), Beside(0, layout.stream)
        self.join_keys, self.join_values = Beside(0, layout.stream), Beside(0, layout.stream)
        self._make_attention(separation, width, layout, compute_dtype)
        self.add_user_attended, self.add_candidate_attended = Add(layout.stream), Add(layout.stream)
        self.add_user, self.add_candidate, self.add_compensation = (Add(layout.stream) for _ in range(3))
        self.repeat = Repeat(p_g)
        self.compensation = None
        if separation.compensation != "none":
            self.compensation = Compensation(separation.compensation, p_u, self.rows, p_g, width,
                                             separation.compensation_rank or width, compute_dtype)
        self.components = [(p_g, c_u * d), (c_u, separation.attention_size), (c_u, width),
                           *([self.compensation.shape] if self.compensation is not None else [])]

    def _make_attention(self, separation: UGSepSettings, width: int, layout: TokenLayout,
                        compute_dtype: mstype) -> None:
        (c_u, c_g), (p_u, p_g), size = self.before, self.after, separation.attention_size
        self.query_user, self.query_group, self.key_user, self.key_group = (
            GroupedLinear(count, width, size, layout=layout, bias=False, compute_dtype=compute_dtype)
            for count in (p_u, p_g, c_u, c_g))
        self.attend_user, self.attend_candidate = Attend(size), Attend(size)
        bias = np.zeros((1, p_u + p_g, c_u + c_g), np.float32)
        if separation.residual_mask:
            bias[:, :p_u, c_u:] = -math.inf
        self.bias = Tensor(bias)

    def applied(self, network: nn.Cell, x_TBD: Tensor, index_N: Tensor | None = None) -> tuple:
        """(result, penalty) of a network with or without one."""
        if self.sparse:
            return network(x_TBD, index_N)
        return network(x_TBD), 0.0

    def user(self, x_uRD: Tensor, index_N: Tensor | None = None) -> tuple:
        """(x_pRD; components: U's part of the G mixed tokens, keys and values of the U tokens, compensation if any;
        penalty)."""
        n_uRD = self.norm1(x_uRD) if self.prenorm else x_uRD
        own, other = self.mixing.split_heads(n_uRD)
        own, given = self.mixing.user(own, other)
        o_pRD, penalty = self.applied(self.first_user, own, index_N)
        keys = self.key_user(n_uRD)
        components = (given, keys, n_uRD)
        if self.compensation is not None:
            components += (self.compensation(own),)
        o_pRD = self.add_user_attended(o_pRD, self.attend_user(self.query_user(o_pRD), keys, n_uRD))
        if not self.prenorm:
            return self.norm1(o_pRD), components, penalty
        return self.add_user(o_pRD, self.second_user(self.norm2(o_pRD))), components, penalty

    def candidate(self, x_gND: Tensor, components: tuple, index_N: Tensor | None) -> tuple:
        """(x_pND, penalty)."""
        n_gND = self.norm1(x_gND) if self.prenorm else x_gND
        h_pNM = self.beside(self.take.full(components[0], index_N), self.mixing.candidate(n_gND))
        o_pND, penalty = self.applied(self.first_group, h_pNM)
        keys = self.join_keys(self.take.full(components[1], index_N), self.key_group(n_gND))
        values = self.join_values(self.take.full(components[2], index_N), n_gND)
        o_pND = self.add_candidate_attended(o_pND, self.attend_candidate(self.query_group(o_pND), keys, values))
        if self.compensation is not None:
            o_pND = self.add_compensation(o_pND, self.take.full(self.repeat(components[3]), index_N))
        if not self.prenorm:
            return self.norm1(o_pND), penalty
        return self.add_candidate(o_pND, self.second_group(self.norm2(o_pND))), penalty

    def masked(self, x_TBD: Tensor) -> tuple:
        """(x_PBD, penalties): the same by masks on full tensors."""
        (c_u, _), (p_u, _) = self.before, self.after
        n_TBD = self.norm1(x_TBD) if self.prenorm else x_TBD
        h_PBM = self.mixing.masked(n_TBD)
        own, penalty = self.applied(self.first_user, h_PBM[:p_u, :, :self.rows])
        other, more = self.applied(self.first_group, h_PBM[p_u:])
        queries = self.join_keys(self.query_user(own), self.query_group(other))
        keys = self.join_keys(self.key_user(n_TBD[:c_u]), self.key_group(n_TBD[c_u:]))
        o_PBD = self.join_tokens(own, other) + self.attend_candidate(queries, keys, n_TBD, self.bias)
        if self.compensation is not None:
            extra = self.repeat(self.compensation(h_PBM[:p_u, :, :self.rows]))
            o_PBD = self.join_tokens(o_PBD[:p_u], o_PBD[p_u:] + extra)
        if not self.prenorm:
            return self.norm1(o_PBD), (penalty, more)
        n_PBD = self.norm2(o_PBD)
        return o_PBD + self.join_tokens(self.second_user(n_PBD[:p_u]), self.second_group(n_PBD[p_u:])), ()
