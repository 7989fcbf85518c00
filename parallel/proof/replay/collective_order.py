"""Whether all ranks of a group come to its collectives in the same order.

A cluster pairs the k-th collective of a group on one rank with the k-th on the others, whatever they are for. Two of
equal kind and shape in another order on one rank do not hang: the ranks get sums of things that do not belong together.
So what a collective is for follows from what it computes with: the cells, primitives and parameters behind its operand.

Ranks whose collectives are not the same ones (a stage has what another has not) are not judged here: only an order that
differs among the same collectives is a mistake for certain. So it is with what one rank sends another: the tags are the
partitioner's, a cluster pairs the k-th Send with the k-th Receive.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from parallel.proof.compile.graph import Node
from parallel.proof.dryrun.accounting import COLLECTIVES
from parallel.proof.replay.collectives import Call, address, describe, group_ranks
from parallel.proof.replay.executor import Program

_PAIRS = ("Send", "Receive")
_FIRST_INPUT_ONLY = ("Depend", "Load")  # what follows only says when


def wrong_order(programs: Sequence[Program]) -> str | None:
    """The first collective of a group that is for something else or of another shape on one rank than on another, or
    the first Send that meets another one's Receive, in words; None if there is none.

    Args:
        programs: of all ranks, by number.
    """
    return _groups_order(programs) or _groups_shapes(programs) or _pairs_order(programs)


def _groups_shapes(programs: Sequence[Program]) -> str | None:
    """Collectives that cannot meet: a cluster waits for ever where one rank brings more than another."""
    for members, calls in sorted(calls_of_groups(programs).items()):
        kinds = {rank: [node.op for node in nodes] for rank, nodes in calls.items()}
        if set(calls) != set(members) or any(kind != kinds[members[0]] for kind in kinds.values()):
            continue
        for rank in members[1:]:
            for number, (one, other) in enumerate(zip(calls[members[0]], calls[rank], strict=True)):
                shapes = [[(item.shape, item.dtype) for item in node.outputs] for node in (one, other)]
                if shapes[0] != shapes[1]:
                    return (f"collective {number} of group {list(members)} is not of one shape: rank {members[0]} has "
                            f"{shapes[0]} at {describe(one)}, but rank {rank} {shapes[1]} at {describe(other)}")
    return None


def _groups_order(programs: Sequence[Program]) -> str | None:
    # The strictest notion of sameness under which the ranks have the same collectives: constants are the same along the
    # data axis, computations within a stage, positions in the network everywhere.
    notions = [[purposes(program, constants) for program in programs] for constants in (True, False)]
    notions.append([{node.name: origin(node) for node in program.nodes} for program in programs])
    for members, calls in sorted(calls_of_groups(programs).items()):
        if set(calls) != set(members) or len({len(nodes) for nodes in calls.values()}) > 1:
            continue  # the replay shows who waits for whom
        for notion in notions:
            orders = {rank: [notion[rank][node.name] for node in nodes] for rank, nodes in calls.items()}
            first = orders[members[0]]
            if any(Counter(order) != Counter(first) for order in orders.values()):
                continue
            for rank in members[1:]:
                for number, (one, other) in enumerate(zip(first, orders[rank], strict=True)):
                    if one != other:
                        return (f"collective {number} of group {list(members)} is not the same on all ranks: rank "
                                f"{members[0]} at {describe(calls[members[0]][number])}, but rank {rank} at "
                                f"{describe(calls[rank][number])}; they come in another order")
            break
    return None


def _pairs_order(programs: Sequence[Program]) -> str | None:
    letters: dict[str, dict[tuple, list[tuple]]] = {name: defaultdict(list) for name in _PAIRS}
    for rank, program in enumerate(programs):
        for node in program.nodes:
            if node.op in _PAIRS:
                sender, receiver, group, tag = address(Call(rank, node, None))
                letters[node.op][sender, receiver, group].append((tag, node))
    for (sender, receiver, group), sent in sorted(letters["Send"].items()):
        wanted = letters["Receive"].get((sender, receiver, group), [])
        if sorted(tag for tag, _ in sent) != sorted(tag for tag, _ in wanted):
            continue  # the replay shows what is lost
        for number, ((one, send), (other, receive)) in enumerate(zip(sent, wanted, strict=True)):
            if one != other:
                return (f"what rank {sender} sends rank {receiver} comes in another order: number {number} is "
                        f"{describe(send)}, but {describe(receive)}")
    return None


def calls_of_groups(programs: Sequence[Program]) -> dict[tuple[int, ...], dict[int, list[Node]]]:
    """The collectives of every group by rank, in order; Send and Receive, which have tags, are none."""
    calls: dict[tuple[int, ...], dict[int, list[Node]]] = defaultdict(lambda: defaultdict(list))
    for rank, program in enumerate(programs):
        for node in program.nodes:
            if node.op in COLLECTIVES and node.op not in _PAIRS:
                calls[group_ranks(node)][rank].append(node)
    return calls


def origin(node: Node) -> tuple:
    """Primitive, cell and parameter of a node, and what it was made of; not its number among such nodes in the cell."""
    return (node.op, node.scope.rpartition("/")[0], str(node.marks.get("mirror_user_id", "")),
            str(node.marks.get("micro", "")), str(node.attributes.get("op", "")))


def purposes(program: Program, constants: bool) -> dict[str, int]:
    """For every node a number that says what it computes: its origin and shape, and those of all nodes behind it.

    Args:
        program: of one rank.
        constants: whether the values of constants count.
    """
    found: dict[str, int] = {}
    for node in program.main.nodes:
        if node.op == "Constant":
            value = node.value.SerializeToString() if constants and node.value is not None else b""
            found[node.name] = hash(("Constant", value))
            continue
        inputs = node.inputs[:1] if node.op in _FIRST_INPUT_ONLY else () if node.op == "UpdateState" else node.inputs
        found[node.name] = hash((origin(node), tuple(item.shape for item in node.outputs),
                                 tuple(found.get(name, name) for name in inputs)))
    return found
