"""Pairs of prompt and answer as batches of records: documents one after another, the loss on answers alone.

Shapes: B batch (of one process), S sequence, R = S + 1 ids of a record.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pangu.data.dataset import check_documents, document_positions, shuffled
from parallel.common.errors import UserError
from parallel.common.lines import text_lines
from parallel.common.structured import BadText, parse_object
from parallel.training.data_source import DataSource

_MOST_PAIRS = 5_000_000


def read_pairs(path: str | Path) -> list[tuple[str, str]]:
    """(prompt, answer) of every line of a jsonl file; raises as `numbered_pairs`."""
    return [(prompt, answer) for prompt, answer, _ in numbered_pairs(path)]


def numbered_pairs(path: str | Path) -> list[tuple[str, str, int]]:
    """(prompt, answer, number of the line) of every line of a jsonl file that is not blank.

    Raises:
        UserError: no such file, a line that is no object with two texts, an empty answer, none at all.
    """
    pairs = []
    for number, line in text_lines(path):
        if not line.strip():
            continue
        pairs.append((*_pair(line, path, number), number))
        if len(pairs) > _MOST_PAIRS:
            raise UserError("more pairs than allowed", where=path, value=_MOST_PAIRS)
    if not pairs:
        raise UserError("there are no pairs in the file", where=path, hint='a line is {"prompt": ..., "answer": ...}')
    return pairs


def _pair(line: str, path: str | Path, number: int) -> tuple[str, str]:
    where = f"{path}, line {number}"
    try:
        row = parse_object(line)
    except BadText as error:
        what = str(error) if str(error).startswith("not JSON") else f"not a JSON object: {error}"
        raise UserError(what, where=where, value=line.strip()) from None
    for key in ("prompt", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f"'{key}' is no text", where=where, value=row.get(key))
    return row["prompt"], row["answer"]


class PairsDataset(DataSource):
    """Batches of pairs for the trainer; batch i depends on the seed and i alone.

    A pair is the document `prompt answer <eot>`. Documents fill records in the order of the file, none is divided;
    every document has positions and attention of its own. Columns: input_ids [B, R], position_ids, documents and
    counted [B, S], all int32; counted is 1 where the next token belongs to an answer (its end included).

    Args:
        path: jsonl file of pairs.
        tokenizer: with `encode`, `eot_id`, `pad_id`.
        batch_size: records of one step over all ranks.
        seed: of the order; each epoch has its own.
        sequence_length: S.
        shard: (index, count) of this rank.
        repeat: on, epochs without end; off, one pass in the file's order, the last batch filled with padding.
        most_documents: pairs in a record; None = any number.

    Raises:
        UserError: see `numbered_pairs`; a pair longer than the model's context; a batch that ranks cannot share; a
            record with more pairs than `most_documents`.
    """

    columns = ("input_ids", "position_ids", "documents", "counted")

    def __init__(self, path: str | Path, tokenizer: Any, *, batch_size: int, seed: int, sequence_length: int,
                 shard: tuple[int, int] = (0, 1), repeat: bool = True, most_documents: int | None = None) -> None:
        if batch_size % shard[1]:
            raise UserError("the batch cannot be shared equally", where="global_batch_size", value=batch_size,
                            hint=f"choose a multiple of the {shard[1]} data-parallel ranks")
        self.batch_size, self.seed, self.repeat, self.length = batch_size, seed, repeat, sequence_length
        self.eot_id, self.pad_id = tokenizer.eot_id, tokenizer.pad_id
        self.ids, self.counted = self._records(path, tokenizer)
        check_documents(document_positions(self.ids[:, :-1], self.eot_id)[1], most_documents, Path(path))
        self.records = len(self.ids)
        rank, ranks = shard
        self._slice = slice(rank * batch_size // ranks, (rank + 1) * batch_size // ranks)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that show every record at least once."""
        return -(-self.records // self.batch_size)

    def batches(self, start_step: int = 0) -> Iterator[tuple[np.ndarray, ...]]:
        """Batches from number `start_step` on, as `columns`."""
        step = start_step
        while self.repeat or step < self.steps_per_epoch:
            numbers = self._numbers(step)
            ids_BR = np.where(numbers[:, None] >= 0, self.ids[numbers], self.pad_id).astype(np.int32)
            counted_BS = np.where(numbers[:, None] >= 0, self.counted[numbers], 0).astype(np.int32)
            yield ids_BR, *document_positions(ids_BR[:, :-1], self.eot_id), counted_BS
            step += 1

    def _numbers(self, step: int) -> np.ndarray:
        places = step * self.batch_size + np.arange(self._slice.start, self._slice.stop, dtype=np.int64)
        if not self.repeat:
            return np.where(places < self.records, places, -1)
        epochs, numbers = places // self.records, places % self.records
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            numbers[chosen] = shuffled(numbers[chosen], self.records, (self.seed << 32) + int(epoch))
        return numbers

    def _records(self, path: str | Path, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
        rows_ids, rows_counted, ids, counted = [], [], [], []
        for prompt, answer, number in numbered_pairs(path):
            front, back = tokenizer.encode(prompt), [*tokenizer.encode(answer), self.eot_id]
            if len(front) + len(back) > self.length + 1:
                raise UserError(f"the pair has {len(front) + len(back)} tokens, the model reads {self.length + 1}",
                                where=f"{path}, line {number}", hint="shorten the prompt")
            if len(ids) + len(front) + len(back) > self.length + 1:
                rows_ids.append(ids)
                rows_counted.append(counted)
                ids, counted = [], []
            # Position i predicts token i + 1: the last token of the prompt predicts the answer's first.
            counted = counted + [0] * len(front) + [1] * len(back)
            ids = ids + front + back
        rows_ids.append(ids)
        rows_counted.append(counted)
        return self._padded(rows_ids, rows_counted)

    def _padded(self, rows_ids: list[list[int]], rows_counted: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        ids_NR = np.full((len(rows_ids), self.length + 1), self.pad_id, np.int32)
        counted_NR = np.zeros((len(rows_ids), self.length + 1), np.int32)
        for place, (ids, counted) in enumerate(zip(rows_ids, rows_counted, strict=True)):
            ids_NR[place, :len(ids)] = ids
            counted_NR[place, :len(counted)] = counted
        return ids_NR, counted_NR[:, 1:]
