"""SIGKILL at random moments; then the same command again, and the end must be what it is without a kill, byte for byte.

Training of both families on one process, packing, deduplication, cleaning and quantization, as the commands that a user
types. What is furthest from its goal, over all runs of the campaign, comes first.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from campaigns.base import Campaign
from campaigns.children import Child, all_ended

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1200.0
_A_FEW = 10


@dataclass
class Job:
    """Something that is killed.

    Args:
        name: for the counts.
        start: `start(folder)`: its processes, started; the same each time, so that they go on.
        result: `result(folder)`: a digest of what it leaves at its end.
        goal: kills wanted over all runs of the campaign.
        prepare: what the folder holds before.
    """

    name: str
    start: Callable[[Path], list[Child]]
    result: Callable[[Path], str]
    goal: int
    prepare: Callable[[Path], None] = lambda folder: None
    wanted: str = ""
    seconds: float = 0.0


def run(campaign: Campaign) -> None:
    """All commands, by what is missing."""
    if not campaign.short:
        kill_all(campaign, "kills", lambda folder: jobs(folder))


def kill_all(campaign: Campaign, name: str, make: Callable[[Path], list[Job]]) -> None:
    """Kills the jobs that `make(folder)` makes until the part's time is up; what takes long to make (corpus,
    vocabulary, programs) stays in the folder for the next campaign."""
    folder, rng = campaign.folder / name, campaign.part(name)
    (folder / "home").mkdir(parents=True, exist_ok=True)
    ready: list[Job] = []
    waiting = sorted(make(folder / "home"), key=lambda job: campaign.killed(job.name) / job.goal)
    while campaign.more(0, 0) and (ready or waiting):
        begun = [job for job in ready if campaign.killed(job.name) < min(job.goal, _A_FEW)]
        if waiting and not begun:
            job = waiting.pop(0)
            ready += [job] if measure(campaign, job, folder / "straight") else []
        else:
            kill_one(campaign, min(begun or ready, key=lambda job: campaign.killed(job.name) / job.goal),
                     folder / "killed", rng)
            print(f"{name}: {dict(campaign.counts)}", file=sys.stderr, flush=True)


def kill_few(campaign: Campaign, name: str, job: Job) -> None:
    """Kills one job twice, as the suite does it."""
    folder = campaign.folder / name
    if measure(campaign, job, folder / "straight"):
        kill_one(campaign, job, folder / "killed", campaign.part(name), kills=2)


def single(words: Callable[[Path], list[str]]) -> Callable[[Path], list[Child]]:
    """A job of one process; `words(folder)`: what follows `python -m`."""
    return lambda place: [Child(words(place), place.with_name(f"{place.name}.log"))]


def measure(campaign: Campaign, job: Job, folder: Path) -> bool:
    """The uninterrupted run: what it leaves, and how long it takes."""
    try:
        _fresh(job, folder)
    except RuntimeError as error:  # what it needs cannot be made
        campaign.fail(f"prepare {job.name}", str(error))
        return False
    first = job.start(folder)  # what is imported late, compiled once
    if not all_ended(first, LIMIT):
        campaign.fail(f"straight {job.name}", "does not end\n" + "\n".join(child.told()[-2000:] for child in first))
        _end(first)
        return False
    _fresh(job, folder)
    begun = time.monotonic()
    children = job.start(folder)
    all_ended(children, LIMIT)
    job.seconds = time.monotonic() - begun
    if any(child.code != 0 for child in children):
        _end(children)
        campaign.fail(f"uninterrupted {job.name}", "\n".join(child.told()[-2000:] for child in children))
        return False
    job.wanted = job.result(folder)
    return True


def _fresh(job: Job, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job.prepare(folder)


def kill_one(campaign: Campaign, job: Job, folder: Path, rng: random.Random, kills: int | None = None) -> None:
    """Kills the job a few times, one of its processes a moment before the others, lets it end, and compares."""
    _fresh(job, folder)
    for _ in range(kills or rng.randrange(3, 13)):
        children = job.start(folder)
        if all_ended(children, rng.uniform(0.05, 0.6 if kills else 1.0) * job.seconds):
            break
        rng.choice(children).kill()
        time.sleep(rng.choice((0.0, 0.05, 0.3)) if len(children) > 1 else 0.0)
        _end(children)
        campaign.count(f"kill {job.name}")
    else:
        children = job.start(folder)
    in_time = all_ended(children, LIMIT)
    codes, output = [child.code for child in children], "\n---\n".join(child.told()[-2500:] for child in children)
    _end(children)
    if not in_time:
        _keep(campaign, job, folder, f"{output}\nthe resumed run does not end within {LIMIT:.0f} s")
    elif any(codes) or "Traceback" in output:
        _keep(campaign, job, folder, f"exit codes {codes}\n{output}")
    elif job.result(folder) != job.wanted:
        _keep(campaign, job, folder, f"{output}\nthe resumed run left something else than the uninterrupted one")
    elif left := leftovers(folder):
        _keep(campaign, job, folder, f"left behind: {left[:5]}")
    campaign.count(f"resumed {job.name}")


def _end(children: list[Child]) -> None:
    for child in children:
        child.kill()


def _keep(campaign: Campaign, job: Job, folder: Path, what: str) -> None:
    """A failure, with the folder as it stands."""
    kept = campaign.folder / "failures" / f"{job.name.replace(' ', '_')}-{time.time_ns()}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, kept)
    campaign.fail(f"kill {job.name}", f"kept in {kept}\n{what}", what)


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


def trained(folder: Path) -> str:
    """Of the newest checkpoint and of the metrics but what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().strip().split("\n")]
    kept = [{key: value for key, value in line.items() if key != "mfu" and not key.endswith("_per_second")}
            for line in lines]
    return newest(folder) + json.dumps(kept)


TRAIN = ["train.log_every=1", "train.validate_every=8", "train.validation_batches=1", "output.checkpoint_every=3",
         "output.tensorboard=false", "output.loss_curve=false", "train.peak_tflops=1", "train.steps=30"]
PANGU = ["model.layers=2", "model.hidden_size=16", "model.heads=2", "model.sequence_length=32",
         "model.vocabulary_size=512", "train.global_batch_size=8", "train.optimizer.schedule.warmup_steps=4"]
CLICKS = ["data.synthetic.samples=2000", "data.synthetic.users=60", "data.synthetic.items=40",
          "train.global_batch_size=64"]


def jobs(home: Path) -> list[Job]:
    """Everything on one process."""
    from campaigns.damage import records, train_vocabulary

    records(home)
    if not (home / "v.model").exists():
        train_vocabulary(home, home / "v.model")
    corpus = home / "world.jsonl"
    pack = ["model.vocabulary_size=950", "model.sequence_length=32", f"data.tokenizer={home}/v.model",
            f"data.corpus={corpus}", "pack.overwrite=true", "pack.workers=2", "pack.shards=2"]
    recsys = ["--config", str(ROOT / "configs/recsys/rankmixer.yaml"), *CLICKS, *TRAIN]
    alone = ["train.validate_every=null"]  # a graph less to compile at every start

    def parts(place: Path) -> str:
        return digest([path for path in place.rglob("part-*") if ".state" not in path.parts])

    def documents(place: Path) -> None:
        shutil.copy(corpus, place / "in.jsonl")

    def tool(verb: str, *words: str) -> Callable[[Path], list[str]]:
        return lambda place: ["data_tools", verb, "--input", f"{place}/in.jsonl", "--output", f"{place}/out", *words,
                              "engine.workers=2", "read.split_bytes=40000"]

    def pangu(place: Path) -> list[str]:
        return ["pangu", "train", *PANGU, *TRAIN, *alone, f"data.directory={home}/records",
                f"output.directory={place}/run"]

    def ranker(place: Path) -> list[str]:
        return ["recsys", "train", *recsys, *alone, "model.layers=1", f"data.cache={place}/cache",
                f"output.directory={place}/run"]

    return [
        Job("pack", single(lambda place: ["pangu", "pack", *pack, f"data.directory={place}/records"]),
            lambda place: digest(list((place / "records").glob("*.ids"))), 20),
        Job("dedup", single(tool("dedup", "--engine", "local")), parts, 20, documents),
        Job("clean", single(tool("clean")), parts, 20, documents),
        quantize(home, recsys),
        Job("train recsys", single(ranker), trained, 100), Job("train pangu", single(pangu), trained, 100),
    ]


def quantize(home: Path, recsys: list[str]) -> Job:
    """Quantization of a ranker trained once."""
    source = home / "ranker"

    def prepare(place: Path) -> None:
        if not source.exists():
            training = Child(["recsys", "train", *recsys, "train.steps=5", f"data.cache={home}/cache",
                              f"output.directory={source}"], home / "ranker.log")
            training.ended(LIMIT)

    return Job("quantize", single(lambda place: ["recsys", "quantize", "--checkpoint", str(source), "--output",
                                                 f"{place}/run", "--part", "none"]), newest, 20, prepare)
