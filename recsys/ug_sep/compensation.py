"""Information compensation: what candidate tokens get of the user's mixed tokens that a mask hides."""

from __future__ import annotations

from mindspore import Tensor, ops
from mindspore import dtype as mstype

from parallel.layers.grouped import GroupedLinear
from parallel.layers.parameter import parameter
from parallel.sharding.layout import Layer, OpSharding
from recsys.ug_sep.layers import Shape


class Compensation(Layer):
    """component_gRD: what G tokens get of U mixed tokens u_hRK; zero at the start. See `UGSepSettings.compensation`.

    Args:
        form: token_mixing, low_rank or mean.
        sources, width: h and K of the U mixed tokens.
        targets, outputs: G tokens and D.
        rank: of low_rank.

    The paper only says that the masked U representation goes through a learnable linear projection and is added to the
    G tokens; the three forms, their source (U mixed tokens, after the mask) and their position (the block's first
    residual) were chosen here.
    """

    in_compute_type = ("weight",)

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
        # Samples first, so that sharding them needs no redistribution.
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
