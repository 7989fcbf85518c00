"""Optimizers as cells of a training graph: each takes all gradients and the step, updates parameters and moments.

States are named `<state>.<parameter>` (`adam_m.backbone...`, as in the released PanGu-alpha checkpoints) and are
float32 whatever the type of the parameter. Whether gradients are finite is not looked at here:
`parallel.training.step` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from parallel.common.errors import UserError
from parallel.layers.fused import adam_kernel
from parallel.training.settings import OptimizerSettings

_NOT_DECAYED = ("layernorm", "layer_norm", "norm.", "bias")


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to the parameter: not to layer norms' gamma and beta, not to biases.

    The released PanGu-alpha code tests the name for `layernorm` and `bias`; gamma and beta of norms that are called
    otherwise are added here.
    """
    lower = name.lower()
    return not (any(part in lower for part in _NOT_DECAYED) or lower.endswith((".gamma", ".beta")))


def make_states(prefix: str, parameters: Sequence[Parameter], value: float = 0.0) -> ParameterTuple:
    """One float32 state per parameter, of its shape, filled with `value` and named `<prefix>.<parameter name>`."""
    states = []
    for parameter in parameters:
        # A clone keeps the tie by which the partitioner shards a state as it shards its parameter.
        state = parameter.clone(init=value)
        if parameter.dtype != ms.float32:
            state.set_dtype(ms.float32)
        state.name, state.requires_grad = f"{prefix}.{parameter.name}", False
        state.parallel_optimizer = parameter.parallel_optimizer
        states.append(state)
    return ParameterTuple(states)


def held(factor: Tensor | float, finite: Tensor | None) -> Tensor | float:
    """The share of a state that a step keeps: all of it where the step does not count (`finite` is false)."""
    if finite is None:
        return factor
    return ops.select(finite, ops.cast(factor, ms.float32), Tensor(1.0, ms.float32))


def kernel_adam_update(kernel: ops.Primitive, scalars: tuple, parameter: Parameter, m: Parameter, v: Parameter,
                       gradient: Tensor, decay: float) -> Tensor:
    """Adam's update of one parameter on the CPU; `scalars` are those without and those with weight decay."""
    if decay:
        return kernel(parameter, m, v, gradient, scalars[1])
    return kernel(parameter, m, v, gradient, scalars[0])


def adam_update(fused: ops.Primitive, rate: Tensor, correction: Tensor, betas: tuple, epsilon: Tensor,
                parameter: Parameter, m: Parameter, v: Parameter, gradient: Tensor, decay: float,
                fusable: bool) -> Tensor:
    """Adam's update of one parameter; the true direction is `correction` times what `epsilon` gives."""
    decay = decay / correction
    if fusable:
        return fused(parameter, m, v, rate * correction, betas[0], betas[1], epsilon, decay, gradient)
    direction, next_m, next_v = adam_direction(m, v, gradient, betas, epsilon)
    value = ops.cast(parameter, ms.float32)
    value = value - rate * correction * (direction + decay * value)
    ops.assign(m, next_m)
    ops.assign(v, next_v)
    return ops.assign(parameter, ops.cast(value, parameter.dtype))


class Adam(nn.Cell):
    """Adam (Kingma and Ba 2015) and AdamW (Loshchilov and Hutter 2019) with float32 moments.

    `m = b1 m + (1-b1) g`, `v = b2 v + (1-b2) g^2`, `p -= rate (m' / (sqrt(v') + epsilon) + decay p)` with
    `m' = m / (1 - b1^t)`, `v' = v / (1 - b2^t)`, t counted from 1; without bias correction m' = m, v' = v.

    Float32 parameters take the fused kernel. Bias correction is folded into its scalars:
    `m' / (sqrt(v') + eps) = (c2 / c1) m / (sqrt(v) + eps c2)` with c1 = 1 - b1^t, c2 = sqrt(1 - b2^t).
    """

    def __init__(self, parameters: Sequence[Parameter], settings: OptimizerSettings) -> None:
        super().__init__(auto_prefix=False)
        if settings.name == "adam" and settings.weight_decay:
            raise UserError("adam has no decoupled weight decay", where="optimizer.weight_decay",
                            value=settings.weight_decay, hint="set it to 0 or use adamw")
        self.parameters = ParameterTuple(parameters)
        self.adam_m = make_states("adam_m", parameters)
        self.adam_v = make_states("adam_v", parameters)
        self.decays = tuple(settings.weight_decay if is_decayed(p.name) else 0.0 for p in parameters)
        self.fusable = tuple(p.dtype == ms.float32 for p in parameters)
        self.beta1, self.beta2 = (Tensor(beta, ms.float32) for beta in settings.betas)
        self.epsilon = settings.epsilon
        self.bias_correction = settings.bias_correction
        self.fused = ops.AdamWeightDecay()
        self.one = Tensor(1.0, ms.float32)
        # Maps, not loops: a loop over n parameters that builds tuples makes the compiler hold n^2 nodes.
        self.map, self.rule = ops.HyperMap(), adam_update
        self.kernel = adam_kernel() if type(self) is Adam and all(self.fusable) else None
        self.decay = Tensor(settings.weight_decay, ms.float32)

    def construct(self, gradients: tuple, rate: Tensor, step: Tensor, finite: Tensor | None = None) -> Tensor:
        """Updates every parameter. gradients: one per parameter; rate: float32 scalar; step: int32 scalar from 0;
        finite: see `Optimizer.construct`."""
        beta1, beta2 = held(self.beta1, finite), held(self.beta2, finite)
        correction = epsilon_factor = self.one
        if self.bias_correction:
            count = ops.cast(step, ms.float32) + 1.0
            epsilon_factor = ops.sqrt(1.0 - ops.pow(self.beta2, count))
            correction = epsilon_factor / (1.0 - ops.pow(self.beta1, count))
        epsilon = self.epsilon * epsilon_factor
        if self.kernel is not None:
            return ops.depend(step, self.run_kernel(gradients, rate * correction, (beta1, beta2), epsilon, correction))
        update = ops.partial(self.rule, self.fused, rate, correction, (beta1, beta2), epsilon)
        return ops.depend(step, self.map(update, self.parameters, self.adam_m, self.adam_v, gradients, self.decays,
                                         self.fusable))

    def run_kernel(self, gradients: tuple, rate: Tensor, betas: tuple, epsilon: Tensor, correction: Tensor) -> tuple:
        """Every parameter's update by the CPU's kernel."""
        plain = ops.stack((rate, betas[0], betas[1], epsilon, self.decay * 0.0))
        decayed = ops.stack((rate, betas[0], betas[1], epsilon, self.decay / correction))
        update = ops.partial(kernel_adam_update, self.kernel, (plain, decayed))
        return self.map(update, self.parameters, self.adam_m, self.adam_v, gradients, self.decays)


def adam_direction(m: Tensor, v: Tensor, gradient: Tensor, betas: tuple, epsilon: Tensor) -> tuple:
    """(m' / (sqrt(v') + epsilon), m', v') with the moments moved towards the gradient; all float32."""
    gradient = ops.cast(gradient, ms.float32)
    next_m = betas[0] * m + (1.0 - betas[0]) * gradient
    next_v = betas[1] * v + (1.0 - betas[1]) * ops.square(gradient)
    return next_m / (ops.sqrt(next_v) + epsilon), next_m, next_v


def lamb_update(fused: ops.Primitive, rate: Tensor, correction: Tensor, betas: tuple, epsilon: Tensor,
                parameter: Parameter, m: Parameter, v: Parameter, gradient: Tensor, decay: float,
                fusable: bool) -> Tensor:
    """LAMB's update of one parameter; Adam's correction cancels out of the trust ratio."""
    direction, next_m, next_v = adam_direction(m, v, gradient, betas, epsilon)
    value = ops.cast(parameter, ms.float32)
    direction = direction + decay / correction * value
    norm_p = ops.sqrt(ops.reduce_sum(ops.square(value)))
    norm_d = ops.sqrt(ops.reduce_sum(ops.square(direction)))
    usable = ops.logical_and(norm_p > 0.0, norm_d > 0.0)
    trust = ops.select(usable, norm_p / ops.maximum(norm_d, Tensor(1e-30, ms.float32)), correction)
    ops.assign(m, next_m)
    ops.assign(v, next_v)
    return ops.assign(parameter, ops.cast(value - rate * trust * direction, parameter.dtype))


class Lamb(Adam):
    """LAMB (You et al. 2020): AdamW's update, scaled per parameter by |p| / |update| (1 where either is 0).

    The norms are those of the tensor in the graph; under op-level sharding the partitioner makes them global.
    """

    def __init__(self, parameters: Sequence[Parameter], settings: OptimizerSettings) -> None:
        super().__init__(parameters, settings)
        self.rule = lamb_update


class Adagrad(nn.Cell):
    """Adagrad (Duchi et al. 2011): `a += g^2`, `p -= rate g / (sqrt(a) + epsilon)`."""

    def __init__(self, parameters: Sequence[Parameter], settings: OptimizerSettings) -> None:
        super().__init__(auto_prefix=False)
        self.parameters = ParameterTuple(parameters)
        self.adagrad_a = make_states("adagrad_a", parameters, settings.initial_accumulator)
        self.epsilon = settings.epsilon
        self.map = ops.HyperMap()

    def construct(self, gradients: tuple, rate: Tensor, step: Tensor, finite: Tensor | None = None) -> Tensor:
        """Updates every parameter; see `Adam.construct` (nothing to hold: gradients of 0 change nothing)."""
        update = ops.partial(adagrad_update, rate, self.epsilon)
        return ops.depend(step, self.map(update, self.parameters, self.adagrad_a, gradients))


def adagrad_update(rate: Tensor, epsilon: float, parameter: Parameter, a: Parameter, gradient: Tensor) -> Tensor:
    """Adagrad's update of one parameter."""
    gradient = ops.cast(gradient, ms.float32)
    next_a = a + ops.square(gradient)
    value = ops.cast(parameter, ms.float32) - rate * gradient / (ops.sqrt(next_a) + epsilon)
    ops.assign(a, next_a)
    return ops.assign(parameter, ops.cast(value, parameter.dtype))


class RMSProp(nn.Cell):
    """RMSProp (Hinton 2012): `s = d s + (1-d) g^2`, `u = momentum u + g / (sqrt(s) + epsilon)`, `p -= rate u`.

    Epsilon outside the root and the learning rate outside the momentum, as in PyTorch; chosen here.
    """

    def __init__(self, parameters: Sequence[Parameter], settings: OptimizerSettings) -> None:
        super().__init__(auto_prefix=False)
        self.parameters = ParameterTuple(parameters)
        self.rmsprop_s = make_states("rmsprop_s", parameters)
        self.momentum = settings.momentum
        self.rmsprop_u = make_states("rmsprop_u", parameters) if settings.momentum else self.rmsprop_s
        self.decay = settings.decay
        self.epsilon = settings.epsilon
        self.map = ops.HyperMap()

    def construct(self, gradients: tuple, rate: Tensor, step: Tensor, finite: Tensor | None = None) -> Tensor:
        """Updates every parameter; see `Adam.construct`."""
        decay = held(self.decay, finite)
        momentum = held(self.momentum, finite) if self.momentum else None
        update = ops.partial(rmsprop_update, rate, decay, momentum, self.epsilon)
        return ops.depend(step, self.map(update, self.parameters, self.rmsprop_s, self.rmsprop_u, gradients))


def rmsprop_update(rate: Tensor, decay: Tensor, momentum: Tensor | None, epsilon: float, parameter: Parameter,
                   s: Parameter, u: Parameter, gradient: Tensor) -> Tensor:
    """RMSProp's update of one parameter; without momentum `u` is not used."""
    gradient = ops.cast(gradient, ms.float32)
    next_s = decay * s + (1.0 - decay) * ops.square(gradient)
    direction = gradient / (ops.sqrt(next_s) + epsilon)
    ops.assign(s, next_s)
    if momentum is not None:
        direction = momentum * u + direction
        ops.assign(u, direction)
    value = ops.cast(parameter, ms.float32) - rate * direction
    return ops.assign(parameter, ops.cast(value, parameter.dtype))


class HandOver(nn.Cell):
    """Leaves gradients in the place of their parameters, for whoever moves these outside of the graph."""

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        super().__init__(auto_prefix=False)
        self.parameters, self.map = ParameterTuple(list(parameters)), ops.HyperMap()

    def construct(self, gradients: tuple, rate: Tensor, step: Tensor, finite: Tensor | None = None) -> Tensor:
        """Takes the gradients; see `Adam.construct`."""
        return ops.depend(step, self.map(ops.assign, self.parameters, gradients))


OPTIMIZERS: dict[str, type[nn.Cell]] = {
    "adamw": Adam, "adam": Adam, "lamb": Lamb, "adagrad": Adagrad, "rmsprop": RMSProp,
}
