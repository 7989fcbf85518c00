"""Weights of forward passes held in the type of their products, and what is fused in such passes."""

from __future__ import annotations

from collections import Counter

import pytest

torch = pytest.importorskip("torch")

from parallel.torch_runtime.execute import Binder  # noqa: E402
from parallel.torch_runtime.fusion.fused import fused_rules  # noqa: E402
from parallel.torch_runtime.fusion.regions import RegionBinder  # noqa: E402
from parallel.torch_runtime.fusion.weights import narrowed  # noqa: E402
from parallel.torch_runtime.graph import Graph, Kind, Node  # noqa: E402
from parallel.torch_runtime.inference.rank import prepared  # noqa: E402

ROWS, WIDTH, INNER = 5, 8, 12
CPU = torch.device("cpu")


def gate(*, wide_up: bool = False) -> Graph:
    """swish(x gate) * (x up) + bias in bfloat16, of float32 weights; with `wide_up` up is also read as it is."""
    graph = Graph([("x", Kind((ROWS, WIDTH), "bfloat16"))],
                  [(name, Kind(shape, "float32")) for name, shape in
                   (("gate", (WIDTH, INNER)), ("up", (WIDTH, INNER)), ("bias", (INNER,)))], [None, 45, False], [], -1)
    none, half, false = range(graph.first_constant, graph.first_node)

    def write(op: str, *inputs: int, shape: tuple[int, ...], dtype: str = "bfloat16") -> int:
        number = graph.first_node + len(graph.nodes)
        graph.nodes.append(Node(op, list(inputs), [Kind(shape, dtype)], {}, "", {}, number))
        graph.result = number
        return number

    def product(parameter: int) -> int:
        loaded = write("Load", parameter, none, shape=(WIDTH, INNER), dtype="float32")
        return write("MatMul", 0, write("Cast", loaded, half, shape=(WIDTH, INNER)), false, false, shape=(ROWS, INNER))

    gated, up = product(1), product(2)
    swish = write("Mul", gated, write("Sigmoid", gated, shape=(ROWS, INNER)), shape=(ROWS, INNER))
    result = write("Mul", swish, up, shape=(ROWS, INNER))
    if wide_up:
        write("Add", write("Load", 2, none, shape=(WIDTH, INNER), dtype="float32"), 3, shape=(WIDTH, INNER),
              dtype="float32")
        graph.result = result
    write("Add", result, 3, shape=(ROWS, INNER), dtype="float32")
    return graph


def run(graph: Graph, binder: type[Binder] = Binder, **options) -> torch.Tensor:
    """The graph's result on random values, parameters in the types that it has."""
    torch.manual_seed(0)
    state = {name: torch.randn(kind.shape).to(getattr(torch, kind.dtype)) for name, kind in graph.parameters}
    x = torch.randn(ROWS, WIDTH).bfloat16()
    return binder(graph, state, CPU, rules=fused_rules(CPU), **options).bind().run([x])


def test_weights_that_are_only_cast_are_held_in_that_type():
    graph = gate()
    narrow, = narrowed([graph])
    assert {name: kind.dtype for name, kind in narrow.parameters} == {"gate": "bfloat16", "up": "bfloat16",
                                                                      "bias": "float32"}
    assert torch.equal(run(narrow), run(graph))


def test_a_weight_that_any_graph_reads_as_it_is_stays():
    kinds = [dict(graph.parameters) for graph in narrowed([gate(), gate(wide_up=True)])]
    assert [own["up"].dtype for own in kinds] == ["float32"] * 2
    assert [own["gate"].dtype for own in kinds] == ["bfloat16"] * 2


@pytest.mark.parametrize("compiled", [False, True])
def test_a_gate_is_fused_whether_compiled_or_not(compiled):
    graph = gate()
    made = prepared({"scores": graph}, fused=True, compiled=compiled)["scores"]
    counts = Counter(node.op for node in made.nodes)
    assert counts["FusedSwish"] == 1 and not counts.keys() & {"Sigmoid", "Mul"}
    if compiled:
        found = run(made, RegionBinder, compile=lambda function, inputs: function)
        assert float((found - run(graph)).abs().max()) < 0.02 * float(run(graph).abs().max())
