"""Kills, damage, wrong input, full disks and slow clients: what must never end in a traceback, half a file or silence.

    python scripts/campaign.py [--minutes 10] [--only inputs,damage,resealed,saves,kills,layouts,disk,launch,clients]
                               [--seed N] [--short] [--folder runs/campaign] [--counts FILE]

Each part gets its share of the time. Seeds are printed; a failure is kept in `<folder>/failures/`, its input made as
small as can be, and tried again with `--seed`. Counts add up over runs in one file (`<folder>/counts.json`, or
`--counts`), with the seed and commit of each, so that a campaign can go on another day: those of the project are in
`docs/measurements/raw/campaign_counts.json`. The last line of stdout is one JSON object; exit code 1 if anything
failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ.setdefault("GLOG_v", "3")
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"

PARTS = {"inputs": 0.25, "damage": 0.1, "resealed": 0.05, "saves": 0.05, "kills": 0.2, "layouts": 0.2, "disk": 0.05,
         "launch": 0.05, "clients": 0.05}
"""Parts and their share of the time."""


def main() -> int:
    """Runs the parts and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="about how long (default 10)")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument("--seed", type=int, default=None, help="of everything drawn (default: the time)")
    parser.add_argument("--folder", default=str(ROOT / "runs" / "campaign"), help="for artefacts, failures and counts")
    parser.add_argument("--counts", default=None, help="file in which counts add up (default: in the folder)")
    parser.add_argument("--short", action="store_true", help="a few trials of each part, as the suite runs it")
    arguments = parser.parse_args()
    parts = [name for name in arguments.only.split(",") if name]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    figures = run(parts, arguments)
    print(json.dumps(figures))
    return 1 if figures["failures"] else 0


def run(parts: list[str], arguments: argparse.Namespace) -> dict:
    """The figures of one run; adds them to the counts."""
    from campaigns.base import Campaign

    seed = arguments.seed if arguments.seed is not None else int(time.time())
    started, folder = time.monotonic(), Path(arguments.folder)
    counts = Path(arguments.counts or folder / "counts.json")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {seed}", file=sys.stderr, flush=True)
    campaign = Campaign(seed, folder.resolve(), started + 60 * arguments.minutes, arguments.short,
                        Counter(kept_counts(counts).get("total", {})))
    weight = sum(PARTS[name] for name in parts)
    for name in parts:
        campaign.share(60 * arguments.minutes * PARTS[name] / weight)
        try:
            importlib.import_module(f"campaigns.{name}").run(campaign)
        except Exception:  # what was counted until then counts
            campaign.fail(f"campaign {name}", traceback.format_exc())
        print(f"{name}: {dict(campaign.counts)}", file=sys.stderr, flush=True)
    for failure in campaign.failures:
        print(f"FAILED {failure['kind']}: {failure['what'].strip().splitlines()[-1][:300]}\n  {failure['file']}",
              file=sys.stderr)
    total = add_up(counts, campaign, time.monotonic() - started)
    return {"seed": seed, "seconds": round(time.monotonic() - started, 1), "counts": dict(campaign.counts),
            "failures": len(campaign.failures), "total": total, "folder": str(folder)}


def kept_counts(path: Path) -> dict:
    """The file of counts."""
    from parallel.common.files import read_json

    return read_json(path) if path.is_file() else {"runs": []}


def add_up(path: Path, campaign: object, seconds: float) -> dict[str, int]:
    """Adds a run to the file of counts; the totals over all runs."""
    import fcntl

    from parallel.common.files import write_json

    lock = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # several campaigns may end at once; given back by closing
    kept = kept_counts(path)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    kept["runs"].append({"seed": campaign.seed, "commit": commit.strip(), "date": time.strftime("%Y-%m-%d"),
                         "seconds": round(seconds, 1), "counts": dict(campaign.counts)})
    total: Counter[str] = Counter()
    for one in kept["runs"]:
        total.update(one["counts"])
    kept["total"] = dict(sorted(total.items()))
    write_json(path, kept)
    os.close(lock)
    return kept["total"]


if __name__ == "__main__":
    sys.exit(main())
