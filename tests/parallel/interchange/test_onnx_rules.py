"""Every ONNX rule, run by onnxruntime, against the replay's NumPy rule of the same primitive, on random inputs."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

import onnxruntime  # noqa: E402
from onnx import helper  # noqa: E402

from parallel.common.errors import UserError  # noqa: E402
from parallel.interchange.onnx_graph import OPSET, OnnxGraph, Value  # noqa: E402
from parallel.interchange.onnx_rules import RULES, At, apply  # noqa: E402
from parallel.proof.compile import graph as compiled  # noqa: E402
from parallel.proof.replay import numpy_ops  # noqa: E402
from parallel.torch_runtime import graph  # noqa: E402
from tests.parallel.torch_runtime.test_rules import CASES, made, parts, same  # noqa: E402

REFUSED = {"Softmax": (0, 2), "LogSoftmax": (0, 2)}  # dims that have no rule
KNOWN = [case for case in CASES if case[0] in RULES and case[0] not in ("MakeTuple", "MakeList", "UpdateState")]


def fed(g: OnnxGraph, values: dict[str, np.ndarray], value):
    """An input of a rule: arrays become inputs of the graph."""
    if isinstance(value, tuple):
        return tuple(fed(g, values, item) for item in value)
    if not isinstance(value, np.ndarray):
        return value
    name = f"input_{len(values)}"
    values[name] = value
    return g.feed(name, value.dtype.name, value.shape)


def run(g: OnnxGraph, values: dict[str, np.ndarray]):
    graph = helper.make_graph(g.nodes, "rule", g.inputs, g.outputs, list(g.constants.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 8
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, values)


@pytest.mark.parametrize("case", KNOWN, ids=lambda case: case[0])
def test_a_rule_gives_what_the_replay_gives(case):
    op, inputs, attributes, shape = parts(case)
    generator = np.random.default_rng(zlib.crc32(op.encode()))
    arrays = [made(item, generator, "float32") for item in inputs]
    node = compiled.Node("x", op, [], [compiled.TensorType(shape, "float32")], attributes)
    wanted = numpy_ops.RULES[op](node, *arrays)
    single = not isinstance(wanted, tuple)
    if single:
        wanted = np.asarray(wanted)
        wanted = wanted.astype(np.float32) if wanted.dtype == np.float64 else wanted
    g, values = OnnxGraph(()), {}
    at = At(graph.Node(op, [], [], attributes), wanted.dtype.name if single else None,
            wanted.shape if single else None)
    given = [fed(g, values, item) for item in arrays]
    if inputs[1:2] == [REFUSED.get(op)]:
        with pytest.raises(UserError, match="no rule"):
            apply(g, at, given)
        return
    found = apply(g, at, given)
    results = [item for item in ((found,) if single else found) if item is not None]
    for number, item in enumerate(results):
        g.give(item if isinstance(item, Value) else g.tensor(item), f"result_{number}", [None] * item.dims)
    got = run(g, values)
    same(got[0] if single else tuple(got), wanted if single else tuple(wanted[:len(got)]), 2e-6)


def test_every_rule_is_one_of_the_replay_and_has_a_case():
    assert set(RULES) <= set(numpy_ops.RULES)
    assert set(RULES) - {case[0] for case in KNOWN} == {"MakeTuple", "MakeList", "UpdateState"}


def test_a_primitive_without_a_rule_is_named():
    with pytest.raises(UserError, match="no ONNX rule for the primitive BitwiseXor"):
        apply(OnnxGraph(()), At(graph.Node("BitwiseXor", [], []), "int32", (2,)), [])
