"""W8A16: int8 weights with float16 or float32 activations, instead of layers that were trained in float32.

How weights become int8: int8_numbers.py. What a model leaves in float32 (routers, whose choice is not smooth, norms,
biases) it says itself (`swap`).

Shapes: T tokens, R routed experts, M rows, K inputs, O outputs, G groups of inputs (1 without groups), P panels.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.auto_generate import GroupedMatmul

from parallel.checkpoint.full import Checkpoint, load_parameters
from parallel.common.errors import UserError
from parallel.common.native import build_library
from parallel.common.progress import info
from parallel.layers.experts.moe import Permutation, SparsePertokenMoE
from parallel.layers.experts.routed import CapacityExperts, DroplessExperts
from parallel.layers.grouped import GroupedLinear, GroupedSwiGLU, Swish
from parallel.layers.int8_numbers import GROUP, SCALE, count_groups, dequantize, error_of, panels, quantize
from parallel.layers.linear import Linear

SOURCE = Path(__file__).parents[1] / "kernels" / "w8a16.cpp"
_EXPERT_WEIGHTS = ("gate_weight", "up_weight", "down_weight")


@functools.lru_cache(maxsize=1)
def _library() -> Path | None:
    return build_library(SOURCE, does="int8 weights are widened to float32 when they are loaded and go through "
                         "MindSpore's own kernels, neither faster nor smaller", flags=("-fno-math-errno",))


def library() -> Path | None:
    """The shared object with the kernel; None (logged once) where it cannot be built or PANGU_KERNELS=0 forbids it."""
    return None if os.environ.get("PANGU_KERNELS", "1") == "0" else _library()


# ---------------------------------------------------------------- cells


class Int8Product(nn.Cell):
    """y_TMO = x_TMK times int8 weights; with experts, rows of each expert (see `GroupedMatMul`) times that expert's.

    Made with the weights in the order of a checkpoint; `prepare` brings them into the order of the device: panels for
    the kernel on the CPU, float32 where there is no compiler, as they are on Ascend.

    Args:
        shape: [T, (R,) K, O].
        groups: G.
        name: of the weight; the scale's is `<name>_scale`.
    """

    def __init__(self, shape: tuple[int, ...], groups: int, name: str) -> None:
        super().__init__(auto_prefix=False)
        self.shape, self.groups, self.experts, self.mode = tuple(shape), groups, len(shape) == 4, "stored"
        self.weight = Parameter(Tensor(np.zeros(shape, np.int8)), name=name, requires_grad=False)
        self.scale = Parameter(Tensor(np.ones((*shape[:-2], groups, shape[-1]), np.float32)), name=name + SCALE,
                               requires_grad=False)
        self.name = name
        self.matmul, self.stack, self.cast, self.product = ops.BatchMatMul(), ops.Stack(axis=0), ops.Cast(), None

    def fill(self, weight: np.ndarray) -> None:
        """Quantizes float weights [T, (R,) K, O] into this product."""
        quantized, scale = quantize(weight, None if self.groups == 1 else GROUP)
        self.weight.set_data(Tensor(quantized))
        self.scale.set_data(Tensor(scale))

    def prepare(self) -> None:
        """Brings the weights into the order of the device; called once, after they are loaded."""
        if self.mode != "stored":
            return
        if mindspore.get_context("device_target") != "CPU":
            self._prepare_on_ascend()
            return
        quantized, kernels = self.weight.asnumpy(), library()
        if kernels is not None:
            self.mode, kind, made = "kernel", "experts" if self.experts else "dense", panels(quantized)
            self.product = ops.Custom(f"{kernels}:{kind}_auto", lambda x, w, scale, *_: [x[0], x[1], scale[-1]],
                                      lambda x, *_: x, "aot")
        else:
            self.mode, made = "float32", dequantize(quantized, self.scale.asnumpy())
            self.product = _float_experts() if self.experts else None
        name = self.weight.name
        del self.weight
        self.weight = Parameter(Tensor(made), name=name, requires_grad=False)

    def _prepare_on_ascend(self) -> None:
        from mindspore.ops.auto_generate import WeightQuantBatchMatmul

        if is_first_910(device_name()) or (self.experts and self.groups > 1):
            what = f"{device_name()} has no product with int8 weights" if self.groups == 1 or not self.experts else \
                "experts have no product with a scale for each group of inputs"
            info(f"{what}: {self.name} is widened to float16 when it is loaded, neither faster nor smaller")
            self.widen()
            return
        self.mode = "ascend"
        if not self.experts:
            self.product = WeightQuantBatchMatmul(False, False, 0 if self.groups == 1 else GROUP)

    def widen(self) -> None:
        """Puts float16 weights in place of the int8 ones."""
        made, name, self.mode = dequantize(self.weight.asnumpy(), self.scale.asnumpy()), self.weight.name, "widened"
        del self.weight
        self.weight = Parameter(Tensor(made, mstype.float16), name=name, requires_grad=False)

    def construct(self, x_TMK: Tensor, counts_TR: Tensor | None = None) -> Tensor:
        if self.mode == "kernel":
            if self.experts:
                return self.product(x_TMK, self.weight, self.scale, counts_TR)
            return self.product(x_TMK, self.weight, self.scale)
        if self.mode == "ascend":
            return self.per_token(x_TMK)
        weight = self.cast(self.weight, x_TMK.dtype)
        if self.experts:
            return self.product(x_TMK, weight, counts_TR)
        return self.matmul(x_TMK, weight)

    def per_token(self, x_TMK: Tensor) -> Tensor:
        """Ascend: its operator takes one matrix, so a call for each token; float16 in and out."""
        x_TMK, scale = self.cast(x_TMK, mstype.float16), self.cast(self.scale, mstype.float16)
        y = ()
        for token in range(self.shape[0]):
            own = scale[token, 0] if self.groups == 1 else scale[token]
            y += (self.product(x_TMK[token], self.weight[token], own, None, None, None, None),)
        return self.stack(y)


def device_name() -> str:
    """Name of the Ascend chip, "" where there is none to ask."""
    try:
        return mindspore.hal.get_device_name(0, "Ascend")
    except (RuntimeError, ValueError):
        return ""


def is_first_910(name: str) -> bool:
    """Whether a chip is of the Atlas training series (the Ascend 910 without a digit behind its letter), for which CANN
    has neither WeightQuantBatchMatmul nor GroupedMatmul."""
    return re.fullmatch(r"Ascend910(A|B|ProA|ProB|PremiumA)?", name) is not None


class Int8Rows(nn.Cell):
    """`ExpertProduct` with the int8 weights of a product that has one scale for an output; float16 in and out."""

    def __init__(self, product: Int8Product) -> None:
        super().__init__(auto_prefix=False)
        self.scale, self.outputs = product.scale, product.shape[-1]
        self.product, self.cast, self.reshape = GroupedMatmul(split_item=3, group_type=0), ops.Cast(), ops.Reshape()

    def construct(self, x_NI: Tensor, w_EIO: Tensor, ends_E: Tensor) -> Tensor:
        scale_EO = self.cast(self.reshape(self.scale, (-1, self.outputs)), mstype.float16)
        offset_EO = ops.zeros_like(scale_EO)
        return self.product([self.cast(x_NI, mstype.float16)], [w_EIO], None, None, None, [scale_EO], [offset_EO],
                            ends_E)[0]


def _float_experts() -> nn.Cell:
    from parallel.layers.experts.moe import GroupedMatMul

    return GroupedMatMul()


class QuantizedGroupedLinear(nn.Cell):
    """`GroupedLinear` with int8 weights; the bias stays."""

    def __init__(self, linear: GroupedLinear, groups: int) -> None:
        super().__init__()
        self.inputs, self.outputs, self.has_bias = linear.inputs, linear.outputs, linear.has_bias
        self.flops_per_sample, self.compute_dtype = linear.flops_per_sample, linear.compute_dtype
        self.product = Int8Product(linear.weight.shape, groups, linear.weight.name)
        self.bias = linear.bias
        self.add, self.cast = ops.Add(), ops.Cast()

    def construct(self, x_TBI: Tensor) -> Tensor:
        y_TBO = self.product(self.cast(x_TBI, self.compute_dtype))
        if self.has_bias:
            y_TBO = self.add(y_TBO, self.cast(self.bias, y_TBO.dtype))
        return y_TBO


class QuantizedLinear(nn.Cell):
    """`Linear` with int8 weights, stored [1, I, O]; the bias stays."""

    def __init__(self, linear: Linear, groups: int) -> None:
        super().__init__()
        self.inputs, self.outputs, self.has_bias = linear.inputs, linear.outputs, linear.has_bias
        self.rows, self.compute_dtype = linear.rows, linear.compute_dtype
        self.product = Int8Product((1, linear.inputs, linear.outputs), groups, linear.weight.name)
        self.bias = linear.bias
        self.add, self.cast, self.reshape = ops.Add(), ops.Cast(), ops.Reshape()

    @property
    def flops_per_sample(self) -> int:
        """Two for each multiplication and addition of the product."""
        return 2 * self.inputs * self.outputs * self.rows

    def construct(self, x_NI: Tensor) -> Tensor:
        x_1NI = self.reshape(self.cast(x_NI, self.compute_dtype), (1, -1, self.inputs))
        y_NO = self.reshape(self.product(x_1NI), (-1, self.outputs))
        if self.has_bias:
            y_NO = self.add(y_NO, self.cast(self.bias, y_NO.dtype))
        return y_NO


class QuantizedNetwork(nn.Cell):
    """Several products that one call of the kernel may do together."""

    def fuse(self) -> None:
        """Takes the kernel of the whole network where there is one; once its weights are in order."""
        raise NotImplementedError


class QuantizedSwiGLU(QuantizedNetwork):
    """`GroupedSwiGLU` with int8 weights: one call of the kernel on the CPU in float32, its parts elsewhere."""

    def __init__(self, network: GroupedSwiGLU, group: int | None) -> None:
        super().__init__()
        self.gate, self.up, self.down = (QuantizedGroupedLinear(linear, count_groups(linear.inputs, group))
                                         for linear in (network.gate, network.up, network.down))
        self.swish, self.fused = network.swish, None

    def fuse(self) -> None:
        self.fused = fused_swiglu("swiglu", self.gate, self.down)

    def construct(self, x_TBD: Tensor) -> Tensor:
        if self.fused is not None:
            gate, up, down = self.gate.product, self.up.product, self.down.product
            return self.fused(x_TBD, gate.weight, gate.scale, up.weight, up.scale, down.weight, down.scale)
        return self.down(self.swish(self.gate(x_TBD), self.up(x_TBD)))


def fused_swiglu(name: str, first: QuantizedGroupedLinear, last: QuantizedGroupedLinear) -> ops.Custom | None:
    """The entry `<name>_auto` of the kernel, where it can do a network with these layers; else None."""
    fits = first.product.mode == "kernel" and first.compute_dtype == mstype.float32
    if not fits or first.has_bias or last.has_bias:
        return None
    outputs = last.outputs
    return ops.Custom(f"{library()}:{name}_auto", lambda x, *_: [x[0], x[1], outputs], lambda x, *_: x, "aot")


class QuantizedMoE(nn.Cell):
    """`SparsePertokenMoE` with int8 experts, exact dispatch; its router is kept, its shared expert is a cell like any
    other."""

    def __init__(self, moe: SparsePertokenMoE, groups: tuple[int, int]) -> None:
        super().__init__()
        self.router, self.shared = moe.router, moe.shared
        self.alpha, self.chosen, self.routed = moe.alpha, moe.chosen, moe.routed
        self.flops_per_sample, self.idle_parameters = moe.flops_per_sample, moe.idle_parameters
        self.compute_dtype = moe.compute_dtype
        for name, count in zip(_EXPERT_WEIGHTS, (groups[0], groups[0], groups[1]), strict=True):
            weight = getattr(moe, name)
            setattr(self, name.replace("_weight", "_product"), Int8Product(weight.shape, count, weight.name))
        self.plan, self.swish = Permutation(moe.routed), Swish((None, None, None))
        self.softmax, self.top, self.sum = ops.Softmax(-1), ops.TopK(), ops.ReduceSum(True)
        self.gather, self.reshape, self.total, self.cast = ops.Gather(), ops.Reshape(), ops.ReduceSum(), ops.Cast()
        self.tokens, self.on_device = moe.tokens, None

    def place(self) -> None:
        """Takes the form of a device that runs no Python, once the weights are in its order: rows sorted by expert, or
        padded where the weights are widened."""
        products = (self.gate_product, self.up_product, self.down_product)
        modes = {product.mode for product in products}
        if not modes & {"ascend", "widened"}:
            return
        if "widened" in modes:
            for product in products:
                if product.mode == "ascend":
                    product.widen()
            self.on_device = CapacityExperts(self.tokens, self.routed, self.routed)
        else:
            self.on_device = DroplessExperts(self.tokens, self.routed, self.routed)
            self.on_device.grouped1, self.on_device.grouped2, self.on_device.grouped3 = map(Int8Rows, products)
        self.on_device.set_train(False)

    def construct(self, x_TBD: Tensor) -> Tensor:
        tokens, batch, width = x_TBD.shape
        x_TBD = self.cast(x_TBD, self.compute_dtype)
        gates_TBA, chosen_TBA = self.top(self.softmax(self.cast(self.router(x_TBD), mstype.float32)), self.chosen)
        if self.chosen >= 2:
            gates_TBA = gates_TBA / self.sum(gates_TBA, -1)
        if self.on_device is not None:
            x_half, gates_half = self.cast(x_TBD, mstype.float16), self.cast(gates_TBA * self.alpha, mstype.float16)
            routed = self.on_device(x_half, chosen_TBA, gates_half, self.gate_product.weight, self.up_product.weight,
                                    self.down_product.weight)
            return self.cast(routed, x_TBD.dtype) + self.cast(self.shared(x_TBD), x_TBD.dtype)
        source_TN, place_TBA, counts_TR = self.plan(chosen_TBA)
        rows_TND = self.reshape(self.gather(self.reshape(x_TBD, (tokens * batch, width)), source_TN, 0),
                                (tokens, batch * self.chosen, width))
        inner = self.swish(self.gate_product(rows_TND, counts_TR), self.up_product(rows_TND, counts_TR))
        y_TND = self.down_product(inner, counts_TR)
        y_TBAD = self.gather(self.reshape(y_TND, (tokens * batch * self.chosen, y_TND.shape[-1])), place_TBA, 0)
        gates_TBA1 = self.reshape(self.cast(gates_TBA * self.alpha, y_TBAD.dtype), (tokens, batch, self.chosen, 1))
        return self.total(y_TBAD * gates_TBA1, 2) + self.shared(x_TBD)


# ---------------------------------------------------------------- networks


def replacement(cell: nn.Cell, group: int | None) -> nn.Cell | None:
    """The cell with int8 weights for one of parallel.layers; None for what has none."""
    if isinstance(cell, GroupedSwiGLU):
        return QuantizedSwiGLU(cell, group)
    if isinstance(cell, GroupedLinear):
        return QuantizedGroupedLinear(cell, count_groups(cell.inputs, group))
    if isinstance(cell, Linear):
        return QuantizedLinear(cell, count_groups(cell.inputs, group))
    if isinstance(cell, SparsePertokenMoE):
        return QuantizedMoE(cell, (count_groups(cell.width, group), count_groups(cell.inner, group)))
    return None


def products(model: nn.Cell) -> list[Int8Product]:
    """The int8 products of a network."""
    return [cell for _, cell in model.cells_and_names() if isinstance(cell, Int8Product)]


Replacement = Callable[[nn.Cell, int | None], nn.Cell | None]


def swap(model: nn.Cell, group: int | None = None, replace: Replacement = replacement,
         left: Collection[str] = ()) -> dict[str, Parameter]:
    """Puts cells with int8 weights (not filled yet) in place of all that is quantized.

    Args:
        model: changed in place.
        group: inputs of one scale (128); None = one scale for an output channel.
        replace: the cell for a cell and a group, or None.
        left: names of cells that stay as they are, whatever they hold.

    Returns: the parameters that went, by name. Biases, norms and all else stay the parameters they were.

    Raises:
        UserError: there is nothing to quantize.
    """
    gone: dict[str, Parameter] = {}
    _swap_below(model, group, replace, frozenset(left), gone)
    if not gone:
        raise UserError("the model has no layer that is quantized", where="model")
    return gone


def _swap_below(cell: nn.Cell, group: int | None, replace: Replacement, left: frozenset[str],
                gone: dict[str, Parameter]) -> None:
    for name, child in list(cell.name_cells().items()):
        if name in left:
            continue
        before = {item.name: item for item in child.get_parameters()}
        made = replace(child, group)
        if made is not None:
            names = {id(item): key for key, item in before.items()}
            _put(cell, name, made)
            # A cell that is assigned to an attribute renames its parameters after it.
            for item in made.get_parameters():
                item.name = names.get(id(item), item.name)
            for product in products(made):
                product.weight.name, product.scale.name = product.name, product.name + SCALE
                gone[product.name] = before[product.name]
            for whole in ("fused", "open"):  # which work on the weights of their cell
                if getattr(cell, whole, None) is not None:
                    setattr(cell, whole, None)
            child = made
        _swap_below(child, group, replace, left, gone)


def _put(parent: nn.Cell, name: str, cell: nn.Cell) -> None:
    if isinstance(parent, nn.CellList):
        parent[int(name)] = cell
    else:
        setattr(parent, name, cell)


def as_stored(parameter: Parameter, product: Int8Product) -> np.ndarray:
    """Values of a float weight in the order of `product`: a `Linear`'s is turned."""
    values = parameter.asnumpy()
    return values.T[None] if values.ndim == 2 else values


def quantize_model(model: nn.Cell, gone: dict[str, Parameter]) -> dict[str, float]:
    """Fills the products of a model with what `swap` gave back. Returns each weight's relative error.

    Raises:
        UserError: a weight that is not finite.
    """
    errors = {}
    for product in products(model):
        weight = as_stored(gone[product.name], product)
        try:
            product.fill(weight)
        except UserError as error:
            raise UserError(error.what, where=product.name, hint=error.hint) from None
        errors[product.name] = relative_error(weight, product)
    return errors


def relative_error(weight: np.ndarray, product: Int8Product) -> float:
    """See `error_of`; product not prepared yet."""
    return error_of(weight, product.weight.asnumpy(), product.scale.asnumpy())


def prepare(model: nn.Cell) -> str | None:
    """Brings all int8 weights into the order of the device; "kernel", "float32", "ascend", "widened" (Ascend 910), or
    None without any."""
    modes = set()
    for product in products(model):
        product.prepare()
        modes.add(product.mode)
    for _, cell in model.cells_and_names():
        if isinstance(cell, QuantizedNetwork):
            cell.fuse()
        if isinstance(cell, QuantizedMoE):
            cell.place()
    if "float32" in modes and library() is None and os.environ.get("PANGU_KERNELS", "1") == "0":
        info("PANGU_KERNELS=0: int8 weights are widened to float32 when they are loaded")
    return next(iter(modes), None)


def load(path: str | Path, model: nn.Cell, swapping: Callable[[nn.Cell, int | None], Any]) -> dict[str, Any]:
    """Fills a model from a checkpoint of either kind: a quantized one turns it into a quantized model.

    Args:
        path: the checkpoint.
        model: in float32.
        swapping: `swap` as the model's package does it, called with the model and the group.

    Raises:
        UserError: see `load_parameters`; another kind of quantization.
    """
    kind = Checkpoint(path).state.get("quantization")
    if kind is None:
        return load_parameters(path, list(model.get_parameters()))
    if kind.get("bits") != 8 or kind.get("group") not in (None, GROUP):
        raise UserError("unknown kind of quantization", where=path, value=kind)
    swapping(model, kind["group"])
    state = load_parameters(path, list(model.get_parameters()))
    prepare(model)
    return state
