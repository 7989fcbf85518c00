"""What a process runs on, and which of how many it is."""

from __future__ import annotations

import os
from dataclasses import dataclass

from parallel.common.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process among those that msrun started.

    Args:
        rank: its number, from 0.
        ranks: how many there are.
        group: the communication group of all of them, None for a single process.
        target: "CPU" or "Ascend".
    """

    rank: int
    ranks: int
    group: str | None
    target: str


def start_device(target: str | None = None) -> Processes:
    """Sets graph mode and the device, and joins the other processes where a launcher started several.

    Args:
        target: "CPU", "Ascend", or None for what this MindSpore finds.

    Raises:
        UserError: Ascend is asked for and not there.
    """
    import mindspore

    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    if target is not None and target != mindspore.get_context("device_target"):
        try:
            mindspore.set_device(target)
        except (RuntimeError, ValueError):
            raise UserError("this device is not available", where="device", value=target, hint="use CPU") from None
    target = mindspore.get_context("device_target")
    if int(os.environ.get("MS_WORKER_NUM", "1")) <= 1:
        return Processes(0, 1, None, target)
    from mindspore.communication import GlobalComm, get_group_size, get_rank, init

    init()
    return Processes(get_rank(), get_group_size(), GlobalComm.WORLD_COMM_GROUP, target)


def set_seed(seed: int) -> None:
    """Seeds MindSpore and NumPy; call before the network is built."""
    import mindspore
    import numpy

    mindspore.set_seed(seed)
    numpy.random.seed(seed)


class DeviceSum:
    """Adds lists of floats over the processes of a group, on their devices.

    Args:
        group: the communication group.
    """

    def __init__(self, group: str | None) -> None:
        from mindspore import ops

        self.add = ops.AllReduce(ops.ReduceOp.SUM, group)

    def __call__(self, values: list[float]) -> list[float]:
        from mindspore import Tensor
        from mindspore import dtype as mstype

        return self.add(Tensor(values, mstype.float32)).asnumpy().tolist()
