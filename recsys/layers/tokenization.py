"""From feature groups to the T tokens of width D that a mixer works on, token-first [T, B, D].

Two ways: equal slices of one long concatenation (RankMixer eq. 2), or an MLP for every semantic group and one more over
all of them for a global token (TokenMixer-Large eq. 1-4).
"""

from __future__ import annotations

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from parallel.common.errors import UserError
from parallel.layers.grouped import GroupedLinear, TokenLayout
from parallel.sharding.layout import Axes, Layer, OpSharding
from recsys.layers.embedding import Join
from recsys.ranker import MLP, dense


class Stack(Layer):
    """x_TBD from T tensors [B, D]."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.stack = ops.Stack(axis=0)

    def construct(self, *parts: Tensor) -> Tensor:
        return self.stack(parts)

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.stack, (("batch", None),) * self.count)]


class SliceTokenizer(Layer):
    """x_t = Proj_t(e[d (t - 1) : d t]): the concatenated groups split into T slices of equal width d (RankMixer eq. 2).

    The last slice is filled with zeros where T does not divide the width. Each slice has a projection of its own with a
    bias; `shared` makes it one for all. The paper leaves both open; chosen here.

    Args:
        widths: of the groups.
        tokens: T.
        width: D.
    """

    def __init__(self, widths: list[int], tokens: int, width: int, *, layout: TokenLayout, shared: bool = False,
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__()
        self.tokens, self.width = tokens, width
        total = sum(widths)
        self.slice = -(-total // tokens)
        self.fill = self.slice * tokens - total
        self.join = Join(len(widths))
        self.pad = ops.Pad(((0, 0), (0, self.fill)))
        self.reshape, self.transpose, self.transpose_back = ops.Reshape(), ops.Transpose(), ops.Transpose()
        self.shared = shared
        self.projection = dense(self.slice, width, compute_dtype, rows=tokens) if shared else GroupedLinear(
            tokens, self.slice, width, layout=layout, compute_dtype=compute_dtype)

    def construct(self, *groups: Tensor) -> Tensor:
        flat_BE = self.join(*groups)
        if self.fill:
            flat_BE = self.pad(flat_BE)
        slices_BTd = self.reshape(flat_BE, (-1, self.tokens, self.slice))
        if self.shared:
            x_ND = self.projection(self.reshape(slices_BTd, (-1, self.slice)))
            return self.transpose(self.reshape(x_ND, (-1, self.tokens, self.width)), (1, 0, 2))
        return self.projection(self.transpose(slices_BTd, (1, 0, 2)))

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.pad, (("batch", None),)), OpSharding(self.transpose, (("batch", None, None),))]


def tokens_of_groups(named: dict[str, int], groups: list[str]) -> list[int]:
    """Tokens that each group makes: what `model.group_tokens` says, else 1.

    Raises:
        UserError: it names a group that is not there, or a count below 1.
    """
    for name, count in named.items():
        if name not in groups:
            raise UserError("no such group", where="model.group_tokens", value=name,
                            hint=f"groups: {', '.join(groups)}")
        if count < 1:
            raise UserError("a group makes at least one token", where=f"model.group_tokens.{name}", value=count)
    return [named.get(name, 1) for name in groups]


class GroupTokenizer(nn.Cell):
    """x_g = MLP_g(group g); x_global = MLP(all groups) in front (TokenMixer-Large eq. 1-4).

    A group may make several tokens. MLP_g is one linear layer, or ReLU between two where `hidden` is given; the paper
    does not say.

    Args:
        widths: of the groups.
        counts: tokens that each group makes.
        width: D.
        global_token: whether there is one.
        hidden: width between two layers; None = one layer.
    """

    def __init__(self, widths: list[int], counts: list[int], width: int, *, global_token: bool = True,
                 hidden: int | None = None, compute_dtype: mstype = mstype.float32) -> None:
        super().__init__()
        self.counts, self.width, self.global_token = tuple(counts), width, global_token
        middle = [hidden] if hidden else []
        self.networks = nn.CellList([MLP([inputs, *middle, count * width], compute_dtype, final_relu=False)
                                     for inputs, count in zip(widths, counts, strict=True)])
        self.join = Join(len(widths)) if global_token else None
        self.global_network = MLP([sum(widths), *middle, width], compute_dtype,
                                  final_relu=False) if global_token else None
        self.tokens = sum(counts) + int(global_token)
        self.stack = Stack(self.tokens)
        self.reshape, self.take = ops.Reshape(), TakeParts()

    def construct(self, *groups: Tensor) -> Tensor:
        tokens = ()
        if self.global_token:
            tokens += (self.global_network(self.join(*groups)),)
        for index in range(len(groups)):
            made = self.networks[index](groups[index])
            if self.counts[index] == 1:
                tokens += (made,)
            else:
                tokens += self.take(made, self.counts[index], self.width)
        return self.stack(*tokens)


class TakeParts(Layer):
    """The `count` slices [B, D] of a tensor [B, count D]."""

    def __init__(self) -> None:
        super().__init__()
        from mindspore.ops.auto_generate import SplitWithSize

        self.split = SplitWithSize()

    def construct(self, x: Tensor, count: int, width: int) -> tuple:
        return self.split(x, (width,) * count, 1)

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.split, (("batch", None),))]


class MeanPool(Layer):
    """hidden_BD: the mean over the T tokens of x_TBD."""

    def __init__(self, layout: TokenLayout) -> None:
        super().__init__()
        self.layout, self.mean = layout, ops.ReduceMean()

    def construct(self, x_TBD: Tensor) -> Tensor:
        return self.mean(x_TBD, 0)

    def redistributes(self, axes: Axes) -> bool:
        return self.layout.tokens is not None and axes.sizes["feature_tokens"] > 1

    def sharding(self) -> list[OpSharding]:
        # Under Token Parallel the last redistribution brings complete samples back: the batch is sharded over all
        # devices.
        batch = "batch" if self.layout.kind == "width" else "rows"
        return [OpSharding(self.mean, ((None, batch, None),))]
