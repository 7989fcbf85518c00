"""A few-shot task: what its YAML under pangu/tasks/ says, where its data are, and its records.

A record is a dict with an `id` and the fields that the templates name; a reader (a module `pangu/tasks/<reader>.py`
with `read(path)`) makes records of a published file format. Sources: PanGu-alpha (arXiv 2104.12369) section 5.2 and
Tables 7 to 10 for the tasks, templates, decoding and published scores.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from parallel.common.errors import UserError
from parallel.common.files import inside
from parallel.common.lines import json_lines
from parallel.common.renamed import TASKS
from parallel.common.settings import Settings, load_settings

FOLDER = Path(__file__).parents[1] / "tasks"
MAX_RECORDS = 2_000_000
MAX_LINE = 16 << 20
_FIELD = re.compile(r"\{(\w+)\}")

Scores = Literal["accuracy", "perplexity", "em_f1", "exact", "begins", "rouge-1", "rouge-l"]


class Decoding(Settings):
    """How answers are generated (paper, Table 8)."""

    max_new_tokens: int = Field(32, ge=1)
    """Tokens at most."""
    top_k: int = Field(0, ge=0)
    """Only the k most likely tokens may be drawn; 0 = all, 1 = greedy."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Only the fewest tokens whose probability reaches p may be drawn."""
    temperature: float = Field(1.0, ge=0.0)
    """Logits are divided by this."""
    stop: list[str] = ["\n"]
    """Strings that end the answer."""


class Paper(Settings):
    """Published scores as printed, in percent: [zero-shot, one-shot, few-shot] (Tables 9 and 10)."""

    cpm_2_6b: list[str | float | None] = []
    """CPM 2.6B, Table 9."""
    pangu_2_6b: list[str | float | None] = []
    """PanGu-alpha 2.6B, Table 10 (Table 9 prints other values for WebQA and CMRC2019)."""
    pangu_13b: list[str | float | None] = []
    """PanGu-alpha 13B, Table 10."""


class TaskSettings(Settings):
    """One task."""

    name: str
    """The name it is called by."""
    kind: Literal["choice", "blanks", "continuation", "generation"]
    """choice: the candidate whose scored text has the least mean nll; blanks: the same for several blanks that take
    different candidates; continuation: perplexity of one text; generation: an answer is written and compared."""
    published: str
    """Who publishes the data, shown to a user who lacks them."""
    folders: list[str]
    """Folder of the data inside --data; the first that exists."""
    files: list[str]
    """File that is evaluated; the first that exists (a public test split before the development split)."""
    every_file: bool = False
    """Whether all files that exist are evaluated, each also for itself, instead of the first."""
    examples: list[str] = []
    """File that demonstrations come from; none of them there: the evaluated file without the instance itself."""
    reader: str = "json_lines"
    """Module of pangu/tasks that reads the files."""
    skill: str | None = None
    """Only records whose `skill` is this."""
    label: str | None = None
    """Field that holds the right label; none: the record has `candidates` and the index `answer`."""
    labels: dict[str, str] = {}
    """What each label is called in the text; empty: as in the data."""
    negatives: int | None = Field(None, ge=1)
    """Number of wrong labels drawn for each instance; none: all labels are candidates."""
    prefix: str = ""
    """Template of what precedes the scored text; generation: the whole prompt."""
    scored: str = ""
    """Template of the scored text. With {label} in `prefix` alone, all candidates score the same text (channel)."""
    answer: str = "{answer}"
    """Generation: what a demonstration has after its prompt."""
    shots: int = Field(1, ge=0)
    """Solved examples of "few"; the paper's K."""
    dynamic: bool = False
    """Whether as many of them are taken as fit, from the shortest passages (the paper's "dynamic" K)."""
    fresh: bool = False
    """Whether examples are drawn anew for every instance, or once for all."""
    separator: str = "\n"
    """What ends a demonstration."""
    example_characters: int | None = Field(None, ge=1)
    """Fields named in `shorten` are truncated to this many characters in demonstrations."""
    shorten: dict[str, Literal["end", "start"]] = {}
    """Fields that may lose characters at that side when an instance is longer than the model's context, in order."""
    decoding: Decoding = Decoding()
    """Generation: how."""
    metric: Scores = "accuracy"
    """What is reported."""
    paper: Paper = Paper()
    """Published scores."""

    @model_validator(mode="after")
    def _complete(self) -> TaskSettings:
        wanted = self.prefix if self.kind == "generation" else self.scored
        if not wanted:
            raise ValueError("generation needs a prefix, every other kind a scored text")
        if self.labels and self.label is None:
            raise ValueError("labels need the field that holds them: label")
        return self


def task_names() -> list[str]:
    """All tasks, by their YAML files."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_task(name: str) -> TaskSettings:
    """The settings of a task.

    Raises:
        UserError: no such task; the nearest one is named.
    """
    if name in TASKS:
        raise UserError(f"the task '{name}' is called '{TASKS[name]}'", where="--tasks", hint=f"type {TASKS[name]}")
    if name not in task_names():
        near = difflib.get_close_matches(name, task_names(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(task_names())}"
        raise UserError("no such task", where="--tasks", value=name, hint=hint)
    return load_settings(TaskSettings, FOLDER / f"{name}.yaml")


def render(template: str, fields: dict[str, Any]) -> str:
    """The template with {name} replaced by fields; nothing else in it or in the fields is interpreted.

    Raises:
        UserError: the record lacks a field.
    """
    def value(match: re.Match) -> str:
        if match[1] not in fields:
            raise UserError(f"a record has no field '{match[1]}'", where=f"record {fields.get('id')}",
                            hint="is it of another data set or version?")
        return str(fields[match[1]])

    return _FIELD.sub(value, template)


class Source:
    """The records of a task in a local folder.

    Args:
        task: the task.
        folder: the folder that holds a folder for each data set (or is that folder).

    Raises:
        UserError: the data are not there; says who publishes them and which file is expected.
    """

    def __init__(self, task: TaskSettings, folder: str | Path) -> None:
        self.task, self.root = task, Path(folder)
        found = [path for name in task.files if (path := self._find([name])) is not None]
        if not found:
            raise UserError(f"no data for the task {task.name}: expected {_one_of(task.folders)}/"
                            f"{_one_of(task.files)}", where=self.root, hint=f"get them from {task.published}")
        self.paths = found if task.every_file else found[:1]
        self.examples_path = self._find(task.examples)

    def _find(self, names: list[str]) -> Path | None:
        """The first file there is, names in order of preference."""
        for name in names:
            for folder in [*self.task.folders, "."]:
                path = inside(self.root, f"{folder}/{name}")
                if path.is_file():
                    return path
        return None

    def records(self) -> Iterator[dict]:
        """The instances to evaluate; with several files, `part` names the one."""
        for path in self.paths:
            for record in self._read(path):
                if len(self.paths) > 1:
                    record |= {"part": path.name, "id": f"{path.name}-{record['id']}"}
                yield record

    def examples(self) -> Iterator[dict]:
        """Records that demonstrations may be made of."""
        return self._read(self.examples_path or self.paths[0])

    @property
    def examples_apart(self) -> bool:
        """Whether examples come from a file of their own, so that none can be the instance itself."""
        return self.examples_path is not None and self.examples_path not in self.paths

    def _read(self, path: Path) -> Iterator[dict]:
        reader = read_json_lines if self.task.reader == "json_lines" else importlib.import_module(
            f"pangu.tasks.{self.task.reader}").read
        last = None
        try:
            for number, record in enumerate(reader(path)):
                last = record.get("id")
                if number >= MAX_RECORDS:
                    raise UserError("more records than allowed", where=path, value=MAX_RECORDS)
                # "-" marks sentence pairs on which the annotators did not agree.
                if self.task.label is not None and str(record.get(self.task.label)) == "-":
                    continue
                if self.task.skill is None or record.get("skill") == self.task.skill:
                    self._check(record, path)
                    yield record
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            what = f"has no key {error}" if isinstance(error, KeyError) else f"{type(error).__name__} {error}"
            raise UserError(f"not the published format of {self.task.name}: {what}",
                            where=path if last is None else f"{path}, behind record {last}",
                            hint=f"the data are published by {self.task.published}") from None

    def _check(self, record: dict, path: Path) -> None:
        """Raises a `UserError` unless the record has all that the task reads of it."""
        where, task = f"{path}, record {record.get('id')}", self.task
        wanted = {*_FIELD.findall(task.prefix), *_FIELD.findall(task.scored)} - {"label"}
        wanted |= {task.label} if task.label is not None else set()
        if task.kind == "generation":
            wanted.add("answers")
        elif task.kind != "continuation" and task.label is None:
            wanted |= {"candidates", "answer"}
        for name in sorted(wanted):
            if name not in record:
                raise UserError(f"a record has no field '{name}'", where=where,
                                hint=f"is it of another data set or version? ({task.published})")
            listed = name in ("candidates", "answers")
            values = record[name] if listed and isinstance(record[name], list) else [record[name]]
            if not all(isinstance(value, (str, int, float)) for value in values):
                raise UserError(f"'{name}' is no {'list of texts' if listed else 'text'}", where=where,
                                value=record[name])
        if "candidates" in wanted and not 0 <= int(record["answer"]) < len(record["candidates"]):
            raise UserError("the answer is no candidate", where=where, value=record["answer"])
        if "answers" in wanted and not record["answers"]:
            raise UserError("a record has no answer", where=where)


def _one_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else "{" + ",".join(names) + "}"


def read_json_lines(path: Path) -> Iterator[dict]:
    """One JSON object a line; `id` is the row's own id or index, else the line's number.

    Raises:
        UserError: a line that is no JSON object or is absurdly long.
    """
    for number, row in json_lines(path, MAX_LINE):
        row["id"] = str(row.get("id", row.get("idx", number)))
        yield row
