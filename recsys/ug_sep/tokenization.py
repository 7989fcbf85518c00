"""Tokens of user and candidate features out of semantic groups.

Shapes: R requests (rows of U), N candidates (rows of G), D width.
"""

from __future__ import annotations

import math

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from parallel.layers.grouped import Add
from recsys.layers.embedding import Join
from recsys.layers.tokenization import GroupTokenizer, Stack
from recsys.ranker import ReLU, dense
from recsys.ug_sep.layers import Beside, Shape, Take
from recsys.ug_sep.sides import allot


class TwoSidedGroupTokenizer(nn.Cell):
    """Tokens by semantic groups for each side, and the global token.

    A global token of all groups is a G token; U's groups enter its first layer by a product of their own, which is a
    component of the state.

    Args:
        users, candidates: widths of each side's groups.
        counts: (U, G) tokens, global tokens counted.
        global_token: none, candidate or per_side.
    """

    def __init__(self, users: dict[str, int], candidates: dict[str, int], counts: Shape, width: int, *,
                 named: dict[str, int], global_token: str, hidden: int | None,
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__()
        options = {"hidden": hidden, "compute_dtype": compute_dtype}
        both = global_token == "per_side"
        self.bundles, self.sides = [], []
        for own, count, extra in ((users, counts[0], both), (candidates, counts[1], global_token != "none")):
            bundles = allot(list(own), count - int(extra), named)
            self.bundles.append(tuple(len(names) for names, _ in bundles))
            widths = [sum(own[name] for name in names) for names, _ in bundles]
            # The global token in front of U tokens is an ordinary one; that of G also reads U.
            self.sides.append(GroupTokenizer(widths, [made for _, made in bundles], width,
                                             global_token=extra and own is users, **options))
        self.user_side, self.group_side = self.sides
        self.joins = [nn.CellList([Join(size) for size in sizes]) for sizes in self.bundles]
        self.user_joins, self.candidate_joins = self.joins
        self.bundles = tuple(self.bundles)
        del self.sides, self.joins
        self.has_global = global_token != "none"
        if self.has_global:
            wide, total = hidden or width, sum(users.values()) + sum(candidates.values())
            self.global_user = dense(sum(users.values()), wide, compute_dtype, bias=False)
            self.global_group = dense(sum(candidates.values()), wide, compute_dtype)
            for linear in (self.global_user, self.global_group):
                linear.weight.start = ("normal", math.sqrt(2.0 / (total + wide)))
            self.global_out = dense(hidden, width, compute_dtype) if hidden else None
            self.relu, self.join_users, self.join_candidate = ReLU(), Join(len(users)), Join(len(candidates))
            self.add, self.beside = Add(("batch", None)), Beside(0, (None, "batch", None))
        self.wide, self.take, self.stack, self.reshape = hidden or width, Take(), Stack(1), ops.Reshape()

    @property
    def components(self) -> list[Shape]:
        """(c, K) of what `user` gives to `candidate`."""
        return [(1, self.wide)] if self.has_global else []

    def bundled(self, groups: tuple, sizes: tuple, joins: nn.CellList) -> tuple:
        """Neighbouring groups that make tokens together, side by side."""
        result, taken = (), 0
        for number in range(len(sizes)):
            result += (joins[number](*groups[taken:taken + sizes[number]]),)
            taken += sizes[number]
        return result

    def user(self, groups: tuple) -> tuple:
        """(x_uRD, components)."""
        x_uRD, components = self.user_side(*self.bundled(groups, self.bundles[0], self.user_joins)), ()
        if self.has_global:
            components += (self.reshape(self.global_user(self.join_users(*groups)), (1, -1, self.wide)),)
        return x_uRD, components

    def candidate(self, groups: tuple, components: tuple, index_N: Tensor | None) -> Tensor:
        """x_gND, the global token in front."""
        x_gND = self.group_side(*self.bundled(groups, self.bundles[1], self.candidate_joins))
        if not self.has_global:
            return x_gND
        given_ND = self.reshape(self.take.full(components[0], index_N), (-1, self.wide))
        made_ND = self.add(self.global_group(self.join_candidate(*groups)), given_ND)
        if self.global_out is not None:
            made_ND = self.global_out(self.relu(made_ND))
        return self.beside(self.stack(made_ND), x_gND)
