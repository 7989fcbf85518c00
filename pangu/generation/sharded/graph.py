"""PanGu-alpha over a paged cache, as one graph for any layout: what every rank of a sharded run compiles.

The cache of a layer is a table of slots, sharded by heads. A call writes the keys and values of its new tokens into
the slots that the host names, and each group of tokens looks at the slots that the host names for it, as far as they
are visible; so blocks, shared beginnings, chunks and batches are all the affair of the host (`runner`), and one
graph serves them. Hidden states of other stages come by the graph; the logits are gathered once, at the end.

Shapes: G groups, S tokens of a group, N = G S, C slots that a group looks at, M rows with logits, T slots of the cache,
D hidden width, H heads, K = D / H, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from pangu.generation.sharded.shapes import SpanShape
from pangu.model import DecoderLayer, PanGuAlpha
from parallel.layers.attention import AttentionBias
from parallel.layers.parameter import parameter
from parallel.sharding.layout import Layer, OpSharding, hold_weights
from parallel.sharding.trainable import Trainable

if TYPE_CHECKING:
    from mindspore import Parameter

_LEAST = float(np.finfo(np.float32).min)


class SlotCache(Layer):
    """Keys or values of one layer, [T, H, K], written in place.

    Args:
        slots: T.
        heads: H.
        head_width: K.
        dtype: element type.
    """

    def __init__(self, slots: int, heads: int, head_width: int, dtype: mstype) -> None:
        super().__init__()
        self.table = parameter((slots, heads, head_width), "zeros", dtype=dtype)
        self.shape = (-1, heads, head_width)
        self.split_heads, self.write, self.read = ops.Reshape(), ops.ScatterUpdate(), ops.Gather()
        self.order = ops.Transpose()

    def construct(self, new_ND: Tensor, write_N: Tensor, read_GC: Tensor) -> Tensor:
        """Writes the new rows at `write_N`; returns those at `read_GC`: [G, H, C, K]."""
        table_THK = self.write(self.table, write_N, self.split_heads(new_ND, self.shape))
        return self.order(self.read(table_THK, read_GC, 0), (0, 2, 1, 3))

    def sharding(self) -> list[OpSharding]:
        rows = (None, "heads", None)
        return [OpSharding(self.write, (rows, (None,), rows), weights=("table",)),
                OpSharding(self.read, (rows, (None, None))),
                OpSharding(self.order, ((None, None, "heads", None),))]


class SpanLayer(nn.Cell):
    """A `DecoderLayer` whose attention looks at slots of a cache, the new tokens' own among them."""

    def __init__(self, layer: DecoderLayer, shape: SpanShape, dtype: mstype) -> None:
        super().__init__(auto_prefix=False)  # parameters keep the model's names
        attention = layer.attention
        self.layer, self.groups = layer, shape.groups
        self.keys = SlotCache(shape.cache, attention.heads, attention.head_width, dtype)
        self.values = SlotCache(shape.cache, attention.heads, attention.head_width, dtype)

    def construct(self, hidden_ND: Tensor, bias_G1SC: Tensor, write_N: Tensor, read_GC: Tensor,
                  query_ND: Tensor | None = None) -> Tensor:
        layer, attention = self.layer, self.layer.attention
        normed_ND = layer.norm1(hidden_ND)
        if query_ND is None:
            query_ND = normed_ND
        query_GHSK = attention.to_heads(attention.query(query_ND), self.groups)
        keys_GHCK = self.keys(attention.key(normed_ND), write_N, read_GC)
        values_GHCK = self.values(attention.value(normed_ND), write_N, read_GC)
        mixed_GHSK = attention.core(query_GHSK, keys_GHCK, values_GHCK, bias_G1SC)
        hidden_ND = layer.add1(hidden_ND, attention.output(attention.from_heads(mixed_GHSK)))
        return layer.add2(hidden_ND, layer.feed_forward(layer.norm2(hidden_ND)))


class WantedRows(Layer):
    """rows_MD = hidden_ND[wanted_M]."""

    def __init__(self) -> None:
        super().__init__()
        self.gather = ops.Gather()

    def construct(self, hidden_ND: Tensor, wanted_M: Tensor) -> Tensor:
        return self.gather(hidden_ND, wanted_M, 0)

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.gather, ((None, None), (None,)))]


class WholeLogits(Layer):
    """float32 logits [M, V], of all parts of the vocabulary, on every device."""

    def __init__(self) -> None:
        super().__init__()
        self.cast, self.whole = ops.Cast(), ops.Maximum()

    def construct(self, logits_MV: Tensor) -> Tensor:
        # Whatever is here with a strategy of its own makes the partitioner gather; this one also bars -inf.
        return self.whole(self.cast(logits_MV, mstype.float32), _LEAST)

    def redistributes(self, axes: Any) -> bool:
        return True

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.whole, ((None, None), ()))]


class SpanDecoder(Trainable):
    """Logits after some of the new tokens.

    Args:
        model: its layers and parameters are used, not copied.
        shape: of the call.

    Inputs: ids_GS, positions_GS int32; write_N int32, the slots of the new tokens; read_GC int32, the slots that each
    group looks at; visible_GSC int8, 1 where a token sees one of them; wanted_M int32, the tokens with logits.
    Output: logits_MV float32.
    """

    def __init__(self, model: PanGuAlpha, shape: SpanShape) -> None:
        super().__init__(auto_prefix=False)
        self.model = model
        cells = [SpanLayer(layer, shape, model.compute_dtype) for layer in [*model.layers, model.query_layer]]
        for number, cell in enumerate(cells):
            cell.keys.table.name, cell.values.table.name = f"cache.{number}.keys", f"cache.{number}.values"
        self.layers = nn.CellList(cells[:-1], auto_prefix=False)
        self.query_layer = cells[-1]
        self.wanted, self.whole = WantedRows(), WholeLogits()
        self.biases = nn.CellList([AttentionBias() for _ in cells[:-1]], auto_prefix=False)
        self.bias = AttentionBias()
        self.cast = ops.Cast()
        self.set_train(False)

    def construct(self, ids_GS: Tensor, positions_GS: Tensor, write_N: Tensor, read_GC: Tensor, visible_GSC: Tensor,
                  wanted_M: Tensor) -> Tensor:
        model = self.model
        hidden_ND = model.embedding(ids_GS, positions_GS)
        for number in range(len(self.layers)):
            hidden_ND = self.layers[number](hidden_ND, self.biases[number](visible_GSC), write_N, read_GC)
        if model.norm_first:
            hidden_ND = model.norm(hidden_ND)
        query_ND = self.cast(model.query_embedding(positions_GS), model.compute_dtype)
        hidden_ND = self.query_layer(hidden_ND, self.bias(visible_GSC), write_N, read_GC, query_ND)
        hidden_MD = self.wanted(hidden_ND, wanted_M)
        if not model.norm_first:
            hidden_MD = model.norm(hidden_MD)
        return self.whole(model.logits(hidden_MD))

    def pipeline_cells(self) -> list[nn.Cell | list[nn.Cell]]:
        """See `pangu.model.PanGuAlpha.pipeline_cells`."""
        model = self.model
        layers = [[layer, bias] for layer, bias in zip(self.layers, self.biases, strict=True)]
        return [model.embedding, *layers, [self.query_layer, self.bias],
                [model.query_embedding, model.norm, self.wanted, model.head, self.whole]]

    def shared_parameters(self) -> list[tuple[Parameter, list[nn.Cell]]]:
        """See `pangu.model.TrainingLoss.shared_parameters`."""
        return [(self.model.embedding.word.table, [self.model.embedding, self.model.head])]


def span_decoder(model: PanGuAlpha, shape: SpanShape) -> SpanDecoder:
    """The cell whose matrices, biases and words are parameters of the compute type, so that no call casts them."""
    decoder = SpanDecoder(model, shape)
    hold_weights(model, model.compute_dtype)
    model.embedding.word.table.set_dtype(model.compute_dtype)
    return decoder
