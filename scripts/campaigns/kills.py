"""SIGKILL at random moments; then the same command again, and the end must be what it is without a kill, byte for byte.

Saves are killed by the hundred in a process that does nothing else; training of both families, packing, deduplication
and quantization as the commands that a user types.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from campaigns.base import Campaign

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 600.0


@dataclass
class Job:
    """A command that is killed.

    Args:
        name: for the counts.
        command: `command(folder)`: arguments of the Python interpreter; the same each time, so that it goes on.
        result: `result(folder)`: a digest of what it leaves at its end.
        prepare: what the folder holds before.
        clean: what the folder must hold no leftovers of: looked for after the end.
    """

    name: str
    command: Callable[[Path], list[str]]
    result: Callable[[Path], str]
    prepare: Callable[[Path], None] = lambda folder: None
    wanted: str = ""
    seconds: float = 0.0


def run(campaign: Campaign) -> None:
    """Saves first, then the commands in turn."""
    folder = campaign.folder / "kills"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    saves(campaign, folder / "saves", campaign.part("saves"))
    if campaign.short:
        return
    rng, ready, done = campaign.part("kills"), [], 0
    for job in jobs(folder):
        if campaign.more(done, 0) and measure(campaign, job, folder / "straight"):
            ready.append(job)
    while ready and campaign.more(done, 0):
        kill_one(campaign, ready[done % len(ready)], folder / "killed", rng)
        done += 1


def measure(campaign: Campaign, job: Job, folder: Path) -> bool:
    """The uninterrupted run: what it leaves, and how long it takes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job.prepare(folder)
    begun = time.monotonic()
    done = subprocess.run([sys.executable, *job.command(folder)], capture_output=True, text=True, timeout=LIMIT,
                          cwd=ROOT)
    job.seconds = time.monotonic() - begun
    if done.returncode != 0:
        campaign.fail(f"uninterrupted {job.name}", done.stderr[-3000:])
        return False
    job.wanted = job.result(folder)
    return True


def kill_one(campaign: Campaign, job: Job, folder: Path, rng: random.Random) -> None:
    """Kills the job one to three times, lets it end, and compares."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job.prepare(folder)
    output = ""
    for _ in range(rng.choice((1, 1, 2, 3))):
        process = subprocess.Popen([sys.executable, *job.command(folder)], stdout=subprocess.DEVNULL, cwd=ROOT,
                                   stderr=subprocess.PIPE, text=True, start_new_session=True)
        wait = rng.uniform(0.3, 1.0) * job.seconds
        try:
            output = process.communicate(timeout=wait)[1]
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            campaign.count(f"kill {job.name}")
    done = subprocess.run([sys.executable, *job.command(folder)], capture_output=True, text=True, timeout=LIMIT,
                          cwd=ROOT)
    if done.returncode != 0 or "Traceback" in done.stderr + output:
        campaign.fail(f"kill {job.name}", f"exit code {done.returncode}\n{output[-1000:]}\n{done.stderr[-2500:]}")
    elif job.result(folder) != job.wanted:
        campaign.fail(f"kill {job.name}", "the resumed run left something else than the uninterrupted one")
    elif left := leftovers(folder):
        campaign.fail(f"kill {job.name}", f"left behind: {left[:5]}")


def leftovers(folder: Path) -> list[str]:
    """Half-made files and folders that nobody owns."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name.endswith((".tmp", ".old"))]


def digest(paths: list[Path]) -> str:
    """Of names and bytes of files."""
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def newest(folder: Path) -> str:
    """Of the parameters and moments of the newest checkpoint."""
    steps = sorted((folder / "run" / "checkpoints").glob("step_*"))
    return steps[-1].name + digest(list(steps[-1].glob("*.safetensors"))) if steps else "none"


def jobs(folder: Path) -> list[Job]:
    """What is killed besides saves."""
    home = folder / "home"
    home.mkdir()
    pangu = ["model.layers=2", "model.hidden_size=16", "model.heads=2", "model.sequence_length=32",
             "model.vocabulary_size=950", "train.global_batch_size=4", "train.validation_batches=1",
             "output.tensorboard=false", f"data.tokenizer={home}/v.model", f"data.corpus={home}/corpus.jsonl"]
    for words in (["data_tools", "generate-corpus", "--output", f"{home}/corpus.jsonl", "--bytes", "200KB"],
                  ["pangu", "train-vocabulary", *pangu], ["pangu", "pack", *pangu, f"data.directory={home}/records"]):
        subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True, cwd=ROOT)
    train = ["train.steps=60", "output.checkpoint_every=5", "train.log_every=5", "train.validate_every=20"]
    recsys = ["--config", "configs/recsys/rankmixer.yaml", "data.synthetic.samples=4000", "data.synthetic.users=60",
              "data.synthetic.items=40", "train.global_batch_size=64", "train.log_every=5", "train.validate_every=20",
              "output.tensorboard=false", "output.checkpoint_every=5", "train.steps=60"]

    def parts(place: Path) -> str:
        return digest([path for path in place.rglob("part-*") if ".state" not in path.parts])

    def documents(place: Path) -> None:
        shutil.copy(home / "corpus.jsonl", place / "in.jsonl")

    return [
        Job("train pangu", lambda place: ["-m", "pangu", "train", *pangu, *train, f"data.directory={home}/records",
                                          f"output.directory={place}/run"], newest),
        Job("train recsys", lambda place: ["-m", "recsys", "train", *recsys, f"data.cache={place}/cache",
                                           f"output.directory={place}/run"], newest),
        Job("pack", lambda place: ["-m", "pangu", "pack", *pangu, "pack.overwrite=true", "pack.workers=2",
                                   "pack.shards=2", f"data.directory={place}/records"],
            lambda place: digest(list((place / "records").glob("*.ids")))),
        Job("dedup", lambda place: ["-m", "data_tools", "dedup", "--input", f"{place}/in.jsonl", "--output",
                                    f"{place}/out", "--engine", "local", "engine.workers=2", "read.split_bytes=40000"],
            parts, documents),
        Job("clean", lambda place: ["-m", "data_tools", "clean", "--input", f"{place}/in.jsonl", "--output",
                                    f"{place}/out", "engine.workers=2", "read.split_bytes=40000"], parts, documents),
        quantize(folder, home, recsys),
    ]


def quantize(folder: Path, home: Path, recsys: list[str]) -> Job:
    """Quantization of a ranker trained once."""
    source = home / "ranker"

    def prepare(place: Path) -> None:
        if not source.exists():
            subprocess.run([sys.executable, "-m", "recsys", "train", *recsys[:-1], "train.steps=5",
                            f"data.cache={home}/cache", f"output.directory={source}"], check=True, capture_output=True,
                           cwd=ROOT)

    return Job("quantize", lambda place: ["-m", "recsys", "quantize", "--checkpoint", str(source), "--output",
                                          f"{place}/run", "--part", "none"], newest, prepare)


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


def saves(campaign: Campaign, folder: Path, rng: random.Random) -> None:
    """Kills a process that saves and saves: what was reported as saved must be there undamaged at the next start, and
    no more than the kept checkpoints. Half of the runs replace one and the same checkpoint."""
    done, limit = 0, 3 if campaign.short else 100
    while done < limit and (campaign.short or campaign.more(done, 0)):
        by = done // 10 % 2
        place = folder / f"{done // 10}"
        script = _SAVES.format(root=str(ROOT), scripts=str(ROOT / "scripts"), folder=str(place), by=by)
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True)
        first = process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.4))
        process.kill()
        out, output = process.communicate()
        if not first or "Traceback" in output:
            campaign.fail("kill save", f"{first}\n{output[-2000:]}")
        lines = [json.loads(line) for line in out.split("\n") if line.endswith("]")]
        saved = [step for what, step in lines if what == "saved"]
        check_saves(campaign, place, saved[-1] if saved else json.loads(first)[1] if first else 0)
        campaign.count("kill save")
        done += 1


def check_saves(campaign: Campaign, place: Path, output: int) -> None:
    """The newest checkpoint is undamaged and at least what was reported; nothing is left beside it after a sweep."""
    from parallel.checkpoint.newest import good_checkpoint
    from parallel.checkpoint.sharded import Slices

    try:
        path = good_checkpoint(place)
        step = int(Slices(path).state["iteration"]) if path else 0
    except Exception as error:
        campaign.fail("kill save", f"{type(error).__name__}: {error}")
        return
    if step < output:
        campaign.fail("kill save", f"step {output} was reported as saved, and {step} is there")
    if left := leftovers(place):
        campaign.fail("kill save", f"left behind: {left}")
