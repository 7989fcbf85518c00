"""A `Runner` of sharded graphs over a paged cache: the first rank of a group says which spans a call reads, all ranks
of the group lay them out and run the graph.

Shapes: see `graph`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pangu.generation import runner
from pangu.generation.choosing import LibraryChoice
from pangu.generation.runner import LogProbabilities, Span
from pangu.generation.sampling import Draw, choose
from pangu.generation.sharded.shapes import KINDS, SLOTS, SpanShape
from pangu.native import kernel_library


class GraphRank(Protocol):
    """What runs the graphs of this process: `parallel.torch_runtime.inference.rank.InferenceRank`."""

    def shape(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Shapes of a graph's inputs by name."""

    def run(self, kind: str, inputs: Sequence[np.ndarray]) -> Any:
        """The logits as a torch tensor on the group's first rank, None elsewhere."""


@dataclass(frozen=True)
class Call:
    """One run of a graph over parts of spans.

    Args:
        kind: which graph.
        parts: spans; of a graph with one group, all of them side by side, else one a group.
    """

    kind: str
    parts: list[Span]

    def packed(self) -> np.ndarray:
        """As int32s, for the other ranks."""
        found = [KINDS.index(self.kind), len(self.parts)]
        for part in self.parts:
            found += [part.start, len(part.ids), part.outputs, len(part.table), *part.ids, *part.table]
        return np.array(found, np.int32)

    @classmethod
    def unpacked(cls, message: np.ndarray) -> Call:
        """What `packed` told."""
        kind, count = (int(item) for item in message[:2])
        parts, place = [], 2
        for _ in range(count):
            start, ids, outputs, table = (int(item) for item in message[place:place + 4])
            place += 4
            parts.append(Span(message[place + ids:place + ids + table], start, message[place:place + ids], outputs))
            place += ids + table
        return cls(KINDS[kind], parts)

    def arrays(self, shapes: dict[str, tuple[int, ...]], spare: int) -> list[np.ndarray]:
        """The graph's inputs.

        Args:
            shapes: of the inputs, by name.
            spare: first slot of a block that no sequence has; padding is written there.
        """
        made = {name: np.zeros(shape, np.int8 if name == "visible" else np.int32) for name, shape in shapes.items()}
        groups, tokens = shapes["ids"]
        made["write"][:] = spare
        made["read"][:] = spare
        columns: dict[int, int] = {}
        row = wanted = 0
        for number, part in enumerate(self.parts):
            if groups > 1:
                columns, row = {}, number * tokens
            self._lay(part, row, columns, made)
            last = row + len(part.ids)
            made["wanted"][wanted:wanted + part.outputs] = np.arange(last - part.outputs, last)
            wanted += part.outputs
            row = last
        return list(made.values())

    @staticmethod
    def _lay(part: Span, row: int, columns: dict[int, int], made: dict[str, np.ndarray]) -> None:
        """One part's tokens from `row` on; `columns` says where in its group's slots a block lies."""
        tokens = made["ids"].shape[1]
        group, first = divmod(row, tokens)
        count, end = len(part.ids), part.start + len(part.ids)
        positions = np.arange(part.start, end)
        made["ids"][group, first:first + count] = part.ids
        made["positions"][group, first:first + count] = positions
        blocks = np.asarray(part.table[:-(-end // SLOTS)], np.int64)
        made["write"][row:row + count] = blocks[positions // SLOTS] * SLOTS + positions % SLOTS
        fresh = [block for block in blocks.tolist() if block not in columns]
        begin = len(columns) * SLOTS
        columns |= {block: begin + place * SLOTS for place, block in enumerate(fresh)}
        slots = np.array(fresh, np.int64)[:, None] * SLOTS + np.arange(SLOTS)
        made["read"][group, begin:begin + slots.size] = slots.reshape(-1)
        seen = made["visible"][group, first:first + count]
        own = np.arange(len(blocks) * SLOTS) <= positions[:, None]
        if len(fresh) == len(blocks):
            seen[:, begin:begin + own.shape[1]] = own
        else:
            places = np.array([columns[block] for block in blocks.tolist()])[:, None] + np.arange(SLOTS)
            seen[:, places.reshape(-1)] = own


class SpanRunner:
    """See `Runner`. For the first rank of a group.

    Args:
        rank: the graphs.
        send: gives the other ranks of the group a message.
        blocks: of the cache; the graphs' cache has one more.
        config: the model's sizes.
        lock: held while all ranks run a call: those of two models must not come in another order on another rank.
    """

    block_size, shares_prefixes = SLOTS, True

    def __init__(self, rank: GraphRank, send: Any, blocks: int, config: Any, lock: Any = None) -> None:
        self.rank, self.send, self.blocks, self.config = rank, send, blocks, config
        self._lock = lock or threading.RLock()
        self.shapes = {kind: rank.shape(kind) for kind in KINDS}
        library = kernel_library()
        self._choice = LibraryChoice(library) if library is not None else None

    def run(self, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """See `Runner`."""
        logits: list[list[np.ndarray]] = [[] for _ in spans]
        best: list[list[np.ndarray]] = [[] for _ in spans]
        for numbers, call in self.calls(spans):
            with self._lock:
                self.send(call.packed())
                found = run_call(self.rank, call, self.shapes, self.blocks)
            wanted = sum(part.outputs for part in call.parts)
            if not wanted:
                continue
            rows, likeliest = found[:wanted].cpu().numpy(), found[:wanted].argmax(-1).cpu().numpy()
            first = 0
            for number, part in zip(numbers, call.parts, strict=True):
                logits[number].append(rows[first:first + part.outputs])
                best[number].append(likeliest[first:first + part.outputs])
                first += part.outputs
        if not any(map(len, logits)):
            return np.empty((0, self.config.vocabulary_size), np.float32), np.empty(0, np.int32)
        return (np.concatenate([row for rows in logits for row in rows]),
                np.concatenate([row for rows in best for row in rows]).astype(np.int32))

    def calls(self, spans: Sequence[Span]) -> list[tuple[list[int], Call]]:
        """The calls that read all spans, each with the numbers of the spans that its parts belong to."""
        single = [number for number, span in enumerate(spans) if len(span.ids) == 1]
        groups = self.shapes["decode"]["ids"][0]
        found = [(single[first:first + groups], Call("decode", [spans[number] for number in
                                                               single[first:first + groups]]))
                 for first in range(0, len(single), groups)]
        packer = _Packer(self.shapes["prefill"])
        for number, span in enumerate(spans):
            if len(span.ids) > 1:
                packer.add(number, span)
        return found + packer.finish()

    def log_probabilities(self, logits_MV: np.ndarray, targets_M: np.ndarray, k: int) -> LogProbabilities:
        """See `Runner`."""
        if self._choice is not None:
            return self._choice.log_probabilities(logits_MV, targets_M, k)
        return runner.log_probabilities(logits_MV, targets_M, k)

    def choose(self, logits_MV: np.ndarray, rows: Sequence[int], draws: Sequence[Draw]) -> list[int]:
        """See `Runner`."""
        if self._choice is not None:
            return self._choice.choose(logits_MV, rows, draws)
        return [choose(logits_MV[row], draw) for row, draw in zip(rows, draws, strict=True)]


class _Packer:
    """Puts spans of several tokens side by side into calls of the graph with one group."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.tokens, self.seen, self.rows = shapes["ids"][1], shapes["read"][1] // SLOTS, shapes["wanted"][0]
        self.calls: list[tuple[list[int], Call]] = []
        self._begin()

    def _begin(self) -> None:
        self.numbers, self.parts, self.blocks, self.left = [], [], set(), self.tokens

    def add(self, number: int, span: Span) -> None:
        """Reads a span, in several calls if it is long."""
        done = 0
        while done < len(span.ids):
            count = min(self.left, len(span.ids) - done)
            needed = {int(block) for block in span.table[:-(-(span.start + done + count) // SLOTS)]}
            if count == 0 or (self.parts and len(self.blocks | needed) > self.seen):
                self._flush()
                continue
            outputs = max(0, min(count, span.outputs - (len(span.ids) - done - count)))
            self.parts.append(Span(span.table, span.start + done, span.ids[done:done + count], outputs))
            self.numbers.append(number)
            self.blocks |= needed
            self.left -= count
            done += count

    def _flush(self) -> None:
        if self.parts:
            wanted = sum(part.outputs for part in self.parts)
            self.calls.append((self.numbers, Call("prefill" if wanted <= self.rows else "score", self.parts)))
        self._begin()

    def finish(self) -> list[tuple[list[int], Call]]:
        """All calls."""
        self._flush()
        return self.calls


def run_call(rank: GraphRank, call: Call, shapes: dict[str, dict[str, tuple[int, ...]]], blocks: int) -> Any:
    """Runs a call on this rank; its logits where this is the group's first rank."""
    return rank.run(call.kind, call.arrays(shapes[call.kind], blocks * SLOTS))


def sample_call(kind: str, shape: SpanShape, model: Any, seed: int) -> list[np.ndarray]:
    """Inputs of a graph: random ids, at random places of random blocks; for proofs.

    Args:
        kind, shape: of the graph.
        model: a `pangu.config.ModelConfig`.
        seed: of the random numbers.
    """
    generator = np.random.default_rng(seed)
    blocks = shape.cache // SLOTS - 1
    free = generator.permutation(blocks).tolist()
    count = shape.groups if shape.groups > 1 else min(2, shape.rows, shape.tokens)
    tokens = 1 if kind == "decode" else shape.tokens // count
    parts = []
    for _ in range(count):
        start = int(generator.integers(0, model.sequence_length - tokens + 1)) // (1 if shape.groups > 1 else count)
        table = [free.pop() for _ in range(-(-(start + tokens) // SLOTS))]
        ids = generator.integers(0, model.vocabulary_size, tokens)
        parts.append(Span(table, start, ids, min(tokens, max(1, shape.rows // count))))
    return Call(kind, parts).arrays(shape.inputs(), blocks * SLOTS)
