"""PanGu-alpha with a static key and value cache: the layers of `pangu.model`, called on a few new tokens at a time.

One cell serves the prompt (S = chunk tokens at once) and the single step (S = 1); the slot of a token in the cache is
its absolute position, so sequences of different lengths share a batch without shifting anything, and what is in
the slots beyond a sequence's own position is never visible to it.

Shapes: B batch, S new tokens, C cache slots, D hidden width, H heads, K = D / H, V vocabulary, N = B S tokens.
"""

from __future__ import annotations

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from pangu.model import DecoderLayer, PanGuAlpha
from parallel.layers.attention import MASKED


class LayerCache(nn.Cell):
    """Keys and values of one layer, [B H C, K] each: a row per sequence, head and slot, written in place.

    Args:
        name: prefix of the two parameters.
        batch: B.
        heads: H.
        capacity: C.
        head_width: K.
        dtype: element type.
    """

    def __init__(self, name: str, batch: int, heads: int, capacity: int, head_width: int, dtype: mstype) -> None:
        super().__init__(auto_prefix=False)
        rows = (batch * heads * capacity, head_width)
        self.keys = Parameter(Tensor(np.zeros(rows), dtype), name=f"{name}.keys", requires_grad=False)
        self.values = Parameter(Tensor(np.zeros(rows), dtype), name=f"{name}.values", requires_grad=False)
        self.shape = (batch, heads, capacity, head_width)
        self.head_width = head_width
        self.write = ops.ScatterUpdate()

    def construct(self, key_BHSK: Tensor, value_BHSK: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new keys and values at `rows` [B H S]; returns all: [B, H, C, K] twice."""
        keys = self.write(self.keys, rows, key_BHSK.reshape((-1, self.head_width)))
        values = self.write(self.values, rows, value_BHSK.reshape((-1, self.head_width)))
        return keys.reshape(self.shape), values.reshape(self.shape)


class CachedLayer(nn.Cell):
    """A `DecoderLayer` whose attention also sees the tokens in its cache."""

    def __init__(self, layer: DecoderLayer, cache: LayerCache) -> None:
        super().__init__(auto_prefix=False)
        self.layer, self.cache, self.batch = layer, cache, cache.shape[0]

    def construct(self, hidden_ND: Tensor, bias_B1SC: Tensor, rows: Tensor, query_ND: Tensor | None = None) -> Tensor:
        layer, attention = self.layer, self.layer.attention
        normed_ND = layer.norm1(hidden_ND)
        if query_ND is None:
            query_ND = normed_ND
        query_BHSK = attention.to_heads(attention.query(query_ND), self.batch)
        keys_BHCK, values_BHCK = self.cache(attention.to_heads(attention.key(normed_ND), self.batch),
                                            attention.to_heads(attention.value(normed_ND), self.batch), rows)
        mixed_BHSK = attention.core(query_BHSK, keys_BHCK, values_BHCK, bias_B1SC)
        hidden_ND = layer.add1(hidden_ND, attention.output(attention.from_heads(mixed_BHSK)))
        return layer.add2(hidden_ND, layer.feed_forward(layer.norm2(hidden_ND)))


class CachedDecoder(nn.Cell):
    """Logits of the token after each sequence's last new one, from the new tokens and the cache.

    Args:
        model: its layers and parameters are used, not copied.
        batch: B.
        capacity: C.
        chunk: S of the calls that read a prompt; other calls have S = 1.

    Inputs: ids_BS int32; start_B int32, the position of each sequence's first new token; last_B int32, which of the S
    new tokens is the last real one (the rest is padding). Outputs: logits_BV float32 and their argmax_B; with `every`,
    those of all new tokens, [B S, V] and [B S].

    The query table is indexed by the absolute position, as the position table is (state reuse of the released code).
    Padding may run past the position tables; it is then looked up in their last row and never seen.
    """

    def __init__(self, model: PanGuAlpha, batch: int, capacity: int, chunk: int) -> None:
        super().__init__(auto_prefix=False)
        config = model.config
        self.model, self.batch, self.capacity, self.chunk = model, batch, capacity, chunk
        self.last_position, self.every = config.sequence_length - 1, False
        cells = [CachedLayer(layer, LayerCache(f"cache.{index}", batch, config.heads, capacity,
                                               config.hidden_size // config.heads, model.compute_dtype))
                 for index, layer in enumerate([*model.layers, model.query_layer])]
        self.layers = nn.CellList(cells[:-1], auto_prefix=False)
        self.query_layer = cells[-1]
        self.slots_C = Tensor(np.arange(capacity, dtype=np.int32))
        # Row of the first slot of every sequence and head.
        self.first_BH1 = Tensor(np.arange(batch * config.heads, dtype=np.int32).reshape(batch, -1, 1) * capacity)
        self.gather = ops.Gather()
        self.argmax = ops.Argmax(axis=-1, output_type=mstype.int32)
        self.set_train(False)

    def construct(self, ids_BS: Tensor, start_B: Tensor, last_B: Tensor) -> tuple[Tensor, Tensor]:
        model, length = self.model, ids_BS.shape[1]
        slots_BS = start_B.reshape((-1, 1)) + self.slots_C[:length]
        rows = (self.first_BH1 + slots_BS.reshape((self.batch, 1, length))).reshape((-1,))
        bias_B1SC = self.bias(slots_BS)
        positions_BS = ops.minimum(slots_BS, self.last_position)
        hidden_ND = model.embedding(ids_BS, positions_BS)
        for layer in self.layers:
            hidden_ND = layer(hidden_ND, bias_B1SC, rows)
        if model.norm_first:
            hidden_ND = model.norm(hidden_ND)
        query_ND = ops.cast(model.query_embedding(positions_BS), model.compute_dtype)
        hidden_ND = self.query_layer(hidden_ND, bias_B1SC, rows, query_ND)
        if length > 1 and not self.every:
            hidden_ND = self.gather(hidden_ND, last_B + Tensor(np.arange(self.batch, dtype=np.int32) * length), 0)
        if not model.norm_first:
            hidden_ND = model.norm(hidden_ND)
        logits_BV = ops.cast(model.logits(hidden_ND), mstype.float32)
        return logits_BV, self.argmax(logits_BV)

    def read(self, ids_BS: np.ndarray, start_B: np.ndarray, last_B: np.ndarray | None = None,
             every: bool = False) -> tuple[Tensor, Tensor]:
        """The cell called on int32 arrays, S = chunk or 1.

        MindSpore looks through every child cell before each call to see whether the graph still fits, which takes as
        long as the products of a small model; under names of a phase it does not. So there must be one shape and one
        kind of result per phase.
        """
        if ids_BS.shape not in ((self.batch, 1), (self.batch, self.chunk)):
            raise ValueError(f"{ids_BS.shape} is neither one token nor {self.chunk} for each of {self.batch} sequences")
        self.phase = "increment" if ids_BS.shape[1] == 1 else "score" if every else "prefill"
        self.every = every
        last_B = np.zeros(self.batch, np.int32) if last_B is None else last_B
        return self(Tensor(ids_BS), Tensor(start_B), Tensor(last_B))

    def bias(self, slots_BS: Tensor) -> Tensor:
        """bias_B1SC: a token sees the slots up to its own."""
        hidden_BSC = self.slots_C.reshape((1, 1, -1)) > slots_BS.reshape((self.batch, -1, 1))
        return ops.cast(hidden_BSC, mstype.float32).reshape((self.batch, 1, -1, self.capacity)) * MASKED
