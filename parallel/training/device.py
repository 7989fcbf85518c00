"""What a process runs on, and which of how many it is."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from parallel.common.errors import UserError
from parallel.sharding.config import MindSporeConfig
from parallel.training.operation.stall import waiting


@dataclass(frozen=True)
class Processes:
    """This process among those that msrun started.

    Args:
        rank: its number, from 0.
        ranks: how many there are.
        group: the communication group of all of them, None for a single process.
        target: "CPU", "Ascend", or "GPU" (MindSpore's CUDA backend).
    """

    rank: int
    ranks: int
    group: str | None
    target: str


def start_device(options: MindSporeConfig | None = None, *, key: str = "", target: str | None = None) -> Processes:
    """Sets graph mode and the device, and joins the other processes where a launcher started several.

    Args:
        options: `parallel.mindspore`; None = the defaults.
        key: of what is compiled (`agreement.graph_key`): MindSpore's cache of graphs looks at the sources only.
        target: "CPU", "Ascend", or None for `options.device`, or what this MindSpore finds (Ascend or the CPU).

    Raises:
        UserError: Ascend or a GPU is asked for and not there.
    """
    import mindspore

    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    if target is None and options is not None:
        target = options.device
    found = mindspore.get_context("device_target")
    if target is None and found == "GPU":
        target = "CPU"  # where CUDA_HOME is set MindSpore takes the GPU by itself, which is for those who ask for it
    if target == "GPU":
        # A kernel that is missing is an error then; else MindSpore would take the CPU's and copy, and say nothing.
        os.environ.setdefault("MS_DISABLE_KERNEL_BACKOFF", "1")
    if target is not None and (target != found or target == "GPU"):
        _set_device(target)
    target = mindspore.get_context("device_target")
    if options is not None:
        _set_options(options, key, target)
    if int(os.environ.get("MS_WORKER_NUM", "1")) <= 1:
        return Processes(0, 1, None, target)
    from mindspore.communication import GlobalComm, get_group_size, get_rank, init

    init()
    return Processes(get_rank(), get_group_size(), GlobalComm.WORLD_COMM_GROUP, target)


def _set_device(target: str) -> None:
    import mindspore

    try:
        mindspore.set_device(target)
    except (RuntimeError, ValueError):
        if target == "GPU":
            raise UserError("MindSpore's CUDA backend does not load here", where="parallel.mindspore.device",
                            value=target, hint="docs/mindspore_cuda.md says which libraries it needs") from None
        raise UserError("this device is not available", where="device", value=target, hint="use CPU") from None


def check_precision(precision: str, target: str) -> None:
    """Raises a `UserError` if MindSpore has no kernels on `target` for `train.precision`; what the CPU lacks is left to
    the packages, which know a way out."""
    if target == "GPU" and precision == "bf16":
        raise UserError("MindSpore's CUDA kernels lack bfloat16", where="train.precision", value=precision,
                        hint="take fp16 or fp32, or parallel.backend=torch")


def _set_options(options: MindSporeConfig, key: str, target: str) -> None:
    """What must be said before communication begins and anything is compiled. HCCL's variables:
    https://www.hiascend.com/document/detail/en/CANNCommunityEdition/900/API/hcclug/hcclenvref_07_0001.html
    """
    import mindspore

    hccl = {"HCCL_CONNECT_TIMEOUT": options.hccl_connect_seconds, "HCCL_EXEC_TIMEOUT": options.hccl_exec_seconds,
            "HCCL_BUFFSIZE": options.hccl_buffer_mb}
    os.environ.update({name: str(value) for name, value in hccl.items() if value is not None})
    if options.compile_cache is not None:
        place = os.path.abspath(os.path.join(options.compile_cache, key))
        os.makedirs(place, exist_ok=True)
        os.environ |= {"MS_COMPILER_CACHE_ENABLE": "1", "MS_COMPILER_CACHE_PATH": place}
    if options.deterministic and target == "GPU":
        raise UserError("MindSpore's CUDA kernels have no deterministic form", where="parallel.mindspore.deterministic",
                        value=True, hint="leave it out")
    if options.deterministic:
        os.environ["HCCL_DETERMINISTIC"] = "true"
        mindspore.set_deterministic(True)
    if options.jit_level == "O2" and target != "Ascend":
        raise UserError("whole graphs are sunk on Ascend only", where="parallel.mindspore.jit_level", value="O2",
                        hint="choose O0 or O1")
    if options.jit_level is not None:
        mindspore.set_context(jit_config={"jit_level": options.jit_level})
    memory = {} if options.memory_gb is None else {"max_size": f"{options.memory_gb:g}GB"}
    memory |= {} if options.memory_level is None else {"optimize_level": options.memory_level}
    if memory:
        mindspore.runtime.set_memory(**memory)


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

        with waiting(f"a sum of {len(values)} numbers over all processes"):
            return self.add(Tensor(values, mstype.float32)).asnumpy().tolist()


class DeviceSwap:
    """AlltoAll of bytes over MindSpore's processes: `swap(uint8 [ranks, n])` sends row r to process r and returns what
    each had for this one. Their CPU backend has AllGather and no AlltoAll, so there each receives what all have for all
    and keeps its own; bytes travel as float32.

    Args:
        processes: this one among all, in their group of all.
    """

    def __init__(self, processes: Processes) -> None:
        from mindspore import ops

        self.rank, self.ranks, self.on_cpu = processes.rank, processes.ranks, processes.target == "CPU"
        self.exchange = (ops.AllGather(processes.group) if self.on_cpu else
                         ops.AlltoAll(processes.ranks, 0, 0, processes.group))

    def __call__(self, parts: np.ndarray) -> np.ndarray:
        from mindspore import Tensor

        # Each byte as a number: bit patterns of integers may be signalling NaNs, which a float may not keep.
        numbers = parts.astype(np.float32)
        with waiting("an exchange of bytes between all processes"):
            if self.on_cpu:
                found = self.exchange(Tensor(numbers.reshape(1, -1))).asnumpy()
                return found.reshape(self.ranks, *parts.shape)[:, self.rank].astype(np.uint8)
            return self.exchange(Tensor(numbers)).asnumpy().astype(np.uint8)
