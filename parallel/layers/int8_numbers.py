"""The numbers of int8 weights, without a network. Needs no MindSpore.

Symmetric, one scale s for each output channel (or for each 128 inputs of it): q = round(w / s) in -127 .. 127 with
s = max |w| / 127, so |q s - w| <= s / 2 and an output moves by at most s / 2 * ||x||_1. The scale is applied after the
sum, which is exact. Neither symmetry nor granularity of the paper (UG-Sep, arXiv 2602.10455) could be read: both were
chosen here.

Shapes: K inputs, O outputs, G groups of inputs (1 without groups), P panels.
"""

from __future__ import annotations

import numpy as np

from parallel.common.errors import UserError

GROUP = 128
PANEL = 32  # columns of a panel in parallel/kernels
SCALE = "_scale"


def quantize(weight: np.ndarray, group: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(q int8 [.., K, O], scale float32 [.., G, O]) of weights [.., K, O].

    Raises:
        UserError: a weight is not finite.
    """
    if not np.isfinite(weight).all():
        raise UserError("a weight is infinite or not a number", hint="use an earlier checkpoint")
    *lead, inputs, outputs = weight.shape
    size = group or inputs
    quantized, scales = np.empty(weight.shape, np.int8), []
    for begin in range(0, inputs, size):
        part = weight[..., begin:begin + size, :]
        scale = (np.abs(part).max(-2, keepdims=True) / np.float32(127.0)).astype(np.float32)
        scale[scale == 0.0] = 1.0
        quantized[..., begin:begin + size, :] = np.clip(np.rint(part / scale), -127, 127)
        scales.append(scale)
    return quantized, np.ascontiguousarray(np.concatenate(scales, -2)).reshape(*lead, len(scales), outputs)


def dequantize(quantized: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 [.., K, O]."""
    if scale.shape[-2] > 1:
        scale = np.repeat(scale, GROUP, -2)[..., :quantized.shape[-2], :]
    return quantized * scale


def panels(quantized: np.ndarray) -> np.ndarray:
    """[.., P, K, PANEL]: PANEL columns side by side, in the order in which the kernel reads; the last filled with 0."""
    *lead, inputs, outputs = quantized.shape
    count = -(-outputs // PANEL)
    filled = np.zeros((*lead, inputs, count * PANEL), np.int8)
    filled[..., :outputs] = quantized
    return np.ascontiguousarray(np.moveaxis(filled.reshape(*lead, inputs, count, PANEL), -2, -3))


def count_groups(inputs: int, group: int | None) -> int:
    """Scales of an output channel."""
    return 1 if group is None or inputs <= group else -(-inputs // group)


def error_of(weight: np.ndarray, quantized: np.ndarray, scale: np.ndarray) -> float:
    """||W - q s|| / ||W||, Frobenius norms."""
    change = dequantize(quantized, scale) - weight
    return float(np.linalg.norm(change) / max(np.linalg.norm(weight), np.finfo(np.float32).tiny))
