"""Process groups and collectives: gloo between CPU processes, NCCL between GPUs.

Every collective begins where its node is and is waited for before its result is first read, so communication and
computation overlap. A Send never waits before the end of the step. Each direction of each pair of stages has a group of
its own: on NCCL two messages in opposite directions on one communicator would wait for each other.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.common.errors import UserError
from parallel.torch_runtime.graph import Node
from parallel.training.operation.stall import ACTIVITY, waiting

_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN,
               "prod": dist.ReduceOp.PRODUCT}

JOINED = ("AllReduce", "AllGather", "ReduceScatter")
"""Collectives of which several may begin as one."""

# Newer releases call them so, and warn of the old names.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


ON_GPUS = "nccl"
"""What connects GPUs; gloo, through the host, where several processes share one GPU to be compared."""
_COLLECTIVE = datetime.timedelta(seconds=600.0)
"""After which a collective that others do not join is an error."""


class Pending:
    """A collective under way: its result once `wait` has returned. Keeps what is sent alive until then."""

    __slots__ = ("finish", "kept", "result", "what", "work")

    def __init__(self, work: Any, result: Any, kept: Any = None, finish: Any = None) -> None:
        self.work, self.result, self.kept, self.finish, self.what = work, result, kept, finish, None

    def wait(self) -> Tensor:
        """The result; on a GPU the stream waits, not the caller."""
        if self.work is not None:
            with waiting(self.what):
                self.work.wait()
            self.work = self.kept = None
        if self.finish is not None:
            self.result, self.finish = self.finish(self.result), None
        return self.result


class Communicator:
    """This process among those of a world.

    Args:
        rank, world: its number and how many there are.
        device: of tensors.
        groups: all groups of the world, the same on every rank.
        messages: all directions of messages, (sender, receiver).
    """

    def __init__(self, rank: int, world: int, device: torch.device, groups: Sequence[tuple[int, ...]] = (),
                 messages: Sequence[tuple[int, int]] = ()) -> None:
        self.rank, self.world, self.device = rank, world, device
        self.groups: dict[tuple, Any] = {}
        # Every rank makes every group, its own and the others', in the same order: torch asks for it.
        for kind, listed in (("group", groups), ("message", messages)):
            for members in sorted(set(map(tuple, listed))):
                if len(members) > 1:
                    made = dist.new_group(list(members), group_desc="-".join(map(str, (kind, *members))))
                    self.groups[(kind, *members)] = made
        self.sent: list[Pending] = []

    def start(self, node: Node, value: Any, members: tuple[int, ...], own: bool = False) -> Pending:
        """Begins a collective.

        Args:
            node: of the graph.
            value: what this rank brings; None for a Receive.
            members: its group; of messages (sender, receiver).
            own: nobody else reads the value, so a sum may take its place.

        Raises:
            UserError: a collective without a rule.
        """
        ACTIVITY.last = (node.op, members, node.scope)
        pending = self._started(node, value, members, own)
        pending.what = ACTIVITY.last
        return pending

    def _started(self, node: Node, value: Any, members: tuple[int, ...], own: bool) -> Pending:
        if node.op in ("Send", "Receive"):
            return self._message(node, value, members)
        if len(members) == 1:
            return Pending(None, value)
        group = self.groups[("group", *members)]
        value = value.contiguous()
        if node.op in JOINED:
            pending = self._drafted(node, value, len(members), own)
            pending.work = self._begun(node, pending, group, async_op=True)
            return pending
        if node.op == "Broadcast":
            root = int(node.attributes.get("root_rank") or 0)
            result = value.clone()
            source = members[root if root < len(members) else members.index(root)]
            return Pending(dist.broadcast(result, source, group, async_op=True), result)
        if node.op in ("AlltoAll", "AllToAll"):
            return self._exchange(node, value, group, len(members))
        raise UserError(f"no rule for the collective {node.op}", where=node.scope,
                        hint="add one to parallel/torch_runtime/groups.py")

    def start_together(self, nodes: Sequence[Node], values: Sequence[Tensor], members: tuple[int, ...],
                       own: Sequence[bool]) -> list[Pending]:
        """Begins collectives of one kind, type and group as one launch, without copying them side by side.

        Args:
            nodes, values, own: of each, as in `start`.
            members: their group.
        """
        ACTIVITY.last = (nodes[0].op, members, nodes[0].scope)
        group, pointers = self.groups[("group", *members)], set()
        found = []
        for node, value, alone in zip(nodes, values, own, strict=True):
            value = value.contiguous()
            # A compiler may have found that two results are the same and made one of them.
            alone = alone and value.data_ptr() not in pointers
            pointers.add(value.data_ptr())
            found.append(self._drafted(node, value, len(members), alone))
        with dist._coalescing_manager(group, async_ops=True) as work:
            for node, pending in zip(nodes, found, strict=True):
                self._begun(node, pending, group, async_op=False)
        for pending in found:
            pending.work, pending.what = work, ACTIVITY.last
        return found

    def _drafted(self, node: Node, value: Tensor, count: int, own: bool) -> Pending:
        """A collective's operands and result, not begun."""
        if node.op == "AllGather":
            shape = (value.shape[0] * count, *value.shape[1:]) if value.dim() else (count,)
            return Pending(None, value.new_empty(shape), value)
        if node.op == "ReduceScatter":
            return Pending(None, value.new_empty((value.shape[0] // count, *value.shape[1:])), value)
        return Pending(None, value if own else value.clone())

    @staticmethod
    def _begun(node: Node, pending: Pending, group: Any, async_op: bool) -> Any:
        if node.op == "AllGather":
            return _all_gather(pending.result, pending.kept, group=group, async_op=async_op)
        operation = _REDUCTIONS[str(node.attributes.get("op") or "sum")]
        if node.op == "ReduceScatter":
            return _reduce_scatter(pending.result, pending.kept, op=operation, group=group, async_op=async_op)
        return dist.all_reduce(pending.result, operation, group, async_op=async_op)

    def _exchange(self, node: Node, value: Tensor, group: Any, count: int) -> Pending:
        """AlltoAll: `split_dim` in a part for each rank; the i-th goes to rank i; what comes is joined."""
        split, concat = int(node.attributes["split_dim"]), int(node.attributes["concat_dim"])
        parts = torch.stack(value.chunk(count, split)).contiguous()
        result = torch.empty_like(parts)
        work = dist.all_to_all_single(result, parts, group=group, async_op=True)
        return Pending(work, result, parts, lambda found: torch.cat(found.unbind(0), concat))

    def _message(self, node: Node, value: Any, pair: tuple[int, ...]) -> Pending:
        group, tag = self.groups[("message", *pair)], int(node.attributes["tag"])
        if node.op == "Send":
            value = value.contiguous()
            self.sent.append(Pending(dist.isend(value, pair[1], group, tag), None, value))
            self.sent[-1].what = ACTIVITY.last
            return Pending(None, value)
        kind = node.outputs[0]
        result = torch.empty(kind.shape, dtype=value, device=self.device)
        return Pending(dist.irecv(result, pair[0], group, tag), result)

    def give(self, tensor: Tensor, source: int, target: int) -> None:
        """Copies `tensor` of rank `source` into that of rank `target`; both call it, in the same order."""
        if self.rank == source:
            dist.send(tensor.contiguous(), target)
        else:
            received = torch.empty_like(tensor)
            dist.recv(received, source)
            tensor.copy_(received)

    def wait_for_sends(self) -> None:
        """Waits for all messages that were sent."""
        for item in self.sent:
            item.wait()
        self.sent.clear()

    def add(self, values: list[float]) -> list[float]:
        """Adds lists of floats over all ranks."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        with waiting(("exchange of numbers", range(self.world), "")):
            dist.all_reduce(total)
            return total.tolist()

    def swap(self, parts: np.ndarray) -> np.ndarray:
        """AlltoAll of bytes, uint8 [world, n]: row r goes to rank r, row r of the result comes from rank r."""
        sent = torch.from_numpy(np.ascontiguousarray(parts)).to(self.device)
        received = torch.empty_like(sent)
        with waiting(("exchange of bytes", range(self.world), "")):
            dist.all_to_all_single(received, sent)
            return received.cpu().numpy()

    def barrier(self) -> None:
        """Returns when all ranks have called it."""
        if self.world > 1:
            self.add([0.0])


def join(rank: int, world: int, device: torch.device, *, address: str | None = None,
         seconds: float | None = None) -> None:
    """Meets the other processes.

    Args:
        rank, world: this process's number and how many there are.
        device: "cpu" takes gloo, "cuda" NCCL.
        address: HOST:PORT of rank 0; None = MASTER_ADDR and MASTER_PORT.
        seconds: after which processes that do not come are given up; None = PARALLEL_MEET_SECONDS.

    Raises:
        UserError: the address is taken or nobody answers there.
    """
    if world == 1 or dist.is_initialized():
        return
    if address is None:
        address = f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', '29500')}"
    seconds = seconds or float(os.environ.get("PARALLEL_MEET_SECONDS", "600"))
    options = {"device_id": device} if device.type == "cuda" and ON_GPUS == "nccl" else {}
    try:
        host, _, port = address.rpartition(":")
        store = dist.TCPStore(host, int(port), world, rank == 0, timeout=datetime.timedelta(seconds=seconds))
        dist.init_process_group(ON_GPUS if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                                timeout=_COLLECTIVE, **options)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the processes did not find each other: {reason}", where=f"rank {rank} of {world}",
                        value=address, hint="choose another port, and see that it is free on that machine") from None


def leave() -> None:
    """Ends the communication of this process."""
    if dist.is_initialized():
        dist.destroy_process_group()
