"""One HTML file with pictures (inline SVG, nothing loaded): timeline, memory, parts of a step, roofline, what if."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError
from parallel.common.files import atomic_write
from parallel.planning.planner import Estimate, Planner
from parallel.planning.timeline import Timeline
from parallel.sharding.config import ParallelConfig

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
    """Passes of every stage over time; forward and backward in two colours, idle time white. Where there are too many
    passes to draw, every k-th stage represents its neighbours."""
    row, left = 18, 60
    step = max(1, -(-sum(map(len, line.passes)) // _MOST_PASSES))
    drawn = sorted({*range(0, len(line.passes), step), len(line.passes) - 1})
    scale, shapes = (_WIDTH - left) / line.end, []
    for row_index, stage in enumerate(drawn):
        shapes.append(f"<text x='0' y='{row_index * row + 12}' font-size='11'>stage {stage}</text>")
        for item, start, end in line.passes[stage]:
            width = max((end - start) * scale, 0.3)
            shapes.append(f"<rect x='{left + start * scale:.1f}' y='{row_index * row}' width='{width:.1f}' "
                          f"height='{row - 3}' fill='{_COLOURS[item.kind != 'F']}' stroke='white' stroke-width='.3'>"
                          f"<title>{item.kind}{item.micro_batch} chunk {item.chunk}</title></rect>")
    height = row * len(drawn)
    for mark in range(6):
        x = left + (_WIDTH - left) * mark / 5
        shapes.append(f"<line x1='{x:.0f}' y1='0' x2='{x:.0f}' y2='{height + 4}' stroke='#999' stroke-dasharray='2'/>"
                      f"<text x='{x - 20:.0f}' y='{height + 16}' font-size='11'>{line.end * mark / 5:.3g} s</text>")
    legend = (f"<span style='color:{_COLOURS[0]}'>&#9632; forward</span> "
              f"<span style='color:{_COLOURS[1]}'>&#9632; backward</span>"
              + (f"; every {step}th stage of {len(line.passes)} is drawn" if step > 1 else ""))
    return f"<svg width='{_WIDTH + 30}' height='{height + 20}'>{''.join(shapes)}</svg><p>{legend}</p>"


def memory_picture(estimate: Estimate) -> str:
    """Stacked bars of memory by kind, with the limit as a line."""
    names, row = [name for name in vars(estimate.fullest) if name != "reused"], 18
    most = max(estimate.fullest.total, estimate.limit)
    scale, shapes = (_WIDTH - 60) / most, []
    for stage, memory in enumerate(estimate.memory):
        left = 60.0
        shapes.append(f"<text x='0' y='{stage * row + 12}' font-size='11'>stage {stage}</text>")
        for name, colour in zip(names, _COLOURS, strict=False):
            width = (getattr(memory, name) + (memory.reused if name == "gradients" else 0)) * scale
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

    def row_index(intensity: float, rate: float) -> tuple[float, float]:
        return (_WIDTH * (math.log10(max(intensity, 0.1)) + 1) / 5,
                height * (1 - (math.log10(max(rate / peak, 1e-4)) + 4) / 4))

    shapes = []
    for power in range(-1, 5):
        x = row_index(10.0**power, 1)[0]
        shapes.append(f"<line x1='{x:.0f}' y1='8' x2='{x:.0f}' y2='{height + 8}' stroke='#ddd'/>"
                      f"<text x='{x + 2:.0f}' y='{height + 6}' font-size='11'>{10.0**power:g}</text>")
    for power in range(-3, 1):
        y = row_index(1, peak * 10.0**power)[1] + 8
        shapes.append(f"<line x1='0' y1='{y:.0f}' x2='{_WIDTH}' y2='{y:.0f}' stroke='#ddd'/>"
                      f"<text x='2' y='{y + 12:.0f}' font-size='11'>{peak / 1e12 * 10.0**power:g} TFLOP/s</text>")
    corner = [row_index(0.1, 0.1 * memory), row_index(peak / memory, peak), row_index(10_000, peak)]
    shapes.append("<polyline fill='none' stroke='black' points='"
                  + " ".join(f"{x:.0f},{y + 8:.0f}" for x, y in corner) + "'/>")
    for flops, least, moved in sorted(points):
        share = cluster.efficiency.products * least / (least + cluster.efficiency.half_size)
        rate = min(peak * share, flops / moved * memory * cluster.efficiency.memory)
        x, y = row_index(flops / moved, rate)
        shapes.append(f"<circle cx='{x:.0f}' cy='{y + 8:.0f}' r='4' fill='{_COLOURS[3]}'><title>"
                      f"{flops:.3g} FLOPs, least dim {least}, {flops / moved:.0f} FLOPs/byte</title></circle>")
    return (f"<svg width='{_WIDTH}' height='{height + 16}'>{''.join(shapes)}</svg>"
            "<p>Each dot is a matrix product of one micro-batch on one rank. Right: more FLOPs per byte of memory "
            "traffic; up: FLOP/s by the model; black: the roof of memory bandwidth and peak.</p>")


def sensitivity(planner: Planner, estimate: Estimate) -> list[list[Any]]:
    """What becomes of the step if one thing about the cluster or the layout changes."""
    cluster, config = planner.cluster, estimate.config
    links = {name: getattr(cluster, name) for name in ("group", "node", "rack", "across")
             if getattr(cluster, name) is not None}
    rows = [["as planned", *_figures(planner, config)]]
    changes = [(f"twice the {name} bandwidth", [(link, "bandwidth_gb")]) for name, link in links.items()]
    changes += [("twice the bandwidth of all links", [(link, "bandwidth_gb") for link in links.values()]),
                ("twice the peak", [(cluster, "peak_tflops")]),
                ("twice the memory bandwidth", [(cluster, "memory_bandwidth_gb")])]
    for text, attributes in changes:
        with _doubled(attributes):
            rows.append([text, *_figures(planner, config)])
    if config.data % 2 == 0:
        half = config.model_copy(deep=True)
        half.data, half.devices = half.data // 2, half.world // 2
        half.pipeline.micro_batches = config.pipeline.micro_batches * (2 if half.pipeline.stages > 1 else 1)
        with suppress(UserError):
            rows.append(["half the devices (data halved, same batch)", *_figures(planner, half)])
    return rows


@contextmanager
def _doubled(attributes: list[tuple[Any, str]]) -> Iterator[None]:
    kept = [getattr(owner, name) for owner, name in attributes]
    for (owner, name), value in zip(attributes, kept, strict=True):
        setattr(owner, name, 2 * value)
    try:
        yield
    finally:
        for (owner, name), value in zip(attributes, kept, strict=True):
            setattr(owner, name, value)


def _figures(planner: Planner, config: Any) -> list[Any]:
    found = planner.evaluate(config)
    size = f"{found.fullest.total / 1e9:.4g}"
    return [found.step_seconds, f"{found.mfu:.1%}", size if found.missing <= 0 else f"{size}: does not fit"]


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


def recompute_name(config: ParallelConfig) -> str:
    """The policy, and whether what is kept is sliced."""
    return config.recompute.policy + (", sliced" if config.recompute.slice_activations else "")


def _search_table(search: Any) -> str:
    rows = [[item.config.data, item.config.op, item.config.pipeline.stages, item.config.pipeline.micro_batches,
             recompute_name(item.config), item.config.optimizer.shard, item.step_seconds, item.mfu,
             item.fullest.total / 1e9] for item in search.best]
    lost = ", ".join(f"{name} {count}" for name, count in search.lost.most_common())
    return (_table(["data", "op", "stages", "micro", "recompute", "shard", "step s", "MFU", "GB"], rows)
            + f"<p>{search.tried} layouts tried; lost by: {html.escape(lost)}.</p>")
