"""Every layout of the grid under every small model, replayed and compared with one device, as one table.

    python scripts/bench/replay_table.py [--models pangu/tiny,recsys/dlrm_mlp] [--layouts all] [--markdown FILE]

Nothing is timed against another project: `ours` is the time of a replayed step divided by the ranks, `peer` the
one-device step of the same batch on MindSpore's CPU kernels, both medians over the table. All of it takes about half an
hour on two cores. The last line of stdout is JSON; exit code 1 if a layout differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

MODELS = {
    "pangu/tiny": "train.global_batch_size=16",
    "recsys/rankmixer": "train.global_batch_size=16",
    "recsys/tokenmixer_large": "train.global_batch_size=16",
    # Rows beyond an expert's capacity get nothing from it, on the cluster only: here no row is left out.
    "recsys/tokenmixer_large_moe": "train.global_batch_size=16 model.moe.capacity_factor=8",
    **{f"recsys/{name}": "train.global_batch_size=16"
       for name in ("autoint", "dcnv2", "dhen", "dlrm_mlp", "hiformer", "longer", "wukong",
                    "rankmixer_ug_sep", "tokenmixer_large_ug_sep")},
}


def main() -> int:
    """Parses the flags, replays and prints."""
    from parallel.proof.child import Compilers
    from parallel.proof.grid import chosen, replay_all, show

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="files under configs/, commas between")
    parser.add_argument("--layouts", default="all", help="names of the grid, commas between")
    parser.add_argument("--steps", type=int, default=3, help="training steps to compare")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there")
    arguments = parser.parse_args()
    layouts, found = chosen(arguments.layouts), {}
    with Compilers(2) as compilers, tempfile.TemporaryDirectory() as cache:
        for model in arguments.models.split(","):
            keys = MODELS.get(model, "").split()
            if model.startswith("recsys/"):
                keys.append(f"data.cache={cache}")
            found[model] = list(replay_all(f"{ROOT}/configs/{model}.yaml", keys, layouts, compilers, arguments.steps))
            show(found[model], model)
    if arguments.markdown:
        Path(arguments.markdown).write_text(markdown(found), encoding="utf-8")
    figures = [cell.figures for cells in found.values() for cell in cells if cell.figures is not None]
    ours = median(item["step_seconds"] / item["world"] for item in figures)
    peer = median(item["one_device_step_seconds"] for item in figures)
    equal = all(item["equal"] for item in figures) and not broken_twins(found)
    print(json.dumps({"ratio": round(ours / peer, 3), "ours": round(ours, 4), "peer": round(peer, 4),
                      "unit": "seconds a step and rank", "equal": equal, "replays": len(figures),
                      "refused": sum(len(cells) for cells in found.values()) - len(figures),
                      "max_loss_difference": max(item["max_loss_difference"] for item in figures),
                      "max_parameter_difference": max(item["max_parameter_difference"] for item in figures)}))
    return 0 if equal else 1


def broken_twins(found: dict[str, list]) -> list[str]:
    """Layouts that should have ended equal to another bit for bit and did not."""
    from parallel.proof.grid import bitwise

    return [f"{model} {name}" for model, cells in found.items() for name, same in bitwise(cells).items() if not same]


def markdown(found: dict[str, list]) -> str:
    """Rows are layouts, columns models; a field is the largest relative difference of losses / of parameters."""
    models = list(found)
    lines = ["| layout | ranks | " + " | ".join(name.partition("/")[2] for name in models) + " |",
             "|---" * (len(models) + 2) + "|"]
    for row in zip(*found.values(), strict=True):
        world = max((cell.figures["world"] for cell in row if cell.figures is not None), default=0)
        lines.append(f"| {row[0].layout.name} | {world or ''} | " + " | ".join(_field(cell) for cell in row) + " |")
    return "\n".join(lines) + "\n"


def _field(cell) -> str:
    if cell.figures is None:
        return "-"
    text = f"{cell.figures['max_loss_difference']:.0e} / {cell.figures['max_parameter_difference']:.0e}"
    return text if cell.figures["equal"] else f"**{text}**"


if __name__ == "__main__":
    sys.exit(main())
