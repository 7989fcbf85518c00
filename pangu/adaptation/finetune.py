"""Verbs `finetune` and `make-pairs`: training on pairs of prompt and answer, and pairs out of a task's examples."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pangu.build import check_adapts
from pangu.evaluation.task import Source, TaskSettings, load_task, render
from parallel.common.errors import UserError
from parallel.common.files import atomic_write

if TYPE_CHECKING:
    from pangu.settings import Run


def run(settings: Run, arguments: argparse.Namespace) -> dict:
    """`train` on the pairs of the `adapt:` block, from its checkpoint; every layout and backend that `train` knows.

    Raises:
        UserError: the block is not there.
    """
    from pangu.train import run as train

    check_adapts(settings)
    return train(settings, arguments)


def pairs_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `make-pairs`."""
    parser.add_argument("--task", required=True, metavar="NAME", help="a task of `evaluate`")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of the published data sets")
    parser.add_argument("--output", required=True, metavar="FILE", help="jsonl file to write")


def run_make_pairs(settings: None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Writes the demonstrations of a task (its training file) as pairs, in the words in which the task asks.

    Raises:
        UserError: no such task, no data, or data without a file of examples.
    """
    task = load_task(arguments.task)
    source = Source(task, arguments.data)
    if not source.examples_apart:
        raise UserError(f"the task {task.name} has no file of examples here, and what it is scored on is not to be "
                        "trained on", where=arguments.data, hint=f"get {' or '.join(task.examples) or 'one'}")
    count = 0
    with atomic_write(Path(arguments.output), "w") as file:
        for record in source.examples():
            prompt, answer = pair_of(task, record)
            file.write(json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) + "\n")
            count += 1
    return {"output": str(arguments.output), "pairs": count, "task": task.name}


def pair_of(task: TaskSettings, record: dict) -> tuple[str, str]:
    """(prompt, answer) of a demonstration: for a choice its prefix and scored text with the right candidate.

    Raises:
        UserError: a field or the label is missing.
    """
    if task.kind == "generation":
        fields = {**record, "answer": record["answers"][0]}
        return render(task.prefix, fields), render(task.answer, fields)
    if task.label is None:
        word = str(record["candidates"][int(record["answer"])])
    else:
        label = str(record.get(task.label))
        word = task.labels.get(label, label) if task.labels else label
        if task.labels and label not in task.labels:
            raise UserError("the label is unknown", where=f"record {record.get('id')}", value=label)
    fields = {**record, "label": word}
    return render(task.prefix, fields), render(task.scored, fields)
