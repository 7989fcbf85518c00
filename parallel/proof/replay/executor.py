"""Execution of partitioned graphs: each rank is a coroutine that runs its nodes in the order of its graph and hands
every collective to the others (`collectives.Meeting`); a tensor is freed after its last use.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parallel.common.errors import UserError
from parallel.proof.compile.graph import Function, Graph, Node, attribute_value
from parallel.proof.dryrun.accounting import COLLECTIVES
from parallel.proof.replay.collectives import Call, Meeting
from parallel.proof.replay.numpy_ops import RULES, UPDATES

Observer = Callable[[int, Node, Any], None]


def constant(value: Any) -> Any:
    """Python value or array of a Constant's protobuf attribute."""
    if value is None:
        return None
    if len(value.tensors) == 1 and not value.values:
        proto = value.tensors[0]
        array = np.frombuffer(proto.raw_data, _ELEMENTS[proto.data_type]).reshape(tuple(proto.dims))
        if proto.data_type == BFLOAT16:
            return np.left_shift(array.astype(np.uint32), np.uint32(16)).view(np.float32)
        return array.copy()
    if value.type == type(value).TUPLE or value.type == type(value).LIST:
        return tuple(_item(item) for item in value.values)
    return attribute_value(value)


def _item(value: Any) -> Any:
    found = constant(value)
    return found[0] if isinstance(found, list) and len(found) == 1 else found


BFLOAT16 = 16
"""MindSpore's number of the type, which NumPy lacks: such constants are float32 here."""
_ELEMENTS = {1: "f4", 2: "u1", 3: "i1", 4: "u2", 5: "i2", 6: "i4", 7: "i8", 9: "?", 10: "f2", 11: "f8",
             12: "u4", 13: "u8", BFLOAT16: "u2"}
_NUMPY = {"bfloat16": "float32", "string": None}
_FLOATING = ("float16", "bfloat16", "float32", "float64")


@dataclass
class Program:
    """A rank's graph made ready: constants read, aliases of parameters found, last uses known.

    Args:
        graph: the rank's.
        nodes: what is to be computed, in order.
        constants: values of its Constants.
        aliases: names that stand for a parameter.
        dead_after: which values are freed after which node.
        read: names that some node reads; other results are not kept.
    """

    graph: Graph
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    dead_after: dict[str, list[str]] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)

    @property
    def copies(self) -> set[str]:
        """Parameters that another stage owns and sends here at every step: the copy here is read by nobody."""
        return {self.aliases.get(node.inputs[0], node.inputs[0]) for node in self.nodes
                if node.op == "Receive" and "pipeline_param" in node.marks}

    @property
    def main(self) -> Function:
        """The only function: replay takes flat graphs."""
        return self.graph.main


def prepare(graph: Graph) -> Program:
    """Checks that every primitive has a rule and finds when each value is used for the last time.

    Raises:
        UserError: a primitive without a rule, or a graph that calls functions.
    """
    program, main = Program(graph), graph.main
    last: dict[str, str] = {}
    for node in main.nodes:
        if node.op == "Constant":
            program.constants[node.name] = constant(node.value)
            continue
        if node.op == "call":
            raise UserError("the graph calls functions, replay takes flat graphs", where=node.scope, value=node.callee)
        if node.op not in RULES and node.op not in UPDATES and node.op not in COLLECTIVES:
            raise UserError(f"replay has no rule for the primitive {node.op}", where=node.scope,
                            hint="add one to parallel/proof/replay/numpy_ops.py: a "
                            "line of RULES where NumPy has the function")
        program.nodes.append(node)
        # Depend on a parameter is the parameter itself: what is read is what it holds when it is read.
        source = node.inputs[0] if node.inputs else ""
        if node.op == "Depend" and (source in graph.parameters or source in program.aliases):
            program.aliases[node.name] = program.aliases.get(source, source)
        for name in node.inputs:
            last[name] = node.name
    program.read = {main.result, *last}
    kept = {main.result, *program.constants, *graph.parameters}
    for name, user in last.items():
        if name not in kept:
            program.dead_after.setdefault(user, []).append(name)
    return program


@dataclass
class Rank:
    """One rank: its program and what its parameters hold now.

    Args:
        number: its rank.
        program: its graph made ready.
        state: parameters by name.
        exact: every floating type is float64, whatever the graph declares.
    """

    number: int
    program: Program
    state: dict[str, np.ndarray]
    exact: bool = False

    def run(self, inputs: Sequence[np.ndarray], observe: Observer | None = None) -> Generator[Call, Any, Any]:
        """A coroutine of one step: yields collectives, is sent their results, returns the graph's result.

        Raises:
            ValueError: a rule's result has another shape than the graph declares.
        """
        program, state = self.program, self.state
        if self.exact:
            inputs = [item.astype(np.float64) if item.dtype.kind == "f" else item for item in inputs]
        values: dict[str, Any] = dict(zip(data_inputs(program), inputs, strict=True))

        def fetch(name: str) -> Any:
            name = program.aliases.get(name, name)
            if name in program.constants:
                return program.constants[name]
            return values[name] if name in values else state[name]

        for node in program.nodes:
            if node.name in program.aliases:
                result: Any = None
            elif node.op in COLLECTIVES:
                result = yield Call(self.number, node, fetch(node.inputs[0]) if node.inputs else None)
            elif node.op in UPDATES:
                result = self._update(node, fetch)
            else:
                with np.errstate(all="ignore"):
                    result = RULES[node.op](node, *(fetch(name) for name in node.inputs))
            result = declared(node, result, self.exact)
            if observe is not None:
                observe(self.number, node, result)
            if node.name in program.read:
                values[node.name] = result
            for name in program.dead_after.get(node.name, ()):
                values.pop(name, None)
        return fetch(program.main.result)

    def _update(self, node: Node, fetch: Callable[[str], Any]) -> Any:
        """Runs an update; parameters get new arrays, so what was loaded before keeps the old values."""
        new = UPDATES[node.op](node, *(fetch(name) for name in node.inputs))
        for name, value in zip(node.inputs, new, strict=False):
            target = self.program.aliases.get(name, name)
            if target not in self.state:
                raise UserError(f"{node.op} writes {name}, which is no parameter", where=f"rank {self.number}")
            old = self.state[target]
            self.state[target] = np.asarray(value, old.dtype).reshape(old.shape)
        return new[0]


def data_inputs(program: Program) -> list[str]:
    """Names of the graph's inputs that are no parameters, in order."""
    return [name for name in program.main.inputs if name not in program.graph.parameters]


def declared(node: Node, result: Any, exact: bool = False) -> Any:
    """`result` in the type that the graph declares for the node; float64 for its floating types where it is `exact`."""
    if len(node.outputs) != 1 or isinstance(result, tuple) or result is None:
        return result if exact else _floats(result)
    kind = node.outputs[0]
    dtype = "float64" if exact and kind.dtype in _FLOATING else _NUMPY.get(kind.dtype, kind.dtype)
    array = np.asarray(result, dtype)
    if kind.dtype == "bfloat16" and not exact:
        array = rounded_to_bfloat16(array)
    if array.shape != kind.shape and not any(size < 0 for size in kind.shape):
        if array.size != 1 or node.op in ("UpdateState", "Assign"):
            raise ValueError(f"{node.op} at {node.scope} gave shape {array.shape}, the graph declares {kind.shape}")
        array = array.reshape(kind.shape)
    return array


def rounded_to_bfloat16(array: np.ndarray) -> np.ndarray:
    """float32 values rounded to the nearest that bfloat16 has, ties to even."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(array), nearest.view(np.float32), array)


def _floats(result: Any) -> Any:
    # NumPy's scalar arithmetic drifts to float64; results of several tensors are float32 where they are floating.
    if isinstance(result, tuple):
        return tuple(_floats(item) for item in result)
    if isinstance(result, np.ndarray) and result.dtype == np.float64:
        return result.astype(np.float32)
    return result


def run_step(ranks: Sequence[Rank], inputs: Sequence[Sequence[np.ndarray]], observe: Observer | None = None) -> list:
    """One training step of all ranks in lock-step; returns each rank's result.

    Args:
        ranks: all ranks of the world, by number.
        inputs: each rank's rows of the batch.
        observe: called with (rank, node, result) after every node.

    Raises:
        Deadlock: ranks wait for each other, or take part in a group's collectives in different orders.
    """
    return Meeting([rank.run(own, observe) for rank, own in zip(ranks, inputs, strict=True)]).run()
