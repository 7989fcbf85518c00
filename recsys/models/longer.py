"""LONGER: long behaviour sequences with merged tokens, global tokens and reuse of the user's keys and values
(arXiv 2505.04421).

Shapes: B batch, L sequence, M = L / K merged tokens, G global tokens, D width, H heads. Sequence tokens look only at
the sequence, so what a user's sequence needs is the same for every candidate: `user_state` makes it once, `score` uses
it; together they equal the forward pass.
"""

from __future__ import annotations

from typing import Literal

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from pydantic import Field, model_validator

from parallel.common.errors import UserError
from parallel.layers.parameter import parameter
from parallel.sharding.layout import Layer, OpSharding
from recsys.data.features import FeatureSpec
from recsys.layers.embedding import Join, group_widths
from recsys.layers.interactions import CUBE, AddRelu, Attend, CubeNorm, Flat, Heads, PositionLinear
from recsys.ranker import MLP, Ranker, dense
from recsys.settings import RankerSettings


class LongerSettings(RankerSettings):
    """Sizes of the stack."""

    name: Literal["longer"] = "longer"
    """Which ranker."""
    width: int = Field(32, ge=1)
    """D."""
    heads: int = Field(4, ge=1)
    """Attention heads; must divide D."""
    layers: int = Field(2, ge=1, le=10_000)
    """Attention layers: the first looks at the whole sequence, the others at the recent tokens."""
    merge: int = Field(2, ge=1)
    """K adjacent items that become one token; must divide the sequence's length."""
    recent: int = Field(4, ge=1)
    """Newest merged tokens that go on as queries beside the global ones."""
    ffn_ratio: float = Field(2.0, gt=0.0)
    """Inner width of the feed-forward networks over D."""
    top: list[int] = Field(default_factory=lambda: [64])
    """Deep network on the global tokens."""

    @model_validator(mode="after")
    def _check(self) -> LongerSettings:
        if self.width % self.heads:
            raise UserError(f"heads must divide width {self.width}", where="model.heads", value=self.heads)
        return self


class Merge(Layer):
    """x_BMD: K adjacent items side by side through one linear layer, plus a learned position; bias_B11M hides tokens
    that hold no item."""

    def __init__(self, length: int, width: int, settings: LongerSettings, compute_dtype: mstype) -> None:
        super().__init__()
        self.count, self.size = length // settings.merge, settings.merge * width
        self.project = PositionLinear(self.size, settings.width, self.count, compute_dtype)
        self.position = parameter((1, self.count, settings.width), "normal", 0.02, shard_optimizer=False)
        self.merge = settings.merge
        self.weigh, self.add, self.max, self.reshape = ops.Mul(), ops.Add(), ops.ReduceMax(), ops.Reshape()
        self.invert, self.hide = ops.Sub(), ops.Mul()

    def construct(self, rows_BLW: Tensor, present_BL1: Tensor) -> tuple:
        masked = self.reshape(self.weigh(rows_BLW, present_BL1), (-1, self.count, self.size))
        some_BM = self.max(self.reshape(present_BL1, (-1, self.count, self.merge)), 2)
        bias_BM = self.hide(self.invert(some_BM, 1.0), 1e4)
        return self.add(self.project(masked), self.position), self.reshape(bias_BM, (-1, 1, 1, self.count))

    def sharding(self) -> list[OpSharding]:
        flat = ("batch", None)
        return [OpSharding(self.weigh, (CUBE, CUBE)), OpSharding(self.add, (CUBE, (None, None, None))),
                OpSharding(self.max, (CUBE,)), OpSharding(self.invert, (flat, ())), OpSharding(self.hide, (flat, ()))]


class LongerLayer(nn.Cell):
    """Pre-norm attention and feed-forward network. Sequence and global tokens share the projections; the queries of the
    sequence see keys of the sequence only, so each kind can also go its own way (`sequence`, `candidates`)."""

    def __init__(self, keys: int, queries: int, globals_: int, settings: LongerSettings, compute_dtype: mstype) -> None:
        super().__init__()
        width, inner = settings.width, round(settings.ffn_ratio * settings.width)
        rows = queries + globals_
        self.query = PositionLinear(width, width, rows, compute_dtype)
        self.key, self.value = (PositionLinear(width, width, keys + globals_, compute_dtype) for _ in range(2))
        self.out = PositionLinear(width, width, rows, compute_dtype)
        self.first, self.second = (PositionLinear(i, o, rows, compute_dtype) for i, o in ((width, inner),
                                                                                          (inner, width)))
        self.heads, self.attend = Heads(settings.heads), Attend((width // settings.heads) ** -0.5)
        self.norm1, self.norm2 = CubeNorm(width), CubeNorm(width)
        self.add1, self.add2, self.relu = AddRelu(3), AddRelu(3), ops.ReLU()
        self.join_keys, self.join_bias, self.zero = JoinHeads(2), JoinHeads(3), ops.ZerosLike()
        self.recent, self.count = queries, globals_
        pairs = queries * keys + globals_ * (keys + globals_)
        self.flops_per_sample = (2 * width * width * (2 * rows + 2 * (keys + globals_)) + 4 * rows * width * inner
                                 + 4 * pairs * width)

    def keys_values(self, x: Tensor) -> tuple:
        """Keys and values [B, H, F, D / H] of tokens [B, F, D]."""
        normed = self.norm1(x)
        return self.heads(self.key(normed)), self.heads(self.value(normed))

    def update(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Tokens that looked at the given keys."""
        mixed = self.attend(self.heads(self.query(self.norm1(x))), keys, values, bias)
        x = self.add1(x, self.out(self.heads(mixed, True)))
        return self.add2(x, self.second(self.relu(self.first(self.norm2(x)))))

    def sequence(self, x_BMD: Tensor, bias: Tensor) -> tuple:
        """(the recent tokens after the layer, their bias, (keys, values, bias) for the global tokens)."""
        keys, values = self.keys_values(x_BMD)
        recent_BMD = self.update(x_BMD[:, -self.recent:], keys, values, bias)
        return recent_BMD, bias[:, :, :, -self.recent:], (keys, values, bias)

    def candidates(self, x_BGD: Tensor, state: tuple) -> Tensor:
        """The global tokens after the layer, given what `sequence` leaves for them."""
        keys, values, bias = state
        own_keys, own_values = self.keys_values(x_BGD)
        full = self.join_bias(self.zero(bias[:, :, :, :1]).tile((1, 1, 1, self.count)), bias)
        return self.update(x_BGD, self.join_keys(own_keys, keys), self.join_keys(own_values, values), full)

    def construct(self, x_BGD: Tensor, x_BMD: Tensor, bias: Tensor) -> tuple:
        """(global tokens, recent tokens, their bias)."""
        # Nothing before a stage's border asks for the bias's gradient: sent back all the same, it would wait forever.
        x_BMD, recent_bias, state = self.sequence(x_BMD, ops.stop_gradient(bias))
        return self.candidates(x_BGD, state), x_BMD, recent_bias


class Longer(Ranker):
    """hidden = MLP(global tokens after L layers over the sequence)."""

    def __init__(self, settings: LongerSettings, spec: FeatureSpec, tasks: int,
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__(settings, spec, tasks, compute_dtype)
        kept = [slot for slot in spec.slots.values() if slot.feature.is_list and slot.feature.pooling == "none"]
        if len(kept) != 1 or kept[0].length % settings.merge:
            raise UserError("LONGER needs one sequence with pooling: none and a length that model.merge divides",
                            where="data.features", value=[slot.feature.name for slot in kept],
                            hint="for features of the reader set data.pooling: {name: none}")
        widths = list(group_widths(spec).values())
        self.merge = Merge(kept[0].length, kept[0].width, settings, compute_dtype)
        self.globals = nn.CellList([dense(width, settings.width, compute_dtype) for width in widths])
        self.count, self.width = len(widths), settings.width
        self.recent = min(settings.recent, self.merge.count)
        sizes = [self.merge.count] + [self.recent] * (settings.layers - 1)
        self.layers = nn.CellList([LongerLayer(keys, self.recent, self.count, settings, compute_dtype)
                                   for keys in sizes])
        self.join = Join(self.count)
        self.flat, self.reshape = Flat(self.count * settings.width), ops.Reshape()
        self.network = MLP([self.flat.size, *settings.top], compute_dtype)
        self.make_head(settings.top[-1] if settings.top else self.flat.size)

    def user_state(self, sequences: tuple) -> tuple:
        """(keys, values, bias) of every layer: all that candidates need of a user's sequence."""
        rows_BLW, present_BL1 = sequences[0]
        x_BMD, bias = self.merge(rows_BLW, present_BL1)
        state = ()
        for layer in self.layers:
            x_BMD, bias, own = layer.sequence(x_BMD, bias)
            state += (own,)
        return state

    def tokens(self, groups: tuple) -> Tensor:
        """x_BGD: a global token of each group."""
        made = ()
        for index in range(self.count):
            made += (self.globals[index](groups[index]),)
        return self.reshape(self.join(*made), (-1, self.count, self.width))

    def score(self, groups: tuple, state: tuple) -> Tensor:
        """hidden_BD of candidates whose users' states are given (a row of the state for each row of the groups)."""
        x_BGD = self.tokens(groups)
        for index in range(len(self.layers)):
            x_BGD = self.layers[index].candidates(x_BGD, state[index])
        return self.network(self.flat(x_BGD))

    def represent(self, groups: tuple, sequences: tuple) -> tuple:
        rows_BLW, present_BL1 = sequences[0]
        x_BMD, bias = self.merge(rows_BLW, present_BL1)
        x_BGD = self.tokens(groups)
        for layer in self.layers:
            x_BGD, x_BMD, bias = layer(x_BGD, x_BMD, bias)
        return self.network(self.flat(x_BGD)), (), ()

    def pipeline_cells(self) -> list[nn.Cell | list[nn.Cell]]:
        first = [self.embedding, self.drop, self.merge, self.globals, self.join]
        return [first, *self.layers, [self.flat, self.network, self.head]]


class JoinHeads(Layer):
    """Concatenation of two tensors [B, H, F, K] along `dim`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.concat = ops.Concat(axis=dim)

    def construct(self, one: Tensor, other: Tensor) -> Tensor:
        return self.concat((one, other))

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.concat, (("batch", None, None, None),) * 2)]


SETTINGS, MODEL = LongerSettings, Longer
