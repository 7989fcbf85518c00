"""A graph's lane of its own: what depends on some inputs alone, in front of and beside the rest."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from parallel.torch_runtime.execute import Binder, read_by  # noqa: E402
from parallel.torch_runtime.fusion.regions import RegionBinder  # noqa: E402
from parallel.torch_runtime.graph import Graph, Kind, Node  # noqa: E402
from parallel.torch_runtime.inference import lanes  # noqa: E402

WIDTH, ROWS, LAYERS = 6, 5, 4
CPU = torch.device("cpu")


def request():
    """A user of one row and five candidates; each layer of theirs adds what the user's gives, in an order of nodes as a
    compiler makes it: the user's result, which reads all its layers, first."""
    names = [f"{side}{layer}" for side in ("user", "candidate") for layer in range(LAYERS)]
    square, rows = Kind((WIDTH, WIDTH), "float32"), Kind((ROWS, WIDTH), "float32")
    graph = Graph([("user", Kind((1, WIDTH), "float32")), ("candidates", rows)], [(name, square) for name in names],
                  [False], [], -1)
    place = {name: number for number, (name, _) in enumerate([*graph.inputs, *graph.parameters])}

    def add(op, inputs, kind=None):
        number = graph.first_node + len(graph.nodes)
        outputs = [] if kind is None else [kind]
        graph.nodes.append(Node(op, inputs, outputs, {}, op, {}, number))
        return number

    flat, states = graph.first_constant, [place["user"]]
    for layer in range(LAYERS):
        weight = add("Load", [place[f"user{layer}"]], square)
        states.append(add("Tanh", [add("MatMul", [states[-1], weight, flat, flat], Kind((1, WIDTH), "float32"))],
                          Kind((1, WIDTH), "float32")))
    x = place["candidates"]
    for layer in range(LAYERS):
        made = add("MatMul", [x, add("Load", [place[f"candidate{layer}"]], square), flat, flat], rows)
        x = add("Tanh", [add("Add", [made, states[layer + 1]], rows)], rows)
    graph.result = add("MakeTuple", [states[-1], x])
    return graph


def test_the_lane_is_what_one_input_alone_leads_to():
    graph = request()
    lane = lanes.beside(graph, [0])
    nodes = {node.number: node for node in graph.nodes}
    assert [nodes[number].op for number in sorted(lane)] == ["Load", "MatMul", "Tanh"] * LAYERS
    # Of the candidates the first product, which reads nothing of the user's.
    assert lanes.beside(graph, [1]) == set(sorted(set(nodes) - lane)[:2])
    assert lanes.beside(graph, []) == set()
    graph.nodes.append(Node("AllReduce", [graph.result], [], {}, "", {}, graph.result + 1))
    assert lanes.beside(graph, [0]) == set(), "an order of collectives would be another"


@pytest.mark.parametrize("compiled", [False, True])
def test_both_lanes_give_what_the_graph_gives_and_wait_for_all_that_they_read(compiled):
    graph = request()
    torch.manual_seed(0)
    state = {name: torch.randn(kind.shape) / 3 for name, kind in graph.parameters}
    inputs = [torch.randn(1, WIDTH), torch.randn(ROWS, WIDTH)]
    wanted = Binder(graph, state, CPU).bind().run(inputs)
    lane = lanes.beside(graph, [0])
    front = lanes.in_front(graph, lane)
    more = {"compile": lambda function, inputs: function, "lane": lane} if compiled else {}
    bound = lanes.Lanes((RegionBinder if compiled else Binder)(front, state, CPU, **more).bind(), lane, CPU)
    for found, right in zip(bound.run(inputs), wanted, strict=True):
        assert torch.equal(found, right)
    maker = {number: place for place, step in enumerate(bound.beside) for number in lanes._made(step)}
    held, rest = -1, {number for step in bound.rest for number in lanes._made(step)}
    for step, waits in zip(bound.rest, bound.waits, strict=True):
        held = held if waits is None else waits
        assert all(maker.get(number, -1) <= held for number in read_by(step.node))
    assert not any(number in rest for step in bound.beside for number in read_by(step.node))
    # Layers of the rest do not all wait for the end of the lane.
    assert len([waits for waits in bound.waits if waits is not None]) > 1
    assert compiled is any(step.node.op == "Region" for step in bound.rest)


def test_what_is_made_soon_after_is_waited_for_at_once():
    assert lanes._together([-1, 4, -1, 6, 5, 20], 3) == [None, 3, None, None, None, 5]
    assert lanes._together([-1, 4, -1, 6, 5, 20], 0) == [None, 1, None, 3, None, 5]
    assert lanes._together([-1, -1], 3) == [None, None]
