"""Two ranks as a user starts them: one is killed, the launcher is killed, a signal stops them. Nothing trains on
without an owner, every stop leaves a checkpoint, and the run goes on bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from campaigns.base import Campaign
from campaigns.kills import ROOT, newest

LIMIT = 420.0
PORTS = range(8200, 8900)
ENDS = 5
GOALS = {"SIGTERM": 10, "SIGINT": 10, "rank killed": 5, "launcher killed": 5}


def run(campaign: Campaign) -> None:
    """The kinds of end, by what was tried least; nothing in the suite, where tests of the launcher stand for it."""
    if campaign.short:
        return
    folder, rng = campaign.folder / "launch", campaign.part("launch")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    launch(folder, "straight", rng).communicate(timeout=LIMIT)
    wanted, done = newest(folder / "straight"), 0
    while campaign.more(done, 0):
        name, output, ended = f"run{done}", "", []
        for _ in range(ENDS):  # of one run, each behind a later checkpoint
            ended.append(min(GOALS, key=lambda kind: (campaign.counts[f"launch {kind}"]
                                                      + campaign.before[f"launch {kind}"]) / GOALS[kind]))
            output += end(campaign, folder, name, ended[-1], rng)
            campaign.count(f"launch {ended[-1]}")
            print(f"launch: {dict(campaign.counts)}", file=sys.stderr, flush=True)
            if not campaign.more(done, 0):
                break
        process = launch(folder, name, rng)
        try:
            rest = process.communicate(timeout=LIMIT)[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            rest = "the second launch did not end"
        campaign.count("launch resumed")
        if "Traceback" in output + rest or newest(folder / name) != wanted:
            campaign.fail(f"launch {', '.join(ended)}", f"{output[-2000:]}\n---\n{rest[-2500:]}\n"
                          f"{newest(folder / name)[:20]} for {wanted[:20]}")
        shutil.rmtree(folder / name, ignore_errors=True)
        done += 1


def launch(folder: Path, name: str, rng: random.Random) -> subprocess.Popen:
    """A launch of two ranks that train a ranker."""
    words = ["--config", "configs/recsys/rankmixer.yaml", "--nproc", "2", "--master", f"127.0.0.1:{rng.choice(PORTS)}",
             "parallel.data=2", "data.synthetic.samples=2000", "data.synthetic.users=60", "data.synthetic.items=40",
             "train.global_batch_size=64", "train.steps=200", "train.log_every=1", "output.checkpoint_every=5",
             "train.validate_every=100", "output.tensorboard=false", f"data.cache={folder}/cache",
             f"output.directory={folder}/{name}/run"]
    return subprocess.Popen([sys.executable, "-m", "parallel", "launch", *words], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)


def end(campaign: Campaign, folder: Path, name: str, kind: str, rng: random.Random) -> str:
    """Starts a launch and ends it once it has saved; its output."""
    before = newest_step(folder / name)
    process = launch(folder, name, rng)
    deadline = time.monotonic() + LIMIT
    while newest_step(folder / name) == before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(rng.uniform(0.0, 1.5))
    ranks = children(process.pid)
    if kind == "launcher killed":
        os.kill(process.pid, signal.SIGKILL)
    elif kind == "rank killed" and ranks:
        os.kill(rng.choice(ranks), signal.SIGKILL)
    elif process.poll() is None:
        process.send_signal(getattr(signal, kind, signal.SIGTERM))
    try:
        output = process.communicate(timeout=90)[1]
    except subprocess.TimeoutExpired:
        campaign.fail(f"launch {kind}", "the launcher did not end within 90 seconds")
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[1]
    gone = time.monotonic() + 15
    while any(map(lives, ranks)) and time.monotonic() < gone:
        time.sleep(0.2)
    if left := [pid for pid in ranks if lives(pid)]:
        campaign.fail(f"launch {kind}", f"processes {left} went on without their launcher")
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    if kind.startswith("SIG") and process.returncode != 0:
        campaign.fail(f"launch {kind}", f"exit code {process.returncode}\n{output[-2500:]}")
    saved, ran = newest_step(folder / name), last_step(folder / name)
    if kind.startswith("SIG") and saved != ran:
        campaign.fail(f"launch {kind}", f"stopped after step {ran}, the checkpoint is of {saved}\n{output[-2500:]}")
    return output


def newest_step(place: Path) -> int:
    """Step of the newest checkpoint, 0 without one."""
    return max((int(path.name[5:]) for path in (place / "run" / "checkpoints").glob("step_*")), default=0)


def last_step(place: Path) -> int:
    """The last step in metrics.jsonl, of which every one is there."""
    return max((json.loads(line)["step"] for line in (place / "run" / "metrics.jsonl").read_text().split("\n") if line),
               default=0)


def children(pid: int) -> list[int]:
    """Processes that a process started and that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] not in "ZX":
            found.append(int(path.parent.name))
    return found


def lives(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] \
            not in "ZX"
    except OSError:
        return False
