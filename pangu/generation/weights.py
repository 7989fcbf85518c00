"""A PanGu-alpha's parameters for the C++ kernels: read from a checkpoint, tensor by tensor, or of a model.

Shapes: O outputs, I inputs, G groups of inputs with a scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pangu.generation.kernel_runner import (
    PackedMatrix,
    PackedWeights,
    WeightSource,
    pack_float,
    pack_int8,
    pack_weights,
)
from parallel.checkpoint.adapter_names import hint_for_unknown
from parallel.checkpoint.folder import PARAMETERS_FILE
from parallel.checkpoint.full import Checkpoint
from parallel.common.errors import UserError
from parallel.layers.int8_numbers import GROUP, SCALE, count_groups, quantize

WORDS = "embedding.word.table"


def parameter_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters of a model in float32."""
    width, inner, positions = config.hidden_size, config.ffn, config.sequence_length
    shapes: dict[str, tuple[int, ...]] = {
        WORDS: (config.vocabulary_size, width), "embedding.position.table": (positions, width),
        "query_embedding.table": (positions, width), "norm.gamma": (width,), "norm.beta": (width,)}
    for name in [*(f"layers.{number}" for number in range(config.layers - 1)), "query_layer"]:
        for norm in ("norm1", "norm2"):
            shapes |= {f"{name}.{norm}.gamma": (width,), f"{name}.{norm}.beta": (width,)}
        linears = {f"attention.{part}": (width, width) for part in ("query", "key", "value", "output")}
        linears |= {"feed_forward.mapping": (inner, width), "feed_forward.projection": (width, inner)}
        for linear, shape in linears.items():
            shapes |= {f"{name}.{linear}.weight": shape, f"{name}.{linear}.bias": shape[:1]}
    return shapes


def is_matrix(name: str) -> bool:
    """Whether a parameter is one that gets int8 weights."""
    return name == WORDS or name.endswith(".weight")


def check_parameters(checkpoint: Checkpoint, wanted: dict[str, tuple[int, ...]]) -> None:
    """Raises a `UserError` unless a checkpoint's parameters are just those that are wanted, by name and shape."""
    layout, where = checkpoint.layout, checkpoint.path
    for name in checkpoint.names(PARAMETERS_FILE):
        if name not in wanted:
            raise UserError(f"the checkpoint has the unknown parameter {name}", where=where,
                            hint=hint_for_unknown([name], "is it of another model?"))
    for name, shape in wanted.items():
        if name not in layout:
            raise UserError(f"the checkpoint lacks parameter {name}", where=where, hint="is it of another model?")
        if tuple(layout[name]["shape"]) != shape:
            raise UserError(f"'{name}' has shape {list(shape)} in the model and {layout[name]['shape']} in the "
                            "checkpoint", where=where, hint="use the model settings that the checkpoint was trained "
                                                            "with")


class CheckpointWeights:
    """Reads the parameters of a checkpoint of either kind, float or int8.

    Args:
        config: the model's sizes.
        path: the checkpoint.
        int8: whether float matrices are quantized while they are read.
        group: inputs of one scale (128) for that; None = one scale for an output.

    Raises:
        UserError: not a checkpoint, damaged, of another model, or of an unknown kind of quantization.
    """

    def __init__(self, config: Any, path: str | Path, int8: bool = False, group: int | None = None) -> None:
        self.config, self.checkpoint, self.int8, self.group = config, Checkpoint(path), int8, group
        kind = self.checkpoint.state.get("quantization")
        if kind is not None and (kind.get("bits") != 8 or kind.get("group") not in (None, GROUP)):
            raise UserError("unknown kind of quantization", where=path, value=kind)
        if kind is not None and int8:
            raise UserError("is quantized already", where="--int8", value=str(path))
        self.stored_int8 = kind is not None
        self._shapes = parameter_shapes(config)
        self._check(None if kind is None else kind.get("group"))

    def packed(self) -> PackedWeights:
        """All of them."""
        return pack_weights(self.config, WeightSource(self.checkpoint.read, self._matrix))

    def _check(self, group: int | None) -> None:
        wanted = dict(self._shapes)
        if self.stored_int8:
            for name, shape in self._shapes.items():
                if is_matrix(name):
                    outputs, inputs = shape
                    wanted[name] = (1, inputs, outputs)
                    wanted[name + SCALE] = (1, count_groups(inputs, group), outputs)
        check_parameters(self.checkpoint, wanted)

    def _matrix(self, name: str, bias: str | None) -> PackedMatrix:
        read = self.checkpoint.read
        values = None if bias is None else read(bias)
        if self.stored_int8:
            return pack_int8(read(name)[0], read(name + SCALE)[0], values)
        weight_OI = read(name)
        if not self.int8:
            return pack_float(weight_OI, values)
        return pack_int8(*_quantized(name, weight_OI, self.group), values)


def _quantized(name: str, weight_OI: np.ndarray, group: int | None) -> tuple[np.ndarray, np.ndarray]:
    inputs = weight_OI.shape[1]
    try:
        return quantize(np.asarray(weight_OI, np.float32).T, group if count_groups(inputs, group) > 1 else None)
    except UserError as error:
        raise UserError(error.what, where=name, hint=error.hint) from None


def weights_of(model: Any) -> PackedWeights:
    """The parameters of a `pangu.model.PanGuAlpha` as they are at this moment, copied; float32 or int8."""
    parameters = {item.name: item for item in model.get_parameters()}
    ready = _ready_products(model)

    def matrix(name: str, bias: str | None) -> PackedMatrix:
        values = None if bias is None else parameters[bias].asnumpy()
        if not model.int8:
            return pack_float(parameters[name].asnumpy(), values)
        product = ready[name]
        quantized = product.weight.asnumpy()[0]
        if product.mode == "kernel":  # panels [P, I, 32]
            quantized = quantized.transpose(1, 0, 2).reshape(quantized.shape[1], -1)[:, :product.shape[-1]]
        return pack_int8(quantized, product.scale.asnumpy()[0], values)

    return pack_weights(model.config, WeightSource(lambda name: parameters[name].asnumpy(), matrix))


def _ready_products(model: Any) -> dict[str, Any]:
    if not model.int8:
        return {}
    from parallel.layers.int8 import products

    found = {product.name: product for product in products(model)}
    if any(product.mode == "float32" for product in found.values()):
        raise ValueError("these int8 weights were widened to float32 and cannot be packed")
    return found
