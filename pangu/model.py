"""PanGu-alpha: a stack of decoder layers, a query layer on top and a head tied to the word embedding.

Shapes: B batch, S sequence, D hidden width, H heads, F feed-forward width, V vocabulary, N = B S tokens.
Source: PanGu-alpha (arXiv 2104.12369) section 2; choices the paper leaves open follow the released code.
"""

from __future__ import annotations

import math

import mindspore
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from pangu.config import ModelConfig
from parallel.layers.attention import Attention, Form, mask_of
from parallel.layers.dropout import Dropout, DropoutKeys
from parallel.layers.embedding import Embedding, Residual, TiedHead
from parallel.layers.feed_forward import FeedForward
from parallel.layers.loss import CrossEntropy, MaskedMean, TiedCrossEntropy
from parallel.layers.norm import LayerNorm
from parallel.sharding.layout import Layer, OpSharding
from parallel.sharding.trainable import Trainable


class DecoderLayer(nn.Cell):
    """x = x + attention(norm(x)); x = x + feed_forward(norm(x)) (eq. 2-4).

    The query layer is the same cell called with another query input (eq. 5): the residual is the layer's own input.
    """

    def __init__(self, config: ModelConfig, compute_dtype: mstype, form: Form = "written_out") -> None:
        super().__init__()
        width, depth_std = config.hidden_size, config.ffn_std / math.sqrt(2 * config.layers)
        self.norm1 = LayerNorm(width, compute_dtype=compute_dtype)
        self.attention = Attention(
            width, config.heads, qkv_std=config.linear_std, output_std=depth_std, dropout=config.dropout,
            compute_dtype=compute_dtype, softmax_dtype=getattr(mstype, config.softmax_dtype),
            form=form, most_documents=config.most_documents)
        self.norm2 = LayerNorm(width, compute_dtype=compute_dtype)
        self.feed_forward = FeedForward(width, config.ffn, mapping_std=config.ffn_std, projection_std=depth_std,
                                        gelu=config.gelu, compute_dtype=compute_dtype)
        self.dropout_keys = DropoutKeys()
        self.dropout1 = Dropout(config.dropout, ("residual", None))
        self.dropout2 = Dropout(config.dropout, ("residual", None))
        self.add1, self.add2 = Residual(), Residual()

    def construct(self, hidden_ND: Tensor, told: Tensor, query_ND: Tensor | None = None,
                  rows_B: Tensor | None = None) -> Tensor:
        normed_ND, keys = self.norm1(hidden_ND), None
        if query_ND is None:
            query_ND = normed_ND
        if rows_B is not None:
            keys = self.dropout_keys(rows_B, hidden_ND.shape[0] // rows_B.shape[0])
        hidden_ND = self.add1(hidden_ND, self.dropout1(self.attention(query_ND, normed_ND, told, keys), keys))
        return self.add2(hidden_ND, self.dropout2(self.feed_forward(self.norm2(hidden_ND)), keys))


class TokenEmbedding(nn.Cell):
    """hidden_ND = dropout(word[ids] + position[positions])."""

    def __init__(self, config: ModelConfig, compute_dtype: mstype, axis: str | None) -> None:
        super().__init__()
        width, std = config.hidden_size, config.embedding_std
        self.word = Embedding(config.vocabulary_size, width, std=std, axis=axis)
        self.position = Embedding(config.sequence_length, width, std=std, start="truncated_normal")
        self.add = Residual()
        self.dropout, self.dropout_keys = Dropout(config.dropout, ("residual", None)), DropoutKeys()
        self.compute_dtype = compute_dtype
        self.cast = ops.Cast()

    def construct(self, ids_BS: Tensor, positions_BS: Tensor, rows_B: Tensor | None = None) -> Tensor:
        keys = self.dropout_keys(rows_B, ids_BS.shape[1]) if rows_B is not None else None
        hidden_ND = self.dropout(self.add(self.word(ids_BS), self.position(positions_BS)), keys)
        return self.cast(hidden_ND, self.compute_dtype)


class PanGuAlpha(nn.Cell):
    """Logits of the next token at every position.

    Args:
        config: sizes and choices.
        compute_dtype: type of the matmuls (float16 on Ascend, float32 on the CPU).
        attention: the form it takes (`parallel.layers.attention`).

    Inputs: ids_BS int32, positions_BS int32, documents_BS int32 (or a mask [B, S, S], see `AttentionBias`).
    Output: logits [N, V].
    """

    def __init__(self, config: ModelConfig, compute_dtype: mstype = mstype.float32,
                 attention: Form = "written_out") -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embedding = TokenEmbedding(config, compute_dtype, "vocabulary")
        # One for each layer, so that pipeline stages make it themselves instead of sending it on; on one stage the
        # compiler merges them.
        self.biases = nn.CellList([mask_of(attention, config.most_documents) for _ in range(config.layers - 1)])
        self.bias = mask_of(attention, config.most_documents)
        self.layers = nn.CellList([DecoderLayer(config, compute_dtype, attention) for _ in range(config.layers - 1)])
        self.query_embedding = Embedding(config.sequence_length, width, std=config.embedding_std,
                                         start="truncated_normal")
        self.query_layer = DecoderLayer(config, compute_dtype, attention)
        self.norm = LayerNorm(width, compute_dtype=compute_dtype)
        self.head = TiedHead(axis="vocabulary")
        self.norm_first = config.final_norm == "before_query"
        self.int8 = False  # see pangu/int8.py
        self.compute_dtype = compute_dtype
        self.cast = ops.Cast()

    def construct(self, ids_BS: Tensor, positions_BS: Tensor, documents_BS: Tensor) -> Tensor:
        return self.logits(self.hidden(ids_BS, positions_BS, documents_BS))

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, V], of what `hidden` gives."""
        if self.int8:
            return self.embedding.word.logits(hidden_ND)
        return self.head(hidden_ND, self.embedding.word.table)

    def hidden(self, ids_BS: Tensor, positions_BS: Tensor, documents_BS: Tensor,
               rows_B: Tensor | None = None) -> Tensor:
        """[N, D]: what the head is applied to; rows_B numbers the samples for dropout."""
        hidden_ND = self.embedding(ids_BS, positions_BS, rows_B)
        for i in range(len(self.layers)):
            hidden_ND = self.layers[i](hidden_ND, self.biases[i](documents_BS), None, rows_B)
        if self.norm_first:
            hidden_ND = self.norm(hidden_ND)
        # The released code indexes the query table with the input's own position: row i asks for token i + 1.
        query_ND = self.cast(self.query_embedding(positions_BS), self.compute_dtype)
        hidden_ND = self.query_layer(hidden_ND, self.bias(documents_BS), query_ND, rows_B)
        if not self.norm_first:
            hidden_ND = self.norm(hidden_ND)
        return hidden_ND

    def pipeline_cells(self) -> list[nn.Cell | list[nn.Cell]]:
        """Cells in the order of the forward pass, for placing them on pipeline stages: what comes before the layers,
        the layers one by one (the query layer is the last) with what they need, what comes after."""
        layers = [list(pair) for pair in zip(self.layers, self.biases, strict=True)]
        return [self.embedding, *layers, [self.query_layer, self.bias], [self.query_embedding, self.norm, self.head]]


class TrainingLoss(Layer, Trainable):
    """Mean negative log-likelihood of the next token over a batch of records.

    Inputs: records_BR int32 with R = S + 1 ids, positions_BS, documents_BS and, in training with dropout, rows_B
    (numbers of the samples, int32). Output: scalar loss in nats per token.
    Tokens are records[:, :-1], labels records[:, 1:]. The loss mask looks at the *input* token (it is 0 where that is
    padding), as in the released code, so the border from one document to the next is predicted too.
    """

    can_weigh = True

    def __init__(self, model: PanGuAlpha, weighted: bool = False) -> None:
        # No prefix: a parameter is called the same in training, generation and on disk.
        super().__init__(auto_prefix=False)
        config = model.config
        self.model, self.pad_id, self.length = model, config.pad_id, config.sequence_length
        self.weighted = weighted
        self.cross_entropy = CrossEntropy(config.vocabulary_size, axis="vocabulary")
        on_cpu = mindspore.get_context("device_target") == "CPU" and model.compute_dtype == mstype.float32
        self.together = TiedCrossEntropy() if on_cpu else None
        self.mean = MaskedMean()
        self.inputs, self.labels, self.differs = ops.StridedSlice(), ops.StridedSlice(), ops.NotEqual()
        self.reshape, self.cast = ops.Reshape(), ops.Cast()

    def construct(self, records_BR: Tensor, positions_BS: Tensor, documents_BS: Tensor,
                  rows_B: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        ids_BS = self.inputs(records_BR, (0, 0), (records_BR.shape[0], self.length), (1, 1))
        nll_N = self.token_nll(records_BR, ids_BS, positions_BS, documents_BS, rows_B)
        counted_BS = self.cast(self.differs(ids_BS, self.pad_id), mstype.float32)
        loss, weight = self.mean(nll_N, self.reshape(counted_BS, (-1,)))
        return (loss, weight) if self.weighted else loss

    def token_nll(self, records_BR: Tensor, ids_BS: Tensor, positions_BS: Tensor, documents_BS: Tensor,
                  rows_B: Tensor | None) -> Tensor:
        """float32 [N]: negative log-likelihood of the next token at every position."""
        batch = records_BR.shape[0]
        labels_BS = self.labels(records_BR, (0, 1), (batch, self.length + 1), (1, 1))
        hidden_ND = self.model.hidden(ids_BS, positions_BS, documents_BS, rows_B)
        table_VD = self.model.embedding.word.table
        logits_NV, labels_N = self.model.head(hidden_ND, table_VD), self.reshape(labels_BS, (-1,))
        if self.together is not None:
            return self.together(ops.stop_gradient(logits_NV), hidden_ND, table_VD, labels_N)
        return self.cross_entropy(logits_NV, labels_N)

    def pipeline_cells(self) -> list[nn.Cell | list[nn.Cell]]:
        """See `PanGuAlpha.pipeline_cells`; the loss goes with the head."""
        *rest, last = self.model.pipeline_cells()
        return [*rest, [*last, self.cross_entropy, self.mean]]

    def shared_parameters(self) -> list[tuple[Parameter, list[nn.Cell]]]:
        """Parameters that cells on several stages use: the word embedding's table, looked up first and last."""
        return [(self.model.embedding.word.table, [self.model.embedding, self.model.head])]

    def sharding(self) -> list[OpSharding]:
        rows = ("batch", None)
        return [OpSharding(self.inputs, (rows,)), OpSharding(self.labels, (rows,)),
                OpSharding(self.differs, (rows, ()))]
