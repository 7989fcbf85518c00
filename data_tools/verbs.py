"""The verbs of `python -m data_tools` and their flags."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from data_tools.documents import plan_splits
from data_tools.engines import open_engine
from data_tools.flags import need
from data_tools.parts import OutputLayout
from data_tools.pipeline import StepResult, run_one, run_pipeline, total_by_rule
from data_tools.report import load_results, write_report
from data_tools.settings import DataSettings
from parallel.common.errors import UserError
from parallel.common.files import atomic_write
from parallel.common.progress import info, table


def apply_flags(settings: DataSettings, arguments: argparse.Namespace) -> DataSettings:
    """Flags win over the file."""
    need(arguments, "input", "output")
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError("must be at least 1", where="--workers", value=arguments.workers)
    if arguments.engine or arguments.master:
        settings.engine.name = arguments.engine or "spark"
    if arguments.master:
        settings.engine.master = arguments.master
    if arguments.workers is not None:
        settings.engine.workers = arguments.workers
    if arguments.format:
        settings.format = arguments.format
    check_output(arguments.input, arguments.output)
    return settings


def check_output(inputs: list[str], output: str) -> None:
    """Refuses an output that is, or is inside, an input folder: the next run would read its own output."""
    place = Path(output).resolve()
    for text in inputs:
        folder = Path(text).resolve()
        if folder.is_dir() and (place == folder or folder in place.parents):
            raise UserError("the output is inside the input", where="--output", value=output,
                            hint="give another folder")


def claim_output(output: str, verb: str) -> None:
    """Refuses a folder that holds the output of another verb, whose documents would be replaced."""
    if Path(output).is_file():
        raise UserError("the output is a file", where="--output", value=output, hint="give a folder")
    marker = Path(output) / ".state" / "verb"
    if marker.is_file() and (owner := marker.read_text("utf-8", "replace").strip()) != verb:
        raise UserError(f"the folder holds the output of '{owner[:40]}'", where="--output", value=output,
                        hint="give another folder")
    if Path(output).is_dir() and any(path.is_file() for path in Path(output).iterdir()) and not marker.is_file():
        raise UserError("the output folder holds other files", where="--output", value=output,
                        hint="give a new folder")
    with atomic_write(marker) as file:
        file.write(f"{verb}\n")


def run_clean(settings: DataSettings, arguments: argparse.Namespace) -> dict[str, Any]:
    """`clean`: the cleaning rules."""
    return run_step_verb("clean", apply_flags(settings, arguments), arguments)


def run_filter(settings: DataSettings, arguments: argparse.Namespace) -> dict[str, Any]:
    """`filter`: sensitive words, spam and quality."""
    settings = apply_flags(settings, arguments)
    if not settings.filter.active():
        raise UserError("no filter has its file", where="filter",
                        hint="set filter.sensitive.words_file, filter.spam.model or filter.quality.model")
    return run_step_verb("filter", settings, arguments)


def run_dedup(settings: DataSettings, arguments: argparse.Namespace) -> dict[str, Any]:
    """`dedup`: exact and near duplicates across all inputs."""
    settings = apply_flags(settings, arguments)
    if arguments.threshold is not None:
        if not 0 < arguments.threshold <= 1:
            raise UserError("must be in (0, 1]", where="--threshold", value=arguments.threshold)
        settings.dedup.threshold = arguments.threshold
    return run_step_verb("dedup", settings, arguments)


def run_paragraphs(settings: DataSettings, arguments: argparse.Namespace) -> dict[str, Any]:
    """`paragraphs`: paragraphs that stand in several documents."""
    return run_step_verb("paragraphs", apply_flags(settings, arguments), arguments)


def run_decontaminate(settings: DataSettings, arguments: argparse.Namespace) -> dict[str, Any]:
    """`decontaminate`: documents that hold texts of the evaluation sets."""
    settings = apply_flags(settings, arguments)
    if arguments.evaluation:
        settings.decontaminate.evaluation = arguments.evaluation
    if not settings.decontaminate.evaluation:
        raise UserError("no evaluation sets given", where="--evaluation", hint="name their files or folders")
    return run_step_verb("decontaminate", settings, arguments)


def run_mix(settings: DataSettings, arguments: argparse.Namespace) -> dict[str, Any]:
    """`mix`: the training mixture."""
    return run_step_verb("mix", apply_flags(settings, arguments), arguments)


def run_step_verb(name: str, settings: DataSettings, arguments: argparse.Namespace) -> dict[str, Any]:
    """One step over the inputs; its figures for the JSON line."""
    splits = plan_splits(arguments.input, settings.read)
    claim_output(arguments.output, name)
    places, work = OutputLayout.under(arguments.output, name), Path(arguments.output).absolute() / ".work" / name
    started = time.perf_counter()
    with open_engine(settings.engine) as engine:
        result = run_one(name, settings, splits, places, work, engine, settings.format)
    line = report_step(result, time.perf_counter() - started)
    return {**line, "engine": settings.engine.name}


def run_all(settings: DataSettings, arguments: argparse.Namespace) -> dict[str, Any]:
    """`run`: all steps and the report."""
    settings = apply_flags(settings, arguments)
    plan_splits(arguments.input, settings.read)  # a wrong input is reported before anything is written
    claim_output(arguments.output, "run")
    started = time.perf_counter()
    with open_engine(settings.engine) as engine:
        results = run_pipeline(settings, arguments.input, arguments.output, engine)
    seconds = time.perf_counter() - started
    lines = [report_step(result, result.figures.worker_seconds) for result in results]
    page = write_report(arguments.output)
    info(f"report {page}")
    size = results[0].figures.bytes_in
    return {
        "documents_in": results[0].figures.documents_in, "documents_out": results[-1].figures.documents_out,
        "bytes_in": size, "bytes_out": results[-1].figures.bytes_out, "by_rule": total_by_rule(results),
        "damaged_files": lines[0]["damaged_files"], "repaired": lines[0]["repaired"],
        "steps": {result.name: result.figures.documents_out for result in results}, "report": str(page),
        "seconds": round(seconds, 3), "mb_per_second": round(size / 1e6 / seconds, 3), "engine": settings.engine.name,
    }


def run_report(settings: None, arguments: argparse.Namespace) -> dict[str, Any]:
    """`report`: the HTML page of an output folder."""
    page = write_report(arguments.input, arguments.output)
    results = load_results(Path(arguments.input))
    return {"report": str(page), "steps": [result.name for result in results], "by_rule": total_by_rule(results)}


def report_step(result: StepResult, seconds: float) -> dict[str, Any]:
    """Prints the tables of a step and returns its JSON line."""
    name, figures, more = result.name, result.figures, dict(result.more)
    rows = [[rule, count, figures.bytes_by_rule[rule] / 1e6] for rule, count in figures.by_rule.most_common()]
    table(f"{name}: {figures.documents_in:,} documents in, {figures.documents_out:,} out",
          ["removed by", "documents", "MB"], rows)
    if figures.changed_by_rule:
        table(f"{name}: documents changed", ["by", "documents"], figures.changed_by_rule.most_common())
    if figures.damaged_files:
        table(f"{name}: damaged files, the first of {len(figures.damaged_files)}", ["path", "kind", "evidence"],
              [list(entry.values()) for entry in figures.damaged_files[:20]])
    sizes = more.pop("cluster_sizes", {})
    if sizes:
        table("dedup: clusters", ["documents in a cluster", "clusters"], list(sizes.items())[:20])
    if figures.documents_in and not figures.documents_out:
        info(f"nothing is left: {name} removed all {figures.documents_in:,} documents; the table says by which rule")
    more = {"categories": more} if name == "mix" else more
    speed = figures.bytes_in / 1e6 / seconds if seconds > 0 else 0.0
    return {**figures.summary(), **more, "seconds": round(seconds, 3), "mb_per_second": round(speed, 3)}
