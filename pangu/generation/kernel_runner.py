"""The C++ kernels of pangu/kernels/paged.cpp, with weights and cache in their order. Needs no MindSpore.

Shapes: O outputs, I inputs, P panels of 32 outputs, G groups of inputs with a scale (int8), H heads, K head width.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pangu.generation.choosing import LibraryChoice, at
from pangu.generation.runner import Span

SLOTS = 16  # tokens of a block
PANEL = 32
_WIDE = 16
_ALIGNMENT = 64
_GELU = {"tanh": 0, "fast": 1, "erf": 2}


def aligned(shape: tuple[int, ...], dtype: type, zeros: bool = False) -> np.ndarray:
    """An array whose first element begins a line of the cache. Zeros cost memory only where they are written."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = (np.zeros if zeros else np.empty)(size + _ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % _ALIGNMENT
    return raw[begin:begin + size].view(dtype).reshape(shape)


@dataclass
class PackedMatrix:
    """Weights as panels [P, I, 32], float32 or int8 with scales [G, P * 32]; bias [O] or None."""

    panels: np.ndarray
    scale: np.ndarray | None
    bias: np.ndarray | None
    outputs: int

    @property
    def groups(self) -> int:
        """Scales of an output."""
        return 1 if self.scale is None else len(self.scale)

    @property
    def bytes(self) -> int:
        """Memory that a pass over the matrix reads."""
        return sum(part.nbytes for part in (self.panels, self.scale, self.bias) if part is not None)


def pack_float(weight_OI: np.ndarray, bias: np.ndarray | None) -> PackedMatrix:
    """Float weights [O, I]."""
    outputs, inputs = weight_OI.shape
    panels = aligned((-(-outputs // PANEL), inputs, PANEL), np.float32)
    for number, panel in enumerate(panels):
        part = weight_OI[number * PANEL:(number + 1) * PANEL]
        panel[:, :len(part)] = part.T
        panel[:, len(part):] = 0.0
    return PackedMatrix(panels, None, _own(bias), outputs)


def pack_int8(quantized_IO: np.ndarray, scale_GO: np.ndarray, bias: np.ndarray | None) -> PackedMatrix:
    """Int8 weights [I, O] with their scales, as parallel/layers/int8.py makes them."""
    inputs, outputs = quantized_IO.shape
    panels = aligned((-(-outputs // PANEL), inputs, PANEL), np.int8)
    for number, panel in enumerate(panels):
        part = quantized_IO[:, number * PANEL:(number + 1) * PANEL]
        panel[:, :part.shape[1]] = part
        panel[:, part.shape[1]:] = 0
    scale = aligned((len(scale_GO), len(panels) * PANEL), np.float32, zeros=True)
    scale[:, :outputs] = scale_GO
    return PackedMatrix(panels, scale, _own(bias), outputs)


def _own(values: np.ndarray | None) -> np.ndarray | None:
    if values is None:
        return None
    made = aligned(values.shape, np.float32)
    made[...] = values
    return made


@dataclass
class PackedWeights:
    """All parameters of a PanGu-alpha in the order of the kernels.

    Args:
        config: a `pangu.config.ModelConfig`.
        words: [V, D], word embedding and head.
        places, queries: tables [positions, D].
        norm: gamma and beta of the last norm.
        layers: for each layer the arrays of both norms (gamma, beta, gamma, beta), and the six matrices: query, key,
            value, output, mapping, projection.
    """

    config: Any
    words: PackedMatrix
    places: np.ndarray
    queries: np.ndarray
    norm: tuple[np.ndarray, np.ndarray]
    layers: list[tuple[list[np.ndarray], list[PackedMatrix]]]

    @property
    def step_bytes(self) -> int:
        """What generating a token reads."""
        return self.words.bytes + sum(matrix.bytes for _, matrices in self.layers for matrix in matrices)


@dataclass
class WeightSource:
    """Where `pack_weights` takes parameters from; each is asked for once, so that it may be let go at once.

    Args:
        array: name of a parameter -> its float values.
        matrix: (name of a weight, name of its bias or None) -> the packed matrix.
    """

    array: Callable[[str], np.ndarray]
    matrix: Callable[[str, str | None], PackedMatrix]


def pack_weights(config: Any, source: WeightSource) -> PackedWeights:
    """Takes every parameter, one after the other."""
    layers = []
    for name in [*(f"layers.{number}" for number in range(config.layers - 1)), "query_layer"]:
        norms = [_own(source.array(f"{name}.{norm}.{part}")) for norm in ("norm1", "norm2")
                 for part in ("gamma", "beta")]
        linears = [f"{name}.attention.{part}" for part in ("query", "key", "value", "output")]
        linears += [f"{name}.feed_forward.{part}" for part in ("mapping", "projection")]
        layers.append((norms, [source.matrix(f"{linear}.weight", f"{linear}.bias") for linear in linears]))
    return PackedWeights(config, source.matrix("embedding.word.table", None),
                         _own(source.array("embedding.position.table")), _own(source.array("query_embedding.table")),
                         (_own(source.array("norm.gamma")), _own(source.array("norm.beta"))), layers)


class KernelRunner(LibraryChoice):
    """A `Runner` of the C++ kernels. A row's logits depend on its sequence alone, bit for bit.

    Args:
        weights: packed; several runners may use the same.
        blocks: of the cache. Memory is taken when a block is first written.
        library: the shared object (`pangu.native.kernel_library`).
    """

    block_size, shares_prefixes = SLOTS, True

    def __init__(self, weights: PackedWeights, blocks: int, library: Path) -> None:
        config = weights.config
        self.weights, self.blocks, self.config = weights, blocks, config
        super().__init__(library)
        heads, head_width = config.heads, config.hidden_size // config.heads
        padded = -(-head_width // _WIDE) * _WIDE
        self._cache = [(aligned((blocks, heads, head_width, SLOTS), np.float32, zeros=True),
                        aligned((blocks, heads, SLOTS, padded), np.float32, zeros=True)) for _ in range(config.layers)]
        sizes = np.array([config.layers, config.hidden_size, heads, config.ffn, config.vocabulary_size,
                          config.sequence_length, blocks, _GELU[config.gelu], config.final_norm == "before_query"],
                         np.int64)
        pointers, groups = self._pointers()
        self._model = self._library.paged_create(at(sizes), at(pointers), at(groups))
        weakref.finalize(self, self._library.paged_destroy, self._model)
        self._logits = np.empty((0, config.vocabulary_size), np.float32)

    def _pointers(self) -> tuple[np.ndarray, np.ndarray]:
        arrays: list[np.ndarray | None] = []
        groups: list[int] = []

        def add(matrix: PackedMatrix) -> None:
            arrays.extend([matrix.panels, matrix.scale, matrix.bias])
            groups.append(matrix.groups)

        add(self.weights.words)
        arrays += [self.weights.places, self.weights.queries, *self.weights.norm]
        for (norms, matrices), (keys, values) in zip(self.weights.layers, self._cache, strict=True):
            arrays += norms
            for matrix in matrices:
                add(matrix)
            arrays += [keys, values]
        return (np.array([0 if array is None else array.ctypes.data for array in arrays], np.uint64),
                np.array(groups, np.int64))

    def run(self, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """See `Runner`.

        Raises:
            ValueError: a span that the kernels refuse.
        """
        rows = sum(span.outputs for span in spans)
        if rows > len(self._logits):
            self._logits = np.empty((rows, self.config.vocabulary_size), np.float32)
        logits, best = self._logits[:rows], np.empty(rows, np.int32)
        tables, numbers = [], np.empty((len(spans), 4), np.int64)
        begin = 0
        for number, span in enumerate(spans):
            needed = -(-(span.start + len(span.ids)) // SLOTS)
            if len(span.table) < needed:
                raise ValueError(f"{len(span.table)} blocks for {span.start + len(span.ids)} tokens")
            numbers[number] = span.start, len(span.ids), span.outputs, begin
            tables += span.table[:needed]
            begin += needed
        ids = np.fromiter((token for span in spans for token in span.ids), np.int32)
        table = np.array(tables, np.int32)
        code = self._library.paged_run(self._model, len(spans), at(numbers), at(table), at(ids), at(logits),
                                       at(best))
        if code != 0:
            raise ValueError(f"the kernels refuse the call: code {code}")
        return logits, best
