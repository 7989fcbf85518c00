"""From raw pages to a training mixture: the steps one after the other, each resumable."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.dedup.step import run_dedup
from data_tools.documents import OutputFormat, find_files, plan_splits
from data_tools.engines.base import Engine
from data_tools.parts import OutputLayout, PartFigures, digest_of, run_step, split_identity
from data_tools.records import Split
from data_tools.rules import discover
from data_tools.settings import DataSettings
from data_tools.steps.clean import CleanStep
from data_tools.steps.decontaminate import DecontaminateStep, build_index
from data_tools.steps.filter import FilterStep, file_digest
from data_tools.steps.mix import run_mix
from data_tools.steps.paragraphs import run_paragraphs
from parallel.common.errors import UserError
from parallel.common.files import read_json, write_json
from parallel.common.progress import info


@dataclass
class StepResult:
    """Figures of one step; `more` holds what only this step has (clusters, categories)."""

    name: str
    figures: PartFigures
    more: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "figures": self.figures.to_json(), "more": self.more}

    @staticmethod
    def from_json(tree: dict[str, Any]) -> StepResult:
        return StepResult(tree["name"], PartFigures.from_json(tree["figures"]), tree["more"])


def active_steps(settings: DataSettings) -> list[str]:
    """The steps of `run.steps` that have something to do.

    Raises:
        UserError: none has.
    """
    something = {
        "clean": any(getattr(settings.rules, name).enabled for name in discover()),
        "filter": settings.filter.active(),
        "dedup": True,
        "paragraphs": settings.paragraphs.enabled,
        "decontaminate": bool(settings.decontaminate.evaluation),
        "mix": bool(settings.mix.active_weights()),
    }
    steps = [name for name in settings.run.steps if something[name]]
    if not steps or len(set(steps)) < len(steps):
        raise UserError("no step with something to do, or one named twice", where="run.steps", value=settings.run.steps)
    return steps


def run_one(name: str, settings: DataSettings, splits: list[Split], layout: OutputLayout, work: Path, engine: Engine,
            format: OutputFormat) -> StepResult:
    """One step by its name."""
    read = settings.read
    if name == "dedup":
        figures, more = run_dedup(settings.dedup, read, splits, layout, work, engine, format)
    elif name == "mix":
        figures, more = run_mix(settings.mix, read, splits, layout, work, engine, format)
    elif name == "paragraphs":
        figures, more = run_paragraphs(settings.paragraphs, read, splits, layout, work, engine, format), {}
    elif name == "decontaminate":
        index = work / "decontaminate.npy"
        more = {"ngrams": build_index(settings.decontaminate, index)}
        figures = run_step(DecontaminateStep(settings.decontaminate, index), splits, layout, engine, format, read)
    else:
        step = CleanStep(settings.rules) if name == "clean" else FilterStep(settings.filter)
        figures, more = run_step(step, splits, layout, engine, format, read), {}
    result = StepResult(name, figures, more)
    write_json(f"{layout.state}.json", result.to_json())
    return result


def run_pipeline(settings: DataSettings, inputs: list[str], output: str | Path, engine: Engine) -> list[StepResult]:
    """All active steps; documents of the last one in `output`, those removed in `output/removed/<step>`.

    What an interrupted run has finished is not done again; a finished run with the same input and settings does
    nothing.
    """
    output, steps = Path(output).absolute(), active_steps(settings)
    splits = plan_splits(inputs, settings.read)
    marker, digest = output / ".state" / "run.json", _run_digest(settings, splits)
    done = _finished(marker, digest, output)
    if done is not None:
        info("run: everything was done already")
        return done
    results = []
    for name in steps:
        last = name == steps[-1]
        folder = output / ".work" / name
        documents = output if last else folder / "documents"
        layout = OutputLayout(str(documents), str(output / "removed" / name), str(output / ".state" / name))
        results.append(run_one(name, settings, splits, layout, folder / "work", engine,
                               settings.format if last else "jsonl"))
        if not last:
            splits = _splits_of(documents, settings)
    parts = sorted(path.name for path in output.glob("part-*"))
    write_json(marker, {"digest": digest, "parts": parts, "steps": [result.to_json() for result in results]})
    if not settings.run.keep_intermediate:
        shutil.rmtree(output / ".work", ignore_errors=True)
    return results


def _splits_of(documents: Path, settings: DataSettings) -> list[Split]:
    """Parts for the next step; a part that the last step left empty is no damaged file and is passed over."""
    if all(os.path.getsize(path) == 0 for path, _ in find_files([str(documents)])):
        return []
    splits = [split for split in plan_splits([str(documents)], settings.read) if os.path.getsize(split.path) > 0]
    return [Split(index, *list(vars(split).values())[1:]) for index, split in enumerate(splits)]


def _finished(marker: Path, digest: str, output: Path) -> list[StepResult] | None:
    if not marker.is_file():
        return None
    done = read_json(marker)
    if done["digest"] != digest or not all((output / name).is_file() for name in done["parts"]):
        return None
    return [StepResult.from_json(tree) for tree in done["steps"]]


def _run_digest(settings: DataSettings, splits: list[Split]) -> str:
    """Stands for the input, the settings and the files that these name; where it runs does not matter."""
    filters = settings.filter
    files = [filters.sensitive.words_file, filters.spam.model, filters.quality.model]
    files += [path for name in discover() for path in getattr(settings.rules, name).word_lists()]
    files += [str(path) for text in settings.decontaminate.evaluation for path in sorted(Path(text).rglob("*"))]
    files += settings.decontaminate.evaluation
    contents = [file_digest(path) for path in files if path is not None and Path(path).is_file()]
    return digest_of([settings.model_dump(mode="json", exclude={"engine"}), contents,
                      [split_identity(split) for split in splits]])


def total_by_rule(results: list[StepResult]) -> dict[str, int]:
    """Documents removed by each rule of any step."""
    counts: dict[str, int] = {}
    for result in results:
        for rule, count in result.figures.by_rule.items():
            counts[rule] = counts.get(rule, 0) + count
    return dict(sorted(counts.items()))
