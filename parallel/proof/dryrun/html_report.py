"""The dry run as one HTML file with pictures: mesh, pipeline timeline, memory per stage, communication by dimension."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.common.files import atomic_write
from parallel.planning.timeline import Timeline, timeline
from parallel.proof.dryrun.accounting import DIMENSIONS, coordinates, summary
from parallel.sharding.config import ParallelConfig
from parallel.sharding.topology import Node, mesh_rows, rack_rows, reach

if TYPE_CHECKING:
    from parallel.proof.dryrun.rank_report import RankReport

_MIB = 2**20
_MOST_ROWS = 400
_MOST_DRAWN = 64
_STYLE = """body{font:15px/1.5 sans-serif;max-width:1100px;margin:2em auto;color:#222}table{border-collapse:collapse}
td,th{border:1px solid #ccc;padding:2px 8px;text-align:right}td:first-child,th:first-child{text-align:left}
img{max-width:100%}.wrong{background:#fdd}"""


def write_report(path: Path, reports: list[RankReport], nodes: list[Node], title: str) -> None:
    """Writes the report of the compiled ranks; `nodes` says which machine holds which rank.

    Raises:
        UserError: no disk space.
    """
    config = reports[0].config
    parts = [f"<h1>Dry run of {html.escape(title)}</h1>", _summary(reports),
             "<h2>Mesh</h2>",
             _picture(lambda axes: _draw_mesh(axes, config, nodes, [report.rank for report in reports])),
             _topology(config, nodes),
             _pipeline(reports[0]), "<h2>Memory per stage</h2>",
             _picture(lambda axes: _draw_memory(axes, reports)), "<h2>Communication of one step, by dimension</h2>",
             _picture(lambda axes: _draw_communication(axes, reports))]
    for report in reports:
        parts += [f"<h2>Rank {report.rank}, stage {report.stage}</h2>", _collective_table(report),
                  _layout_table(report)]
    page = f"<!doctype html><meta charset=utf-8><title>Dry run</title><style>{_STYLE}</style>{''.join(parts)}"
    with atomic_write(path) as file:
        file.write(page)


def _summary(reports: list[RankReport]) -> str:
    config = reports[0].config
    shard = config.optimizer_shard if config.optimizer_shard > 1 else "off"
    lines = [f"{config.world} devices: data {config.data} x op {config.op} x pipeline {config.pipeline.stages} "
             f"({config.pipeline.schedule}, {reports[0].result['micro_batches']} micro-batches), "
             f"optimizer shard {shard}, recompute {config.recompute.policy}. Compiled, not run."]
    wrong = sum(item.times for report in reports for item in report.collectives if item.unexpected)
    lines.append(f"Unexpected redistributions: {wrong}.")
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def _pipeline(report: RankReport) -> str:
    config, count = report.config, report.result["micro_batches"]
    if config.pipeline.stages == 1:
        return ""
    backward, chunks = 3.0 if config.recompute.policy == "full" else 2.0, config.pipeline.interleave
    line = timeline(config.pipeline.schedule, *([[length / chunks] * chunks] * config.pipeline.stages
                                                for length in (1.0, backward)), count)
    text = (f"Bubble: {line.bubble:.1%} of the step, for equal stages, a forward pass of length 1 and a backward pass "
            f"of {backward:g}; transfers not counted.")
    return f"<h2>Pipeline</h2><p>{text}</p>" + _picture(lambda axes: _draw_timeline(axes, line), height=0.3
                                                        * config.pipeline.stages + 1.2)


def _picture(draw: Callable[[Any], None], height: float = 4.0) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, min(height, 12.0)), layout="constrained")
    draw(figure.subplots())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _topology(config: ParallelConfig, nodes: list[Node]) -> str:
    """Tables: how far each axis reaches, and which machines (by --node-rank) are in one rack."""
    reaching, racks = mesh_rows(config, nodes), rack_rows(config, nodes)
    axes = ("axis", "ranks of a group", "step", "the first group", "reaches")
    places = ("rack", "data coordinates", "machines (--node-rank), by stage")
    return f"{_table(axes, reaching, [False] * len(reaching))}<p></p>{_table(places, racks, [False] * len(racks))}"


def _draw_mesh(axes: Any, config: ParallelConfig, nodes: list[Node], compiled: list[int]) -> None:
    """Stages to the right, data downwards, op inside a box with its ranks; thick lines between racks."""
    rows, columns = min(config.data, _MOST_DRAWN), config.pipeline.stages
    places = {coordinates(rank, config)[:2]: rank for rank in compiled}
    small = rows * columns > 300
    for stage in range(columns):
        for data in range(rows):
            first = (stage * config.data + data) * config.op
            colour = "#f4a259" if (stage, data) in places else "#d6e4f0"
            axes.add_patch(_box(stage, data, colour))
            if not small:
                last = first + config.op - 1
                axes.text(stage + 0.5, data + 0.5, f"{first}" if last == first else f"{first}-{last}", ha="center",
                          va="center", fontsize=7)
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.set_xticks([stage + 0.5 for stage in range(columns)], range(columns))
    axes.set_yticks([data + 0.5 for data in range(rows)], range(rows))
    per_node, rack_of = nodes[0].ranks[1] + 1, [node.rack for node in nodes]
    for data in range(1, rows):
        if rack_of[data * config.op // per_node] != rack_of[(data - 1) * config.op // per_node]:
            axes.axhline(data, color="#222", linewidth=2)
    axes.set_xlabel(f"pipeline stage ({reach('pipeline', config, nodes)})")
    axes.set_ylabel(f"data and optimizer ({reach('data', config, nodes)})")
    axes.set_title(f"each box: {config.op} ranks of the op axis ({reach('op', config, nodes)}); compiled ranks are "
                   "orange; thick lines between racks")


def _box(x: float, y: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, facecolor=colour, edgecolor="#446")


def _draw_timeline(axes: Any, line: Timeline) -> None:
    for kind, phase, colour in (("F", "forward", "#7fb069"), ("B", "backward", "#5b8dbe")):
        own = [(stage, start, end) for stage, passes in enumerate(line.passes) for item, start, end in passes
               if item.kind == kind]
        axes.barh([stage for stage, _, _ in own], [end - start for _, start, end in own],
                  left=[start for _, start, _ in own], color=colour, edgecolor="white", linewidth=0.3, label=phase)
    axes.invert_yaxis()
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("time in forward passes of one micro-batch")
    axes.set_ylabel("stage")
    axes.legend(loc="upper right")


def _draw_memory(axes: Any, reports: list[RankReport]) -> None:
    names = ("parameters", "optimizer", "gradients", "activations")
    labels, bottom = [f"stage {report.stage}\nrank {report.rank}" for report in reports], [0.0] * len(reports)
    for name in names:
        heights = [getattr(report.memory, name) / 2**30 for report in reports]
        axes.bar(labels, heights, bottom=bottom, width=0.5, label=name)
        bottom = [low + high for low, high in zip(bottom, heights, strict=True)]
    axes.set_ylabel("GiB per device")
    axes.legend()


def _draw_communication(axes: Any, reports: list[RankReport]) -> None:
    width = 0.8 / len(reports)
    for number, report in enumerate(reports):
        wire = summary(report.collectives)["wire_bytes_by_dimension"]
        positions = [index + number * width for index in range(len(DIMENSIONS))]
        axes.bar(positions, [wire[name] / _MIB for name in DIMENSIONS], width=width,
                 label=f"stage {report.stage}, rank {report.rank}")
    axes.set_xticks([index + 0.4 - width / 2 for index in range(len(DIMENSIONS))], DIMENSIONS)
    axes.set_yscale("symlog")
    axes.set_ylabel("MiB sent per device and step")
    axes.legend()


def _collective_table(report: RankReport) -> str:
    rows = [(item.kind, item.dimension, item.purpose, item.phase, " ".join(map(str, item.ranks[:16])),
             "x".join(map(str, item.shape)) or "scalar", item.dtype, f"{item.bytes:,}", item.times, item.scope)
            for item in report.collectives]
    wrong = [item.unexpected for item in report.collectives]
    return "<h3>Collectives</h3>" + _table(
        ("kind", "dimension", "purpose", "phase", "ranks", "tensor", "type", "bytes", "times", "cell"), rows, wrong)


def _layout_table(report: RankReport) -> str:
    trainable = set(report.result["trainable"])
    rows = [(name, "x".join(map(str, layout[6])), "x".join(map(str, report.graph.parameters[name].shape)), layout[0],
             layout[1], layout[5] or "") for name, layout in report.layouts.items()
            if name in trainable and name in report.graph.parameters]
    return "<h3>Parameters</h3>" + _table(
        ("parameter", "whole", "slice", "device matrix", "tensor map", "optimizer group"), rows, [False] * len(rows))


def _table(columns: Iterable[str], rows: list[tuple], wrong: list[bool]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        f"<tr{' class=wrong' if bad else ''}>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row, bad in zip(rows[:_MOST_ROWS], wrong, strict=False))
    more = f"<p>{len(rows) - _MOST_ROWS} more rows are left out.</p>" if len(rows) > _MOST_ROWS else ""
    return f"<table><tr>{head}</tr>{body}</table>{more}"
