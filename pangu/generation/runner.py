"""Running a model over new tokens of many sequences: what the scheduler needs, and which implementation there is.

The C++ kernels (`kernel_runner`) run on the CPU in float32, with a cache in small blocks; elsewhere MindSpore's graph
(`graph_runner`) does the same with one large block for each sequence. Shapes: M rows with logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pangu.generation.sampling import Draw


@dataclass(frozen=True)
class Span:
    """New tokens of one sequence.

    Args:
        table: blocks of the sequence, enough for its tokens up to the last new one.
        start: position of the first new token; all before it have been read.
        ids: the new tokens.
        outputs: for how many of them, counted from the last, logits are wanted.
    """

    table: Sequence[int]
    start: int
    ids: Sequence[int]
    outputs: int


@dataclass(frozen=True)
class LogProbabilities:
    """Of M rows: log p of the target [M], how many tokens are likelier [M], and the k likeliest [M, k], best first."""

    target: np.ndarray
    above: np.ndarray
    top_ids: np.ndarray
    top: np.ndarray


class Runner(Protocol):
    """A model with a cache. Used by one thread at a time."""

    block_size: int
    """Tokens of a block."""
    blocks: int
    """Blocks of the cache."""
    shares_prefixes: bool
    """Whether a full block may belong to several sequences."""

    def run(self, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """Reads the new tokens; logits [M, V] float32 and their argmax [M], in the order of spans and tokens.

        Both arrays are the runner's and hold until the next call.
        """

    def log_probabilities(self, logits_MV: np.ndarray, targets_M: np.ndarray, k: int) -> LogProbabilities:
        """See `log_probabilities`."""

    def choose(self, logits_MV: np.ndarray, rows: Sequence[int], draws: Sequence[Draw]) -> list[int]:
        """The token that each draw takes from its row; `pangu.generation.sampling.choose` says how."""


def log_probabilities(logits_MV: np.ndarray, targets_M: np.ndarray, k: int) -> LogProbabilities:
    """log softmax in float32, the sum in float64; equal tokens by id. What is equal in logits is equal in log p."""
    rows = np.arange(len(logits_MV))
    highest_M1 = logits_MV.max(-1, keepdims=True)
    sum_M1 = np.exp((logits_MV - highest_M1).astype(np.float64)).sum(-1, keepdims=True)
    log_p_MV = logits_MV - (np.log(sum_M1) + highest_M1).astype(np.float32)
    target_M = logits_MV[rows, targets_M]
    top_ids_Mk = np.argsort(-logits_MV, -1, kind="stable")[:, :k].astype(np.int32)
    return LogProbabilities(log_p_MV[rows, targets_M], (logits_MV > target_M[:, None]).sum(-1).astype(np.int32),
                            top_ids_Mk, np.take_along_axis(log_p_MV, top_ids_Mk, -1))


def cache_bytes_per_token(config: Any) -> int:
    """Bytes of keys and values of one token in float32."""
    return 2 * 4 * config.layers * config.hidden_size
