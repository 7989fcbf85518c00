"""Multiple-choice questions answered by likelihood: a small model's accuracy, against chance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError
from parallel.common.lines import json_lines

_MAX_QUESTIONS = 1_000_000
Request = tuple[list[int], list[int]]


def read_questions(path: str | Path) -> Iterator[dict]:
    """Yields `{"id", "skill", "prompt", "choices", "answer"}` from a jsonl file.

    Raises:
        UserError: a line is not such an object, naming the line.
    """
    for number, question in json_lines(path):
        where = f"{path}, line {number}"
        if number > _MAX_QUESTIONS:
            raise UserError("more questions than allowed", where=where, value=_MAX_QUESTIONS)
        _check(question, where)
        yield question


def _check(question: Any, where: str) -> None:
    if not isinstance(question, dict) or not {"skill", "prompt", "choices", "answer"} <= question.keys():
        raise UserError("a question needs skill, prompt, choices and answer", where=where)
    choices, answer = question["choices"], question["answer"]
    for key in ("skill", "prompt"):
        if not isinstance(question[key], str):
            raise UserError(f"'{key}' must be a text", where=where, value=question[key])
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) and choice.strip()
                                                                          for choice in choices):
        raise UserError("a question needs at least two choices, each a text", where=where, value=choices)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise UserError("answer must be the index of a choice", where=where, value=answer)


def requests_of(questions: list[dict], tokenizer: Any) -> list[list[Request]]:
    """(prefix ids, scored ids) of each choice of each question.

    A choice is encoded together with the prompt, since words are segmented differently at a joint; what follows the ids
    that all choices of a question have in common is scored, and divided by its number of tokens.
    """
    found = []
    for question in questions:
        encoded = [tokenizer.encode(question["prompt"] + choice) for choice in question["choices"]]
        common = min(common_prefix(encoded), min(len(ids) for ids in encoded) - 1)
        found.append([(ids[:common], ids[common:]) for ids in encoded])
    return found


def answer(requests: list[list[Request]], scorer: Any) -> list[int]:
    """Index of the likeliest choice of each question: mean log-likelihood of the choice's tokens after the prompt.

    Args:
        requests: see `requests_of`.
        scorer: anything with `loglikelihood(list of requests) -> list of (log-likelihood, ...)`.
    """
    scores = iter(scorer.loglikelihood([request for choices in requests for request in choices]))
    picked = []
    for choices in requests:
        means = [next(scores)[0] / max(len(scored), 1) for _, scored in choices]
        picked.append(max(range(len(choices)), key=means.__getitem__))
    return picked


def common_prefix(sequences: list[list[int]]) -> int:
    """How many leading ids all `sequences` share."""
    length = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length


def tally(questions: list[dict], picked: list[int]) -> dict[str, dict[str, float]]:
    """Accuracy by skill beside chance and the standard error of the accuracy."""
    results: dict[str, dict[str, float]] = {}
    for skill in sorted({question["skill"] for question in questions}):
        rows = [(question, guess) for question, guess in zip(questions, picked, strict=True)
                if question["skill"] == skill]
        count = len(rows)
        accuracy = sum(guess == question["answer"] for question, guess in rows) / count
        chance = sum(1.0 / len(question["choices"]) for question, _ in rows) / count
        results[skill] = {"accuracy": accuracy, "chance": chance, "instances": count,
                          "stderr": math.sqrt(accuracy * (1 - accuracy) / max(count - 1, 1))}
    return results


def limit_each_skill(questions: list[dict], limit: int | None) -> list[dict]:
    """The first `limit` questions of every skill, in their order; all of them for None."""
    if limit is None:
        return questions
    seen: dict[str, int] = {}
    kept = []
    for question in questions:
        seen[question["skill"]] = seen.get(question["skill"], 0) + 1
        if seen[question["skill"]] <= limit:
            kept.append(question)
    return kept
