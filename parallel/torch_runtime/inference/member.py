"""One process of a launch that generates: its group of op x stages ranks, and how the first of a group leads.

A program of inference is that of one group of data parallelism. A launch may run several such groups side by side;
group g has the ranks from g x (op x stages) on. A group's first rank alone decides what is computed and broadcasts the
inputs; the others follow.
"""

from __future__ import annotations

import datetime
import json
import os
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from parallel.common.errors import UserError
from parallel.common.structured import parse_json
from parallel.torch_runtime.groups import Communicator, join, leave
from parallel.torch_runtime.program import Program
from parallel.torch_runtime.step import device_of

_PATIENT = datetime.timedelta(days=3650)  # a server may be idle for long


class Member:
    """This process in its group and among all groups.

    Args:
        program: of one group.
        device: "cpu" or "gpu".

    Raises:
        UserError: the number of processes does not divide into groups, or they do not find each other.
    """

    def __init__(self, program: Program, device: str) -> None:
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.size = program.world
        if self.world % self.size:
            raise UserError(f"the program is for groups of {self.size} processes", where="--nproc", value=self.world,
                            hint=f"start a multiple of {self.size}")
        self.group, self.number = divmod(self.rank, self.size)
        self.groups, self.base = self.world // self.size, self.rank - self.rank % self.size
        self.device = device_of("cuda" if device == "gpu" else "cpu")
        join(self.rank, self.world, self.device, seconds=float(os.environ.get("PARALLEL_MEET_SECONDS", "600")))
        self.control, self.leaders = self._groups()
        bases = range(0, self.world, self.size)
        groups, messages = ([tuple(member + base for member in members) for base in bases for members in listed]
                            for listed in program.groups)
        self.communicator = Communicator(self.rank, self.world, self.device, groups, messages) if self.world > 1 \
            else None

    def _groups(self) -> tuple[Any, Any]:
        """Process groups of the host's own messages: in this group, and among the first ranks of all groups."""
        if self.world == 1:
            return None, None
        own = None
        for base in range(0, self.world, self.size):
            made = dist.new_group(list(range(base, base + self.size)), timeout=_PATIENT, backend="gloo")
            own = made if base == self.base else own
        return own, dist.new_group(list(range(0, self.world, self.size)), timeout=_PATIENT, backend="gloo")

    @property
    def leads(self) -> bool:
        """Whether it decides what its group computes."""
        return self.number == 0

    def gather(self, items: Any) -> list[Any]:
        """A JSON value of every group's first rank, in the groups' order; each of them gets all."""
        return [items] if self.groups == 1 else _gathered(items, self.groups, self.leaders)

    def tell_group(self, item: Any) -> list[Any]:
        """A JSON value of every process of this group, in their order; each of them gets all."""
        return [item] if self.size == 1 else _gathered(item, self.size, self.control)

    def broadcast(self, message: np.ndarray) -> None:
        """Sends the others of the group a message of int32s."""
        if self.size > 1:
            dist.broadcast(torch.tensor([len(message)]), self.base, group=self.control)
            dist.broadcast(torch.from_numpy(np.ascontiguousarray(message, np.int32)), self.base, group=self.control)

    def receive(self) -> np.ndarray:
        """The next message that the group's first rank broadcasts."""
        size = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(size, self.base, group=self.control)
        message = torch.zeros(int(size), dtype=torch.int32)
        dist.broadcast(message, self.base, group=self.control)
        return message.numpy()

    def close(self) -> None:
        """Leaves the other processes."""
        leave()


def _gathered(items: Any, count: int, group: Any) -> list[Any]:
    """A JSON value of each of `count` processes of a gloo group."""
    data = torch.frombuffer(bytearray(json.dumps(items).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(count)]
    dist.all_gather(sizes, torch.tensor([len(data)]), group=group)
    longest = max(int(size) for size in sizes)
    parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(count)]
    dist.all_gather(parts, torch.nn.functional.pad(data, (0, longest - len(data))), group=group)
    return [parse_json(bytes(part[:int(size)].numpy()).decode(), max_bytes=1 << 32)
            for part, size in zip(parts, sizes, strict=True)]
