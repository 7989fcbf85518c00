"""Every rule of the torch runtime against the replay's NumPy rule of the same primitive, on random inputs."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from parallel.proof.compile import graph as compiled  # noqa: E402
from parallel.proof.replay import numpy_ops  # noqa: E402
from parallel.torch_runtime import graph, rules  # noqa: E402


def floats(*shape: int, positive: bool = False):
    """A maker of float inputs."""
    return lambda generator: np.abs(generator.standard_normal(shape)) + 0.1 if positive else \
        generator.standard_normal(shape)


def whole(*shape: int, low: int = 0, high: int = 5):
    """A maker of int32 inputs."""
    return lambda generator: generator.integers(low, high, shape).astype(np.int32)


def large(*shape: int):
    """A maker of floats above 3."""
    return lambda generator: np.abs(generator.standard_normal(shape)) + 3.0


def truths(*shape: int):
    """A maker of booleans."""
    return lambda generator: generator.integers(0, 2, shape).astype(bool)


X, Y, P, Q = floats(3, 4), floats(3, 4), floats(3, 4, positive=True), floats(3, 4, positive=True)
BITS, SHIFT = whole(3, 4, low=-1000, high=1000), whole(3, 4, high=8)
ONE = ["Exp", "Square", "Neg", "Abs", "Cos", "Sin", "Tanh", "IsFinite", "Sign", "Floor", "ReLU", "Erf", "Sigmoid",
       "SiLU", "ZerosLike", "OnesLike", "TensorMove", "Identity", "Load", "StopGradient", "Cast", "ScalarToTensor",
       "TensorToScalar", "Copy", "Contiguous", "HSigmoid"]
POSITIVE = ["Log", "Sqrt", "Log1p", "Rsqrt", "Reciprocal"]
TWO = ["Add", "Sub", "Mul", "Muls", "Maximum", "Minimum", "Less", "Greater", "LessEqual", "GreaterEqual", "Equal",
       "NotEqual", "ReluGrad", "AbsGrad", "SiLUGrad", "SigmoidGrad", "TanhGrad"]
TWO_POSITIVE = ["Div", "RealDiv", "FloorDiv", "FloorMod", "Mod", "Pow", "Xdivy", "SqrtGrad", "RsqrtGrad",
                "ReciprocalGrad", "Divs"]
WITH_NUMBER = ["ScalarAdd", "ScalarMul", "Adds", "Subs", "LessScalar", "LessEqualScalar", "GreaterScalar",
               "GreaterEqualScalar", "EqualScalar", "NotEqualScalar", "Muls", "Divs", "Add", "Mul", "Sub", "Maximum",
               "Minimum", "Pow"]
BITWISE = ["BitwiseXor", "BitwiseAnd", "BitwiseOr", "BitwiseAndTensor", "BitwiseXorTensor", "BitwiseOrTensor"]
REDUCTIONS = ["ReduceSum", "SumExt", "ReduceMax", "ReduceMin", "ReduceMean", "MeanExt", "ReduceProd"]
# Shape, bits of dropout, mask, and further inputs of a fused attention: documents one after the other, one of them
# empty; and masked ones with dropout.
FLASH = [((7, 2, 16), None, lambda generator: np.triu(np.ones((4, 4), np.uint8), 1),
          ((3, 3, 7), (3, 3, 7), 2, 1.0, 0.25, 99, 0, 0, 4, 2)),
         ((2, 2, 8, 16), lambda generator: generator.integers(0, 256, (2, 2, 8, 1)).astype(np.uint8),
          lambda generator: np.triu(np.ones((2, 1, 8, 8), np.uint8), 1), (None, None, 2, 0.9, 0.25, 99, 99, 0, 1, 0))]
# op, inputs (makers or constants), attributes, shape of the declared output where the rule reads it
CASES: list[tuple] = [
    *[(op, [X]) for op in ONE], *[(op, [P]) for op in POSITIVE], *[(op, [X, Y]) for op in TWO],
    *[(op, [P, Q]) for op in TWO_POSITIVE], *[(op, [P, 2.0]) for op in WITH_NUMBER],
    *[(op, [2.0, P]) for op in ("Add", "Sub", "Mul", "Div", "RealDiv", "Maximum", "Greater")],
    *[(op, [BITS, SHIFT]) for op in (*BITWISE, "RightShift", "BitwiseRightShift", "BitwiseLeftShift")],
    *[(op, [BITS, 9]) for op in ("BitwiseAndScalar", "BitwiseXorScalar", "BitwiseOrScalar", "RightShift",
                                 "BitwiseAnd")],
    ("Mul", [BITS, 0x5EBCA6B]), ("FloorDiv", [BITS, 7]), ("FloorMod", [BITS, 7]), ("BitwiseNot", [BITS]),
    ("LogicalNot", [truths(3, 4)]), ("LogicalAnd", [truths(3), truths(3)]), ("LogicalOr", [truths(3), truths(3)]),
    *[(op, [floats(2, 3, 4), dims, keep]) for op in REDUCTIONS for dims, keep in (((), False), ((0, -1), True),
                                                                                  (1, False))],
    *[(op, [truths(2, 3), (1,), False]) for op in ("ReduceAny", "ReduceAll")], ("ReduceSum", [truths(2, 3), (), False]),
    ("Size", [X]), ("Shape", [X]), ("Tile", [X, (2, 1)]), ("Tile", [X, (2, 1, 3)]), ("BroadcastTo", [floats(1, 4),
                                                                                                     (3, -1)]),
    ("ExpandDims", [X, 1]), ("ExpandDims", [X, -1]), ("ExpandDims", [X, (0, 3)]), ("TransposeExt", [X, 0, 1]),
    ("Transpose", [floats(2, 3, 4), (2, 0, 1)]), ("BiasAdd", [floats(2, 3, 2, 2), floats(3)]),
    ("BiasAdd", [X, floats(4)]),
    ("FillV2", [(2, 3), 0.5]), ("Full", [(2, 3), 0.5]), ("Zeros", [(2, 3), 43]), ("Ones", [(2, 3), 43]),
    ("Range", [0, 10, 3, 100]), ("Select", [truths(3, 4), X, Y]), ("SelectV2", [truths(3, 4), X, 0.0]),
    ("MaskedFill", [X, truths(3, 4), 0.0]), ("AddN", [(X, Y, P)]), ("AddExt", [X, Y, 2]), ("SubExt", [X, Y, 2]),
    ("MakeTuple", [X, Y]), ("MakeList", [X, Y]), ("TupleGetItem", [(X, Y), 1]), ("Depend", [X, Y]),
    ("UpdateState", [X]),
    ("Reshape", [X, (2, 6)]), ("Reshape", [X, (-1,)]), ("Reshape", [floats(1), ()]), ("Flatten", [floats(2, 3, 4)]),
    ("Squeeze", [floats(3, 1, 4)], {}, (3, 4)), ("Concat", [(X, Y), 1]), ("Concat", [(X, Y)], {"axis": 0}),
    ("Stack", [(X, Y)], {"axis": 1}), ("Stack", [(X, Y), 0]), ("Pad", [X], {"paddings": [[1, 0], [2, 1]]}),
    ("Pad", [X], {"paddings": [[[1], [0]], [[2], [1]]]}),
    *[(op, [floats(2, 3, 4), floats(2, 4, 5)]) for op in ("BatchMatMul", "Bmm", "MatMulExt")],
    *[(op, [X, floats(4, 5)]) for op in ("MatMul", "Mm", "MatMulV2")], ("MatMul", [X, floats(5, 3), True, True]),
    ("BatchMatMul", [floats(2, 3, 4), floats(2, 5, 4), False, True]),
    ("StridedSlice", [floats(4, 6, 3), (0, -3), (0, 0), (1, 1), 1, 3]), ("StridedSlice", [floats(4, 6), (1, 0),
                                                                                          (4, 6), (2, 3)]),
    ("StridedSlice", [floats(4, 6, 3), (0, 1, 0), (0, 2, 0), (1, 1, 1), 0, 0, 1, 4, 2]),
    ("StridedSliceGrad", [floats(4, 3), (4, 6), (0, -3), (0, 0), (1, 1)], {"begin_mask": 1, "end_mask": 3}),
    ("StridedSliceGrad", [floats(2, 2), (4, 6), (1, 0), (4, 6), (2, 3), 0, 0, 0, 0, 0]),
    ("Slice", [floats(4, 6), (1, 2), (2, -1)]), ("SliceGrad", [floats(2, 3), floats(4, 6), (1, 2), (2, 3)]),
    ("Gather", [floats(5, 3), whole(2, 4), 0, 0]), ("Gather", [floats(2, 5, 3), whole(4), 1, 0]),
    ("Gather", [floats(2, 3, 5, 4), whole(2, 3, 6), 2, 2]), ("Gather", [floats(2, 3, 5), whole(2, 6), 2, 1]),
    ("GatherD", [floats(3, 5), 1, whole(3, 2)]), ("GatherNd", [floats(5, 5, 2), whole(3, 2)]),
    ("UnsortedSegmentSum", [floats(3, 4, 2), whole(3, 4, low=-1, high=7), 5]),
    ("UnsortedSegmentSum", [floats(6), whole(6), 5]),
    ("ScatterNd", [whole(6, 1), floats(6, 3), (5, 3)]), ("ScatterNd", [whole(6, 2), floats(6), (5, 5)]),
    ("OneHot", [whole(6, low=-2, high=7), 5, 1.0, 0.0, -1]), ("OneHot", [whole(2, 3), 4, 0.9, 0.1, 0]),
    ("GroupedMatmul", [(floats(7, 4),), (floats(4, 4, 5),), *[None] * 5, lambda generator: np.array([2, 2, 6, 7]), 3,
                       0, False, False]),
    ("GroupedMatmul", [(floats(7, 4),), (floats(2, 4, 5),), *[None] * 5, lambda generator: np.array([2, 4]), 3,
                       0, False, False]),  # the last three rows are nobody's
    ("Split", [floats(4, 6)], {"axis": 1, "output_num": 3}), ("Split", [floats(4, 6), 0, 2]),
    ("SplitWithSize", [floats(4, 6), (1, 2, 3), 1]), ("Unstack", [X], {"axis": 1}), ("Unstack", [X, 0]),
    *[(op, [floats(2, 3, 4), dims]) for op in ("Softmax", "LogSoftmax") for dims in (-1, (1,), (0, 2))],
    ("SoftmaxBackward", [X, Y, -1]), ("SoftmaxGrad", [X, Y, (0, 1)]),
    ("LayerNorm", [floats(4, 6), floats(6), floats(6), -1, -1, 1e-5]),
    ("LayerNorm", [floats(2, 3, 4), floats(3, 4), floats(3, 4), 1, 1, 1e-5]),
    ("LayerNormGrad", [floats(4, 6), floats(4, 6), floats(4, 1, positive=True), floats(4, 1), floats(6), -1, -1, 1e-5]),
    ("LayerNormGrad", [floats(4, 6), floats(4, 6), floats(4, 1, positive=True), floats(4, 1), floats(6), -1, -1],
     {"epsilon": 1e-5}),
    ("RmsNorm", [floats(4, 6), floats(6), 1e-6]),
    ("RmsNormGrad", [floats(4, 6), floats(4, 6), floats(4, 1, positive=True),
                     floats(6)]),
    ("GeLU", [X]), ("GeLUGrad", [X, Y, P]), ("TopK", [whole(4, 9, high=4), 3]), ("TopK", [floats(4, 9), 3]),
    *[(op, [X, 1], attributes) for op in ("CumSum", "CumsumExt")
      for attributes in ({}, {"exclusive": 1}, {"reverse": 1}, {"exclusive": 1, "reverse": 1})],
    ("Einsum", [(floats(2, 3, 4), floats(2, 4, 5))], {"equation": "bij,bjk->bik"}),
    *[(op, [(3, 1, 4), (2, 1)]) for op in ("DynamicBroadcastGradientArgs", "BroadcastGradientArgs")],
    ("TensorToTuple", [whole(4)]),
    *[("FlashAttentionScore", [*[floats(*shape)] * 3, None, bits, None, mask, None, *more])
      for shape, bits, mask, more in FLASH],
    *[("FlashAttentionScoreGrad", [*[floats(*shape)] * 4, None, bits, None, mask, large(*shape[:-1], 8),
                                   large(*shape[:-1], 8), 0.0, floats(*shape), None, *more])
      for shape, bits, mask, more in FLASH],
]  # fmt: skip


def parts(case):
    """Primitive, inputs, attributes and declared shape of a case."""
    op, inputs, *more = case
    return op, inputs, more[0] if more else {}, more[1] if len(more) > 1 else ()


def made(item, generator, dtype):
    """A case's input as the NumPy rule takes it."""
    if isinstance(item, tuple):
        return tuple(made(part, generator, dtype) for part in item)
    if not callable(item):
        return item
    value = item(generator)
    return value.astype(dtype) if value.dtype.kind == "f" else value


def torched(value):
    """The same as the torch rule takes it."""
    if isinstance(value, tuple):
        return tuple(torched(part) for part in value)
    return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value


def same(got, wanted, tolerance):
    """Whether results of both rules agree."""
    if isinstance(wanted, tuple):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            same(one, other, tolerance)
        return
    if wanted is None:
        assert got is None
        return
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got.astype(np.float64), wanted.astype(np.float64), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_rule_gives_what_the_replay_gives(case):
    op, inputs, attributes, shape = parts(case)
    for dtype, tolerance in (("float32", 2e-6), ("float64", 1e-13)):
        generator = np.random.default_rng(zlib.crc32(op.encode()))
        values = [made(item, generator, dtype) for item in inputs]
        node = compiled.Node("x", op, [], [compiled.TensorType(shape, dtype)], attributes)
        wanted = numpy_ops.RULES[op](node, *values)
        node = graph.Node(op, [], [graph.Kind(shape, dtype)], attributes)
        same(rules.RULES[op](node, *map(torched, values)), wanted, tolerance)


UPDATES = {
    "AdamWeightDecay": [P, X, Q, 0.1, 0.9, 0.99, 1e-6, 0.01, Y], "Assign": [X, Y], "AssignAdd": [X, Y],
    "AssignSub": [X, Y], "InplaceZero": [X], "InplaceCopy": [X, floats(4)],
    "ScatterUpdate": [X, lambda generator: generator.permutation(3)[:2].astype(np.int32), floats(2, 4)],
    "ScatterSub": [X, lambda generator: np.array([2, 0, 2], np.int32), floats(3, 4)],
}  # fmt: skip


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("float64", 1e-13)])
@pytest.mark.parametrize("op", UPDATES)
def test_an_update_changes_its_parameters_in_place_as_the_replay_says(op, dtype, tolerance):
    generator = np.random.default_rng(5)
    values = [made(item, generator, dtype) for item in UPDATES[op]]
    wanted = numpy_ops.UPDATES[op](compiled.Node("x", op, [], []), *values)
    tensors = [torched(value) for value in values]
    rules.UPDATES[op](graph.Node(op, [], []), *tensors)
    assert rules.WRITES.get(op, 1) == len(wanted)
    same(tuple(tensors[:len(wanted)]), tuple(wanted), tolerance)


def test_both_tables_name_the_same_primitives_and_every_one_has_a_case():
    assert set(rules.RULES) == set(numpy_ops.RULES)
    assert set(rules.UPDATES) == set(numpy_ops.UPDATES) == set(UPDATES)
    assert {case[0] for case in CASES} == set(rules.RULES)


def test_views_are_the_rules_that_may_share_memory():
    """A rule that is not in VIEWS must not: what it returns has to survive an in-place update of its input."""
    for case in CASES:
        op, inputs, attributes, shape = parts(case)
        if op in rules.VIEWS:
            continue
        values = [torched(made(item, np.random.default_rng(1), "float32")) for item in inputs]
        result = rules.RULES[op](graph.Node(op, [], [graph.Kind(shape, "float32")], attributes), *values)
        taken = {item.untyped_storage().data_ptr() for value in values for item in
                 (value if isinstance(value, tuple) else (value,)) if isinstance(item, torch.Tensor)}
        for item in result if isinstance(result, tuple) else (result,):
            assert not isinstance(item, torch.Tensor) or item.untyped_storage().data_ptr() not in taken, op
