"""Every layout of the grid under every small model, replayed and compared with one device, as one table.

    python scripts/bench/replay_table.py [--models pangu/tiny,recsys/dlrm_mlp] [--layouts all] [--runs FILE]
                                         [--minutes 8] [--markdown FILE]

The whole grid takes about two hours on two cores. `--runs` keeps finished replays in a file of JSON lines and reads it
when started again; `--minutes` begins no replay after that time. Delete a line to have it replayed again.

Nothing is timed against another project: `ours` is the time of a replayed step of all ranks, `ours_a_rank` the same
divided by the ranks, `peer` the one-device step of the same batch on MindSpore's CPU kernels: medians over the table.
The last line of stdout is JSON; exit code 1 if a layout differs, or is refused for another reason than the model's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
# Sums of another number of threads differ in their last bit; a table may be made in several runs.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Sizes of the small models; a layout may say otherwise (four stages need four layers).
BATCH = "train.global_batch_size=16"
MODELS = {
    "pangu/tiny": f"model.layers=2 model.hidden_size=32 model.sequence_length=16 model.vocabulary_size=64 {BATCH}",
    **{f"recsys/{name}": BATCH for name in (
        "tokenmixer_large_moe", "rankmixer", "tokenmixer_large", "rankmixer_ug_sep", "tokenmixer_large_ug_sep",
        "longer", "dhen", "wukong", "hiformer", "autoint", "dcnv2", "dlrm_mlp")},
}
# With seed 1 and four layers one input of one ReLU is within rounding of 0 (docs/replay.md).
MODELS["recsys/longer"] += " train.seed=2"
# On one rank MindSpore adds up the gradients of a DHEN layer's input in another order if the layer is not recomputed;
# the MoE ranker differs there by rounding too (5e-15 in float64), and on two ranks by no bit.
OTHER_ORDER = {("recsys/dhen", "recompute"), ("recsys/tokenmixer_large_moe", "recompute")}


def main() -> int:
    """Parses the flags, replays and prints."""
    from parallel.proof.replay.layout_grid import chosen

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="files under configs/, commas between")
    parser.add_argument("--layouts", default="all", help="names of the grid, commas between")
    parser.add_argument("--steps", type=int, default=3, help="training steps to compare")
    parser.add_argument("--runs", metavar="FILE", help="file of finished replays")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no replay after that time")
    parser.add_argument("--trust", action="store_true",
                        help="compile one data coordinate where there are two; that the graphs of others follow from "
                        "it is then checked for each model where there are four")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there")
    arguments = parser.parse_args()
    layouts, models = chosen(arguments.layouts), arguments.models.split(",")
    cells = replayed(models, layouts, arguments)
    if arguments.markdown:
        Path(arguments.markdown).write_text(markdown(models, layouts, cells), encoding="utf-8")
    return report(cells, len(models) * len(layouts))


def replayed(models: list[str], layouts: list, arguments: argparse.Namespace) -> dict[tuple[str, str], object]:
    """Cells by model and layout: those of `--runs`, and what is replayed now."""
    from parallel.proof.compile.rank_compiler import Compilers

    end = time.monotonic() + 60 * arguments.minutes
    cells = kept(arguments.runs)
    with Compilers(min(2, os.cpu_count() or 1)) as compilers, tempfile.TemporaryDirectory() as cache:
        for model in models:
            left = [layout for layout in layouts if (model, layout.name) not in cells]
            for cell in replays(model, left, compilers, arguments, cache) if time.monotonic() < end else ():
                cells[model, cell.layout.name] = cell
                keep(arguments.runs, model, cell)
                if time.monotonic() > end:
                    break
    return {(model, layout.name): cells[model, layout.name] for model in models for layout in layouts
            if (model, layout.name) in cells}


def replays(model: str, layouts: list, compilers, arguments: argparse.Namespace, cache: str) -> Iterator:
    """Replays one model, a cell for each layout."""
    from parallel.proof.replay.layout_grid import replay_all

    sizes = MODELS.get(model, "").split() + ([f"data.cache={cache}"] if model.startswith("recsys/") else [])
    yield from replay_all(f"{ROOT}/configs/{model}.yaml", [], layouts, compilers, arguments.steps, sizes=sizes,
                          trust=arguments.trust)


def kept(file: str | None) -> dict[tuple[str, str], object]:
    """The cells in a file of finished replays."""
    from parallel.proof.replay.layout_grid import LAYOUTS, Cell

    known = {layout.name: layout for layout in LAYOUTS}
    lines = Path(file).read_text(encoding="utf-8").splitlines() if file and Path(file).exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["model"], row["layout"]): Cell(known[row["layout"]], row["figures"], row["digest"], row["refused"])
            for row in rows if row["layout"] in known}


def keep(file: str | None, model: str, cell) -> None:
    """Appends a finished replay to the file, and prints it."""
    row = {"model": model, "layout": cell.layout.name, "figures": cell.figures, "digest": cell.digest,
           "refused": cell.refused}
    if file:
        with Path(file).open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
    figures = cell.figures or {}
    line = cell.refused or "{} ranks, {}, loss {:.1e}, parameters {:.1e}".format(
        figures["world"], "equal" if figures["equal"] else "DIFFERENT", figures["max_loss_difference"],
        figures["max_parameter_difference"])
    print(f"{model} {cell.layout.name}: {line}", file=sys.stderr, flush=True)


def report(cells: dict[tuple[str, str], object], wanted: int) -> int:
    """Prints the JSON line; returns the exit code."""
    figures = [cell.figures for cell in cells.values() if cell.figures is not None]
    different = [" ".join(place) for place, cell in cells.items() if cell.figures and not cell.figures["equal"]]
    different += broken_twins(cells)
    different += [" ".join(place) for place, cell in cells.items() if cell.figures is None and not _reason(cell)]
    stepped = [item for item in figures if item["step_seconds"]]
    ours, rank, peer = (median(map(of, stepped)) if stepped else 0.0 for of in (
        lambda item: item["step_seconds"], lambda item: item["step_seconds"] / item["world"],
        lambda item: item["one_device_step_seconds"]))
    largest = {f"max_{name}_difference": max((item[f"max_{name}_difference"] for item in figures), default=None)
               for name in ("loss", "norm", "parameter", "state")}
    print(json.dumps({"ratio": round(ours / peer, 3) if peer else None, "ours": round(ours, 4), "peer": round(peer, 4),
                      "unit": "seconds a step", "ours_a_rank": round(rank, 4), "equal": bool(figures) and not different,
                      "different": different, "replays": len(figures), "refused": len(cells) - len(figures),
                      "left": wanted - len(cells), "worlds": sorted({item["world"] for item in figures}), **largest}))
    return 0 if figures and not different else 1


def broken_twins(cells: dict[tuple[str, str], object]) -> list[str]:
    """Layouts that should have ended equal to another bit for bit and did not."""
    from parallel.proof.replay.layout_grid import bitwise

    models = dict.fromkeys(model for model, _ in cells)
    return [f"{model} {name} (bit for bit)" for model in models
            for name, same in bitwise([cell for place, cell in cells.items() if place[0] == model]).items()
            if not same and (model, name) not in OTHER_ORDER]


def markdown(models: list[str], layouts: list, cells: dict[tuple[str, str], object]) -> str:
    """Rows are layouts, columns models; a field is the largest relative difference of parameters, or why it was
    refused. The last row is each model's largest relative difference of losses."""
    head = ["layout", "ranks", *(model.partition("/")[2] for model in models)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for layout in layouts:
        row = [cells.get((model, layout.name)) for model in models]
        world = max((cell.figures["world"] for cell in row if cell and cell.figures), default="")
        lines.append(f"| {layout.name} | {world} | " + " | ".join(map(_field, row)) + " |")
    worst = []
    for model in models:
        losses = [cell.figures["max_loss_difference"] for place, cell in cells.items()
                  if place[0] == model and cell.figures]
        worst.append(f"{max(losses):.1e}" if losses else "")
    lines.append("| largest of the losses | | " + " | ".join(worst) + " |")
    return "\n".join(lines) + "\n"


def _reason(cell) -> str:
    """Why a layout was refused, in a word; "" if the model is no reason (MindSpore refused it, say)."""
    from parallel.proof.replay.layout_grid import REFUSALS

    return next((reason for text, reason in REFUSALS.items() if text in cell.refused), "")


def _field(cell) -> str:
    if cell is None:
        return ""
    if cell.figures is None:
        return _reason(cell) or "**refused**"
    text = f"{cell.figures['max_parameter_difference']:.1e}"
    return text if cell.figures["equal"] else f"**{text}**"


if __name__ == "__main__":
    sys.exit(main())
