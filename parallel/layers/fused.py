"""Per-token networks and norms as one C++ primitive each on the CPU, with their gradients.

The layers of `grouped`, `moe`, `relu_moe` and `norm` take these in float32 on the CPU, where the machine has a C++
compiler; everywhere else, and in every compiled layout, they are the plain operations that their `sharding` speak of.
The environment variable PANGU_KERNELS=0 switches them off. Arithmetic: parallel/kernels/entries.cpp.

Shapes: T tokens, B batch, D width, F inner width, E experts, R routed experts, A chosen ones, f width of one expert.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import signature

from parallel.common.native import build_library

SOURCE = Path(__file__).resolve().parents[1] / "kernels" / "entries.cpp"


@functools.lru_cache(maxsize=1)
def _library() -> Path | None:
    library = build_library(SOURCE, does="per-token networks use MindSpore's own kernels")
    # Without oneDNN in the process (wheels for other processors) there is no product to build on.
    return library if library is not None and ctypes.CDLL(str(library)).ready() else None


def library(compute_dtype: mstype) -> Path | None:
    """The shared object with the kernels; None where the layers are to use plain operations."""
    if (os.environ.get("PANGU_KERNELS", "1") == "0" or compute_dtype != mstype.float32
        or mindspore.get_context("device_target") != "CPU"):
        return None
    return _library()


class Kernels:
    """The three entries of a network in the library: `<name>`, `<name>_kept`, which also returns what the backward pass
    needs, and `<name>_backward`.

    Args:
        path: the library.
        name: of the entries.
        gradients: how many of the inputs, the first ones, have a gradient.
        last: which input is the last weight; its last dim is that of the result.
        kept: shapes of what is kept, from those of the inputs.
        kinds: its types.
    """

    def __init__(self, path: Path, name: str, gradients: int, last: int, kept: Callable, *kinds: mstype) -> None:
        def result(*shapes: list) -> list:
            return [*shapes[0][:2], shapes[last][-1]]

        every, changes = (mstype.float32, *kinds), (mstype.float32,) * gradients
        self.infer = ops.Custom(f"{path}:{name}", result, lambda *_: mstype.float32, "aot")
        self.keep = ops.Custom(f"{path}:{name}_kept", lambda *shapes: (result(*shapes), *kept(*shapes)),
                               lambda *_: every, "aot")
        self.backward = ops.Custom(f"{path}:{name}_backward", lambda *shapes: tuple(shapes[:gradients]),
                                   lambda *_: changes, "aot")


class Network(nn.Cell):
    """y of the inputs, given as one tuple, by a network's kernels.

    In training what the backward pass needs is kept. In inference it is not; where such a pass is differentiated all
    the same, it is computed again.

    Args:
        kernels: of the network.
        constants: further inputs of the kernels, without gradients.
    """

    def __init__(self, kernels: Kernels, *constants: Tensor) -> None:
        super().__init__()
        self.keeping, self.inferring = _Keeping(kernels, constants), _Inferring(kernels, constants)

    def construct(self, inputs: tuple) -> Tensor:
        return self.keeping(inputs)[0] if self.training else self.inferring(inputs)


class _Keeping(nn.Cell):
    """(y, what is kept)."""

    def __init__(self, kernels: Kernels, constants: tuple) -> None:
        super().__init__()
        self.keep, self.backward, self.constants = kernels.keep, kernels.backward, constants

    def construct(self, inputs: tuple) -> tuple:
        return self.keep(*inputs, *self.constants)

    def bprop(self, inputs: tuple, made: tuple, changes: tuple) -> tuple:
        return (self.backward(*inputs, *self.constants, *made[1:], changes[0]),)


class _Inferring(nn.Cell):
    """y."""

    def __init__(self, kernels: Kernels, constants: tuple) -> None:
        super().__init__()
        self.infer, self.keep, self.backward = kernels.infer, kernels.keep, kernels.backward
        self.constants = constants

    def construct(self, inputs: tuple) -> Tensor:
        return self.infer(*inputs, *self.constants)

    def bprop(self, inputs: tuple, y: Tensor, change: Tensor) -> tuple:
        made = self.keep(*inputs, *self.constants)
        return (self.backward(*inputs, *self.constants, *made[1:], change),)


class FusedFeedForward(nn.Cell):
    """GELU(x W1 + b1) W2 + b2 for each token, tanh GELU: x [T, B, D], w1 [T, D, F], b1 [T, 1, F], w2 [T, F, D],
    b2 [T, 1, D]."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        kernels = Kernels(path, "feed_forward", 5, 3, lambda x, w1, *_: ([*x[:2], w1[2]],), mstype.float32)
        self.network = Network(kernels)

    def construct(self, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return self.network((x, w1, b1, w2, b2))


class FusedGatedExperts(nn.Cell):
    """Sum over experts of gate (GELU(x W1 + b1) W2 + b2), the work being that of the gates that are not 0: x [T, B, D],
    gates [T, B, E], w1 [T, D, F], b1 [T, 1, F], w2 [T, F, D], b2 [T, E, D]; an expert has F / E of the inner width.

    The gradient of a gate of 0 is given as 0: right behind a ReLU, whose own gradient is 0 there."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        kernels = Kernels(path, "gated_experts", 6, 4, lambda x, gates, w1, *_: ([*x[:2], w1[2]],), mstype.float32)
        self.network = Network(kernels)

    def construct(self, x: Tensor, gates: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return self.network((x, gates, w1, b1, w2, b2))


class FusedSwiGLU(nn.Cell):
    """(swish(x gate) * (x up)) down for each token: x [T, B, D], gate and up [T, D, F], down [T, F, D]."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        kernels = Kernels(path, "swiglu", 4, 3, lambda x, gate, *_: ([*x[:2], gate[2]],) * 2, mstype.float32,
                          mstype.float32)
        self.network = Network(kernels)

    def construct(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return self.network((x, gate, up, down))


def _kept_of_experts(x: list, router: list, gate: list, *others: list) -> tuple:
    """Shapes of probabilities, chosen experts, and the products by gate and up of all rows that any expert saw."""
    tokens, batch, active = x[0], x[1], others[4][0]
    rows = [tokens, batch * (1 + active), gate[2]]
    return [tokens, batch, router[2]], [tokens, batch, active], rows, rows


class FusedSparseExperts(nn.Cell):
    """`SparsePertokenMoE` from its router to its sum: x [T, B, D], router [T, D, R]; gate, up [T, D, f] and down
    [T, f, D] of the shared expert, gates, ups [T, R, D, f] and downs [T, R, f, D] of the routed ones.

    Args:
        chosen: A.
        alpha: factor of the gates."""

    def __init__(self, path: Path, chosen: int, alpha: float) -> None:
        super().__init__()
        kernels = Kernels(path, "sparse_experts", 8, 4, _kept_of_experts,
                          mstype.float32, mstype.int32, mstype.float32, mstype.float32)
        # How many are chosen is given by a shape, which kernels and shape functions both see.
        constants = Tensor(np.zeros(chosen, np.float32)), Tensor(np.array([alpha], np.float32))
        self.network = Network(kernels, *constants)

    def construct(self, x: Tensor, router: Tensor, gate: Tensor, up: Tensor, down: Tensor, gates: Tensor, ups: Tensor,
                  downs: Tensor) -> Tensor:
        return self.network((x, router, gate, up, down, gates, ups, downs))


class FusedLinear(nn.Cell):
    """x w + b for each token: x [T, B, I], w [T, I, O], b [T, 1, O]."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.forward = ops.Custom(f"{path}:linear", lambda x, w, b: [*x[:2], w[2]], lambda *_: mstype.float32, "aot")
        self.backward = ops.Custom(f"{path}:linear_backward", lambda x, w, dy: (x, w, [w[0], 1, w[2]]),
                                   lambda *_: (mstype.float32,) * 3, "aot")

    def construct(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return self.forward(x, w, b)

    def bprop(self, x: Tensor, w: Tensor, b: Tensor, y: Tensor, change: Tensor) -> tuple:
        return self.backward(x, w, change)


class FusedLinearWithoutBias(nn.Cell):
    """x w for each token."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.forward = ops.Custom(f"{path}:linear", lambda x, w: [*x[:2], w[2]], lambda *_: mstype.float32, "aot")
        self.backward = ops.Custom(f"{path}:linear_backward", lambda x, w, dy: (x, w),
                                   lambda *_: (mstype.float32,) * 2, "aot")

    def construct(self, x: Tensor, w: Tensor) -> Tensor:
        return self.forward(x, w)

    def bprop(self, x: Tensor, w: Tensor, y: Tensor, change: Tensor) -> tuple:
        return self.backward(x, w, change)


class FusedTokenMix(nn.Cell):
    """y [R, B, S, K] of x [S, B, R, K]: token mixing between its two reshapes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.run = ops.Custom(f"{path}:exchange_tokens", lambda x: [x[2], x[1], x[0], x[3]],
                              lambda *_: mstype.float32, "aot")

    def construct(self, x: Tensor) -> Tensor:
        return self.run(x)

    def bprop(self, x: Tensor, y: Tensor, change: Tensor) -> tuple:
        return (self.run(change),)


class FusedAdd(nn.Cell):
    """x + y of one shape."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.run = ops.Custom(f"{path}:add_residual", lambda x, y: x, lambda *_: mstype.float32, "aot")

    def construct(self, x: Tensor, y: Tensor) -> Tensor:
        return self.run(x, y)

    def bprop(self, x: Tensor, y: Tensor, z: Tensor, change: Tensor) -> tuple:
        return change, change


class FusedLayerNorm(nn.Cell):
    """(x - mean) / sqrt(var + epsilon) * gamma + beta over the last dim."""

    def __init__(self, path: Path, epsilon: float) -> None:
        super().__init__()
        self.epsilon = Tensor(np.array([epsilon], np.float32))
        self.forward = ops.Custom(f"{path}:layer_norm", lambda x, *_: x, lambda *_: mstype.float32, "aot")
        self.backward = ops.Custom(f"{path}:layer_norm_backward", lambda x, gamma, *_: (x, gamma, gamma),
                                   lambda *_: (mstype.float32,) * 3, "aot")

    def construct(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return self.forward(x, gamma, beta, self.epsilon)

    def bprop(self, x: Tensor, gamma: Tensor, beta: Tensor, y: Tensor, change: Tensor) -> tuple:
        return self.backward(x, gamma, self.epsilon, change)


class FusedRMSNorm(nn.Cell):
    """x / sqrt(mean(x^2) + epsilon) * gamma over the last dim."""

    def __init__(self, path: Path, epsilon: float) -> None:
        super().__init__()
        self.epsilon = Tensor(np.array([epsilon], np.float32))
        self.forward = ops.Custom(f"{path}:rms_norm", lambda x, *_: x, lambda *_: mstype.float32, "aot")
        self.backward = ops.Custom(f"{path}:rms_norm_backward", lambda x, gamma, *_: (x, gamma),
                                   lambda *_: (mstype.float32,) * 2, "aot")

    def construct(self, x: Tensor, gamma: Tensor) -> Tensor:
        return self.forward(x, gamma, self.epsilon)

    def bprop(self, x: Tensor, gamma: Tensor, y: Tensor, change: Tensor) -> tuple:
        return self.backward(x, gamma, self.epsilon, change)


def squares_kernel() -> ops.Custom | None:
    """Sum of a float32 tensor's squares, [1], in one pass over memory; None where there are no kernels."""
    path = library(mstype.float32)
    return ops.Custom(f"{path}:squares", lambda x: [1], lambda x: mstype.float32, "aot") if path is not None else None


def adam_kernel() -> ops.Custom | None:
    """Adam's update of one float32 parameter and its moments, in place and in one pass: of (parameter, m, v, gradient,
    [rate, beta1, beta2, epsilon, decay]); None where there are no kernels."""
    path = library(mstype.float32)
    if path is None:
        return None
    kernel = ops.Custom(f"{path}:adam", lambda *_: [1], lambda *_: mstype.float32, "aot")
    # Without these MindSpore may hand the kernel copies, or leave it out since nobody needs its result.
    kernel.add_prim_attr("side_effect_mem", True)
    written = signature.sig_rw.RW_WRITE
    kernel.set_signatures([*(signature.make_sig(name, written) for name in ("parameter", "m", "v")),
                           signature.make_sig("gradient"), signature.make_sig("scalars")])
    return kernel
