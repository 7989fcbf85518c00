"""Verb `evaluate`: few-shot tasks and files of questions, scored with one model by one process or many."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pangu.data.tokenizer import Tokenizer
from pangu.evaluation.instances import FEW, Instance, InstanceBuilder
from pangu.evaluation.language_model import LanguageModel, RequestCache
from pangu.evaluation.metrics import assign, begins_with, bootstrap, exact_match, f1, rouge
from pangu.evaluation.task import Source, TaskSettings, load_task, task_names
from pangu.evaluation.workers import is_worker, launch_evaluation, wants_launch, workers_of
from pangu.generation.generate import check_vocabulary
from parallel.common.errors import UserError
from parallel.common.files import atomic_write, write_json
from parallel.common.progress import Bar, info, table
from parallel.launch.plan import add_node_arguments

if TYPE_CHECKING:
    from pangu.settings import Run

_COLUMNS = {"cpm_2_6b": "CPM 2.6B", "pangu_2_6b": "PanGu-α 2.6B", "pangu_13b": "PanGu-α 13B"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", help="checkpoint to load (none: the newest of output.directory)")
    add("--int8", action="store_true", help="quantize a float checkpoint's weights while loading")
    add("--tasks", metavar="NAMES", help=f"tasks, parted by commas, or 'all' of which data are found: "
        f"{', '.join(task_names())}")
    add("--data", metavar="DIR", default="data/evaluation", help="folder with a folder for each data set, as published "
        "(default %(default)s)")
    add("--shots", default="0", metavar="K", help="demonstrations per instance: 0, 1, another number, or 'few' for "
        "the paper's number of each task (default 0)")
    add("--questions", metavar="FILE", help="jsonl of multiple-choice questions: id, skill, prompt, choices, answer")
    add("--limit", type=int, metavar="N", help="at most N instances of each task (drawn at random) or skill")
    add("--batch", default="auto", metavar="N", help="rows computed together, or 'auto' (default)")
    add("--seed", type=int, default=1, help="of examples, wrong labels, limit and decoding (default 1)")
    add("--log-samples", metavar="FILE", help="write every instance's scores, prediction and target as jsonl")
    add("--output", metavar="DIR", help="where the table goes as markdown and JSON, and the answers given so far "
        "(default: evaluation in output.directory)")
    add("--no-cache", action="store_true", help="neither use nor keep the answers of earlier runs")
    add("--no-sharing", action="store_true", help="compute common beginnings anew for every request")
    add_node_arguments(parser)


def run(settings: Run, arguments: argparse.Namespace) -> dict:
    """Verb `evaluate`: returns `results` by task or skill and `instances_per_second`.

    Raises:
        UserError: nothing to evaluate, an unknown task, data that are not there, flags out of range.
    """
    if not arguments.tasks and not arguments.questions:
        raise UserError("nothing to evaluate", where="evaluate", hint="give --tasks NAMES or --questions FILE")
    _check(arguments)
    if not is_worker() and wants_launch(arguments):
        return launch_evaluation(settings, arguments)
    sources = _sources(arguments) if arguments.tasks else []
    evaluation = Evaluation(settings, arguments)
    if evaluation.workers.follows:
        return evaluation.workers.follow()
    results: dict[str, dict] = {}
    figures: dict[str, Any] = {"results": results}
    if sources:
        figures |= evaluation.run(sources, results)
    if arguments.questions:
        figures |= evaluation.answer_questions(results)
    evaluation.workers.close()
    return figures


def _check(arguments: argparse.Namespace) -> None:
    if arguments.shots != FEW and not (arguments.shots.isdigit() and int(arguments.shots) <= 1000):
        raise UserError("must be a number or 'few'", where="--shots", value=arguments.shots)
    if arguments.batch != "auto" and not (arguments.batch.isdigit() and 1 <= int(arguments.batch) <= 4096):
        raise UserError("must be 'auto' or a number from 1 to 4096", where="--batch", value=arguments.batch)
    for name, least in (("limit", 1), ("seed", 0), ("nproc", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"must be at least {least}", where=f"--{name}", value=value)
    if arguments.log_samples and not arguments.tasks:
        raise UserError("only tasks have a log of samples", where="--log-samples", hint="give --tasks")


def _sources(arguments: argparse.Namespace) -> list[Source]:
    """The data of the tasks asked for; with 'all', those whose data are there."""
    if arguments.tasks != "all":
        names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
        return [Source(load_task(name), arguments.data) for name in dict.fromkeys(names)]
    sources = []
    for name in task_names():
        try:
            sources.append(Source(load_task(name), arguments.data))
        except UserError as error:
            info(str(error))
    if not sources:
        raise UserError("no data of any task", where="--data", value=arguments.data)
    return sources


class Evaluation:
    """One model on some tasks.

    Args:
        settings: a `pangu.settings.Run`.
        arguments: the verb's flags.
    """

    def __init__(self, settings: Run, arguments: argparse.Namespace) -> None:
        self.arguments, self.settings = arguments, settings
        self.output = Path(arguments.output or Path(settings.output.directory) / "evaluation")
        self.tokenizer = Tokenizer(settings.data.tokenizer)
        check_vocabulary(self.tokenizer, settings.model.vocabulary_size)
        self.workers = workers_of(settings, arguments.checkpoint or settings.output.directory, arguments.int8)
        self.checkpoint = self.workers.checkpoint
        self.first = self.workers.rank == 0
        if not self.workers.follows:
            self.model = self._load()

    def _load(self) -> LanguageModel:
        arguments, settings = self.arguments, self.settings
        cache = RequestCache(None if arguments.no_cache else self.output / "requests",
                             model_fingerprint(self.checkpoint, settings, arguments.int8, self.workers.identity()),
                             self.workers.rank)
        batch = None if arguments.batch == "auto" else int(arguments.batch)
        model, scorer = self.workers.load(not arguments.no_sharing)
        return LanguageModel(model, self.tokenizer, batch, not arguments.no_sharing, cache, scorer)

    def answer_questions(self, results: dict[str, dict]) -> dict:
        """Adds the accuracy of each skill of a file of questions to `results`."""
        from pangu.evaluation import questions

        began, arguments = time.perf_counter(), self.arguments
        listed = questions.limit_each_skill(list(questions.read_questions(arguments.questions)), arguments.limit)
        if not listed:
            raise UserError("there is no question in the file", where=arguments.questions)
        requests = questions.requests_of(listed, self.tokenizer)
        picked = self.workers.shared([sum(map(_tokens, choices)) for choices in requests], lambda mine: (
            questions.answer([requests[number] for number in mine], self.model)))
        told = questions.tally(listed, picked)
        if self.first:
            table("Accuracy", ["skill", "accuracy", "chance", "questions", "standard error"],
                  [(skill, row["accuracy"], row["chance"], row["instances"], row["stderr"])
                   for skill, row in told.items()])
        results |= {skill: {"metric": row["accuracy"], **row} for skill, row in told.items()}
        return {"instances_per_second": len(listed) / (time.perf_counter() - began)}

    def run(self, sources: list[Source], results: dict[str, dict]) -> dict:
        """Fills `results` and writes tables and samples; rank 0 writes, all return the same."""
        samples, seconds, count = [], 0.0, 0
        for source in sources:
            name, began = source.task.name, time.perf_counter()
            rows = self._task(source)
            seconds, count = seconds + time.perf_counter() - began, count + len(rows)
            results[name] = summarize(source.task, rows)
            samples += [{"task": name, **row} for row in rows]
        figures = {"instances_per_second": count / max(seconds, 1e-9), "shots": self.arguments.shots,
                   "checkpoint": str(self.checkpoint)}
        if self.first:
            self._write(results, figures, samples)
        return figures

    def _task(self, source: Source) -> list[dict]:
        """A row for each instance of a task, from all processes, in the file's order."""
        task, arguments = source.task, self.arguments
        builder = InstanceBuilder(task, source, self.tokenizer, self.settings.model.sequence_length,
                                  arguments.shots, arguments.seed)
        instances = builder.instances(arguments.limit)
        truncated = sum(instance.truncated > 0 for instance in instances)
        if truncated and self.first:
            info(f"{task.name}: {truncated} of {len(instances)} instances did not fit into {builder.room} tokens; "
                 f"fields {', '.join(task.shorten)} lost characters (see `truncated` in --log-samples)")
        sizes = [len(instance.prompt) + sum(map(_tokens, instance.requests)) for instance in instances]
        answers = self.workers.shared(sizes, lambda mine: self._answers(task, [instances[number] for number in mine]))
        return judge(task, instances, answers)

    def _answers(self, task: TaskSettings, instances: list[Instance]) -> list[Any]:
        """For each instance the mean nll of each candidate, or the generated text; of a continuation the mean nll and
        whether it is the greedy one."""
        requests = [request for instance in instances for request in instance.requests]
        total = len(instances) if task.kind == "generation" else len(requests)
        with Bar(total, task.name) as bar:
            if task.kind == "generation":
                return self.model.generate_until([instance.prompt for instance in instances], self._decoding(task),
                                                 bar.advance)
            scores = iter(self.model.loglikelihood(requests, bar.advance))
        if task.kind == "continuation":
            return [[-score / len(scored), greedy]
                    for (_, scored), (score, greedy) in zip(requests, scores, strict=True)]
        return [[-next(scores)[0] / len(scored) for _, scored in instance.requests] for instance in instances]

    def _decoding(self, task: TaskSettings) -> Any:
        from pangu.generation.settings import GenerateSettings

        return GenerateSettings(**task.decoding.model_dump(), seed=self.arguments.seed)

    def _write(self, results: dict, figures: dict, samples: list[dict]) -> None:
        shots = self.arguments.shots
        report = markdown(results, shots)
        write_json(self.output / f"results_{shots}.json", {"results": results, **figures})
        with atomic_write(self.output / f"results_{shots}.md") as file:
            file.write(report)
        if self.arguments.log_samples:
            with atomic_write(self.arguments.log_samples) as file:
                for sample in samples:
                    file.write(json.dumps(sample, ensure_ascii=False) + "\n")
        columns, rows = comparison(results, shots)
        table(f"{shots}-shot, in percent (perplexity as it is); {self.output}/results_{shots}.md", columns, rows)
        sys.stderr.flush()


def _tokens(request: tuple[list[int], list[int]]) -> int:
    return len(request[0]) + len(request[1])


def model_fingerprint(checkpoint: Path, settings: Run, int8: bool = False, identity: bytes = b"") -> str:
    """What answers depend on: the checkpoint's checksums (or `identity`, where it is of another code), the model's
    settings, the precision and the tokenizer."""
    layouts = sorted(checkpoint.glob("layout*.json"))  # one, or one for each rank's slices
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in layouts) + identity + b"int8" * int8)
    digest.update(settings.model.model_dump_json().encode() + str(settings.train.precision).encode())
    digest.update(Path(settings.data.tokenizer).read_bytes())
    return digest.hexdigest()[:16]


def judge(task: TaskSettings, instances: list[Instance], answers: list[Any]) -> list[dict]:
    """A row for each instance: id, scores, prediction, target, and what counts towards the metrics."""
    rows = []
    for instance, answer in zip(instances, answers, strict=True):
        row = {"id": instance.id, "group": instance.group, "part": instance.part, "shots": instance.shots,
               "truncated": instance.truncated, "target": instance.target}
        if task.kind == "generation":
            row |= {"scores": [], "prediction": answer, **_compare(task.metric, answer, instance.target)}
        elif task.kind == "continuation":
            nll, greedy = answer
            row |= {"scores": [nll], "prediction": 0, "tokens": len(instance.requests[0][1]), "perplexity": nll,
                    "accuracy": float(greedy)}
        else:
            # Equal scores are ordered by the word, so the order of the candidates has no influence.
            best = min(range(len(answer)), key=lambda index: (answer[index], instance.candidates[index]))
            row |= {"scores": answer, "prediction": best, "candidates": instance.candidates}
        rows.append(row)
    if task.kind == "blanks":
        _fill_blanks(rows)
    if task.kind in ("choice", "blanks"):
        for row in rows:
            row["accuracy"] = float(row["candidates"][row["prediction"]] == row["candidates"][row["target"]])
    return rows


def _fill_blanks(rows: list[dict]) -> None:
    """Predictions of the blanks of a passage together, each candidate used once."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    for members in groups.values():
        for row, chosen in zip(members, assign(np.array([row["scores"] for row in members])), strict=True):
            row["prediction"] = int(chosen)


def _compare(metric: str, text: str, references: list[str]) -> dict[str, float]:
    text = text.strip().split("\n")[0]
    if metric == "em_f1":
        return {"em": exact_match(text, references), "f1": f1(text, references)}
    if metric.startswith("rouge"):
        return {metric: rouge(text, references, metric)}
    return {"accuracy": (exact_match if metric == "exact" else begins_with)(text, references)}


def summarize(task: TaskSettings, rows: list[dict]) -> dict[str, Any]:
    """Means with standard errors (bootstrap over passages); `metric` is the task's main one."""
    names = [name for name in ("em", "f1", "accuracy", "rouge-1", "rouge-l") if name in rows[0]]
    main = {"em_f1": "f1", "exact": "accuracy", "begins": "accuracy"}.get(task.metric, task.metric)
    groups = [row["group"] for row in rows]
    result: dict[str, Any] = {"metric": 0.0, "name": main, "stderr": 0.0, "instances": len(rows)}
    for name in names:
        values = [row[name] for row in rows]
        result |= {name: float(np.mean(values)), f"{name}_stderr": bootstrap(values, groups=groups)}
        for part in sorted({row["part"] for row in rows} - {""}):
            result[f"{name}_{part}"] = float(np.mean([row[name] for row in rows if row["part"] == part]))
    if task.kind == "continuation":
        tokens = np.array([row["tokens"] for row in rows], np.float64)
        nll = np.array([row["perplexity"] for row in rows]) * tokens
        result |= {"perplexity": float(np.exp(nll.sum() / tokens.sum())),
                   "perplexity_stderr": bootstrap(nll / tokens.mean(), np.exp)}
    if task.kind in ("choice", "blanks"):
        result["chance"] = float(np.mean([1 / max(len(row["candidates"]), 1) for row in rows]))
    if task.kind == "blanks":
        whole: dict[str, list[float]] = {}
        for row in rows:
            whole.setdefault(row["group"], []).append(row["accuracy"])
        result["passage_accuracy"] = float(np.mean([min(parts) for parts in whole.values()]))
    result |= {"metric": result[main], "stderr": result[f"{main}_stderr"],
               "truncated": sum(row["truncated"] > 0 for row in rows),
               "shots": float(np.mean([row["shots"] for row in rows]))}
    return result


def comparison(results: dict[str, dict], shots: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table beside the paper's figures for the same number of examples."""
    place = {"0": 0, "1": 1}.get(shots, 2)
    rows = []
    for name, result in results.items():
        paper = load_task(name).paper.model_dump()
        published = [values[place] if place < len(values) else None for values in paper.values()]
        rows.append([name, result["name"], _shown(result), f"{_scaled(result, result['stderr']):.2f}",
                     f"{100 * result['chance']:.1f}" if "chance" in result else "", str(result["instances"]),
                     f"{result['shots']:.1f}", *("" if value is None else str(value) for value in published)])
    return ["task", "metric", "this model", "± stderr", "chance", "instances", "examples", *_COLUMNS.values()], rows


def _scaled(result: dict, value: float) -> float:
    return value if result["name"] == "perplexity" else 100 * value


def _shown(result: dict) -> str:
    if result["name"] == "f1":
        return f"{100 * result['em']:.2f}/{100 * result['f1']:.2f}"
    if result["name"] == "perplexity":
        return f"{result['perplexity']:.2f} (top-1 {100 * result['accuracy']:.2f})"
    return f"{_scaled(result, result['metric']):.2f}"


def markdown(results: dict[str, dict], shots: str) -> str:
    """The table as markdown."""
    columns, rows = comparison(results, shots)
    lines = [columns, ["---"] * len(columns), *rows]
    head = (f"# {shots}-shot evaluation\n\nIn percent; EM/F1 with two numbers; perplexity as it is. The last "
            "columns are published (PanGu-α, Tables 9 and 10), not measured here.\n\n")
    return head + "".join("| " + " | ".join(line) + " |\n" for line in lines)
