"""A `Runner` of MindSpore's own kernels, for what the C++ ones do not do: other devices, half precision, no compiler.

Each sequence has one block, a row of `CachedDecoder`'s cache, and the graph always works on all rows. A row's result
depends on its sequence alone as far as MindSpore's products do not look at their row's neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pangu.generation.kv_cache import CachedDecoder
from pangu.generation.runner import LogProbabilities, Span, log_probabilities
from pangu.generation.sampling import Draw, choose


class GraphRunner:
    """Args:
        model: a `pangu.model.PanGuAlpha`.
        sequences: rows of the cache.
        chunk: tokens of a prompt that are read at once.
    """

    shares_prefixes = False

    def __init__(self, model: Any, sequences: int, chunk: int) -> None:
        self.config, self.chunk = model.config, chunk
        # Rows with nothing to read get their padding where no token of theirs ever is.
        self._spare = -(-self.config.sequence_length // chunk) * chunk
        self.blocks, self.block_size = sequences, self._spare + chunk
        self.decoder = CachedDecoder(model, sequences, self.block_size, chunk)

    def run(self, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """See `Runner`."""
        logits: list[list[np.ndarray]] = [[] for _ in spans]
        done = [0] * len(spans)
        single = [number for number, span in enumerate(spans) if len(span.ids) == 1]
        if single:
            self._call(spans, single, done, 1, logits)
        while left := [number for number, span in enumerate(spans) if done[number] < len(span.ids)]:
            self._call(spans, left, done, self.chunk, logits)
        rows = [row for found in logits for row in found]
        if not rows:
            return np.empty((0, self.config.vocabulary_size), np.float32), np.empty(0, np.int32)
        logits_MV = np.concatenate(rows)
        return logits_MV, logits_MV.argmax(-1).astype(np.int32)

    def _call(self, spans: Sequence[Span], members: list[int], done: list[int], width: int,
              logits: list[list[np.ndarray]]) -> None:
        """Reads up to `width` tokens of each member, and adds the logits that are wanted."""
        ids_BS = np.full((self.blocks, width), self.config.pad_id, np.int32)
        start_B, last_B = np.full(self.blocks, self._spare, np.int32), np.zeros(self.blocks, np.int32)
        wanted = {}
        for number in members:
            span, row = spans[number], spans[number].table[0]
            part = span.ids[done[number]:done[number] + width]
            ids_BS[row, :len(part)] = part
            start_B[row], last_B[row] = span.start + done[number], len(part) - 1
            done[number] += len(part)
            wanted[number] = max(0, min(len(part), span.outputs - (len(span.ids) - done[number])))
        every = width > 1 and any(count > 1 for count in wanted.values())
        result = self.decoder.read(ids_BS, start_B, last_B, every)[0].asnumpy()
        for number, count in wanted.items():
            row = spans[number].table[0]
            if every:
                end = row * width + last_B[row] + 1
                logits[number].append(result[end - count:end].copy())
            elif count:
                logits[number].append(result[row:row + 1].copy())

    def log_probabilities(self, logits_MV: np.ndarray, targets_M: np.ndarray, k: int) -> LogProbabilities:
        """See `Runner`."""
        return log_probabilities(logits_MV, targets_M, k)

    def choose(self, logits_MV: np.ndarray, rows: Sequence[int], draws: Sequence[Draw]) -> list[int]:
        """See `Runner`."""
        return [choose(logits_MV[row], draw) for row, draw in zip(rows, draws, strict=True)]
