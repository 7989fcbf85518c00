"""UG-Sep: the parts of a ranker whose user tokens (U) do not depend on the candidate (G), so that they are
computed once a request.

Shapes: R requests (rows of U), N candidates (rows of G), T tokens of which the first are U, H mixing heads, D width,
K width of a component, S width of the state. A *component* [c, R, K] is something of the U pass that the G pass reads;
the state of a request is all its components in one row, state_RS.

Attributes named after "group" (`first_group`, `group_side`, ...) hold parameters of the candidate side, whose names in
checkpoints they are.

Source: UG-Sep (arXiv 2602.10455). The masks: a U mixed token reads U heads only, M_mix[h, j] = 0 for h < h_u, j >= c_u
d_h; a U token takes back U mixed tokens only, M_rev[t, j] = 0 for t < c_u, j >= h_u d_h. The paper's formulas could not
be read; these were chosen here (UI-MixFormer, arXiv 2602.14110 eq. 10-11, prints a mask of the same kind).
"""

from __future__ import annotations

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from parallel.common.errors import UserError
from parallel.layers.grouped import TokenLayout
from parallel.sharding.config import ParallelConfig
from parallel.sharding.layout import Layer, OpSharding
from recsys.data.features import FeatureSpec
from recsys.layers.losses import Answers
from recsys.layers.tokenization import MeanPool
from recsys.ranker import Ranker, check_token_axes
from recsys.settings import RankerSettings
from recsys.ug_sep.layers import Beside, Pack, Shape, SharedMean, Take, TwoSidedEmbedding, Unpack
from recsys.ug_sep.sides import UserCandidateSplit


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
        self.embedding = TwoSidedEmbedding(spec, self.sides, settings.embedding_std, compute_dtype)
        self.layout = TokenLayout(settings.op_sharding)
        self.in_slices = self.ug_sep.form == "slices" and self.ug_sep.separated
        self.take, self.reshape, self.cast = Take(), ops.Reshape(), ops.Cast()
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
        flat = tuple(shape for shapes in self.component_shapes for shape in shapes)
        self.pack, self.unpack = Pack(len(flat)), Unpack(flat)
        self.make_head(self.settings.width)

    @property
    def state_size(self) -> int:
        """S: numbers that a request's state holds."""
        return sum(self.unpack.sizes)

    def check_masks(self) -> None:
        """Raises a `UserError` unless every mask is on; not within graphs, which raise none."""
        if not self.ug_sep.separated:
            raise UserError("without every mask what U tokens hold depends on the candidate", where="model.ug_sep",
                            hint="set mixing_mask, reverting_mask and residual_mask: true")

    # -- the two passes -----------------------------------------------------------------------------------------------

    def user_pass(self, ids_Rm: Tensor, numbers_Rn: Tensor) -> Tensor:
        """state_RS: all that candidates need of each request's user. Inputs: the columns of `sides.user`."""
        groups, _ = self.embedding.user(ids_Rm, numbers_Rn)
        return self.packed(self.user_layers(groups), ids_Rm.shape[0])

    def packed(self, components: tuple, rows: int) -> Tensor:
        """state_RS out of each layer's components of `rows` requests."""
        flat = ()
        for layer in components:
            flat += tuple(layer)
        return self.pack(flat, rows)

    def candidate_pass(self, state_RS: Tensor, index_N: Tensor, ids_Nm: Tensor, numbers_Nn: Tensor) -> Tensor:
        """logits_NK of candidates; `index_N` int32 is each one's row of the state (not read if R = 1). Inputs: the
        columns of `sides.candidate`."""
        parts, taken, components = self.unpack(state_RS), 0, ()
        for shapes in self.component_shapes:
            own = ()
            for part in parts[taken:taken + len(shapes)]:
                # In the type that the user's pass had them in: float32 would spread over the candidates' tokens.
                own += (self.cast(part, self.compute_dtype),)
            taken += len(shapes)
            components += (own,)
        groups, _ = self.embedding.group(ids_Nm, numbers_Nn)
        return self.served(self.head(self.candidate_layers(groups, components, index_N)))

    def request_pass(self, ids_NM: Tensor, numbers_NN: Tensor) -> tuple:
        """(state_1S, logits_NK) of the candidates of one user, that of the first row: both passes at once. Inputs: all
        columns."""
        embedding = self.embedding
        return self.both_passes(embedding.user_ids(ids_NM[:1]), embedding.user_numbers(numbers_NN[:1]),
                                embedding.candidate_ids(ids_NM), embedding.candidate_numbers(numbers_NN))

    def both_passes(self, user_ids_1m: Tensor, user_numbers_1n: Tensor, ids_Nm: Tensor, numbers_Nn: Tensor) -> tuple:
        """As `request_pass`, by the columns of either side."""
        users, _ = self.embedding.user(user_ids_1m, user_numbers_1n)
        components = self.user_layers(users)
        groups, _ = self.embedding.group(ids_Nm, numbers_Nn)
        # Of an index only the length is read where there is one user.
        hidden_ND = self.candidate_layers(groups, components, ids_Nm[:, 0])
        return self.packed(components, 1), self.served(self.head(hidden_ND))

    # -- the forward pass ---------------------------------------------------------------------------------------------

    def outputs(self, ids_BM: Tensor, numbers_BN: Tensor, rows_B: Tensor | None = None) -> tuple:
        user, candidate = self.embedding(ids_BM, numbers_BN)
        user, candidate = self.dropped(user, rows_B), self.dropped(candidate, rows_B)
        if self.in_slices:
            return self.both_layers(user, candidate, None)
        x_TBD, auxiliary, penalties = self.masked_layers(user, candidate)
        if self.norm is not None:
            x_TBD = self.norm(x_TBD)
        return self.head(self.pool_user(x_TBD)), auxiliary, penalties

    def aggregated_outputs(self, user_ids: Tensor, user_numbers: Tensor, index_N: Tensor, candidate_ids: Tensor,
                           candidate_numbers: Tensor) -> tuple:
        """As `outputs` for a batch whose users' rows are given once each; `index_N` is each sample's user. There must
        be no dropout, which would not differ between a user's samples."""
        user, _ = self.embedding.user(user_ids, user_numbers)
        candidate, _ = self.embedding.group(candidate_ids, candidate_numbers)
        return self.both_layers(user, candidate, index_N)

    def both_layers(self, user: tuple, candidate: tuple, index_N: Tensor | None) -> tuple:
        """(logits, auxiliary logits, penalties): both passes at once, layer by layer."""
        x_uRD, first = self.tokenize.user(user)
        x_gND = self.tokenize.candidate(candidate, first, index_N)
        users, candidates, auxiliary, penalties = (), (), (), ()
        for index in range(len(self.layers)):
            users, candidates = users + (x_uRD,), candidates + (x_gND,)
            x_uRD, x_gND, own, other = self.layers[index](x_uRD, x_gND, index_N)
            if self.sparse:
                penalties += (own, other)
            if index in self.sources:
                x_uRD = self.add_lower_user(index, x_uRD, users)
                x_gND = self.add_lower_candidate(index, x_gND, candidates)
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
        """Components: the tokenizer's, each layer's, the mean of the U tokens."""
        x_uRD, first = self.tokenize.user(groups)
        components, inputs = (first,), ()
        for index in range(len(self.layers)):
            inputs += (x_uRD,)
            x_uRD, own, _ = self.layers[index].user(x_uRD)
            components += (own,)
            if index in self.sources:
                x_uRD = self.add_lower_user(index, x_uRD, inputs)
        if self.norm is not None:
            x_uRD = self.norm(x_uRD)
        return components + ((self.mean(x_uRD),),)

    def add_lower_user(self, index: int, x_uRD: Tensor, inputs: tuple) -> Tensor:
        """U tokens after layer `index` plus the output of the layer `gap` below; inputs[i] went into layer i."""
        return self.adds_user[index // self.gap - 1](x_uRD, inputs[index - self.gap + 1])

    def add_lower_candidate(self, index: int, x_gND: Tensor, inputs: tuple) -> Tensor:
        """As `add_lower_user` for candidate tokens."""
        return self.adds_candidate[index // self.gap - 1](x_gND, inputs[index - self.gap + 1])

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
                x_gND = self.add_lower_candidate(index, x_gND, inputs)
        if self.norm is not None:
            x_gND = self.norm(x_gND)
        return self.pooled_over_all(components[-1][0], x_gND, index_N, self.token_counts[-1])

    def pooled_over_all(self, user_1RD: Tensor, x_gND: Tensor, index_N: Tensor | None, counts: Shape) -> Tensor:
        """hidden_ND: the mean over U and G tokens, the former's given."""
        user_ND = self.reshape(self.take(user_1RD, index_N), (-1, self.settings.width))
        return self.shared_mean(user_ND, self.pool_candidate(x_gND), counts[0] / sum(counts))

    def masked_layers(self, user: tuple, candidate: tuple) -> tuple:
        """(x_TBD after all layers; auxiliary logits; penalties): `represent` with masks instead of slices."""
        x_uBD, first = self.tokenize.user(user)
        x_TBD = self.join_tokens(x_uBD, self.tokenize.candidate(candidate, first, None))
        inputs, auxiliary, penalties = (), (), ()
        for index in range(len(self.layers)):
            inputs += (x_TBD,)
            x_TBD, penalty = self.layers[index].masked(x_TBD)
            if self.sparse:
                penalties += penalty
            if index in self.sources:
                x_TBD = self.add_lower_user(index, x_TBD, inputs)
            if index in self.auxiliary_layers:
                auxiliary += (self.auxiliary[len(auxiliary)](self.pool_user(x_TBD)),)
        return x_TBD, auxiliary, penalties

    def check_op(self, parallel: ParallelConfig, batch: int) -> None:
        if self.settings.op_sharding != "width":
            raise UserError("tokens of a separated ranker are not sharded", where="model.op_sharding",
                            value=self.settings.op_sharding, hint="choose model.op_sharding: width")
        check_token_axes(self.settings, parallel, batch, set())

    def pipeline_cells(self) -> list[nn.Cell | list[nn.Cell]]:
        last = [self.pool_user, self.pool_candidate, self.head, *([self.norm] if self.norm is not None else [])]
        return [[self.embedding, self.drop, self.tokenize], *self.layers, last]


class UserPass(Layer):
    """`SeparatedRanker.user_pass` as a graph of its own."""

    inputs = 2

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


class RequestPass(nn.Cell):
    """`SeparatedRanker.request_pass` as a graph of its own."""

    def __init__(self, model: SeparatedRanker) -> None:
        super().__init__(auto_prefix=False)
        model.check_masks()
        self.model = model

    def construct(self, ids_NM: Tensor, numbers_NN: Tensor) -> tuple:
        return self.model.request_pass(ids_NM, numbers_NN)


class CandidateScores(Layer):
    """`CandidatePass` up to the probabilities_NK (products of them and numbers where tasks are such)."""

    inputs = 4

    def __init__(self, model: SeparatedRanker) -> None:
        super().__init__(auto_prefix=False)
        model.check_masks()
        self.model, self.sigmoid = model, ops.Sigmoid()
        self.answers = None if model.plan.plain else Answers(model.plan)

    def construct(self, state_RS: Tensor, index_N: Tensor, ids_Nm: Tensor, numbers_Nn: Tensor) -> Tensor:
        return self.probabilities(self.model.candidate_pass(state_RS, index_N, ids_Nm, numbers_Nn))

    def probabilities(self, logits_NK: Tensor) -> Tensor:
        """What the logits are served as."""
        if self.answers is not None:
            return self.answers(logits_NK)
        return self.sigmoid(logits_NK)

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.sigmoid, (("batch", None),))]


class RequestScores(CandidateScores):
    """`RequestPass` up to the probabilities_NK: (state_1S, probabilities_NK) by the columns of either side."""

    def construct(self, user_ids_1m: Tensor, user_numbers_1n: Tensor, ids_Nm: Tensor, numbers_Nn: Tensor) -> tuple:
        state_1S, logits_NK = self.model.both_passes(user_ids_1m, user_numbers_1n, ids_Nm, numbers_Nn)
        return state_1S, self.probabilities(logits_NK)
