"""Shapes of the graphs that a sharded model generates and scores with. Needs no MindSpore."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SLOTS = 16
"""Tokens of a block of the cache."""
KINDS = ("decode", "prefill", "score")
"""decode: the next token of many sequences; prefill: a chunk of prompts, with logits of few tokens; score: the same
with logits of all."""


_STARTS = ("embedding_std", "linear_std", "ffn_std")


@dataclass(frozen=True)
class SpanShape:
    """Of one graph.

    Args:
        groups: G, parts of the batch that look at slots of their own.
        tokens: S, new tokens of a group.
        seen: C, slots that a group looks at.
        rows: M, tokens with logits.
        cache: T, slots of the cache that the graph is compiled with; torch may hold another number.
    """

    groups: int
    tokens: int
    seen: int
    rows: int
    cache: int

    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the graph's inputs by name, in order; see `graph.SpanDecoder`."""
        return {"ids": (self.groups, self.tokens), "positions": (self.groups, self.tokens),
                "write": (self.groups * self.tokens,), "read": (self.groups, self.seen),
                "visible": (self.groups, self.tokens, self.seen), "wanted": (self.rows,)}


def span_shape(kind: str, model: Any, generate: Any) -> SpanShape:
    """The shape of a kind of graph.

    Args:
        kind: one of KINDS.
        model: a `pangu.config.ModelConfig`.
        generate: `batch_size` sequences decode together, `prefill_chunk` tokens of prompts are read at once.
    """
    context, chunk, batch = _blocks(model.sequence_length), _blocks(generate.prefill_chunk), generate.batch_size
    cache = (batch + 1) * context
    if kind == "decode":
        return SpanShape(batch, 1, context, batch, cache)
    # Room for one whole sequence and for the own tokens of those that share its beginning.
    rows = chunk if kind == "score" else min(batch, chunk)
    return SpanShape(1, chunk, context + chunk, rows, cache)


def shapes_inference(settings: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's settings (as JSON) that shapes the graphs of `pangu.build.PanguPackage.inference`."""
    model, layout, generate = (settings[block] for block in ("model", "parallel", "generate"))
    return {
        "model": {key: value for key, value in model.items() if key not in ("dropout", *_STARTS)},
        "train": {"precision": settings["train"]["precision"]},
        "generate": {key: generate[key] for key in ("batch_size", "prefill_chunk")},
        "parallel": {"op": layout["op"], "vocabulary": layout["vocabulary"],
                     "pipeline": {key: layout["pipeline"][key] for key in ("stages", "offsets")}},
    }  # fmt: skip


def _blocks(tokens: int) -> int:
    return -(-tokens // SLOTS) * SLOTS
