"""One HTML file with pictures (inline SVG, nothing loaded): timeline, memory, parts of a step, roofline, what if."""

from __future__ import annotations

import html
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from parallel.planning.estimate import Estimate, Planner
from parallel.planning.timeline import Timeline
from parallel.runtime.errors import UserError
from parallel.runtime.files import atomic_write

_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#edc948", "#9c755f")
_STYLE = ("body{font:14px sans-serif;margin:2em;max-width:1100px}table{border-collapse:collapse}td,th{padding:2px 9px;"
          "border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child{text-align:left}"
          "svg{display:block}")
_WIDTH, _MOST_PASSES = 1000, 6000


def write_report(path: Path, planner: Planner, estimate: Estimate, *, title: str, search: Any = None) -> None:
    """Writes the report of one layout, and of the search that found it."""
    parts = [f"<h1>{html.escape(title)} on {html.escape(planner.cluster.name)}</h1>", _headline(planner, estimate)]
    if estimate.timeline is not None:
        parts += ["<h2>Pipeline</h2>", timeline_picture(estimate.timeline)]
    parts += ["<h2>Memory of one device of each stage</h2>", memory_picture(estimate),
              "<h2>Where a step goes (slowest stage)</h2>", _bars(estimate.parts, "s"),
              "<h2>Communication of one rank in a step</h2>",
              _bars({name: size / 1e6 for name, size in estimate.communication_bytes.items()}, "MB"),
              "<h2>Roofline</h2>", roofline_picture(planner, estimate),
              "<h2>What if</h2>", _table(["change", "step s", "MFU", "GB"], sensitivity(planner, estimate))]
    if search is not None:
        parts += ["<h2>Best layouts</h2>", _search_table(search)]
    page = (f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{_STYLE}</style>"
            + "\n".join(parts))
    with atomic_write(path) as file:
        file.write(page)


def _headline(planner: Planner, estimate: Estimate) -> str:
    config = estimate.config
    return (f"<p>{planner.parameters:,} parameters; data {config.data}, op {config.op}, "
            f"stages {config.pipeline.stages}, {estimate.micro_batches} micro-batches; "
            f"step {estimate.step_seconds:.4g} s, MFU {estimate.mfu:.1%}, "
            f"{estimate.tokens_per_second_per_device:.4g} tokens/s per device, bubble {estimate.bubble:.1%}; "
            f"fullest device {estimate.fullest.total / 1e9:.1f} GB of {estimate.limit / 1e9:.1f} GB. "
            "An estimate: nothing was run.</p>")


def timeline_picture(line: Timeline) -> str:
    """Passes of every stage over time; forward and backward in two colours, idle time white."""
    row, scale = 18, _WIDTH / line.end
    shapes, drawn = [], 0
    for stage, passes in enumerate(line.passes):
        for item, start, end in passes:
            if drawn < _MOST_PASSES:
                colour = _COLOURS[0] if item.kind == "F" else _COLOURS[1]
                width = max((end - start) * scale, 0.3)
                shapes.append(f"<rect x='{start * scale:.1f}' y='{stage * row}' width='{width:.1f}'"
                              f" height='{row - 3}' fill='{colour}' stroke='white' stroke-width='.3'><title>"
                              f"{item.kind}{item.micro_batch} chunk {item.chunk}</title></rect>")
                drawn += 1
    return f"<svg width='{_WIDTH}' height='{row * len(line.passes)}'>{''.join(shapes)}</svg>"


def memory_picture(estimate: Estimate) -> str:
    """Stacked bars of memory by kind, with the limit as a line."""
    names, row = list(vars(estimate.fullest)), 18
    most = max(estimate.fullest.total, estimate.limit)
    scale, shapes = (_WIDTH - 60) / most, []
    for stage, memory in enumerate(estimate.memory):
        left = 60.0
        shapes.append(f"<text x='0' y='{stage * row + 12}' font-size='11'>stage {stage}</text>")
        for name, colour in zip(names, _COLOURS, strict=False):
            width = getattr(memory, name) * scale
            shapes.append(f"<rect x='{left:.1f}' y='{stage * row}' width='{width:.1f}' height='{row - 3}' "
                          f"fill='{colour}'><title>{name} {getattr(memory, name) / 1e9:.2f} GB</title></rect>")
            left += width
    edge, height = 60 + estimate.limit * scale, row * len(estimate.memory)
    shapes.append(f"<line x1='{edge:.1f}' y1='0' x2='{edge:.1f}' y2='{height}' stroke='black'/>")
    legend = " ".join(f"<span style='color:{colour}'>&#9632; {name}</span>" for name, colour in
                      zip(names, _COLOURS, strict=False))
    return f"<svg width='{_WIDTH + 40}' height='{height}'>{''.join(shapes)}</svg><p>{legend}</p>"


def roofline_picture(planner: Planner, estimate: Estimate) -> str:
    """Products of one micro-batch by FLOPs per byte, under the roof of peak and memory bandwidth."""
    cluster, height = planner.cluster, 260
    peak, memory = cluster.peak_tflops * 1e12, cluster.memory_bandwidth_gb * 1e9
    cost = planner.cost(estimate.config, estimate.micro_batches)
    points = {product for part in cost.costs for product in part.forward.products if product[2]}

    def place(intensity: float, rate: float) -> tuple[float, float]:
        return (_WIDTH * (math.log10(max(intensity, 0.1)) + 1) / 5,
                height * (1 - (math.log10(max(rate / peak, 1e-4)) + 4) / 4))

    shapes = []
    corner = [place(0.1, 0.1 * memory), place(peak / memory, peak), place(10_000, peak)]
    shapes.append("<polyline fill='none' stroke='black' points='"
                  + " ".join(f"{x:.0f},{y + 8:.0f}" for x, y in corner) + "'/>")
    for flops, least, moved in sorted(points):
        share = cluster.efficiency.products * least / (least + cluster.efficiency.half_size)
        rate = min(peak * share, flops / moved * memory * cluster.efficiency.memory)
        x, y = place(flops / moved, rate)
        shapes.append(f"<circle cx='{x:.0f}' cy='{y + 8:.0f}' r='4' fill='{_COLOURS[3]}'><title>"
                      f"{flops:.3g} FLOPs, least dim {least}, {flops / moved:.0f} FLOPs/byte</title></circle>")
    return (f"<svg width='{_WIDTH}' height='{height + 16}'>{''.join(shapes)}</svg>"
            "<p>Right: more FLOPs per byte (0.1 to 10,000); up: FLOP/s (10<sup>-4</sup> to 1 of the peak).</p>")


def sensitivity(planner: Planner, estimate: Estimate) -> list[list[Any]]:
    """What becomes of the step if one thing about the cluster or the layout changes."""
    rows = [["as planned", estimate.step_seconds, estimate.mfu, estimate.fullest.total / 1e9]]
    cluster = planner.cluster
    changes = [(f"twice the {name} bandwidth", name) for name in ("node", "rack", "across")]
    for text, name in changes:
        link = getattr(cluster, name)
        kept = link.bandwidth_gb
        link.bandwidth_gb = 2 * kept
        rows.append([text, *_figures(planner, estimate.config)])
        link.bandwidth_gb = kept
    for text, name in (("twice the peak", "peak_tflops"), ("twice the memory bandwidth", "memory_bandwidth_gb")):
        kept = getattr(cluster, name)
        setattr(cluster, name, 2 * kept)
        rows.append([text, *_figures(planner, estimate.config)])
        setattr(cluster, name, kept)
    if estimate.config.data % 2 == 0:
        half = estimate.config.model_copy(deep=True)
        half.data, half.devices = half.data // 2, half.world // 2
        half.pipeline.micro_batches = estimate.config.pipeline.micro_batches * (2 if half.pipeline.stages > 1 else 1)
        with suppress(UserError):
            rows.append(["half the devices (data halved)", *_figures(planner, half)])
    return rows


def _figures(planner: Planner, config: Any) -> list[float]:
    found = planner.evaluate(config, exact=False)
    return [found.step_seconds, found.mfu, found.fullest.total / 1e9]


def _bars(values: dict[str, float], unit: str) -> str:
    most = max([*values.values(), 1e-12])
    rows = [f"<tr><td>{html.escape(name)}</td><td>{value:.4g} {unit}</td><td><svg width='500' height='12'><rect width="
            f"'{max(0.0, 500 * value / most):.0f}' height='12' fill='{_COLOURS[0]}'/></svg></td></tr>"
            for name, value in values.items()]
    return f"<table>{''.join(rows)}</table>"


def _table(columns: list[str], rows: list[list[Any]]) -> str:
    def cell(value: Any) -> str:
        return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))

    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _search_table(search: Any) -> str:
    from parallel.planning.plan import recompute_name

    rows = [[item.config.data, item.config.op, item.config.pipeline.stages, item.config.pipeline.micro_batches,
             recompute_name(item.config), item.config.optimizer.shard, item.step_seconds, item.mfu,
             item.fullest.total / 1e9] for item in search.best]
    lost = ", ".join(f"{name} {count}" for name, count in search.lost.most_common())
    return (_table(["data", "op", "stages", "micro", "recompute", "shard", "step s", "MFU", "GB"], rows)
            + f"<p>{search.tried} layouts tried; lost by: {html.escape(lost)}.</p>")
