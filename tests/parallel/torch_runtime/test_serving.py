"""Fused products, layer norm and attention over slots, and int8 weights, against the graph node by node."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from parallel.common.errors import UserError  # noqa: E402
from parallel.layers import int8_numbers  # noqa: E402
from parallel.torch_runtime.execute import Binder  # noqa: E402
from parallel.torch_runtime.fusion.fused import fused_rules  # noqa: E402
from parallel.torch_runtime.fusion.served import serving_rules, widened  # noqa: E402
from parallel.torch_runtime.fusion.serving_pass import for_serving  # noqa: E402
from parallel.torch_runtime.graph import Graph, Kind, Literal, Node  # noqa: E402
from parallel.torch_runtime.inference.weights import Weights, quantized, widening  # noqa: E402

WIDTH, HEADS, SLOTS, SEEN, GROUPS, WORDS = 24, 3, 40, 16, 2, 30
CPU = torch.device("cpu")
MATRICES = {"query": (WIDTH, WIDTH), "key": (WIDTH, WIDTH), "value": (WIDTH, WIDTH), "output": (WIDTH, WIDTH),
            "up": (4 * WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH)}


class Writing:
    """A graph that is being written, one node after the other."""

    def __init__(self, inputs, parameters, constants):
        self.graph = Graph([(name, Kind((), "")) for name in inputs], list(parameters.items()), list(constants), [], -1)
        self.numbers = {name: place for place, name in enumerate([*inputs, *parameters])}
        self.constants = {str(value): self.graph.first_constant + place for place, value in enumerate(constants)}

    def __call__(self, op, *inputs, shape=None):
        number = self.graph.first_node + len(self.graph.nodes)
        read = [item if type(item) is Number else self.constants[str(item)] if str(item) in self.constants
                else self.numbers[item] for item in inputs]
        outputs = [] if shape is None else [Kind(shape, "float32")]
        self.graph.nodes.append(Node(op, [int(item) for item in read], outputs, {}, f"node {number}", {}, number))
        self.graph.result = number
        return Number(number)


class Number(int):
    """The number of a node's result."""


def number_of(value):
    """A scalar constant."""
    return Literal(Kind((), "float32"), data=np.array(value, np.float32))


def layer():
    """A decoder layer and a head over a cache, one new token of each group."""
    parameters = {"table": Kind((WORDS, WIDTH), "float32"),
                  **{f"norm{place}.{part}": Kind((WIDTH,), "float32") for place in (1, 2)
                     for part in ("gamma", "beta")}}
    for name, (outputs, inputs) in MATRICES.items():
        parameters |= {f"{name}.weight": Kind((outputs, inputs), "float32"),
                       f"{name}.bias": Kind((outputs,), "float32")}
    parameters |= {f"cache.{name}": Kind((SLOTS, HEADS, WIDTH // HEADS), "float32") for name in ("keys", "values")}
    scale, masked, one = number_of(0.3), number_of(-10000.0), number_of(1.0)
    shapes = {"rows": (-1, WIDTH), "split": (GROUPS, -1, HEADS, WIDTH // HEADS), "each": (-1, HEADS, WIDTH // HEADS),
              "order": (0, 2, 1, 3), "last": (-1,), "epsilon": 1e-5}
    write = Writing(["ids", "write", "read", "visible"], parameters,
                    [0, 1, -1, False, True, scale, masked, one, *shapes.values()])
    flat, by_head, whole = (GROUPS, WIDTH), (GROUPS, HEADS, 1, WIDTH // HEADS), (GROUPS, HEADS, SEEN, WIDTH // HEADS)

    def linear(x, name):
        outputs = MATRICES[name][0]
        made = write("MatMul", x, write("Load", f"{name}.weight", shape=MATRICES[name]), False, True,
                     shape=(GROUPS, outputs))
        return write("Add", made, f"{name}.bias", shape=(GROUPS, outputs))

    def norm(x, place):
        made = write("LayerNorm", x, f"norm{place}.gamma", f"norm{place}.beta", -1, -1, 1e-5)
        return write("TupleGetItem", made, 0, shape=flat)

    def slots(x, name):
        new = write("Reshape", linear(x, name), shapes["each"], shape=(GROUPS, *shapes["each"][1:]))
        table = write("ScatterUpdate", f"cache.{name}s", "write", new, shape=(SLOTS, HEADS, WIDTH // HEADS))
        seen = write("Gather", table, "read", 0, 0, shape=(GROUPS, SEEN, HEADS, WIDTH // HEADS))
        return write("Transpose", seen, shapes["order"], shape=whole)

    words = write("Gather", "table", "ids", 0, 0, shape=(GROUPS, 1, WIDTH))
    hidden = write("Reshape", words, shapes["rows"], shape=flat)
    normed = norm(hidden, 1)
    query = write("Reshape", linear(normed, "query"), shapes["split"], shape=(GROUPS, 1, HEADS, WIDTH // HEADS))
    query = write("Mul", write("Transpose", query, shapes["order"], shape=by_head), scale, shape=by_head)
    scores = write("BatchMatMul", query, slots(normed, "key"), False, True, shape=(GROUPS, HEADS, 1, SEEN))
    seen = write("ExpandDims", write("Cast", "visible", 1, shape=(GROUPS, 1, SEEN)), 1, shape=(GROUPS, 1, 1, SEEN))
    bias = write("Mul", write("Sub", one, seen, shape=(GROUPS, 1, 1, SEEN)), masked, shape=(GROUPS, 1, 1, SEEN))
    weights = write("Softmax", write("Add", scores, bias, shape=(GROUPS, HEADS, 1, SEEN)), shapes["last"],
                    shape=(GROUPS, HEADS, 1, SEEN))
    mixed = write("BatchMatMul", weights, slots(normed, "value"), False, False, shape=by_head)
    mixed = write("Transpose", mixed, shapes["order"], shape=(GROUPS, 1, HEADS, WIDTH // HEADS))
    hidden = write("Add", hidden, linear(write("Reshape", mixed, shapes["rows"], shape=flat), "output"), shape=flat)
    inner = write("GeLU", linear(norm(hidden, 2), "up"), shape=(GROUPS, 4 * WIDTH))
    hidden = write("Add", hidden, linear(inner, "down"), shape=flat)
    write("MatMul", hidden, write("Load", "table", shape=(WORDS, WIDTH)), False, True, shape=(GROUPS, WORDS))
    return write.graph


def values_of(graph):
    """Random values of the parameters."""
    torch.manual_seed(0)
    return {name: torch.randn(kind.shape) * (0.3 if "weight" in name else 1.0) for name, kind in graph.parameters}


def batch():
    """ids, write, read, visible: both groups see beginnings of their slots, and the new tokens'."""
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(SLOTS, generator=generator).int()
    read = torch.stack([order[:SEEN], order[SEEN - 4:2 * SEEN - 4]])
    visible = (torch.arange(SEEN) < torch.tensor([[5], [12]])).to(torch.int8)[:, None]
    return [torch.tensor([[3], [7]]).int(), torch.stack([read[0, 4], read[1, 11]]), read, visible]


def run(graph, values, group=None, **options):
    """(result, caches after it, the graph) with passes, or as it is without options."""
    values = {name: value.clone() for name, value in values.items()}
    if options:
        graph = for_serving(graph, **options)
    weights = Weights([graph], CPU, group)
    for name, value in values.items():
        if name.startswith("cache."):
            weights.state[name] = value
        else:
            weights.put(name, value)
    weights.settle()
    rules = fused_rules(CPU) | serving_rules(CPU, weights)
    made = Binder(graph, weights.state, CPU, rules=rules).bind().run(batch())
    return made, [weights.state[f"cache.{name}"] for name in ("keys", "values")], graph


def near(got, wanted, tolerance=1e-5):
    """Checks that tensors agree."""
    assert float((got - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def test_a_fused_layer_computes_what_its_nodes_do():
    graph = layer()
    values = values_of(graph)
    wanted, caches, _ = run(graph, values)
    found, own, fused = run(graph, values, fused=True)
    near(found, wanted)
    for one, other in zip(own, caches, strict=True):
        near(one, other)
    counts = Counter(node.op for node in fused.nodes)
    # q, k and v side by side, output, up, down, head; nothing of attention, norms and products is left.
    assert (counts["Product"], counts["NormedRows"], counts["SlotAttention"]) == (5, 2, 1)
    assert not counts.keys() & {"MatMul", "BatchMatMul", "LayerNorm", "Softmax", "Add", "GeLU", "ScatterUpdate"}


@pytest.mark.parametrize(("fused", "group"), [(True, None), (False, None), (True, 128)])
def test_int8_weights_compute_what_their_widened_values_do(fused, group):
    graph = layer()
    values = values_of(graph)
    wide = dict(values)
    for name in [name for name in values if name.endswith("weight")]:
        wide[name] = widened(*quantized(values[name][None], group))[0]
    wanted, _, _ = run(graph, wide)
    found, _, made = run(graph, values, group, fused=fused, eight=lambda name, rows: name.endswith("weight"))
    near(found, wanted)
    assert sum(len(node.attributes["weights"]) for node in made.nodes if node.op == "Product"
               and node.attributes["eight"]) == len(MATRICES)


def test_products_of_many_rows_stay_floating():
    graph, asked = layer(), []
    values = values_of(graph)
    _, _, made = run(graph, values, fused=True, eight=lambda name, rows: asked.append(rows) or rows > GROUPS)
    assert set(asked) == {GROUPS}
    assert not any(node.attributes["eight"] for node in made.nodes if node.op == "Product")


@pytest.mark.parametrize("group", [None, 128])
def test_weights_become_the_int8_numbers_of_the_project(group):
    generator = np.random.default_rng(0)
    values = generator.standard_normal((2, 300, 7)).astype(np.float32)  # [T, K, O]
    values[0, :, 3] = 0.0
    wanted, scale = int8_numbers.quantize(values, group)
    found, own = quantized(torch.from_numpy(values).transpose(1, 2), group)
    np.testing.assert_array_equal(found.transpose(1, 2).numpy(), wanted)
    np.testing.assert_allclose(own.numpy(), scale, rtol=1e-7)
    np.testing.assert_allclose(widened(found, own).transpose(1, 2).numpy(), int8_numbers.dequantize(wanted, scale),
                               rtol=1e-6)


def test_a_quantized_checkpoint_is_read_into_the_same_int8_weights():
    values = np.random.default_rng(0).standard_normal((9, 40)).astype(np.float32)  # [O, K], kept as [1, K, O]
    held = dict(zip(("w", "w_scale"), int8_numbers.quantize(values.T[None]), strict=True))
    read = widening(lambda name, extent: held[name], {"w": (9, 40)})
    assert read("w", None).shape == (9, 40)
    np.testing.assert_array_equal(quantized(torch.from_numpy(np.ascontiguousarray(read("w", None)))[None])[0].numpy(),
                                  held["w"].transpose(0, 2, 1))


def test_a_weight_that_is_not_finite_is_named():
    graph = layer()
    values = values_of(graph)
    values["up.weight"][3, 2] = float("nan")
    with pytest.raises(UserError, match="up.weight: a weight is infinite or not a number"):
        run(graph, values, fused=True, eight=lambda name, rows: True)


def test_other_values_take_the_place_of_the_first():
    graph = layer()
    values = values_of(graph)
    made = for_serving(graph, eight=lambda name, rows: name.startswith(("query", "key", "value")))
    weights = Weights([made], CPU)
    for turn in range(2):
        for name, value in values.items():
            if name.startswith("cache."):
                weights.state[name] = value.clone()
            else:
                weights.put(name, value * (1.0 + turn * 0.5))
        weights.settle()
    rules = fused_rules(CPU) | serving_rules(CPU, weights)
    found = Binder(made, weights.state, CPU, rules=rules).bind().run(batch())
    others = {name: value if name.startswith("cache.") else value * 1.5 for name, value in values.items()}
    near(found, run(graph, others, eight=lambda name, rows: name.startswith(("query", "key", "value")))[0])
