"""Normalisation over the last dim, in float32 whatever the compute type. Shapes: N tokens, D width."""

from __future__ import annotations

import mindspore
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.auto_generate import RmsNorm

from parallel.layers.fused import FusedLayerNorm, FusedRMSNorm, library
from parallel.layers.parameter import parameter
from parallel.sharding.layout import Layer, Operand, OpSharding


class LayerNorm(Layer):
    """y_ND = (x - mean) / sqrt(var + epsilon) * gamma + beta, biased variance.

    Args:
        width: D.
        epsilon: added to the variance (1e-5 in PanGu-alpha's code).
        compute_dtype: type of the result.
        stream: named axes that shard the input's dims.

    Source: PanGu-alpha code; Ba et al. 2016. On the CPU `FusedLayerNorm` replaces it, or without a C++ compiler, in
    training, `WrittenOutNorm`.
    """

    def __init__(self, width: int, *, epsilon: float = 1e-5, compute_dtype: mstype = mstype.float32,
                 stream: Operand = ("residual", None)) -> None:
        super().__init__()
        self.compute_dtype, self.stream = compute_dtype, stream
        self.gamma = parameter((width,), "ones", shard_optimizer=False)
        self.beta = parameter((width,), "zeros", shard_optimizer=False)
        self.normalise = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=epsilon)
        self.cast = ops.Cast()
        self.written_out = WrittenOutNorm(epsilon) if mindspore.get_context("device_target") == "CPU" else None
        kernels = library(mstype.float32)
        self.fused = FusedLayerNorm(kernels, epsilon) if kernels is not None else None

    def construct(self, x_ND: Tensor) -> Tensor:
        if self.fused is not None:
            return self.cast(self.fused(self.cast(x_ND, mstype.float32), self.gamma, self.beta), self.compute_dtype)
        if self.written_out is not None and self.training:
            return self.cast(self.written_out(self.cast(x_ND, mstype.float32), self.gamma, self.beta),
                             self.compute_dtype)
        y_ND, _, _ = self.normalise(self.cast(x_ND, mstype.float32), self.gamma, self.beta)
        return self.cast(y_ND, self.compute_dtype)

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.normalise, (self.stream, (None,), (None,)))]


class RMSNorm(Layer):
    """y_ND = x / sqrt(mean(x^2) + epsilon) * gamma (Zhang and Sennrich 2019).

    Args:
        width: D.
        epsilon: added to the mean square.
        compute_dtype: type of the result.
        stream: named axes that shard the input's dims; the last must be None.

    On the CPU, which has no such kernel, it is `FusedRMSNorm`, or written out where there is no C++ compiler. On NVIDIA
    GPUs, which have none either, it is written out; on Ascend `ops.RmsNorm` is used.
    """

    def __init__(self, width: int, *, epsilon: float = 1e-6, compute_dtype: mstype = mstype.float32,
                 stream: Operand = ("residual", None)) -> None:
        super().__init__()
        self.compute_dtype, self.stream, self.epsilon = compute_dtype, stream, epsilon
        self.gamma = parameter((width,), "ones", shard_optimizer=False)
        self.written_out = mindspore.get_context("device_target") != "Ascend"
        self.normalise = None if self.written_out else RmsNorm(epsilon)
        self.square, self.mean, self.shift = ops.Square(), ops.ReduceMean(keep_dims=True), ops.Add()
        self.rsqrt, self.divide, self.scale = ops.Rsqrt(), ops.Mul(), ops.Mul()
        self.cast = ops.Cast()
        kernels = library(mstype.float32)
        self.fused = FusedRMSNorm(kernels, epsilon) if kernels is not None else None

    def construct(self, x_ND: Tensor) -> Tensor:
        x_ND = self.cast(x_ND, mstype.float32)
        if self.fused is not None:
            return self.cast(self.fused(x_ND, self.gamma), self.compute_dtype)
        if self.written_out:
            inverse_N1 = self.rsqrt(self.shift(self.mean(self.square(x_ND), -1), self.epsilon))
            y_ND = self.scale(self.divide(x_ND, inverse_N1), self.gamma)
        else:
            y_ND, _ = self.normalise(x_ND, self.gamma)
        return self.cast(y_ND, self.compute_dtype)

    def sharding(self) -> list[OpSharding]:
        if not self.written_out:
            return [OpSharding(self.normalise, (self.stream, (None,)))]
        narrow = (*self.stream[:-1], None)
        return [OpSharding(self.square, (self.stream,)), OpSharding(self.mean, (self.stream,)),
                OpSharding(self.shift, (narrow, ())), OpSharding(self.rsqrt, (narrow,)),
                OpSharding(self.divide, (self.stream, narrow)), OpSharding(self.scale, (self.stream, (None,)))]


class WrittenOutNorm(nn.Cell):
    """The same in plain kernels, with its gradient written by hand: forward and backward together take half the time of
    MindSpore's LayerNorm and LayerNormGrad on the CPU (measured at N 2048, D 256: 4.2 ms against 8.9 ms).

    Inputs: x [..., D], gamma_D and beta_D, float32.
    """

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.mean, self.sum = ops.ReduceMean(keep_dims=True), ops.ReduceSum()

    def standardised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x - mean) / sqrt(var + epsilon) and 1 / sqrt(var + epsilon)."""
        deviation = x - self.mean(x, -1)
        scale = ops.rsqrt(self.mean(deviation * deviation, -1) + self.epsilon)
        return deviation * scale, scale

    def construct(self, x: Tensor, gamma_D: Tensor, beta_D: Tensor) -> Tensor:
        standardised, _ = self.standardised(x)
        return standardised * gamma_D + beta_D

    def bprop(self, x: Tensor, gamma_D: Tensor, beta_D: Tensor, y: Tensor, gradient: Tensor) -> tuple:
        # The compiler finds the forward's values again, so they are computed once.
        standardised, scale = self.standardised(x)
        inner = gradient * gamma_D
        x_gradient = (inner - self.mean(inner, -1) - standardised * self.mean(inner * standardised, -1)) * scale
        gradient_ND = ops.reshape(gradient, (-1, gamma_D.shape[0]))
        standardised_ND = ops.reshape(standardised, (-1, gamma_D.shape[0]))
        return x_gradient, self.sum(gradient_ND * standardised_ND, 0), self.sum(gradient_ND, 0)
