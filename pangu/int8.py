"""PanGu-alpha with int8 weights (see parallel/layers/int8.py): every matrix, and the word embedding, the head's too.

Positions, the query table, norms and biases stay in float32: they are small.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from mindspore import Parameter, Tensor, nn, ops

from pangu.model import PanGuAlpha
from parallel.layers import int8
from parallel.layers.embedding import Embedding
from parallel.layers.int8_numbers import GROUP, PANEL, count_groups


class QuantizedTable(nn.Cell):
    """The word embedding as int8, stored [1, D, V] with a scale a word: rows_ND of ids, logits_NV of hidden states."""

    def __init__(self, table: Embedding, group: int | None) -> None:
        super().__init__()
        self.words, self.width = table.rows, table.width
        self.product = int8.Int8Product((1, table.width, table.rows), count_groups(table.width, group),
                                        table.table.name)
        self.gather, self.cast, self.reshape = ops.Gather(), ops.Cast(), ops.Reshape()
        self.columns_D = Tensor([number * PANEL for number in range(table.width)])

    def construct(self, ids_BS: Tensor) -> Tensor:
        product, ids_N = self.product, self.reshape(ids_BS, (-1,))
        if product.mode == "kernel":
            first_N1 = (ids_N // PANEL) * (self.width * PANEL) + ids_N % PANEL
            rows_ND = self.gather(self.reshape(product.weight, (-1,)),
                                  self.reshape(first_N1, (-1, 1)) + self.cast(self.columns_D, ids_N.dtype), 0)
        else:
            rows_ND = self.gather(product.weight[0], ids_N, 1).T
        rows_ND = self.cast(rows_ND, product.scale.dtype)
        if product.mode == "float32":
            return rows_ND
        scale_NG = self.gather(product.scale[0], ids_N, 1).T
        if product.groups > 1:
            scale_NG = ops.repeat_interleave(scale_NG, GROUP, 1)[:, :self.width]
        return rows_ND * scale_NG

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """What `TiedHead` gives with the table."""
        return self.reshape(self.product(self.reshape(hidden_ND, (1, -1, self.width))), (-1, self.words))


def swap(model: PanGuAlpha, group: int | None = None) -> dict[str, Parameter]:
    """`int8.swap` for PanGu-alpha."""
    gone = int8.swap(model, group, partial(_replacement, model.embedding.word))
    model.int8 = True
    return gone


def _replacement(words: nn.Cell, cell: nn.Cell, group: int | None) -> nn.Cell | None:
    return QuantizedTable(cell, group) if cell is words else int8.replacement(cell, group)


def fill(model: PanGuAlpha, gone: dict[str, Parameter]) -> dict[str, float]:
    """Quantizes what `swap` gave back into the model, which `int8.prepare` makes ready; each weight's relative error.

    Raises:
        UserError: a weight is not finite.
    """
    return int8.quantize_model(model, gone)


def load(path: str | Path, model: PanGuAlpha) -> dict[str, Any]:
    """`int8.load` for PanGu-alpha: from a checkpoint of either kind."""
    return int8.load(path, model, swap)
