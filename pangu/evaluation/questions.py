"""Multiple-choice questions answered by likelihood: a small model's accuracy, against chance."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.common.errors import UserError
from parallel.common.lines import json_lines
from parallel.common.progress import table

if TYPE_CHECKING:
    from pangu.settings import Run

_MAX_QUESTIONS = 1_000_000


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
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        raise UserError("a question needs at least two choices, each a text", where=where, value=choices)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise UserError("answer must be the index of a choice", where=where, value=answer)


def answer(questions: list[dict], scorer: Any, tokenizer: Any) -> list[int]:
    """Index of the likeliest choice of each question: mean log-likelihood of the choice's tokens after the prompt.

    Args:
        questions: as `read_questions` yields them.
        scorer: anything with `loglikelihood(list of (prefix ids, continuation ids)) -> list of float`.
        tokenizer: with `encode`.

    A choice is encoded together with the prompt, since words are segmented differently at a joint; what follows the ids
    that all choices of a question have in common is scored, and divided by its number of tokens.
    """
    requests, spans = [], []
    for question in questions:
        encoded = [tokenizer.encode(question["prompt"] + choice) for choice in question["choices"]]
        common = min(common_prefix(encoded), min(len(ids) for ids in encoded) - 1)
        spans.append((len(requests), len(encoded)))
        requests += [(ids[:common], ids[common:]) for ids in encoded]
    scores = scorer.loglikelihood(requests)
    picked = []
    for start, count in spans:
        means = [scores[start + i] / max(len(requests[start + i][1]), 1) for i in range(count)]
        picked.append(max(range(count), key=means.__getitem__))
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


def run(settings: Run, arguments: argparse.Namespace) -> dict:
    """Verb `evaluate` on a file of questions."""
    from pangu.data.tokenizer import Tokenizer
    from pangu.evaluation.scoring import Scorer
    from pangu.generation.backend import load_model

    questions = limit_each_skill(list(read_questions(arguments.questions)), arguments.limit)
    if not questions:
        raise UserError("there is no question in the file", where=arguments.questions)
    tokenizer = Tokenizer(settings.data.tokenizer)
    scorer = Scorer(load_model(settings, arguments.checkpoint or settings.output.directory,
                               getattr(arguments, "int8", False)))
    results = tally(questions, answer(questions, scorer, tokenizer))
    table("Accuracy", ["skill", "accuracy", "chance", "questions", "standard error"],
          [(skill, row["accuracy"], row["chance"], row["instances"], row["stderr"]) for skill, row in results.items()])
    return {"results": results}


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
