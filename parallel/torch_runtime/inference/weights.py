"""Weights of a graph that serves, each in the forms in which its nodes take it: as it is, cast once to the type of a
product, or int8 with a scale for each output (W8A16). Those of products side by side lie in one tensor.

The numbers of int8 weights are those of `parallel.layers.int8_numbers`.

Shapes: T tokens (1 for a plain matrix), K inputs, O outputs, G groups of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parallel.common.errors import UserError
from parallel.layers.int8_numbers import SCALE, dequantize
from parallel.torch_runtime.execute import DTYPES
from parallel.torch_runtime.graph import Graph, Node

EIGHT = "eight"
"""The form of int8 weights; other forms are called by their type."""


class Weights:
    """What some graphs need of their parameters.

    Args:
        graphs: fused (`for_serving`).
        device: where the weights go.
        group: inputs of one scale (128); None = one scale for an output.

    Attributes:
        shapes: of all parameters by name, caches left out.
        types: their declared types.
        state: name -> tensor of those that nodes read as they are, for `Binder`.
    """

    def __init__(self, graphs: Iterable[Graph], device: torch.device, group: int | None = None) -> None:
        self.device, self.group = device, group
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        self.state: dict[str, Tensor | None] = {}
        self.forms: dict[str, set[str]] = {}
        self.parts: dict[tuple[str, str], tuple[Tensor, ...]] = {}
        self.joined: dict[tuple, tuple[Tensor, ...]] = {}
        self.nodes: list[Node] = []
        self.turned: dict[str, bool] = {}
        for graph in graphs:
            self._plan(graph)

    def _plan(self, graph: Graph) -> None:
        read = {number for node in graph.nodes for number in node.inputs} | {graph.result}
        for number, (name, kind) in enumerate(graph.parameters, graph.first_parameter):
            self.shapes[name], self.types[name] = kind.shape, kind.dtype
            forms = self.forms.setdefault(name, set())
            if number in read:
                forms.add(kind.dtype)
        for node in graph.nodes:
            if node.op == "Product":
                self.nodes.append(node)
                for name in node.attributes["weights"]:
                    self.forms[name].add(form_of(node))
                    self.turned[name] = node.attributes["turned"]
                for name in node.attributes["biases"]:
                    self.forms[name].add(node.attributes["dtype"])

    def inputs_of_eight(self, name: str) -> int | None:
        """Which dim of a parameter holds the inputs of int8 products; None where it has none."""
        if EIGHT not in self.forms[name]:
            return None
        return int(self.turned[name]) if len(self.shapes[name]) == 2 else 1

    def largest(self, name: str, value: Tensor) -> Tensor:
        """[T, O]: largest magnitude of each output's weights, of a parameter that is to be int8."""
        return self._by_outputs(name, value.to(self.device)).float().abs().amax(-1)

    def put(self, name: str, value: Tensor, largest: Tensor | None = None) -> None:
        """Takes a parameter's values, at first or in place of others.

        Args:
            name, value: it.
            largest: what int8 weights are scaled by (`largest`), where the value holds a part of the inputs only.

        Raises:
            UserError: a weight that is to be int8 is not finite.
        """
        value = value.to(self.device)
        for form in self.forms[name]:
            made = self._made(name, value, form, largest)
            if (name, form) in self.parts:
                for own, new in zip(self.parts[name, form], made, strict=True):
                    own.copy_(new)
            else:
                self.parts[name, form] = made
        self.state.setdefault(name, self.parts.get((name, self.types[name]), (None,))[0])

    def _by_outputs(self, name: str, value: Tensor) -> Tensor:
        """A parameter as [T, O, K]."""
        if value.dim() == 2:
            return value[None] if self.turned[name] else value.t()[None]
        return value.transpose(1, 2)

    def _made(self, name: str, value: Tensor, form: str, largest: Tensor | None) -> tuple[Tensor, ...]:
        if form != EIGHT:
            return (value.to(DTYPES[form]).contiguous(),)
        try:
            return quantized(self._by_outputs(name, value), self.group, largest)
        except UserError as error:
            raise UserError(error.what, where=name, hint=error.hint) from None

    def of(self, node: Node) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(weights, scales or None, biases [T, O] or None) of a product: int8 [T, O, K] with [T, G, O], or floating as
        the parameters are shaped."""
        own = node.attributes
        key = (form_of(node), tuple(own["weights"]), tuple(own["biases"]))
        if key not in self.joined:
            self.joined[key] = self._join(node)
        return self.joined[key]

    def _join(self, node: Node) -> tuple[Tensor, Tensor | None, Tensor | None]:
        own, form = node.attributes, form_of(node)
        whole = self._beside(own["weights"], form, -2)
        bias = None
        if own["biases"]:
            bias = self._beside(own["biases"], own["dtype"], -1)[0]
            bias = bias.reshape(1, -1) if bias.dim() == 1 else bias.reshape(bias.shape[0], -1)
        return whole[0], whole[1] if len(whole) > 1 else None, bias

    def _beside(self, names: list[str], form: str, dim: int) -> tuple[Tensor, ...]:
        """The parts of several parameters side by side along their outputs, each then a view of the whole."""
        if len(names) == 1:
            return self.parts[names[0], form]
        dims = (dim, -1)  # scales [T, G, O] have the outputs at the end
        whole = tuple(torch.cat([self.parts[name, form][place] for name in names], dims[place])
                      for place in range(len(self.parts[names[0], form])))
        begin = [0] * len(whole)
        for name in names:
            views = []
            for place, item in enumerate(whole):
                size = self.parts[name, form][place].shape[dims[place]]
                views.append(item.narrow(dims[place], begin[place], size))
                begin[place] += size
            self.parts[name, form] = tuple(views)
            if form == self.types[name]:
                self.state[name] = views[0]
        return whole

    def settle(self) -> None:
        """Puts together what lies side by side; once everything has been `put`."""
        for node in sorted(self.nodes, key=lambda node: -len(node.attributes["weights"])):
            self.of(node)

    def bytes(self) -> int:
        """Of all weights in all forms."""
        return sum(item.numel() * item.element_size() for parts in self.parts.values() for item in parts)


def form_of(node: Node) -> str:
    """The form in which a product takes its weights."""
    return EIGHT if node.attributes["eight"] else node.attributes["dtype"]


def quantized(value: Tensor, group: int | None = None, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(int8 [T, O, K], scales float32 [T, G, O]) of weights [T, O, K]; see `parallel.layers.int8_numbers.quantize`.

    Args:
        value: the weights.
        group: inputs of one scale; None = all.
        largest: [T, O], the largest magnitudes of outputs that have more inputs than these; None = these are all, or
            whole groups.

    Raises:
        UserError: a weight is not finite.
    """
    tokens, outputs, inputs = value.shape
    size = group if group is not None and inputs > group else inputs
    found = torch.empty(tokens, outputs, inputs, dtype=torch.int8, device=value.device)
    scales = torch.empty(tokens, math.ceil(inputs / size), outputs, device=value.device)
    for token in range(tokens):  # one token's float32 copy at a time
        for place, begin in enumerate(range(0, inputs, size)):
            part = value[token, :, begin:begin + size].float()
            scale = (part.abs().amax(-1) if largest is None else largest[token]) / 127.0
            scale = torch.where(scale == 0.0, 1.0, scale)
            found[token, :, begin:begin + size] = (part / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
            scales[token, place] = scale
    if not bool(torch.isfinite(scales).all()):
        raise UserError("a weight is infinite or not a number", hint="use an earlier checkpoint")
    return found, scales


def widening(read: Callable[[str, Any], np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> Callable:
    """A `ReadPart` by that of a quantized checkpoint, which is read in whole tensors: int8 weights as float32, in the
    shapes that a program has. To quantize them again gives the same int8 weights."""

    def found(name: str, extent: Any) -> np.ndarray:
        value = read(name, None)
        if value.dtype == np.int8:
            value = dequantize(value, read(name + SCALE, None)).astype(np.float32)
            # The weight [O, K] of a linear layer is kept as [1, K, O].
            value = value if value.shape == shapes[name] else value.reshape(value.shape[-2:]).T
        return value if extent is None else value[tuple(slice(start, stop) for start, stop in extent)]

    return found
