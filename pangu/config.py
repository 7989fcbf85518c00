"""The `model:` block of PanGu-alpha, and which layouts fit it."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from parallel.common.errors import UserError
from parallel.common.settings import Settings
from parallel.sharding.config import ParallelConfig, divides


class ModelConfig(Settings):
    """Sizes and choices of PanGu-alpha (paper Table 1, section 2; start values from the released code)."""

    largest_integer: ClassVar[int] = 1 << 24

    name: Literal["pangu_alpha"] = "pangu_alpha"
    """Which model the file describes."""
    layers: int = Field(4, ge=2, le=10_000)
    """Transformer layers, the query layer on top included (paper's L)."""
    hidden_size: int = Field(128, ge=1)
    """Width of the residual stream (paper's d)."""
    ffn_size: int | None = Field(None, ge=1)
    """Width of the feed-forward networks; None = 4 times hidden_size."""
    heads: int = Field(4, ge=1)
    """Attention heads; must divide hidden_size."""
    vocabulary_size: int = Field(40000, ge=16)
    """Rows of the word embedding; the tokenizer must have just as many pieces."""
    sequence_length: int = Field(1024, ge=2)
    """Positions of the model; records hold one id more (input and shifted label)."""
    dropout: float = Field(0.1, ge=0.0, lt=1.0)
    """Rate after the embedding, on attention probabilities and on the output of attention and feed-forward."""
    final_norm: Literal["before_query", "after_query"] = "before_query"
    """Position of the last layer norm. before_query: released 2.6B and 13B; after_query: the pipeline code of 200B."""
    gelu: Literal["tanh", "fast", "erf"] = "tanh"
    """tanh: released weights; fast: code from r1.5 on; erf: the Hugging Face port."""
    softmax_dtype: Literal["float32", "float16"] = "float32"
    """Type of the attention softmax. float16 is the later code's default and overflows sooner. Flash attention has
    float32."""
    attention: Literal["auto", "flash", "written_out"] = "auto"
    """How training computes attention. flash: CANN's FlashAttentionScore, which keeps no scores (Ascend; CANN has none
    for the Ascend 910 of the Atlas training series). written_out: its products and softmax one by one, as everywhere
    else. auto: flash on Ascend in bf16, which the chips that have the operator have too; written_out elsewhere."""
    most_documents: int = Field(64, ge=1, le=1024)
    """Documents in a record at most, where flash attention is told where each ends (that is without dropout). Records
    with more are refused. Times the records of a device's micro-batch at most 1024."""
    embedding_std: float = Field(0.02, gt=0)
    """Sigma of the three embedding tables (position and query tables: normal truncated at two sigma)."""
    linear_std: float = Field(0.01, gt=0)
    """Sigma of the query, key and value projections."""
    ffn_std: float = Field(0.02, gt=0)
    """Sigma of the first feed-forward matrix; attention output and second matrix take it divided by sqrt(2 layers)."""
    pad_id: int = Field(6, ge=0)
    """Padding: as input it is left out of the loss and of attention."""
    eot_id: int = Field(9, ge=0)
    """End of document, at which attention and positions start anew, and which ends generation."""

    @property
    def ffn(self) -> int:
        """Feed-forward width, the default filled in."""
        return self.ffn_size or 4 * self.hidden_size

    def is_told_ends(self, precision: str, backend: str) -> bool:
        """Whether a run trains by flash attention that is told where documents end, if it trains on Ascend.

        Args:
            precision: `train.precision`.
            backend: `parallel.backend`.
        """
        chosen = self.attention == "flash" or (self.attention == "auto" and precision == "bf16" and backend != "torch")
        return chosen and self.dropout == 0.0

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.hidden_size % self.heads:
            raise UserError(f"heads must divide hidden_size {self.hidden_size}", where="model.heads", value=self.heads)
        for name in ("pad_id", "eot_id"):
            if getattr(self, name) >= self.vocabulary_size:
                raise UserError(f"must be below vocabulary_size {self.vocabulary_size}", where=f"model.{name}",
                                value=getattr(self, name))
        return self


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raises a `UserError` unless every axis divides what it shards."""
    op, stages = parallel.op, parallel.pipeline.stages
    divides(op, model.heads, where="parallel.op", what="model.heads")
    divides(op, model.ffn, where="parallel.op", what="feed-forward width")
    if parallel.vocabulary:
        divides(op, model.vocabulary_size, where="parallel.op", what="model.vocabulary_size",
                hint="or set parallel.vocabulary: false")
    if stages > model.layers:
        raise UserError(f"more stages than the {model.layers} layers", where="parallel.pipeline.stages", value=stages)
    if parallel.expert > 1:
        raise UserError("PanGu-alpha has no experts to shard", where="parallel.expert", value=parallel.expert,
                        hint="set it to 1")
    if parallel.sequence:
        divides(op, model.sequence_length, where="parallel.op", what="model.sequence_length")
