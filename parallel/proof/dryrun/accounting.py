"""Memory and collectives of one compiled rank: bytes in memory, collectives by purpose and by mesh dimension.

Bytes of a collective are those of the full tensor that it is about: the tensor summed by an AllReduce, the gathered
result of an AllGather, what goes into a ReduceScatter or an AlltoAll, the tensor sent or received. `wire_bytes` is what
one rank sends for it under the usual ring algorithms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from parallel.planning.timeline import most_held
from parallel.proof.compile.graph import Function, Graph, Node, TensorType, attribute_value
from parallel.sharding.config import ParallelConfig

DIMENSIONS = ("data", "op", "pipeline", "optimizer", "expert", "norm")
_GATHERING, _SCATTERING = {"AllGather", "AllGatherV"}, {"ReduceScatter", "ReduceScatterV"}
_EXCHANGING = {"AlltoAll", "AlltoAllV", "AllToAll", "NeighborExchange", "NeighborExchangeV2"}
_POINT_TO_POINT = {"Send", "Receive"}
STAGES_GROUP = "stages_of_"
"""Names of the groups over which the last stage sends the others the loss."""
_MOVING = {"Reshape", "Cast", "Transpose", "Split", "Concat", "StridedSlice", "TupleGetItem", "MakeTuple", "Depend"}
_SLICE_GATHER = "recompute_slice_allgather"
COLLECTIVES = {"AllReduce", "Broadcast"} | _GATHERING | _SCATTERING | _EXCHANGING | _POINT_TO_POINT


@dataclass(frozen=True)
class Collective:
    """One collective of the graph, possibly run several times a step.

    Args:
        kind: the primitive.
        dimension: which dimension of parallelism it serves, one of DIMENSIONS.
        purpose: "gradient", "parameter", "activation", "loss", "norm", "stage" or "redistribution".
        phase: "forward", "recompute" or "backward".
        group: MindSpore's name of the group.
        ranks: the ranks that take part; for Send and Receive this rank and the peer.
        bytes: of the tensor it is about, once.
        times: how often it runs in one step.
        dtype: element type.
        shape: of the tensor it is about.
        scope: the cell that it belongs to.
        fusion: number of the group it is fused with, 0 for none.
        tag: of Send and Receive: pairs of them have the same; None where a stage was compiled alone.
        unexpected: whether it is there only because two layers disagree on a layout.
    """

    kind: str
    dimension: str
    purpose: str
    phase: str
    group: str
    ranks: tuple[int, ...]
    bytes: int
    times: int
    dtype: str
    shape: tuple[int, ...]
    scope: str
    fusion: int = 0
    tag: int | None = None
    unexpected: bool = False

    @property
    def wire_bytes(self) -> int:
        """Bytes that one rank sends per run under a ring (AllReduce 2 (n-1)/n, gathers and scatters (n-1)/n)."""
        ranks = len(self.ranks)
        if self.kind in _POINT_TO_POINT:
            return self.bytes if self.kind == "Send" else 0
        return self.bytes * (2 if self.kind == "AllReduce" else 1) * (ranks - 1) // ranks

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"wire_bytes": self.wire_bytes}


def coordinates(rank: int, config: ParallelConfig) -> tuple[int, int, int]:
    """(stage, data, op) of a rank: op moves fastest, stages are the slowest (MindSpore's order)."""
    stage, inner = divmod(rank, config.data * config.op)
    return stage, *divmod(inner, config.op)


def collectives(graph: Graph, rank: int, config: ParallelConfig,
                redistributing: Sequence[str] = ()) -> list[Collective]:
    """Every collective of one rank's step, in the order of the graph.

    Args:
        graph, rank, config: of the compiled rank.
        redistributing: names of the layers beside which a redistribution is meant
            (`parallel.sharding.layout.redistributing`).
    """
    walked = [(function, node, times) for function, node, times in graph.walk() if node.op in COLLECTIVES and times]
    meant = {_cell(node) for function, node, _ in walked
             if any(_within(_cell(near), name) for near in (node, _maker(function, node)) for name in redistributing)}
    return [_collective(function, node, times, rank, config, _cell(node) in meant) for function, node, times in walked]


def _cell(node: Node) -> str:
    """The cell that a node was made for, `network.model.layers.0.mix`; the same forward and backward."""
    pieces = [piece.partition("-")[0] for piece in node.scope.split("/")[:-1]]
    return ".".join(piece for piece in pieces if not piece.startswith(("Grad", "recompute_", "Default")))


def _within(cell: str, name: str) -> bool:
    return f".{name}." in f".{cell}."


def _maker(function: Function, node: Node) -> Node:
    """The node that computed what a collective is about: what is between only moves it."""
    found = node
    while found.inputs and (found is node or found.op in _MOVING or "redistribution_op" in found.instance):
        before = function.source(found.inputs[0])
        if before is None:
            break
        found = before
    return found


def _collective(function: Function, node: Node, times: int, rank: int, config: ParallelConfig,
                meant: bool) -> Collective:
    ranks = _ranks(node, rank)
    purpose = _purpose(node)
    dimension = _dimension(node, purpose, ranks, config)
    subject = _subject(node, len(ranks))
    unexpected = purpose == "redistribution" and not meant and not _is_half_of_sum(function, node)
    scope = node.scope.removeprefix("Gradients/").removeprefix("recompute_").removeprefix("Default/")
    fusion = node.attributes.get("fusion") or 0
    tag = node.attributes.get("sr_tag") if node.op in _POINT_TO_POINT else None
    phase = "backward" if node.backward else "recompute" if _runs_later(node) else "forward"
    return Collective(node.op, dimension, purpose, phase, str(node.attributes.get("group", "")), ranks, subject.bytes,
                      times, subject.dtype, subject.shape, scope, int(fusion), tag, unexpected)


def _ranks(node: Node, rank: int) -> tuple[int, ...]:
    listed = node.attributes.get("group_rank_ids") or node.attributes.get("rank_list") or []
    ranks = tuple(int(item[0]) if isinstance(item, list) else int(item) for item in listed)
    if node.op in _POINT_TO_POINT:  # the peer is given by its index in the group
        peer = int(node.attributes.get("dest_rank" if node.op == "Send" else "src_rank", 0))
        return (rank, ranks[peer] if peer < len(ranks) else peer)
    return ranks


def _subject(node: Node, ranks: int) -> TensorType:
    """The tensor a collective is about, from the type of its result."""
    result = node.outputs[0] if node.outputs else TensorType((), "float32")
    if node.op in _POINT_TO_POINT and node.attributes.get("shape"):
        shape = tuple(int(item[0]) if isinstance(item, list) else int(item) for item in node.attributes["shape"])
        dtype = node.attributes.get("dtype")
        return TensorType(shape, dtype[0].dtype if dtype else result.dtype)
    if node.op in _SCATTERING and result.shape:
        return TensorType((result.shape[0] * ranks, *result.shape[1:]), result.dtype)
    return result


def _purpose(node: Node) -> str:
    instance = node.instance
    if node.op in _POINT_TO_POINT:
        return "parameter" if "pipeline_param" in node.marks else "stage"
    if instance.startswith("PARALLEL_GLOBALNORM"):
        return "norm"
    if instance.startswith(("grad_parallel_optimizer", "grad_mirror", "_grad_accumulation_shard")):
        return "gradient"
    if instance.startswith("parallel_optimizer"):
        return "parameter"
    if "redistribution_op" in instance:
        return "redistribution"
    if str(node.attributes.get("group", "")).startswith(STAGES_GROUP):
        return "loss"
    result = node.outputs[0] if node.outputs else None
    return "loss" if result is not None and not result.shape else "activation"


def _dimension(node: Node, purpose: str, ranks: tuple[int, ...], config: ParallelConfig) -> str:
    """From the partitioner's mark where there is one, else from the coordinate in which the ranks differ."""
    if node.op in _POINT_TO_POINT:
        return "pipeline"
    if purpose == "norm":
        return "norm"
    if "parallel_optimizer" in node.instance or (purpose == "gradient" and node.op in _SCATTERING):
        return "optimizer"
    places = [coordinates(rank, config) for rank in ranks]
    stages, data, op = (len({inner[axis] for inner in places}) for axis in range(3))
    if purpose == "gradient":  # of a parameter that is replicated on every rank of the stage, the sum runs over op too
        return "data" if data > 1 else "op"
    if stages > 1:
        return "pipeline"
    if node.op in _EXCHANGING and config.expert > 1:
        return "expert"
    return "op" if op > 1 else "data" if data > 1 else "op"


def _is_half_of_sum(function: Function, node: Node) -> bool:
    """Whether an AllGather only completes a ReduceScatter of its group (together an AllReduce), or its gradient."""
    before = function.source(node.inputs[0]) if node.inputs else None
    mine = node.attributes.get("group")
    if node.op in _GATHERING and before is not None and before.op in _SCATTERING:
        return before.attributes.get("group") == mine
    if node.op in _SCATTERING:
        return any(user.op in _GATHERING and user.attributes.get("group") == mine
                   for user in function.users.get(node.name, []))
    return False


def summary(found: list[Collective]) -> dict[str, Any]:
    """`collectives` by kind (count and bytes per step) and `by_dimension` (bytes per step), and more finely divided."""
    kinds: dict[str, dict[str, int]] = {}
    by_dimension, wire, by_purpose = Counter(), Counter(), Counter()
    for item in found:
        entry = kinds.setdefault(item.kind, {"count": 0, "bytes": 0})
        entry["count"] += item.times
        entry["bytes"] += item.bytes * item.times
        by_dimension[item.dimension] += item.bytes * item.times
        wire[item.dimension] += item.wire_bytes * item.times
        by_purpose[f"{item.dimension} {item.purpose} {item.phase}"] += item.bytes * item.times
    return {
        "collectives": kinds,
        "by_dimension": {name: by_dimension[name] for name in DIMENSIONS},
        "wire_bytes_by_dimension": {name: wire[name] for name in DIMENSIONS},
        "by_purpose": dict(sorted(by_purpose.items())),
        "unexpected_redistributions": sum(item.times for item in found if item.unexpected),
    }


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Args:
        parameters: the slices of the trainable parameters of this rank's stage.
        optimizer: the slices of their states.
        gradients: gathered gradients, or without micro-batches one gradient for each parameter slice.
        activations: results of the forward pass that the backward pass reads, for the micro-batches alive at once;
            an estimate from the graph, no planner of device memory has seen it.
        largest_constant: the largest constant baked into the graph.
    """

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    largest_constant: int


def memory(graph: Graph, trainable: set[str], rank: int, config: ParallelConfig, micro_batches: int) -> Memory:
    """What rank `rank` holds, counted from its graph's own parameters and nodes."""
    own = {name: kind.bytes for name, kind in graph.parameters.items() if name in trainable}
    gathered = {name for name in graph.parameters if name.startswith("accu_grads.")}
    states = sum(kind.bytes for name, kind in graph.parameters.items()
                 if name not in trainable and name not in gathered and name.partition(".")[2] in trainable)
    gradients = sum(graph.parameters[name].bytes for name in gathered) or sum(own.values())
    constants = [kind.bytes for _, node, _ in graph.walk() if node.op == "Constant" for kind in _constant(node)]
    stage = coordinates(rank, config)[0]
    pipeline = config.pipeline
    kept = kept_by_chunk(graph, micro_batches, pipeline.interleave)
    held = most_held(kept, pipeline.schedule, pipeline.stages, stage, micro_batches)
    return Memory(sum(own.values()), states, gradients, held, max(constants, default=0))


def kept_by_chunk(graph: Graph, micro_batches: int, chunks: int) -> list[int]:
    """Bytes that one micro-batch keeps for its backward pass, for each chunk of layers of this stage.

    Where micro-batches share functions there is one for each chunk, called in the order of the chunks; a graph that is
    written out is divided evenly.
    """
    sizes = {function.name: sum(kept_tensors(function, graph).values()) for function in graph.functions.values()}
    called = list(dict.fromkeys(node.callee for node in graph.main.nodes if node.op == "call" and
                                sizes.get(node.callee or "")))
    if chunks > 1 and len(called) == chunks:
        return [sizes[name] for name in called]
    return [kept_activations(graph) // micro_batches // chunks] * chunks


def kept_activations(graph: Graph) -> int:
    """Bytes of forward results that the backward pass reads, over all micro-batches of a step.

    A tensor that is passed on by nodes which only mark an order counts once; batches, weights and their copies in
    another type are no activations, nor is what a call gives (the gradients of a micro-batch). What the previous stage
    sent is one.
    """
    return sum(sum(kept_tensors(function, graph).values()) * graph.runs.get(function.name, 0)
               for function in (graph.main, *graph.functions.values()))


def kept_tensors(function: Function, graph: Graph) -> dict[tuple, int]:
    """Bytes of each forward result of one function that outlives it, by (name of the node, index in its tuple)."""
    if function is not graph.main and any(node.backward for node in function.nodes):
        return {}  # a backward function: what it computes again it drops again
    kept: dict[tuple, int] = {}
    for name, reader in _read_later(function):
        node = _passed_on(function, name)
        if node is None:
            kept |= _received(function, name, graph)
        elif reader.op == "TupleGetItem":
            if _is_result(function, node, graph):
                kept[node.name, _place(function, reader)] = sum(kind.bytes for kind in reader.outputs)
        elif node.op == "TupleGetItem":
            source = _passed_on(function, node.inputs[0])
            if source is not None and _is_result(function, source, graph) and not node.backward:
                kept[source.name, _place(function, node)] = sum(kind.bytes for kind in node.outputs)
        elif _is_result(function, node, graph):
            kept[node.name, 0] = sum(kind.bytes for kind in node.outputs)
    return kept


def _read_later(function: Function) -> list[tuple[str, Node]]:
    """(name, node that reads it) of whatever backward, recomputed and partially applied backward functions read."""
    found = []
    for node in function.nodes:
        if node.op == "Partial":  # a backward function with what it keeps of the forward one
            found += [(name, node) for name in node.inputs[1:]]
        elif _runs_later(node) and node.op not in ("UpdateState", "Depend"):
            found += [(name, node) for name in node.inputs]
    return found


def _runs_later(node: Node) -> bool:
    """Whether a node runs in the backward pass: gradients, recomputation, and gathering what was sharded for it."""
    return node.backward or node.recomputed or node.instance == _SLICE_GATHER


def _passed_on(function: Function, name: str) -> Node | None:
    """The node whose result `name` is, behind nodes that only mark an order; None for inputs and parameters."""
    node = function.by_name.get(name)
    while node is not None and node.op == "Depend":
        node = function.by_name.get(node.inputs[0])
    return node


def _place(function: Function, getter: Node) -> int:
    number = function.by_name.get(getter.inputs[1])
    value = attribute_value(number.value) if number is not None and number.value is not None else 0
    return value if isinstance(value, int) else 0


def _is_result(function: Function, node: Node, graph: Graph) -> bool:
    """Whether a node is a forward computation: no gradient, weight, copy of a weight, or call."""
    if _runs_later(node) or node.op in ("Constant", "Load", "UpdateState", "call", "MakeTuple"):
        return False
    if "/gradient-" in node.scope:  # the scale and the weight of the loss, a few numbers
        return False
    if node.op == "AddN":  # the sum of the gradients of a tensor that was used twice bears no mark of its own
        parts = function.by_name.get(node.inputs[0])
        return not any(source is not None and source.backward for source in
                       (_passed_on(function, name) for name in (parts.inputs if parts is not None else ())))
    if node.op in ("Cast", "TensorMove"):
        source = _passed_on(function, node.inputs[0])
        # Inside a function the parameters have arrows and the function's mark before their names.
        bare = node.inputs[0].removeprefix("\N{BLACK RIGHT-POINTING SMALL TRIANGLE}").removeprefix("CR_")
        return source.op != "Load" if source is not None else bare not in graph.parameters
    return True


def _received(function: Function, name: str, graph: Graph) -> dict[tuple, int]:
    """An input of a shared function that its callers received from another stage (and cast, perhaps)."""
    if name not in function.inputs:
        return {}
    inner = function.inputs.index(name)
    for caller in (graph.main, *graph.functions.values()):
        for node in caller.nodes:
            if node.op == "call" and node.callee == function.name and inner < len(node.inputs):
                given, source = _passed_on(caller, node.inputs[inner]), caller.source(node.inputs[inner])
                if given is not None and source is not None and source.op == "Receive" and (
                        "pipeline_param" not in source.marks):
                    return {(given.name, 0): sum(kind.bytes for kind in given.outputs)}
    return {}


def _constant(node: Node) -> list[TensorType]:
    value = attribute_value(node.value) if node.value is not None else None
    return [item for item in value if isinstance(item, TensorType)] if isinstance(value, list) else []
