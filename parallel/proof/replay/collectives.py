"""Where coroutines of ranks meet: collectives are combined once all ranks of the group have arrived, Send and Receive
are matched by tag, and what could not happen on a cluster either is reported as a deadlock.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parallel.common.errors import UserError
from parallel.proof.compile.graph import Node

_REDUCTIONS = {"sum": np.add, "max": np.maximum, "min": np.minimum, "prod": np.multiply}


class Deadlock(RuntimeError):
    """Ranks that would wait for each other for ever; the message names who waits where."""


@dataclass
class Call:
    """A rank at a collective: the node and the tensor that it brings."""

    rank: int
    node: Node
    value: Any

    @property
    def members(self) -> tuple[int, ...]:
        """Ranks of the group, in order."""
        return group_ranks(self.node)

    @property
    def kind(self) -> tuple:
        """What all members of a group must agree on."""
        value = np.asarray(self.value)
        return self.node.op, self.node.attributes.get("op"), value.shape, value.dtype.name

    def __str__(self) -> str:
        return f"rank {self.rank} at {describe(self.node)}"


def describe(node: Node) -> str:
    """A collective in words: primitive, shape, group or peer, cell."""
    attributes = node.attributes
    shape = list(node.outputs[0].shape) if node.outputs else []
    if node.op in ("Send", "Receive"):
        peer = attributes.get("dest_rank" if node.op == "Send" else "src_rank")
        way = "to" if node.op == "Send" else "from"
        return f"{node.op} {way} {peer} of group {list(group_ranks(node))}, tag {attributes.get('sr_tag')}, " \
               f"shape {shape} ({node.scope})"
    owner = f", {node.marks['mirror_user_id']}" if node.marks.get("mirror_user_id") else ""
    return f"{node.op} of shape {shape} in group {list(group_ranks(node))} ({node.scope}{owner})"


def group_ranks(node: Node) -> tuple[int, ...]:
    """The ranks of a collective's group."""
    listed = node.attributes.get("group_rank_ids") or node.attributes.get("rank_list") or []
    return tuple(int(item[0]) if isinstance(item, list) else int(item) for item in listed)


def combine(calls: Sequence[Call]) -> list[np.ndarray]:
    """What each member gets, for calls in the order of the group.

    Raises:
        UserError: a collective that has no rule here.
    """
    node, values = calls[0].node, [np.asarray(call.value) for call in calls]
    count = len(values)
    if node.op == "AllReduce":
        return [_reduced(node, values)] * count
    if node.op == "ReduceScatter":
        return np.split(_reduced(node, values), count)
    if node.op == "AllGather":
        return [np.concatenate(values)] * count
    if node.op == "Broadcast":
        root = int(node.attributes.get("root_rank") or 0)
        return [values[root if root < count else calls[0].members.index(root)]] * count
    if node.op in ("AlltoAll", "AllToAll"):
        return _exchange(node, values)
    raise UserError(f"replay has no rule for the collective {node.op}", where=node.scope,
                    hint="add one to combine() in parallel/proof/replay/collectives.py")


def _reduced(node: Node, values: list[np.ndarray]) -> np.ndarray:
    reduction = _REDUCTIONS[str(node.attributes.get("op") or "sum")]
    total = values[0]
    for value in values[1:]:
        total = reduction(total, value)
    return total


def _exchange(node: Node, values: list[np.ndarray]) -> list[np.ndarray]:
    """AlltoAll: every rank splits `split_dim` into a part for each rank, sends the i-th to rank i and joins what
    comes."""
    count = len(values)
    parts = [np.split(value, count, axis=int(node.attributes["split_dim"])) for value in values]
    return [np.concatenate([part[i] for part in parts], axis=int(node.attributes["concat_dim"])) for i in range(count)]


class Meeting:
    """Runs coroutines until all have returned.

    Send does not wait (its tensor is kept for the receiver), as with HCCL's asynchronous streams; Receive and all
    collectives of groups do.
    """

    def __init__(self, coroutines: Sequence[Generator[Call, Any, Any]]) -> None:
        self.coroutines = list(coroutines)
        self.results: list[Any] = [None] * len(coroutines)
        self.waiting: dict[int, Call] = {}
        self.mail: dict[tuple, list[Call]] = defaultdict(list)
        self.counts: dict[tuple, int] = defaultdict(int)

    def run(self) -> list[Any]:
        """Results of all coroutines.

        Raises:
            Deadlock: see the class; also a Send that nobody received.
        """
        for rank in range(len(self.coroutines)):
            self._resume(rank, None)
        while self.waiting:
            ready = [rank for rank in sorted(self.waiting) if rank in self.waiting and self._advance(rank)]
            if not ready:
                raise Deadlock(self._report())
        lost = [call for calls in self.mail.values() for call in calls]
        if lost:
            raise Deadlock(f"a Send without Receive: {lost[0]}" + _others(len(lost) - 1))
        return self.results

    def _resume(self, rank: int, value: Any) -> None:
        """Runs a rank until it has to wait or ends."""
        while True:
            try:
                call = self.coroutines[rank].send(value)
            except StopIteration as end:
                self.results[rank] = end.value
                return
            if call.node.op != "Send":
                self.waiting[rank] = call
                return
            self.mail[address(call)].append(call)
            value = call.value

    def _advance(self, rank: int) -> bool:
        call = self.waiting[rank]
        if call.node.op == "Receive":
            letters = self.mail.get(address(call))
            if not letters:
                return False
            letter = letters.pop(0)
            wanted = tuple(call.node.outputs[0].shape)
            if np.shape(letter.value) != wanted:
                raise Deadlock(f"{letter} sends shape {np.shape(letter.value)}, {call} wants {wanted}")
            del self.waiting[rank]
            self._resume(rank, letter.value)
            return True
        return self._meet(call)

    def _meet(self, call: Call) -> bool:
        members = call.members
        if call.rank not in members:
            raise Deadlock(f"{call}: the rank is not in the group")
        strangers = [rank for rank in members if not 0 <= rank < len(self.coroutines)]
        if strangers:
            raise Deadlock(f"{call}: the group has ranks that do not exist: {strangers}")
        calls = [self.waiting.get(rank) for rank in members]
        if any(other is None or other.members != members or other.node.op == "Receive" for other in calls):
            return False
        number = self.counts[members]
        for other in calls:
            if other.kind != call.kind:
                raise Deadlock(f"collective {number} of group {list(members)} is not the same on all ranks: {call}, "
                               f"but {other}")
        self.counts[members] += 1
        gathered = combine(calls)
        for rank in members:
            del self.waiting[rank]
        for rank, value in zip(members, gathered, strict=True):
            self._resume(rank, value)
        return True

    def _report(self) -> str:
        lines = []
        for rank in sorted(self.waiting):
            call = self.waiting[rank]
            if call.node.op == "Receive":
                why = "nobody sends this tag" if address(call)[0] not in self.waiting else \
                    f"rank {address(call)[0]} has not sent it"
            else:
                places = {rank: describe(other.node) for rank, other in self.waiting.items()}
                why = "waits for " + ", ".join(
                    f"rank {other} ({places.get(other, 'at its end')})" for other in call.members
                    if other not in self.waiting or self.waiting[other].members != call.members)
            lines.append(f"  {call}: {why}")
        return "deadlock: no rank can go on\n" + "\n".join(lines)


def address(call: Call) -> tuple:
    """(sender, receiver, group, tag) of a Send or Receive."""
    attributes, members = call.node.attributes, call.members
    peer = int(attributes["dest_rank" if call.node.op == "Send" else "src_rank"])
    peer = members[peer] if members else peer
    tag = int(attributes.get("sr_tag") or 0)
    return (call.rank, peer, members, tag) if call.node.op == "Send" else (peer, call.rank, members, tag)


def _others(count: int) -> str:
    return f" (and {count} more)" if count else ""
