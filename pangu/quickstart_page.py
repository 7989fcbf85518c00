"""The page at the end of a quickstart: loss, accuracies beside chance, generated texts, and where the time went.

One HTML file that needs nothing else: no script, no other file, no host.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from parallel.common.files import atomic_write

_STYLE = """:root{color-scheme:light dark;--line:#8884;--one:#2563eb;--two:#d97706;--soft:#8882}
body{font:16px/1.55 system-ui,sans-serif;max-width:52em;margin:2em auto;padding:0 1em}
h1{font-size:1.5em}h2{font-size:1.1em;margin-top:2em}table{border-collapse:collapse;width:100%}
td,th{padding:.35em .7em;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}svg{width:100%;height:auto}
.text{white-space:pre-wrap}.made{color:var(--one)}
.bar{background:var(--soft);position:relative;height:1.1em;min-width:8em}
.bar i{position:absolute;inset:0 auto 0 0;background:var(--one)}
.bar b{position:absolute;top:-.2em;bottom:-.2em;width:2px;background:var(--two)}
code{background:var(--soft);padding:.1em .3em}small{opacity:.7}"""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 260, 46, 28
_MOST_POINTS = 600


def write_page(path: Path, title: str, figures: dict[str, dict], seconds: dict[str, float],
               records: Sequence[dict[str, Any]]) -> None:
    """Writes the page.

    Args:
        path: the HTML file.
        title: its heading.
        figures: JSON lines of the steps by name: pack, vocabulary, train, generate, and evaluate where there is one.
        seconds: how long each step took when it ran.
        records: of the run's metrics.jsonl; `loss` and `validation_loss` are drawn.
    """
    with atomic_write(path) as file:
        for part in _parts(title, figures, seconds, records):
            file.write(part)


def _parts(title: str, figures: dict[str, dict], seconds: dict[str, float],
           records: Sequence[dict[str, Any]]) -> Iterable[str]:
    train, written = figures["train"], figures["generate"]
    yield (f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
           f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>")
    perplexity = train.get("validation_perplexity")
    yield _table((("what", ""), ("", "n")), [
        ("documents", f"{figures['pack']['documents']:,}"), ("tokens", f"{figures['pack']['tokens']:,}"),
        ("pieces of the vocabulary", f"{figures['vocabulary']['vocabulary_size']:,}"),
        ("training steps", f"{train['steps']:,}"), ("tokens/s", f"{train['tokens_per_second']:,.0f}"),
        ("validation perplexity", f"{perplexity:.2f}" if perplexity else "-")])
    yield "<h2>Loss</h2>" + loss_curve(records)
    if results := figures.get("evaluate", {}).get("results"):
        yield "<h2>Accuracy on held-out questions</h2><p><small>The upright line is chance.</small></p>"
        yield _table((("skill", ""), ("", ""), ("accuracy", "n"), ("chance", "n")), [
            (skill, _Markup(f"<div class=bar><i style='width:{row['accuracy']:.1%}'></i>"
                            f"<b style='left:{row['chance']:.1%}'></b></div>"),
             f"{row['accuracy']:.1%}", f"{row['chance']:.0%}") for skill, row in results.items()])
    yield "<h2>Generated</h2>"
    yield _table((("prompt and continuation", ""),), [
        (_Markup(f"<div class=text>{html.escape(prompt)}<span class=made>{html.escape(text)}</span></div>"),)
        for prompt, text in zip(written["prompts"], written["outputs"], strict=True)])
    total = sum(seconds.values())
    yield f"<h2>Where the {total:,.0f} seconds went</h2>"
    yield _table((("step", ""), ("", ""), ("seconds", "n")), [
        (name, _Markup(f"<div class=bar><i style='width:{spent / max(total, 1e-9):.1%}'></i></div>"), f"{spent:,.1f}")
        for name, spent in seconds.items()])


class _Markup(str):
    """Text that is HTML already."""


def _table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> str:
    def cell(text: str, kind: str, tag: str) -> str:
        text = text if isinstance(text, _Markup) else html.escape(text)
        return f"<{tag}{' class=n' if kind == 'n' else ''}>{text}</{tag}>"

    def row(cells: Sequence[str], tag: str) -> str:
        pairs = zip(cells, columns, strict=True)
        return "<tr>" + "".join(cell(text, kind, tag) for text, (_, kind) in pairs) + "</tr>"

    head = row([name for name, _ in columns], "th") if any(name for name, _ in columns) else ""
    return f"<table>{head}{''.join(row(cells, 'td') for cells in rows)}</table>"


def loss_curve(records: Sequence[dict[str, Any]]) -> str:
    """An SVG of training and validation loss over the steps; points that are not finite are left out."""
    curves = {name: [(record["step"], float(record[name])) for record in records
                     if isinstance(record.get(name), (int, float)) and math.isfinite(record[name])]
              for name in ("loss", "validation_loss")}
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return "<p>nothing was logged</p>"
    last, low, high = max(x for x, _ in points), min(y for _, y in points), max(y for _, y in points)
    high = high if high > low else low + 1.0

    def at(point: tuple[int, float]) -> str:
        x = _LEFT + (_WIDTH - _LEFT - 8) * point[0] / max(last, 1)
        return f"{x:.1f},{8 + (_HEIGHT - _BOTTOM - 8) * (high - point[1]) / (high - low):.1f}"

    lines = []
    for fraction in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = low + fraction * (high - low)
        y = at((0, value)).partition(",")[2]
        lines.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y}" y2="{y}" stroke="#8884"/>'
                     f'<text x="{_LEFT - 6}" y="{y}" text-anchor="end" dominant-baseline="middle">{value:.2f}</text>')
        x = _LEFT + (_WIDTH - _LEFT - 8) * fraction
        lines.append(f'<text x="{x:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">{fraction * last:,.0f}</text>')
    for (name, curve), colour in zip(curves.items(), ("#2563eb", "#d97706"), strict=True):
        drawn = " ".join(map(at, curve[:: max(1, len(curve) // _MOST_POINTS)]))
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{drawn}">'
                     f"<title>{name.replace('_', ' ')}</title></polyline>")
    return (f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" font-size="11" fill="currentColor" role="img" '
            f'aria-label="loss over steps">{"".join(lines)}</svg><p><small>blue: training, orange: validation; '
            "steps from left to right</small></p>")
