"""What MindSpore's CUDA backend needs so that its AllReduces run: one more of them, which no kernel waits for.

From two AllReduces on, MindSpore 2.9 puts them on a stream of their own and joins the streams by nodes that its
scheduler does not know: flat graphs fail ("The pointer[send_actor] is null"), graphs with a branch compute wrong
numbers. It gives the second stream up, and all is well, as soon as one AllReduce of the graph has a result that no
kernel reads. The price: communication and computation do not overlap. Other devices get no such node.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore.communication import GlobalComm, get_group_size


def on_gpu() -> bool:
    """Whether graphs are compiled for MindSpore's CUDA backend."""
    return ms.get_context("device_target") == "GPU"


def last_reduction() -> ops.AllReduce | None:
    """The AllReduce (largest value, over all processes) that no kernel of a training step is to wait for; None where
    none is needed: on other devices, and where there is one process."""
    if not on_gpu() or not GlobalComm.INITED or get_group_size() == 1:
        return None
    return ops.AllReduce(ops.ReduceOp.MAX, GlobalComm.WORLD_COMM_GROUP)


class OneStream(nn.Cell):
    """What a cell gives, in a sharded graph without gradients whose AllReduces stay on one stream.

    The partitioner takes no AllReduce in such a graph but those that it makes itself: here one of a sum over rows, each
    of which one device holds.

    Args:
        cell: gives one tensor.
        devices: data x op; they divide the rows of a batch.
        dims: of the first input.
    """

    def __init__(self, cell: nn.Cell, devices: int, dims: int) -> None:
        super().__init__(auto_prefix=False)
        self.cell, self.cast = cell, ops.Cast()
        self.sum = ops.ReduceSum().shard(((devices, *[1] * (dims - 1)),))

    def construct(self, *batch: Tensor) -> Tensor:
        result = self.cell(*batch)
        return ops.depend(result, self.sum(self.cast(batch[0], ms.float32)))
