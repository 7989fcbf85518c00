"""From records to what a model is asked: candidates, demonstrations in front, lengths that fit.

Solved examples are encoded apart from the instance and joined as ids, so all instances share the same ids in front
(with a newline as separator these are the ids of the joined text). Nothing is truncated in silence: examples are left
out first, then the fields named in `shorten` lose characters, alike for all candidates, and both are counted.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from pangu.evaluation.questions import common_prefix
from pangu.evaluation.task import Source, TaskSettings, render
from parallel.common.errors import UserError

FEW = "few"
EXAMPLE_POOL = 20_000  # records read for examples at most
LONGEST_PASSAGE, LONGEST_SENTENCE = 400, 80  # characters of a passage in one-shot and in dynamic few-shot examples
_SENTENCE_ENDS = "。！？!?\n"

Request = tuple[list[int], list[int]]  # prefix ids, scored ids


@dataclass
class Instance:
    """What a model is asked for one record."""

    id: str
    group: str
    """Passage it belongs to, or its own id."""
    part: str
    """File it is in, where a task has several."""
    target: Any
    """Index of the right candidate, or the accepted answers."""
    candidates: list[str] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    """One per candidate."""
    prompt: list[int] = field(default_factory=list)
    """Generation: ids to go on from."""
    shots: int = 0
    """Solved examples that fitted."""
    truncated: int = 0
    """Characters that did not fit."""


class InstanceBuilder:
    """Makes the instances of a task.

    Args:
        task: the task.
        source: its data.
        tokenizer: with `encode`.
        context: tokens that the model reads at most.
        shots: demonstrations per instance, or "few" for the paper's number.
        seed: of examples, wrong labels and `limit`.
    """

    def __init__(self, task: TaskSettings, source: Source, tokenizer: Any, context: int, shots: int | str = 0,
                 seed: int = 1) -> None:
        self.task, self.source, self.tokenizer, self.seed = task, source, tokenizer, seed
        self.shots = task.shots if shots == FEW else int(shots)
        # The last id is scored or generated, never read.
        self.room = context + 1 - (task.decoding.max_new_tokens if task.kind == "generation" else 0)
        if self.room < 2:
            raise UserError(f"the context of {context} tokens leaves no room for a prompt", where=task.name,
                            value=task.decoding.max_new_tokens)
        self._example_ids: dict[str, list[int]] = {}

    def instances(self, limit: int | None = None) -> list[Instance]:
        """All instances, or `limit` of them drawn at random (files are often sorted by label), in the file's order.

        Raises:
            UserError: a field is missing, or an instance does not fit even when shortened.
        """
        records = list(self.source.records())
        if not records:
            raise UserError("there is no instance in the file", where=self.source.paths[0])
        pool = self._pool() if self.shots or (self.task.label and not self.task.labels) else []
        self.words = self._label_words(records, pool)
        self.order = self._example_order(pool, self._generator("examples"))
        self.pool = pool
        if limit is not None and limit < len(records):
            chosen = self._generator("limit").choice(len(records), limit, replace=False)
            records = [records[index] for index in sorted(chosen)]
        return [self.build(record) for record in records]

    def _generator(self, *what: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, *(zlib.crc32(word.encode()) for word in (self.task.name, *what))])

    def _pool(self) -> list[dict]:
        return list(islice(self.source.examples(), EXAMPLE_POOL))

    # ------------------------------------------------------------ labels and candidates

    def _label_words(self, records: list[dict], pool: list[dict]) -> dict[str, str]:
        """Every label with its word, sorted, so that the order of a file or YAML has no influence."""
        if self.task.label is None:
            return {}
        words = self.task.labels or {str(row[self.task.label]): str(row[self.task.label]) for row in records + pool}
        return dict(sorted(words.items()))

    def _candidates(self, record: dict) -> tuple[list[str], int]:
        """Words of the candidates and the index of the right one."""
        if self.task.label is None:
            return [str(word) for word in record["candidates"]], int(record["answer"])
        right = str(record[self.task.label])
        if right not in self.words:
            raise UserError("the label is unknown", where=f"{self.source.paths[0]}, record {record['id']}", value=right,
                            hint=f"known: {', '.join(self.words)}")
        labels = list(self.words)
        if self.task.negatives is not None:
            wrong = [label for label in labels if label != right]
            drawn = self._generator("negatives", record["id"]).choice(
                len(wrong), min(self.task.negatives, len(wrong)), replace=False)
            labels = sorted([right, *(wrong[index] for index in drawn)])
        return [self.words[label] for label in labels], labels.index(right)

    # ------------------------------------------------------------ one instance

    def build(self, record: dict) -> Instance:
        """The instance of one record."""
        task = self.task
        instance = Instance(record["id"], str(record.get("group", record["id"])), record.get("part", ""), None)
        if task.kind == "generation":
            instance.target = list(record["answers"])
            fields, instance.truncated = self._fit(record,
                                                   lambda fields: len(self._encode(render(task.prefix, fields))))
            ids = self._encode(render(task.prefix, fields))
            front, instance.shots = self._examples(record, len(ids))
            instance.prompt = front + ids
            return instance
        if task.kind == "continuation":
            instance.candidates, instance.target = [""], 0
        else:
            instance.candidates, instance.target = self._candidates(record)
        words = instance.candidates
        fields, instance.truncated = self._fit(
            record, lambda fields: max(len(ids) for ids, _ in self._encoded(fields, words)))
        encoded = self._encoded(fields, words)
        front, instance.shots = self._examples(record, max(len(ids) for ids, _ in encoded))
        instance.requests = [split_request(front, ids, first) for ids, first in encoded]
        return instance

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text))

    def _encoded(self, fields: dict, words: list[str]) -> list[tuple[list[int], int]]:
        """Ids of each candidate's text and where its scored part begins: what the ids with and without it share."""
        encoded = []
        for word in words:
            named = {**fields, "label": word}
            prefix = render(self.task.prefix, named)
            ids = self._encode(prefix + render(self.task.scored, named))
            # Words are segmented differently at the joint, so the prefix alone may have other ids, even more of them.
            encoded.append((ids, min(common_prefix([self._encode(prefix), ids]), len(ids) - 1)))
        if "{label}" not in self.task.prefix:
            # One prefix for all: the same position for all, else means over different spans would be compared.
            first = min(first for _, first in encoded)
            encoded = [(ids, first) for ids, _ in encoded]
        return encoded

    def _fit(self, record: dict, length: Callable[[dict], int]) -> tuple[dict, int]:
        """The fields, shortened until `length` tokens fit, and how many characters that took."""
        fields, truncated = dict(record), 0
        for name, side in self.task.shorten.items():
            if length(fields) <= self.room:
                return fields, truncated
            text = str(fields[name])

            def kept(count: int, text: str = text, side: str = side) -> str:
                return text[:count] if side == "end" else text[len(text) - count:]

            low, high = min(1, len(text)), len(text)  # one character at least stays
            while low < high:
                middle = (low + high + 1) // 2
                if length({**fields, name: kept(middle)}) <= self.room:
                    low = middle
                else:
                    high = middle - 1
            fields[name], truncated = kept(low), truncated + len(text) - low
        if (tokens := length(fields)) > self.room:
            raise UserError(f"{tokens} tokens do not fit into {self.room}, even shortened",
                            where=f"{self.task.name}, record {record['id']}", hint="use a model with a longer context")
        return fields, truncated

    # ------------------------------------------------------------ demonstrations

    def _examples(self, record: dict, used: int) -> tuple[list[int], int]:
        """Ids of the demonstrations that fit beside `used` tokens, and how many that are."""
        if not self.shots:
            return [], 0
        order = self.order
        if self.task.fresh:
            order = self._example_order(self.pool, self._generator("examples", record["id"]))
        # Nearest to the instance is the first that was drawn, which is also the one of one-shot.
        front, count = [], 0
        for example in islice(self._usable(order, record), self.shots):
            ids = self._example(example)
            if len(front) + len(ids) + used > self.room:
                break
            front, count = ids + front, count + 1
        return front, count

    def _usable(self, order: list[int], record: dict) -> Iterator[dict]:
        """Examples in the order drawn, without the instance itself and others on its passage."""
        for index in order:
            example = self.pool[index]
            same = example["id"] == record["id"] or record["id"].endswith(f"-{example['id']}")
            if not self.source.examples_apart and (same or ("group" in record
                                                            and example.get("group") == record["group"])):
                continue
            if self.task.dynamic and self._dynamic(example) is None:
                continue
            yield example

    def _example_order(self, pool: list[dict], rng: np.random.Generator) -> list[int]:
        """A random order; with labels, one of each in turn."""
        if not pool:
            return []
        order = rng.permutation(len(pool)).tolist()
        if self.task.label is None:
            return order
        by_label: dict[str, list[int]] = {label: [] for label in self.words}
        for index in order:
            by_label.get(str(pool[index][self.task.label]), []).append(index)
        turns = [by_label[label] for label in rng.permutation(list(by_label)).tolist()]
        return [queue[turn] for turn in range(max(map(len, turns))) for queue in turns if turn < len(queue)]

    def _example(self, record: dict) -> list[int]:
        """Ids of one demonstration with its separator."""
        key = f"{record.get('part', '')} {record['id']}"
        if key not in self._example_ids:
            task, fields = self.task, dict(record)
            if task.dynamic:
                fields = self._dynamic(record)
            if task.example_characters is not None:
                fields |= {name: str(fields[name])[:task.example_characters] for name in task.shorten}
            if task.kind == "generation":
                text = render(task.prefix + task.answer, fields)
            else:
                words, right = self._candidates(record) if task.kind != "continuation" else ([""], 0)
                text = render(task.prefix + task.scored, {**fields, "label": words[right]})
            self._example_ids[key] = self._encode(text + task.separator)
        return self._example_ids[key]

    def _dynamic(self, record: dict) -> dict | None:
        """The record as an example of a passage task: complete and short (one-shot), or the sentence with the
        answer."""
        name = next(iter(self.task.shorten))
        passage = record[name]
        if self.shots == 1:
            return record if len(passage) < LONGEST_PASSAGE else None
        position = passage.find(record["answer"])
        if position < 0:
            return None
        begin = max(passage.rfind(end, 0, position) for end in _SENTENCE_ENDS) + 1
        last = position + len(record["answer"])
        ends = [at + 1 for end in _SENTENCE_ENDS if (at := passage.find(end, last)) >= 0]
        sentence = passage[begin:min(ends, default=len(passage))].strip()
        return {**record, name: sentence} if len(sentence) < LONGEST_SENTENCE else None


def split_request(front: list[int], ids: list[int], first: int) -> Request:
    """Prefix and scored ids; the very first token of all has nothing to be predicted from."""
    ids, position = front + ids, max(1, len(front) + first)
    return ids[:position], ids[position:]
