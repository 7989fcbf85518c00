"""W8A16: the bound on what an output moves, and the kernel against the reference on every path."""

from __future__ import annotations

import ctypes
import shutil

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from parallel.common.errors import UserError
from parallel.layers import int8
from parallel.layers.experts.moe import SparsePertokenMoE
from parallel.layers.int8_numbers import GROUP, dequantize, panels, quantize
from parallel.layers.parameter import initialize

PATHS = ("auto", "avx512", "avx2", "portable")
# Tokens, rows, inputs, outputs: none a multiple of a vector, a panel or a block, some smaller than one.
SHAPES = [(1, 1, 5, 3), (3, 2, 130, 33), (2, 13, 257, 70), (1, 40, 300, 100), (2, 70, 129, 31), (1, 1000, 64, 40),
          (2, 130, 900, 450)]


@pytest.fixture(scope="module")
def kernels():
    path = int8.library()
    if path is None:
        pytest.skip("no C++ compiler here")
    return ctypes.CDLL(str(path))


def call(kernels, name: str, inputs: list[np.ndarray], result: np.ndarray) -> int:
    """An entry of the library as MindSpore calls it; its return code."""
    arrays = [*inputs, result]
    shapes = [(ctypes.c_int64 * array.ndim)(*array.shape) for array in arrays]
    return getattr(kernels, name)(
        len(arrays), (ctypes.c_void_p * len(arrays))(*[array.ctypes.data for array in arrays]),
        (ctypes.c_int * len(arrays))(*[array.ndim for array in arrays]),
        (ctypes.POINTER(ctypes.c_int64) * len(arrays))(*[ctypes.cast(s, ctypes.POINTER(ctypes.c_int64))
                                                         for s in shapes]),
        (ctypes.c_char_p * len(arrays))(*[str(array.dtype).encode() for array in arrays]), None, None)


def product(kernels, name: str, x: np.ndarray, q: np.ndarray, scale: np.ndarray, *more: np.ndarray) -> np.ndarray:
    y = np.full((*x.shape[:2], q.shape[-1]), np.nan, x.dtype)
    code = call(kernels, name, [x, panels(q), scale, *more], y)
    if code == 1:
        pytest.skip(f"this processor lacks {name}")
    assert code == 0
    return y


@pytest.mark.parametrize("group", [None, GROUP])
def test_an_output_moves_by_at_most_half_a_scale_for_each_input(group):
    generator = np.random.default_rng(3)
    for inputs, outputs in ((7, 5), (128, 9), (300, 40)):
        weight = generator.standard_normal((2, inputs, outputs)).astype(np.float32)
        weight[0, :, 0], weight[1, :, 1] = 0.0, 1e-30  # a channel of zeros, one of next to nothing
        weight[0, 3, 2] = 50.0  # an outlier makes its channel's scale, and no other's, large
        q, scale = quantize(weight, group)
        assert q.dtype == np.int8 and np.abs(q.astype(int)).max() == 127
        assert scale.shape == (2, 1 if group is None else -(-inputs // GROUP), outputs)
        wide = np.repeat(scale, GROUP, 1)[:, :inputs] if scale.shape[1] > 1 else np.repeat(scale, inputs, 1)
        x = generator.standard_normal((2, 6, inputs)) * np.exp(generator.standard_normal((2, 6, inputs)))
        moved = np.abs(x @ dequantize(q, scale).astype(np.float64) - x @ weight.astype(np.float64))
        bound = np.abs(x) @ (wide.astype(np.float64) / 2)
        assert (moved <= bound * (1 + 1e-6)).all()
        if group is None:  # the law as it is usually written
            np.testing.assert_allclose(bound, scale / 2 * np.abs(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("group", [None, GROUP])
@pytest.mark.parametrize("path", PATHS)
def test_outputs_of_the_kernel_keep_that_bound(kernels, path, group):
    """Few rows, some, and so many that weights are widened first; the sums' own rounding is allowed for."""
    generator = np.random.default_rng(5)
    for rows, inputs, outputs in ((1, 300, 40), (40, 257, 33), (130, 300, 70)):
        weight = generator.standard_normal((2, inputs, outputs)).astype(np.float32)
        x = generator.standard_normal((2, rows, inputs)) * np.exp(generator.standard_normal((2, 1, inputs)))
        x = x.astype(np.float32)
        q, scale = quantize(weight, group)
        moved = np.abs(product(kernels, f"dense_{path}", x, q, scale) - x.astype(np.float64) @ weight)
        half = np.repeat(scale, GROUP if group else inputs, 1)[:, :inputs].astype(np.float64) / 2
        assert (moved <= np.abs(x) @ half + 1e-6 * (np.abs(x) @ np.abs(weight))).all()
        assert moved.max() > 0.01 * (np.abs(x) @ half).max()  # something did move


def test_a_weight_that_is_not_finite_is_refused():
    with pytest.raises(UserError, match="not a number"):
        quantize(np.array([[1.0, np.nan]], np.float32))


@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize("path", PATHS)
def test_the_kernel_is_the_dequantized_product(kernels, path, kind):
    generator = np.random.default_rng(0)
    for tokens, rows, inputs, outputs in SHAPES:
        for groups in {1, -(-inputs // GROUP)}:
            x = generator.standard_normal((tokens, rows, inputs)).astype(kind)
            q = generator.integers(-127, 128, (tokens, inputs, outputs)).astype(np.int8)
            scale = generator.random((tokens, groups, outputs)).astype(np.float32)
            expected = x.astype(np.float64) @ dequantize(q, scale).astype(np.float64)
            y = product(kernels, f"dense_{path}", x, q, scale)
            error = np.abs(y - expected).max() / np.abs(expected).max()
            assert error < (2e-6 if kind == "float32" else 2e-3), (tokens, rows, inputs, outputs, groups)


@pytest.mark.parametrize("path", PATHS)
def test_experts_see_their_own_rows(kernels, path):
    generator = np.random.default_rng(1)
    tokens, experts, inputs, outputs = 3, 4, 150, 37
    counts = np.array([[5, 0, 7, 1], [0, 13, 0, 0], [3, 3, 3, 4]], np.int32)
    x = generator.standard_normal((tokens, 13, inputs)).astype(np.float32)
    q = generator.integers(-127, 128, (tokens, experts, inputs, outputs)).astype(np.int8)
    scale = generator.random((tokens, experts, 2, outputs)).astype(np.float32)
    y = product(kernels, f"experts_{path}", x, q, scale, counts)
    from parallel.layers.experts.moe import grouped_product

    expected = grouped_product(x, dequantize(q, scale), counts)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("path", PATHS)
def test_a_swiglu_in_one_call(kernels, path):
    """With and without what the user adds to the first products: one row for all, or one each."""
    generator = np.random.default_rng(4)
    for tokens, rows, inputs, inner, outputs in [(1, 1, 5, 3, 4), (2, 13, 257, 70, 31), (1, 1000, 20, 40, 33),
                                                 (2, 130, 400, 390, 401)]:
        for group, added in ((None, 0), (GROUP, 1), (None, rows)):
            x = generator.standard_normal((tokens, rows, inputs)).astype(np.float32)
            floats = [generator.standard_normal((tokens, *shape)).astype(np.float32) / shape[0] ** 0.5
                      for shape in ((inputs, inner), (inputs, inner), (inner, outputs))]
            matrices = [quantize(weight, group) for weight in floats]
            gate, up, down = (dequantize(q, scale).astype(np.float64) for q, scale in matrices)
            shape = (tokens, added, inner)
            more = [generator.standard_normal(shape).astype(np.float32) for _ in range(2 if added else 0)]
            g, u = (x @ gate, x @ up) if not added else (x @ gate + more[0], x @ up + more[1])
            expected = (g / (1 + np.exp(-g)) * u) @ down
            y = np.full(expected.shape, np.nan, np.float32)
            operands = [array for q, scale in matrices for array in (panels(q), scale)]
            code = call(kernels, f"{'added_' if added else ''}swiglu_{path}", [x, *operands, *more], y)
            if code == 1:
                pytest.skip(f"this processor lacks {path}")
            assert code == 0
            np.testing.assert_allclose(y, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def test_a_row_gives_the_same_in_any_number_of_rows(kernels):
    generator = np.random.default_rng(2)
    x = generator.standard_normal((1, 200, 200)).astype(np.float32)  # many: another way through the kernel
    q, scale = quantize(generator.standard_normal((1, 200, 64)).astype(np.float32))
    full = product(kernels, "dense_auto", x, q, scale)
    for begin, end in ((0, 1), (3, 5), (10, 23), (50, 150)):
        part = product(kernels, "dense_auto", np.ascontiguousarray(x[:, begin:end]), q, scale)
        np.testing.assert_allclose(part, full[:, begin:end], rtol=0, atol=2e-6 * np.abs(full).max())


def test_wrong_shapes_are_refused(kernels):
    x, q = np.ones((1, 2, 10), np.float32), np.ones((1, 9, 4), np.int8)
    assert call(kernels, "dense_auto", [x, panels(q), np.ones((1, 1, 4), np.float32)], np.ones((1, 2, 4), "f4")) != 0
    x = np.ones((1, 2, 9), np.float64)
    assert call(kernels, "dense_auto", [x, panels(q), np.ones((1, 1, 4), np.float32)], np.ones((1, 2, 4), "f8")) != 0


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    int8._library.cache_clear()
    try:
        assert int8.library() is None
    finally:
        int8._library.cache_clear()
    output = capsys.readouterr().err
    assert "no C++ compiler" in output and "neither faster nor smaller" in " ".join(output.split())


ASCEND = """
import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.common.api import _cell_graph_executor
from parallel.layers import int8
from parallel.layers.experts.moe import SparsePertokenMoE
from parallel.layers.int8 import Int8Product

ms.set_context(mode=ms.GRAPH_MODE)
assert ms.get_context("device_target") == "Ascend"


class Net(nn.Cell):
    def __init__(self, product):
        super().__init__()
        self.product = product

    def construct(self, x):
        return self.product(x)


for groups in (1, 2):
    product = Int8Product((3, 256, 64), groups, "weight")
    product.prepare()
    assert product.mode == "ascend"
    net = Net(product).set_train(False)
    _cell_graph_executor.compile(net, Tensor(np.ones((3, 5, 256)), ms.float16), phase="predict")
for name, groups, mode, form in (("", 1, "ascend", "DroplessExperts"), ("", 2, "widened", "CapacityExperts"),
                                 ("Ascend910ProA", 1, "widened", "CapacityExperts")):
    int8.device_name = lambda name=name: name
    moe = SparsePertokenMoE(3, 256, 1024, experts=4, active=3, dispatch="capacity", compute_dtype=ms.float16)
    moe = int8.QuantizedMoE(moe, (groups, groups))
    for product in int8.products(moe):
        product.prepare()
        assert product.mode == mode, product.mode
    moe.place()
    assert type(moe.on_device).__name__ == form
    _cell_graph_executor.compile(Net(moe).set_train(False), Tensor(np.ones((3, 5, 256)), ms.float16), phase="predict")
print("compiled")
"""


def test_experts_on_a_device_without_int8_products_give_what_the_cpu_gives(monkeypatch, capsys):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    x = Tensor(np.random.default_rng(0).standard_normal((3, 6, 32)).astype(np.float32))
    results = []
    for chip in (None, "Ascend910A"):
        moe = SparsePertokenMoE(3, 32, 64, experts=4, active=3, down_gain=1.0)
        initialize(moe, 1)
        net = nn.SequentialCell([moe])
        int8.quantize_model(net, int8.swap(net))
        if chip is not None:
            monkeypatch.setattr(int8, "device_name", lambda chip=chip: chip)
            for product in int8.products(net):
                if product.experts:
                    product._prepare_on_ascend()
            net[0].place()
        else:
            int8.prepare(net)
        results.append(net(x).asnumpy())
    assert np.abs(results[0] - results[1]).max() < 5e-3 * np.abs(results[0]).max()
    assert "Ascend910A has no product with int8 weights" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("name", "first"), [("Ascend910A", True), ("Ascend910ProB", True), ("Ascend910B", True),
                                             ("Ascend910B2", False), ("Ascend910_9391", False), ("", False)])
def test_the_first_910_is_known_by_its_name(name, first):
    assert int8.is_first_910(name) == first


def test_ascends_own_product_compiles(tmp_path):
    """In the environment of the dry run: compiled, not run."""
    import subprocess
    import sys

    from parallel.proof.compile.cann_stubs import library_path
    from parallel.proof.compile.rank_compiler import child_environment

    try:
        environment = child_environment(library_path())
    except UserError as error:
        pytest.skip(str(error))
    program = tmp_path / "program.py"  # MindSpore reads the sources of what it compiles
    program.write_text(ASCEND)
    done = subprocess.run([sys.executable, str(program)], env=environment, cwd=tmp_path, capture_output=True, text=True,
                          timeout=300)
    assert done.stdout.strip().endswith("compiled"), done.stderr[-2000:]
