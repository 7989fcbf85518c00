"""Splits a global batch into pipeline micro-batches and their overlapping halves, and weighs their losses."""

from __future__ import annotations

from typing import Any

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.communication import create_group, get_rank

from parallel.common.errors import UserError
from parallel.sharding.config import ParallelConfig
from parallel.sharding.trainable import is_weighted


class MicroBatch(nn.Cell):
    """One micro-batch: from every input each rank takes the number-th part of its own rows.

    MindSpore's own cell makes every rank gather the global batch first, then slices it. Marked like this (under
    stages it takes PIPELINE_SLICE_SKIP_REDISTRIBUTION=1 in the environment too), the rows are sliced where they are.

    Args:
        count: micro-batches.
        dims: dims of each input.
        data: degree by which the rows are sharded.
        pipeline: whether there are stages (else: accumulation on one stage).
    """

    def __init__(self, count: int, dims: list[int], data: int, pipeline: bool) -> None:
        super().__init__()
        self.count = count
        self.slices = tuple(ops.StridedSlice().shard(((data, *[1] * (number - 1)),)) for number in dims)
        for primitive in self.slices:
            primitive.add_prim_attr("out_shard_size", data).add_prim_attr("skip_redistribution", True)
            if not pipeline:
                primitive.add_prim_attr("grad_accu_num", count)

    def construct(self, number: int, *inputs: Tensor) -> tuple:
        """Rows of micro-batch `number` of every input."""
        parts = ()
        for i in range(len(inputs)):
            shape = inputs[i].shape
            rows, zeros, ones = shape[0] // self.count, (0,) * (len(shape) - 1), (1,) * len(shape)
            part = self.slices[i](inputs[i], (number * rows, *zeros), ((number + 1) * rows, *shape[1:]), ones)
            parts = parts + (part,)
        return parts


def _one(self: Wrapper, a: Tensor) -> Tensor:
    return self.loss(a)


def _two(self: Wrapper, a: Tensor, b: Tensor) -> Tensor:
    return self.loss(a, b)


def _three(self: Wrapper, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return self.loss(a, b, c)


def _four(self: Wrapper, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return self.loss(a, b, c, d)


_CONSTRUCTS = {1: _one, 2: _two, 3: _three, 4: _four}


class Wrapper(nn.Cell):
    """A scalar loss made of another network's; a subclass says how in `loss`.

    MindSpore shares the graph of a cell between micro-batches only if its `construct` has neither a variable number of
    parameters nor defaults, so `of` gives the cell as many as there are inputs.
    """

    def __init__(self, network: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network = network

    @classmethod
    def of(cls, inputs: int, *arguments: Any) -> Wrapper:
        """A wrapper for `inputs` inputs; `arguments` are those of the class.

        Raises:
            UserError: there are more inputs than this was written for.
        """
        if inputs not in _CONSTRUCTS:
            raise UserError(f"micro-batches of at most {max(_CONSTRUCTS)} inputs", where="parallel.pipeline",
                            value=inputs)
        return type(cls.__name__, (cls,), {"construct": _CONSTRUCTS[inputs]})(*arguments)

    def loss(self, *batch: Tensor) -> Tensor:
        """The network's own loss."""
        return self.network(*batch)


class Interleaved(Wrapper):
    """The loss of one micro-batch as the sum over its parts, so that tensor-parallel communication of one part overlaps
    the computation of another (`MicroBatchInterleaved`, with slices that stay where they are).

    Args:
        network: `LossAndWeight`.
        parts: how many.
        dims: dims of each input.
        data: degree by which the rows are sharded.
    """

    def __init__(self, network: nn.Cell, parts: int, dims: list[int], data: int) -> None:
        super().__init__(network)
        self.parts = nn.CellList([MicroBatch(parts, dims, data, True) for _ in range(parts)])
        for piece in self.parts:
            for primitive in piece.slices:
                primitive.add_prim_attr("strided_slice_flag", True).add_prim_attr("interleave_num", parts)
        self.add = ops.Add().add_prim_attr("micro_interleaved_add_flag", True).shard(((1,), (1,)))

    def loss(self, *batch: Tensor) -> Tensor:
        """Sum over the parts."""
        total = None
        for i in range(len(self.parts)):
            own = self.network(*self.parts[i](i, *batch))
            total = own if total is None else self.add(total, own)
        return total


class LossAndWeight(Wrapper):
    """float32 [2]: loss x weight / size and weight / size of a network that returns (loss, weight), else (loss, 1).

    One tensor, as the partitioner wants it; what is differentiated is the first element.

    Args:
        network: weighted where its attribute `weighted` is set.
        size: about as large as the weight, so that half-precision gradients stay in range.
    """

    def __init__(self, network: nn.Cell, size: float) -> None:
        super().__init__(network)
        self.weighted, self.share = is_weighted(network), 1.0 / size
        self.one = Tensor([1.0], mstype.float32)
        self.cast, self.reshape = ops.Cast(), ops.Reshape()
        self.join = ops.Concat().shard(((1,), (1,)))

    def loss(self, *batch: Tensor) -> Tensor:
        """See the class."""
        if self.weighted:
            loss, weight = self.network(*batch)
            weight = self.cast(weight, mstype.float32) * self.share
            loss = self.cast(loss, mstype.float32) * weight
            return self.join((self.reshape(loss, (1,)), self.reshape(weight, (1,))))
        return self.join((self.reshape(self.cast(self.network(*batch), mstype.float32), (1,)), self.one))


class SumOverStages(nn.Cell):
    """What the last stage computed, on every stage: an AllReduce over the stages, of which the others bring zeros.

    Args:
        config: resolved.
    """

    def __init__(self, config: ParallelConfig) -> None:
        super().__init__(auto_prefix=False)
        per_stage = config.data * config.op
        first, stages = get_rank() % per_stage, config.pipeline.stages
        self.group = f"stages_of_{first}"
        create_group(self.group, [first + stage * per_stage for stage in range(stages)])
        self.add = ops.AllReduce(ops.ReduceOp.SUM, self.group)

    def construct(self, x: Tensor) -> Tensor:
        return self.add(x)

    def everywhere(self, value: np.ndarray) -> np.ndarray:
        """The same at once, outside a graph."""
        return ops.AllReduce(ops.ReduceOp.SUM, self.group)(Tensor(value)).asnumpy()
