"""SIGKILL inside saves: a process that does nothing else is killed by the hundred. What was told saved must be there
whole at the next start, and nothing half-made beside it."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from campaigns.base import Campaign
from campaigns.kills import ROOT, leftovers

GOAL, FEWEST = 100, 10


def run(campaign: Campaign) -> None:
    """Half of the processes save further steps, the others replace one and the same checkpoint."""
    folder, rng = campaign.folder / "saves", campaign.part("saves")
    shutil.rmtree(folder, ignore_errors=True)
    limit = 3 if campaign.short else max(FEWEST, GOAL - campaign.before["kill save"])
    done = 0
    while done < limit and (campaign.short or campaign.more(done, 0)):
        saves(campaign, folder / str(done // 10), done // 10 % 2, rng)
        done += 1


_SAVES = """
import sys, json
sys.path[:0] = [{root!r}, {scripts!r}]
import numpy as np
from campaigns.damage import Plain
from parallel.checkpoint.full import save_checkpoint
from parallel.checkpoint.newest import good_checkpoint
from parallel.checkpoint.sharded import Slices
folder = {folder!r}
path = good_checkpoint(folder)
step = int(Slices(path).state["iteration"]) if path else 0
print(json.dumps(["from", step]), flush=True)
while True:
    step += {by}
    tensors = [Plain(f"w{{i}}", np.full((64, 256), step + i, np.float32)) for i in range(4)]
    save_checkpoint(folder, max(step, 1), tensors, (), {{"iteration": step}}, keep=2)
    print(json.dumps(["saved", step]), flush=True)
"""


def saves(campaign: Campaign, place: Path, by: int, rng: random.Random) -> None:
    """Kills a process that saves and saves, each time `by` steps further."""
    script = _SAVES.format(root=str(ROOT), scripts=str(ROOT / "scripts"), folder=str(place), by=by)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    first = process.stdout.readline()
    time.sleep(rng.uniform(0.0, 0.4))
    process.kill()
    out, told = process.communicate()
    if not first or "Traceback" in told:
        campaign.fail("kill save", f"{first}\n{told[-2000:]}")
    lines = [json.loads(line) for line in out.split("\n") if line.endswith("]")]
    saved = [step for what, step in lines if what == "saved"]
    check_saves(campaign, place, saved[-1] if saved else json.loads(first)[1] if first else 0)
    campaign.count("kill save")


def check_saves(campaign: Campaign, place: Path, told: int) -> None:
    """The newest checkpoint is undamaged and at least what was reported; nothing is left beside it after a sweep."""
    from parallel.checkpoint.newest import good_checkpoint
    from parallel.checkpoint.sharded import Slices

    try:
        path = good_checkpoint(place)
        step = int(Slices(path).state["iteration"]) if path else 0
    except Exception as error:
        campaign.fail("kill save", f"{type(error).__name__}: {error}")
        return
    if step < told:
        campaign.fail("kill save", f"step {told} was told saved, and {step} is there")
    if left := leftovers(place):
        campaign.fail("kill save", f"left behind: {left}")
