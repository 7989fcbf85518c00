"""UG-Sep: the parts of a ranker whose user tokens (U) know nothing of the candidate (G), so that they are
computed once a request.

Shapes: R requests (rows of U), N candidates (rows of G), T tokens of which the first are U, H mixing heads, D width,
K width of a component, S width of the state. A *component* [c, R, K] is something of the U pass that the G pass reads;
the state of a request is all its components in one row, state_RS.

Attributes named after "group" (`first_group`, `group_side`, ...) hold parameters of the candidate side, whose names in
checkpoints they are.

Source: UG-Sep (arXiv 2602.10455). The masks: a U mixed token reads U heads only, M_mix[h, j] = 0 for h < h_u, j >= c_u
d_h; a U token takes back U mixed tokens only, M_rev[t, j] = 0 for t < c_u, j >= h_u d_h. The paper's formulas could not
be read; these are ours (UI-MixFormer, arXiv 2602.14110 eq. 10-11, prints a mask of the same kind).
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.auto_generate import SplitWithSize

from parallel.common.errors import UserError
from parallel.layers.grouped import GroupedLinear, TokenLayout
from parallel.layers.parameter import parameter
from parallel.sharding.config import ParallelConfig
from parallel.sharding.layout import Layer, Operand, OpSharding
from recsys.data.features import FeatureSpec
from recsys.layers.embedding import FeatureEmbedding, Table
from recsys.layers.tokenization import MeanPool
from recsys.ranker import Ranker, check_token_axes
from recsys.settings import RankerSettings
from recsys.ug_sep.sides import UserCandidateSplit

Shape = tuple[int, int]


class Columns(Layer):
    """Chosen columns of a tensor [B, M]."""

    def __init__(self, columns: tuple[int, ...]) -> None:
        super().__init__()
        self.columns, self.gather = Tensor(np.array(columns, np.int32)), ops.Gather()

    def construct(self, x_BM: Tensor) -> Tensor:
        return self.gather(x_BM, self.columns, 1)

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.gather, (("batch", None), (None,)))]


class TwoSidedEmbedding(nn.Cell):
    """One embedding for each side out of common tables. Called with whole rows it gives the groups of both."""

    def __init__(self, spec: FeatureSpec, sides: UserCandidateSplit, std: float) -> None:
        super().__init__()
        tables = {width: Table(rows, width, std) for width, rows in spec.tables.items()}
        self.tables = nn.CellList(list(tables.values()))
        self.user = FeatureEmbedding(sides.user.spec, std, tables)
        self.group = FeatureEmbedding(sides.candidate.spec, std, tables)
        self.user_ids, self.user_numbers = Columns(sides.user.ids), Columns(sides.user.numbers)
        self.candidate_ids, self.group_numbers = Columns(sides.candidate.ids), Columns(sides.candidate.numbers)

    def construct(self, ids_BM: Tensor, numbers_BN: Tensor) -> tuple:
        """(U groups, G groups)."""
        user, _ = self.user(self.user_ids(ids_BM), self.user_numbers(numbers_BN))
        group, _ = self.group(self.candidate_ids(ids_BM), self.group_numbers(numbers_BN))
        return user, group


class Widths(Layer):
    """Pieces of the given sizes of the last dim of x_TBD."""

    def __init__(self, sizes: tuple[int, ...], stream: Operand) -> None:
        super().__init__()
        self.sizes, self.stream, self.split = sizes, stream, SplitWithSize()

    def construct(self, x_TBD: Tensor) -> tuple:
        return self.split(x_TBD, self.sizes, 2)

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.split, (self.stream,))]


class Beside(Layer):
    """Two tensors [T, B, .] side by side along `dim`: 2 joins widths, 0 joins tokens."""

    def __init__(self, dim: int, stream: Operand) -> None:
        super().__init__()
        # Tokens of two sides are not cut alike, so where they are joined they lie whole.
        self.stream = stream if dim == 2 else (None, stream[1], stream[2])
        self.concat = ops.Concat(axis=dim)

    def construct(self, one: Tensor, other: Tensor) -> Tensor:
        return self.concat((one, other))

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.concat, (self.stream, self.stream))]


class Fill(Layer):
    """Zeros after (or before) the last dim of x_TBD."""

    def __init__(self, before: int, after: int, stream: Operand) -> None:
        super().__init__()
        self.stream, self.pad = stream, ops.Pad(((0, 0), (0, 0), (before, after)))

    def construct(self, x_TBD: Tensor) -> Tensor:
        return self.pad(x_TBD)

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.pad, (self.stream,))]


class Blank(Layer):
    """Zeros in the shape of x_TBD. (A filled constant would not be cut as x is.)"""

    def __init__(self, stream: Operand) -> None:
        super().__init__()
        self.stream, self.zeros = stream, ops.ZerosLike()

    def construct(self, x_TBD: Tensor) -> Tensor:
        return self.zeros(x_TBD)

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.zeros, (self.stream,))]


class Mask(Layer):
    """x_TBE with 0 where a U row (the first `rows`) would read a G column (from `columns` on); all of it otherwise.

    Args:
        shape: (T, E).
        on: false lets everything through (ablation).
    """

    def __init__(self, shape: Shape, rows: int, columns: int, on: bool = True) -> None:
        super().__init__()
        mask = np.ones((shape[0], 1, shape[1]), np.float32)
        mask[:rows, :, columns:] = 0.0
        self.on, self.mask, self.times, self.cast = on, Tensor(mask), ops.Mul(), ops.Cast()

    def construct(self, x_TBE: Tensor) -> Tensor:
        return self.times(x_TBE, self.cast(self.mask, x_TBE.dtype)) if self.on else x_TBE


class Repeat(Layer):
    """[count, B, K] out of [1, B, K]; a tensor of more tokens as it is."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.tile = count, ops.Tile()

    def construct(self, x_cBK: Tensor) -> Tensor:
        return self.tile(x_cBK, (self.count, 1, 1)) if x_cBK.shape[0] < self.count else x_cBK

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.tile, ((None, "batch", None),))]


class Take(nn.Cell):
    """Pieces [c, R, K] for each candidate: row index_N[n] for candidate n; as they are without an index (R = N)."""

    def __init__(self) -> None:
        super().__init__()
        self.gather, self.tile = ops.Gather(), ops.Tile()

    def construct(self, x_cRK: Tensor, index_N: Tensor | None) -> Tensor:
        """[c, N, K], or [c, 1, K] for one request, whose addition broadcasts."""
        if index_N is None or x_cRK.shape[1] == 1:
            return x_cRK
        return self.gather(x_cRK, index_N, 1)

    def full(self, x_cRK: Tensor, index_N: Tensor | None) -> Tensor:
        """[c, N, K] in any case."""
        if index_N is None:
            return x_cRK
        if x_cRK.shape[1] == 1:
            return self.tile(x_cRK, (1, index_N.shape[0], 1))
        return self.gather(x_cRK, index_N, 1)


class SharedMean(Layer):
    """hidden_ND: the mean over U and G tokens from the mean of each side.

    Args:
        batch: the named axis that cuts N.
    """

    def __init__(self, batch: str) -> None:
        super().__init__()
        self.batch, self.weigh_user, self.weigh_candidate, self.add = batch, ops.Mul(), ops.Mul(), ops.Add()

    def construct(self, user_ND: Tensor, candidate_ND: Tensor, share: float) -> Tensor:
        """`share`: that of U among the tokens."""
        return self.add(self.weigh_user(user_ND, share), self.weigh_candidate(candidate_ND, 1.0 - share))

    def sharding(self) -> list[OpSharding]:
        row = (self.batch, None)
        return [OpSharding(self.weigh_user, (row, ())), OpSharding(self.weigh_candidate, (row, ())),
                OpSharding(self.add, (row, row))]


class Compensation(Layer):
    """component_gRD: what G tokens get of U mixed tokens u_hRK; zero at the start. See `UGSepSettings.compensation`.

    Args:
        form: token_mixing, low_rank or mean.
        sources, width: h and K of the U mixed tokens.
        targets, outputs: G tokens and D.
        rank: of low_rank.

    The paper only says that the masked U representation goes through a learnable linear projection and is added to the
    G tokens; the three forms, their source (U mixed tokens, after the mask) and their place (the block's first
    residual) are ours.
    """

    def __init__(self, form: str, sources: int, width: int, targets: int, outputs: int, rank: int,
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__()
        self.form, self.sources, self.width = form, sources, width
        self.targets, self.outputs = targets, outputs
        self.reshape, self.transpose, self.mean = ops.Reshape(), ops.Transpose(), ops.ReduceMean(keep_dims=True)
        self.matmul, self.tile, self.cast = ops.MatMul(transpose_b=True), ops.Tile(), ops.Cast()
        self.turn, self.turn_back = ops.Transpose(), ops.Transpose()
        shared = {"bias": False, "compute_dtype": compute_dtype}
        inputs = sources * width if form == "low_rank" else width
        inner = {"low_rank": rank, "token_mixing": outputs, "mean": outputs}[form]
        self.project = GroupedLinear(1, inputs, inner, gain=0.0 if form == "mean" else 1.0, **shared)
        self.spread = GroupedLinear(targets, rank, outputs, gain=0.0, **shared) if form == "low_rank" else None
        self.weight = None
        if form == "token_mixing":
            self.weight = parameter((targets, sources), "zeros", shard_optimizer=False)

    @property
    def shape(self) -> Shape:
        """(c, K) of the component."""
        return (1 if self.form == "mean" else self.targets), self.outputs

    def construct(self, u_hRK: Tensor) -> Tensor:
        if self.form == "mean":
            return self.project(self.mean(u_hRK, 0))
        rows = u_hRK.shape[1]
        if self.form == "low_rank":
            flat = self.reshape(self.transpose(u_hRK, (1, 0, 2)), (1, rows, self.sources * self.width))
            return self.spread(self.tile(self.project(flat), (self.targets, 1, 1)))
        # Samples first, so that cutting them needs no exchange.
        u_RhK = self.transpose(u_hRK, (1, 0, 2))
        made = self.project(self.reshape(u_RhK, (1, rows * self.sources, self.width)))
        made = self.turn(self.reshape(made, (rows, self.sources, self.outputs)), (0, 2, 1))
        made = self.matmul(self.reshape(made, (rows * self.outputs, self.sources)), self.cast(self.weight, made.dtype))
        return self.turn_back(self.reshape(made, (rows, self.outputs, self.targets)), (2, 0, 1))

    def sharding(self) -> list[OpSharding]:
        cube = (None, "batch", None)
        return [OpSharding(self.transpose, (cube,)), OpSharding(self.mean, (cube,)), OpSharding(self.tile, (cube,)),
                OpSharding(self.turn, (("batch", None, None),)), OpSharding(self.turn_back, (("batch", None, None),)),
                OpSharding(self.matmul, (("batch", None), (None, None)))]

    @property
    def flops_per_sample(self) -> int:
        """Two for each multiplication and addition of the products."""
        if self.form == "low_rank":
            return self.project.flops_per_sample + self.spread.flops_per_sample
        if self.form == "mean":
            return self.project.flops_per_sample
        return self.sources * self.project.flops_per_sample + 2 * self.targets * self.sources * self.outputs


class TwoSidedBlock(nn.Cell):
    """Base of a separated ranker's blocks.

        components                        (c, K) of what its `user` gives to its `candidate`
        user(x_uRD, index) -> (x_uRD, components, penalty)
        candidate(x_gND, components, index) -> (x_gND, penalty)
        masked(x_TBD) -> (x_TBD, penalty) the same with masks instead of slices
    """

    def construct(self, x_uRD: Tensor, x_gND: Tensor, index_N: Tensor | None = None) -> tuple:
        """(x_uRD, x_gND, U's penalty, G's penalty): one layer of both passes."""
        x_uRD, components, own = self.user(x_uRD, index_N)
        x_gND, other = self.candidate(x_gND, components, index_N)
        return x_uRD, x_gND, own, other


class SeparatedRanker(Ranker):
    """Base of separated rankers: `user_pass` once a request, `candidate_pass` for its candidates, both together the
    forward pass.

    A model makes `tokenize`, `layers` (`TwoSidedBlock`s), `pool_user`, `pool_candidate` and says `token_counts`.

    Inputs of the plain call: ids_BM int32, numbers_BN float32. Output: logits_BK float32.

    Raises:
        UserError: a side without features, or tokens that do not divide by the ratio.
    """

    def __init__(self, settings: RankerSettings, spec: FeatureSpec, tasks: int,
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__(settings, spec, tasks, compute_dtype)
        self.ug_sep, self.sides = settings.ug_sep, UserCandidateSplit.of(spec)
        self.embedding = TwoSidedEmbedding(spec, self.sides, settings.embedding_std)
        self.layout = TokenLayout(settings.op_sharding)
        self.in_slices = self.ug_sep.form == "slices" and self.ug_sep.separated
        self.take, self.reshape, self.transpose = Take(), ops.Reshape(), ops.Transpose()
        self.pack, self.unpack = ops.Concat(axis=1), SplitWithSize()
        self.sources, self.gap, self.auxiliary_layers, self.norm = (), 0, (), None
        self.sparse = False

    def finish(self, counts: list[Shape], shapes: list[Shape]) -> None:
        """Called by a model last: (U, G) tokens into each layer and out of the last one; (c, K) of the tokenizer's
        components."""
        self.token_counts = tuple(counts)
        self.tokens = self.token_count = sum(counts[0])
        self.pool_user, self.pool_candidate = MeanPool(self.layout), MeanPool(self.layout)
        self.shared_mean = SharedMean("batch" if self.layout.kind == "width" else "rows")
        self.join_tokens = Beside(0, self.layout.stream)
        self.component_shapes = (tuple(shapes), *(tuple(layer.components) for layer in self.layers),
                             ((1, self.settings.width),))
        self.sizes = tuple(c * k for shapes in self.component_shapes for c, k in shapes)
        self.make_head(self.settings.width)

    @property
    def state_size(self) -> int:
        """S: numbers that a request's state holds."""
        return sum(self.sizes)

    def check_masks(self) -> None:
        """Raises a `UserError` unless every mask is on; not within graphs, which raise none."""
        if not self.ug_sep.separated:
            raise UserError("without every mask what U tokens hold depends on the candidate", where="model.ug_sep",
                            hint="set mixing_mask, reverting_mask and residual_mask: true")

    # -- the two passes -----------------------------------------------------------------------------------------------

    def user_pass(self, ids_Rm: Tensor, numbers_Rn: Tensor) -> Tensor:
        """state_RS: all that candidates need of each request's user. Inputs: the columns of `sides.user`."""
        groups, _ = self.embedding.user(ids_Rm, numbers_Rn)
        rows, flat = ids_Rm.shape[0], ()
        for layer in self.user_layers(groups):
            for component in layer:
                flat += (self.reshape(self.transpose(component, (1, 0, 2)), (rows, -1)),)
        return self.pack(flat)

    def candidate_pass(self, state_RS: Tensor, index_N: Tensor, ids_Nm: Tensor, numbers_Nn: Tensor) -> Tensor:
        """logits_NK of candidates; `index_N` int32 is each one's row of the state (not read if R = 1). Inputs: the
        columns of `sides.candidate`."""
        rows, taken, components = state_RS.shape[0], 0, ()
        flat = self.unpack(state_RS, self.sizes, 1)
        for shapes in self.component_shapes:
            own = ()
            for c, k in shapes:
                own += (self.transpose(self.reshape(flat[taken], (rows, c, k)), (1, 0, 2)),)
                taken += 1
            components += (own,)
        groups, _ = self.embedding.group(ids_Nm, numbers_Nn)
        return self.served(self.head(self.candidate_layers(groups, components, index_N)))

    # -- the forward pass ---------------------------------------------------------------------------------------------

    def outputs(self, ids_BM: Tensor, numbers_BN: Tensor, rows_B: Tensor | None = None) -> tuple:
        user, group = self.embedding(ids_BM, numbers_BN)
        user, group = self.dropped(user, rows_B), self.dropped(group, rows_B)
        if self.in_slices:
            return self.both_layers(user, group, None)
        x_TBD, auxiliary, penalties = self.masked_layers(user, group)
        if self.norm is not None:
            x_TBD = self.norm(x_TBD)
        return self.head(self.pool_user(x_TBD)), auxiliary, penalties

    def aggregated_outputs(self, user_ids: Tensor, user_numbers: Tensor, index_N: Tensor, candidate_ids: Tensor,
                           group_numbers: Tensor) -> tuple:
        """As `outputs` for a batch whose users' rows are given once each; `index_N` is each sample's user. There must
        be no dropout, which would not differ between a user's samples."""
        user, _ = self.embedding.user(user_ids, user_numbers)
        group, _ = self.embedding.group(candidate_ids, group_numbers)
        return self.both_layers(user, group, index_N)

    def both_layers(self, user: tuple, group: tuple, index_N: Tensor | None) -> tuple:
        """(logits, auxiliary logits, penalties): both passes at once, layer by layer."""
        x_uRD, first = self.tokenize.user(user)
        x_gND = self.tokenize.candidate(group, first, index_N)
        inputs, auxiliary, penalties = (), (), ()
        for index in range(len(self.layers)):
            inputs += ((x_uRD, x_gND),)
            x_uRD, x_gND, own, other = self.layers[index](x_uRD, x_gND, index_N)
            if self.sparse:
                penalties += (own, other)
            if index in self.sources:
                number, below = index // self.gap - 1, inputs[index - self.gap + 1]
                x_uRD, x_gND = self.adds_user[number](x_uRD, below[0]), self.adds_candidate[number](x_gND, below[1])
            if index in self.auxiliary_layers:
                hidden_ND = self.pooled_over_all(self.mean(x_uRD), x_gND, index_N, self.token_counts[index + 1])
                auxiliary += (self.auxiliary[len(auxiliary)](hidden_ND),)
        if self.norm is not None:
            x_uRD, x_gND = self.norm(x_uRD), self.norm(x_gND)
        hidden_ND = self.pooled_over_all(self.mean(x_uRD), x_gND, index_N, self.token_counts[-1])
        return self.head(hidden_ND), auxiliary, penalties

    def dropped(self, groups: tuple, rows_B: Tensor | None = None) -> tuple:
        """The groups' vectors after dropout; rows_B numbers the samples."""
        if self.settings.dropout == 0.0:
            return groups
        result, keys = (), self.drop_keys(rows_B, 1) if rows_B is not None else None
        for group in groups:
            result += (self.drop(group, keys),)
        return result

    def user_layers(self, groups: tuple) -> tuple:
        """Pieces: the tokenizer's, each layer's, the mean of the U tokens."""
        x_uRD, first = self.tokenize.user(groups)
        components, inputs = (first,), ()
        for index in range(len(self.layers)):
            inputs += (x_uRD,)
            x_uRD, own, _ = self.layers[index].user(x_uRD)
            components += (own,)
            if index in self.sources:
                x_uRD = self.adds_user[index // self.gap - 1](x_uRD, inputs[index - self.gap + 1])
        if self.norm is not None:
            x_uRD = self.norm(x_uRD)
        return components + ((self.mean(x_uRD),),)

    def mean(self, x_uRD: Tensor) -> Tensor:
        """[1, R, D]: the mean over the U tokens, as a component."""
        return self.reshape(self.pool_user(x_uRD), (1, -1, self.settings.width))

    def candidate_layers(self, groups: tuple, components: tuple, index_N: Tensor | None) -> Tensor:
        """hidden_ND."""
        x_gND = self.tokenize.candidate(groups, components[0], index_N)
        inputs = ()
        for index in range(len(self.layers)):
            inputs += (x_gND,)
            x_gND, _ = self.layers[index].candidate(x_gND, components[index + 1], index_N)
            if index in self.sources:
                x_gND = self.adds_candidate[index // self.gap - 1](x_gND, inputs[index - self.gap + 1])
        if self.norm is not None:
            x_gND = self.norm(x_gND)
        return self.pooled_over_all(components[-1][0], x_gND, index_N, self.token_counts[-1])

    def pooled_over_all(self, user_1RD: Tensor, x_gND: Tensor, index_N: Tensor | None, counts: Shape) -> Tensor:
        """hidden_ND: the mean over U and G tokens, the former's given."""
        user_ND = self.reshape(self.take(user_1RD, index_N), (-1, self.settings.width))
        return self.shared_mean(user_ND, self.pool_candidate(x_gND), counts[0] / sum(counts))

    def masked_layers(self, user: tuple, group: tuple) -> tuple:
        """(x_TBD after all layers; auxiliary logits; penalties): `represent` with masks instead of slices."""
        x_uBD, first = self.tokenize.user(user)
        x_TBD = self.join_tokens(x_uBD, self.tokenize.candidate(group, first, None))
        inputs, auxiliary, penalties = (), (), ()
        for index in range(len(self.layers)):
            inputs += (x_TBD,)
            x_TBD, penalty = self.layers[index].masked(x_TBD)
            if self.sparse:
                penalties += penalty
            if index in self.sources:
                x_TBD = self.adds_user[index // self.gap - 1](x_TBD, inputs[index - self.gap + 1])
            if index in self.auxiliary_layers:
                auxiliary += (self.auxiliary[len(auxiliary)](self.pool_user(x_TBD)),)
        return x_TBD, auxiliary, penalties

    def user_tokens(self, ids_BM: Tensor, numbers_BN: Tensor) -> Tensor:
        """[c_u, B, D]: what the U tokens are in the end, computed with all others: the same for every candidate, if
        the masks hold."""
        user, group = self.embedding(ids_BM, numbers_BN)
        x_TBD, _, _ = self.masked_layers(user, group)
        return x_TBD[:self.token_counts[-1][0]]

    def check_op(self, parallel: ParallelConfig, batch: int) -> None:
        if self.settings.op_sharding != "width":
            raise UserError("tokens of a separated ranker are not sharded", where="model.op_sharding",
                            value=self.settings.op_sharding, hint="choose model.op_sharding: width")
        check_token_axes(self.settings, parallel, batch, set())

    def pipeline_cells(self) -> list[nn.Cell | list[nn.Cell]]:
        last = [self.pool_user, self.pool_candidate, self.head, *([self.norm] if self.norm is not None else [])]
        return [[self.embedding, self.drop, self.tokenize], *self.layers, last]


class UserPass(nn.Cell):
    """`SeparatedRanker.user_pass` as a graph of its own."""

    def __init__(self, model: SeparatedRanker) -> None:
        super().__init__(auto_prefix=False)
        model.check_masks()
        self.model = model

    def construct(self, ids_Rm: Tensor, numbers_Rn: Tensor) -> Tensor:
        return self.model.user_pass(ids_Rm, numbers_Rn)


class CandidatePass(nn.Cell):
    """`SeparatedRanker.candidate_pass` as a graph of its own."""

    def __init__(self, model: SeparatedRanker) -> None:
        super().__init__(auto_prefix=False)
        model.check_masks()
        self.model = model

    def construct(self, state_RS: Tensor, index_N: Tensor, ids_Nm: Tensor, numbers_Nn: Tensor) -> Tensor:
        return self.model.candidate_pass(state_RS, index_N, ids_Nm, numbers_Nn)
