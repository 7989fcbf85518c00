"""The report: one HTML page with pictures, out of the figures and the removed documents of an output folder."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic

from data_tools.pipeline import StepResult
from parallel.common.errors import UserError
from parallel.common.files import atomic_write, name_text, read_json
from parallel.common.lines import json_lines
from parallel.common.structured import typed

_EXAMPLES_A_RULE = 5
_LINES_A_FILE = 2000
_FILES = 200
_TEXT_SHOWN = 200
_STYLE = """body{font-family:sans-serif;margin:2em auto;max-width:70em;color:#222}
table{border-collapse:collapse;margin:1em 0}
td,th{border:1px solid #ccc;padding:.3em .7em;text-align:left;vertical-align:top}td.n{text-align:right}
img{max-width:100%}small{color:#666}"""


class _Removed(pydantic.BaseModel):
    """What the report shows of a removed document."""

    id: str
    source: str
    step: str
    rule: str
    evidence: str
    text: str = ""


def write_report(folder: str | Path, path: str | Path | None = None) -> Path:
    """Writes `report.html` for the output folder of `run` or of a single step.

    Raises:
        UserError: the folder holds no figures of these tools.
    """
    folder = Path(folder)
    results = load_results(folder)
    path = Path(path) if path is not None else folder / "report.html"
    with atomic_write(path) as file:
        for piece in _page(folder, results):
            file.write(piece)
    return path


def load_results(folder: Path) -> list[StepResult]:
    """The figures of all steps of an output folder, in their order."""
    state = folder / ".state"
    if (state / "run.json").is_file():
        return [StepResult.from_json(tree) for tree in read_json(state / "run.json")["steps"]]
    trees = [read_json(path) for path in sorted(state.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)]
    results = [StepResult.from_json(tree) for tree in trees if {"name", "figures", "more"} <= set(tree)]
    if not results:
        raise UserError("no figures of a run here", where=folder, hint="give the output folder of a verb of data_tools")
    return results


def _page(folder: Path, results: list[StepResult]) -> Iterator[str]:
    yield f"<!doctype html><meta charset=utf-8><title>Data report</title><style>{_STYLE}</style><h1>Data report</h1>"
    yield f"<p>{html.escape(name_text(folder))}</p><h2>Steps</h2>"
    yield _table(["step", "documents in", "documents out", "MB in", "MB out", "seconds of workers"], [
        [result.name, result.figures.documents_in, result.figures.documents_out, result.figures.bytes_in / 1e6,
         result.figures.bytes_out / 1e6, result.figures.worker_seconds] for result in results])
    yield _image(_steps_picture(results), "documents and megabytes after each step")
    yield "<h2>Reasons</h2>" + _reasons(results)
    yield "<h2>Lengths</h2>" + _image(_lengths_picture(results), "characters of the documents before and after")
    for result in results:
        if result.more.get("cluster_sizes"):
            yield "<h2>Duplicate clusters</h2>" + _clusters(result.more)
        if result.name == "mix":
            yield "<h2>Mixture</h2>" + _mixture(result.more)
    yield "<h2>Damaged input</h2>" + _damage(results)
    yield "<h2>Examples of removed documents</h2>"
    yield from _examples(folder)


def _table(columns: list[str], rows: list[list[Any]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"<td>{html.escape(str(value))}</td>"
        return f"<td class=n>{value:,}</td>" if isinstance(value, int) else f"<td class=n>{value:,.3f}</td>"

    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(cell(value) for value in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>" if rows else "<p>none</p>"


def _reasons(results: list[StepResult]) -> str:
    rows = [[result.name, rule, count, result.figures.bytes_by_rule.get(rule, 0) / 1e6,
             100.0 * count / max(1, result.figures.documents_in)]
            for result in results for rule, count in sorted(result.figures.by_rule.items(), key=lambda item: -item[1])]
    changed = [[result.name, rule, count] for result in results
               for rule, count in sorted(result.figures.changed_by_rule.items(), key=lambda item: -item[1])]
    picture = _bars([f"{row[0]}: {row[1]}" for row in rows], [row[2] for row in rows], "documents removed")
    return (_table(["step", "rule", "documents removed", "MB", "% of the step's input"], rows)
            + (_image(picture, "documents removed by each rule") if rows else "")
            + "<h3>Documents changed</h3>" + _table(["step", "rule", "documents"], changed))


def _clusters(more: dict[str, Any]) -> str:
    sizes = {int(size): count for size, count in more["cluster_sizes"].items()}
    figure, axes = _figure()
    axes.loglog(list(sizes), list(sizes.values()), "o")
    axes.set(xlabel="documents in a cluster (1000 = 1000 or more)", ylabel="clusters")
    figures = [[name.replace("_", " "), more[name]] for name in
               ("clusters", "largest_cluster", "candidate_pairs", "verified_pairs", "split_buckets")]
    return _table(["figure", "value"], figures) + _image(figure, "sizes of the clusters")


def _mixture(more: dict[str, Any]) -> str:
    columns = list(next(iter(more.values())))
    return _table(["category", *(name.replace("_", " ") for name in columns)],
                  [[category, *(values[name] for name in columns)] for category, values in more.items()])


def _damage(results: list[StepResult]) -> str:
    repaired = [[result.name, kind, count] for result in results for kind, count in result.figures.repaired.items()]
    files = [[entry["path"], entry["kind"], entry["evidence"]]
             for result in results for entry in result.figures.damaged_files]
    return ("<h3>Files</h3>" + _table(["path", "kind", "evidence"], files[:200])
            + (f"<p>and {len(files) - 200} more</p>" if len(files) > 200 else "")
            + "<h3>Documents repaired</h3>" + _table(["step", "kind", "documents"], repaired))


def _examples(folder: Path) -> Iterator[str]:
    """For each rule the few documents whose ids have the smallest hashes: the same ones at every run."""
    chosen: dict[str, list[tuple[str, dict]]] = {}
    files = sorted((folder / "removed").rglob("part-*.jsonl"))[:_FILES]
    for file in files:
        for number, line in itertools.islice(json_lines(file), _LINES_A_FILE):
            record = typed(line, _Removed, where=f"{file}, line {number}").model_dump()
            rank = hashlib.blake2b(record["id"].encode(), digest_size=8).hexdigest()
            best = chosen.setdefault(f"{record['step']}: {record['rule']}", [])
            best.append((rank, record))
            if len(best) > 4 * _EXAMPLES_A_RULE:
                best[:] = sorted(best, key=lambda pair: pair[0])[:_EXAMPLES_A_RULE]
    for rule, best in sorted(chosen.items()):
        records = [record for _, record in sorted(best, key=lambda pair: pair[0])[:_EXAMPLES_A_RULE]]
        yield f"<h3>{html.escape(rule)}</h3>" + _table(["id", "source", "evidence", "text"], [
            [record["id"], record["source"], record["evidence"], record.get("text", "")[:_TEXT_SHOWN]]
            for record in records])


def _figure(width: float = 8.0, height: float = 3.6) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _image(figure: Any, alt: str) -> str:
    if isinstance(figure, tuple):
        figure = figure[0]
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return f"<p><img alt='{alt}' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'></p>"


def _steps_picture(results: list[StepResult]) -> Any:
    figure, left = _figure()
    names = ["input", *(result.name for result in results)]
    documents = [results[0].figures.documents_in, *(result.figures.documents_out for result in results)]
    megabytes = [results[0].figures.bytes_in / 1e6, *(result.figures.bytes_out / 1e6 for result in results)]
    positions = range(len(names))
    left.bar([position - 0.2 for position in positions], documents, 0.4, color="tab:blue")
    left.set_ylabel("documents", color="tab:blue")
    right = left.twinx()
    right.bar([position + 0.2 for position in positions], megabytes, 0.4, color="tab:orange")
    right.set_ylabel("MB", color="tab:orange")
    left.set_xticks(list(positions), names)
    return figure


def _bars(names: list[str], values: list[float], label: str) -> Any:
    figure, axes = _figure(height=1.0 + 0.3 * max(1, len(names)))
    axes.barh(names[::-1], values[::-1])
    axes.set_xlabel(label)
    return figure


def _lengths_picture(results: list[StepResult]) -> Any:
    figure, axes = _figure()
    for label, counts in (("input", results[0].figures.characters_in), ("output", results[-1].figures.characters_out)):
        edges = sorted(int(edge) for edge in counts)
        axes.step(edges, [counts[str(edge)] for edge in edges], where="mid", marker="o", label=label)
    axes.set_xscale("symlog", base=2, linthresh=16)
    axes.set(xlabel="characters (from, up to twice as many)", ylabel="documents")
    axes.legend()
    return figure
