"""Where a replay leaves the one-device run: the first forward node, or the first parameter, that has another value.

For the forward pass the network is compiled once more for a single rank, by the same compiler, and executed beside
the ranks; nodes correspond by cell, primitive and number of the run. A rank's tensor must be the part of the full one
that the rank's coordinates say. What is still to be summed over ranks is compared after the sum.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import ops

from parallel.proof.compile.graph import Node
from parallel.proof.dryrun.accounting import COLLECTIVES, coordinates
from parallel.proof.replay.executor import Program, run_step
from parallel.proof.replay.ranks import AllRanks
from parallel.proof.replay.reference import OneDevice
from parallel.proof.replay.tolerances import FLOAT32, FLOAT64, Bounds, Difference
from parallel.sharding.config import ParallelConfig

_SUMS = {"AllReduce", "ReduceScatter"}
_MOVING = ("Depend", "Load", "TupleGetItem", "MakeTuple", "UpdateState", "Receive", "Send", "AllGather")
_REPLACED = ("Gather", "OneHot")  # where these are sharded the partitioner replaces them by nodes of its own
_COMPARABLE = 0.1
_PROJECT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Divergence:
    """The first node at which a replay differs from one device.

    Args:
        step: training step, from 0.
        rank: the first rank that shows it.
        node: primitive and path of cells; "" where no forward node differs (the mistake is in the backward pass).
        line: file:line of the cell's code, "" where it is not known.
        parameter: the parameter (or state) that differs most; the operand of the node where a node is found.
        difference: relative.
        ranks: all ranks that show it.
    """

    step: int
    rank: int
    node: str
    line: str
    parameter: str
    difference: float
    ranks: tuple[int, ...]

    @property
    def text(self) -> str:
        """For people."""
        place = f"node {self.node} ({self.line})" if self.node else "the backward pass or the update"
        return (f"first divergence: step {self.step}, rank {self.rank} (shown by ranks {list(self.ranks)}), {place}, "
                f"parameter {self.parameter}, relative difference {self.difference:.3g}")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def locate(world: AllRanks, reference: OneDevice, step: int, differences: Sequence[Difference], *,
           forward: bool = True, exact: bool = True) -> Divergence:
    """Runs both sides again up to `step` and finds the first forward node that differs, else the parameter.

    Args:
        world: the layout.
        reference: the one-device run.
        step: the first step that differed.
        differences: of that step's parameters and states, largest first.
        forward: whether the loss of that step differs; if not, the forward pass is not looked at.
        exact: whether both sides compute in float64.
    """
    found, bounds = None, FLOAT64 if exact else FLOAT32
    if forward:
        found = _first_node(world, reference, step, _full_values(world, reference, step, exact), exact, bounds)
    if found is not None:
        rank, node, difference, ranks = found
        line = source_line(reference.task.network, node)
        return Divergence(step, rank, f"{node.op} in {cell_path(node.scope)}", line,
                          _parameter_of(world.programs[rank], node), difference, ranks)
    return _first_parameter(world, reference, step, differences, bounds)


def cell_path(scope: str) -> str:
    """`model-PanGuAlpha/layers-CellList/0-DecoderLayer/...` without the primitive and the step's own cells."""
    parts = scope.removeprefix("Gradients/").split("/")[:-1]
    return "/".join(part for part in parts if "-" in part and "ShardedStep" not in part) or scope


def source_line(network: Any, node: Node) -> str:
    """file:line where the cell of a node uses the primitive; "" if the cell is not found."""
    parts = [part.partition("-")[2] for part in node.scope.split("/")[:-1]]
    classes = {type(cell).__name__: cell for _, cell in network.cells_and_names()}
    for name in reversed(parts):
        if name in classes:
            return _line_in(classes[name], node)
    return ""


def _line_in(cell: Any, node: Node) -> str:
    file = Path(inspect.getsourcefile(type(cell)) or "")
    lines, first = inspect.getsourcelines(type(cell))
    names = [node.instance] if node.instance.isidentifier() else []
    names += [name for name, item in vars(cell).items() if isinstance(item, ops.Primitive) and item.name == node.op]
    names += [name for name, item in cell._primitives.items() if getattr(item, "name", "") == node.op]
    number = next((i for name in names for i, line in enumerate(lines) if f"self.{name}(" in line), None)
    if number is None:
        number = next((i for i, line in enumerate(lines) if "def construct" in line), 0)
    shown = file.relative_to(_PROJECT) if file.is_relative_to(_PROJECT) else file
    return f"{shown}:{first + number}"


def _full_values(world: AllRanks, reference: OneDevice, step: int, exact: bool) -> dict[tuple, np.ndarray]:
    """Values of the forward nodes of the network compiled for one device."""
    single = reference.compiled()
    numbers, values = Numbering(), {}

    def observe(rank: int, node: Node, result: Any) -> None:
        if is_forward(node) and isinstance(result, np.ndarray):
            values[numbers.key(rank, node)] = result

    order = world.order(reference.batch(0)[0].shape[0])
    # The step before is not run here: the partitioner does not gather gradients of micro-batches in a world of 1.
    history = reference.exact(step + 1, order) if exact else reference.run(step + 1, order)
    before = history.values[step - 1] if step else reference.start
    run_step(single.start(before, exact), single.inputs([item[order] for item in reference.batch(step)]), observe)
    return values


class Numbering:
    """Keys of nodes that are the same in every graph: cell, primitive, its name in the cell, and how many such nodes
    ran before. Nodes that the partitioner adds have names of their own."""

    def __init__(self) -> None:
        self.seen: Counter[tuple] = Counter()

    def key(self, rank: int, node: Node) -> tuple:
        """The key; counts the node."""
        name = (folder(node.scope), node.op, "" if node.op in _REPLACED else node.instance)
        self.seen[rank, name] += 1
        return *name, self.seen[rank, name]


def folder(scope: str) -> str:
    """The cell of a node, without the cells that wrap the network."""
    inner = scope.rpartition("/")[0]
    _, found, rest = inner.partition("TrainingLoss")
    return rest if found else inner


def is_forward(node: Node) -> bool:
    """Whether the node is part of the first computation of the loss, and computes something."""
    return not node.backward and not node.recomputed and "TrainingLoss" in node.scope and node.op not in _MOVING


def _first_node(world: AllRanks, reference: OneDevice, step: int, full: dict[tuple, np.ndarray], exact: bool,
                bounds: Bounds) -> tuple | None:
    """(rank, node, difference, ranks) of the earliest forward node, in the order of the graph, that differs."""
    skipped = [unfinished(program, full) for program in world.programs]
    # Each stage numbers only its own micro-batches' nodes, and cells live on one stage.
    numbers, wrong = Numbering(), defaultdict(dict)
    positions = [{node.name: i for i, node in enumerate(program.nodes)} for program in world.programs]

    def observe(rank: int, node: Node, result: Any) -> None:
        if not is_forward(node) or not isinstance(result, np.ndarray):
            return
        key = numbers.key(rank, node)
        replaced = skipped[rank].get(node.name)
        if replaced == "":
            return
        key = replaced or key
        if key in full:
            far = distance(result, full[key], rank, world.config)
            if far > bounds.node:
                wrong[rank][node.name] = (node, far)

    ranks = world.start(reference.start, exact)
    for number in range(step + 1):
        run_step(ranks, world.inputs(reference.batch(number)), observe if number == step else None)
    if not wrong:
        return None
    per_stage = world.config.data * world.config.op
    first_stage = min(rank // per_stage for rank in wrong)
    candidates = [(positions[rank][name], rank, node, far) for rank, nodes in wrong.items()
                  if rank // per_stage == first_stage for name, (node, far) in nodes.items()]
    _, rank, node, far = min(candidates, key=lambda item: item[:2])
    same = tuple(sorted(other for other, nodes in wrong.items()
                        if any(item.scope == node.scope and item.op == node.op for item, _ in nodes.values())))
    return rank, node, far, same


def unfinished(program: Program, full: dict[tuple, np.ndarray]) -> dict[str, Any]:
    """Forward nodes that are compared elsewhere: "" for values still to be summed over ranks, and for the last node of
    the sum the key of the node that it completes."""
    by_name, users, numbers = program.main.by_name, program.main.users, Numbering()
    keys = {node.name: numbers.key(0, node) for node in program.nodes if is_forward(node)}
    found: dict[str, Any] = {}
    for node in program.nodes:
        if node.op not in _SUMS or not is_forward(node):
            continue
        place, pending, completed = folder(node.scope), [node.inputs[0]], None
        while pending:
            source = by_name.get(pending.pop(0))
            if source is None or source.op == "Constant" or folder(source.scope) != place:
                continue
            if source.name in keys and keys[source.name] in full and source.op not in _SUMS:
                completed = completed or keys[source.name]
                found[source.name] = ""
                continue
            found[source.name] = ""
            pending += source.inputs
        last = node
        while (followers := [user for user in users.get(last.name, []) if is_forward(user)]) and len(
                followers) == 1 and folder(followers[0].scope) == place and keys.get(followers[0].name) not in full:
            found[last.name] = ""
            last = followers[0]
        found[last.name] = completed or ""
    return found


def distance(part: np.ndarray, full: np.ndarray, rank: int, config: ParallelConfig) -> float:
    """Relative difference of a rank's tensor from its part of the full one; the least where several parts are possible,
    0 where the shapes say nothing."""
    if part.dtype.kind not in "fiu" or part.ndim != full.ndim or any(
            big % max(small, 1) for small, big in zip(part.shape, full.shape, strict=True)):
        return 0.0
    _, data, op = coordinates(rank, config)
    places = []
    for small, big in zip(part.shape, full.shape, strict=True):
        degree = big // max(small, 1)
        known = {config.data: data, config.op: op}
        numbers = {0} if degree == 1 else ({known[degree]} if degree in known else set(range(degree)))
        if degree > 1 and degree == config.data == config.op:
            numbers = {data, op}
        places.append([slice(n * small, (n + 1) * small) for n in numbers])
    scale = max(float(np.abs(full).max(initial=0.0)), 1e-12)
    return min(float(np.abs(part.astype(np.float64) - full[place]).max(initial=0.0)) / scale
               for place in itertools.product(*places))


def _parameter_of(program: Program, node: Node) -> str:
    """The parameter that a node reads, through casts and collectives; "" if none within a few nodes."""
    pending = [(name, 0) for name in node.inputs]
    while pending:
        name, depth = pending.pop(0)
        name = program.aliases.get(name, name)
        if name in program.graph.parameters:
            return name
        source = program.main.by_name.get(name)
        if source is not None and source.op in ("Load", "Cast", "AllGather", "Depend", "Reshape") and depth < 6:
            pending += [(item, depth + 1) for item in source.inputs]
    return str(node.marks.get("mirror_user_id", ""))


def _first_parameter(world: AllRanks, reference: OneDevice, step: int, differences: Sequence[Difference],
                     bounds: Bounds) -> Divergence:
    """The parameter whose gradient or update differs, by its update's position in the graph of the backward pass."""
    trainable = [item.name for item in reference.task.network.trainable_params()]

    def owner(name: str) -> str:
        return next((item for item in trainable if name == item or name.endswith("." + item)), name)

    # A wrong norm makes every clipped gradient a little wrong: only what is about as wrong as the worst is looked at.
    least = max(bounds.parameter, _COMPARABLE * min(differences[0].relative, 10.0))
    wrong = [item for item in differences if item.relative > least] or list(differences[:1])
    names = {owner(item.name) for item in wrong}
    # Gradients spread wrongness towards the first layer: of the wrong parameters the one nearest to the loss is named.
    name = max(names, key=lambda item: trainable.index(item) if item in trainable else -1)
    own = [item for item in wrong if owner(item.name) == name]
    ranks = tuple(sorted({item.rank for item in own}))
    program = world.programs[ranks[0]]
    user = next((node for node in program.nodes if is_forward(node) and node.op not in COLLECTIVES
                 and _parameter_of(program, node) == name), None)
    where = f"gradient of {user.op} in {cell_path(user.scope)}" if user is not None else ""
    line = source_line(reference.task.network, user) if user is not None else ""
    return Divergence(step, ranks[0], where, line, name, max(item.relative for item in own), ranks)
