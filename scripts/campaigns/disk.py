"""A disk that fills up at every write: each writer ends in one line, leaves what was there, and nothing half-made.

The disk is a limit on the size of files (RLIMIT_FSIZE) of a child process, moved through the sizes that writers reach.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import resource
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from campaigns.base import Campaign
from campaigns.damage import Plain, digest_of_folder
from parallel.common.errors import UserError

LIMITS = [0, 1, 7, 64, 300, 1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000]


def run(campaign: Campaign) -> None:
    """Every writer under every limit."""
    folder = campaign.folder / "disk"
    for name, write in writers().items():
        for limit in LIMITS[::4] if campaign.short else LIMITS:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            with contextlib.redirect_stderr(io.StringIO()):
                write(folder)
            before = digest_of_folder(folder)
            context = multiprocessing.get_context("fork")
            ours, theirs = context.Pipe()
            child = context.Process(target=_child, args=(write, folder, limit, theirs))
            child.start()
            theirs.close()
            outcome = _received(ours)
            child.join()
            campaign.count(f"disk {name}")
            judge(campaign, name, limit, outcome, before, folder)


def judge(campaign: Campaign, name: str, limit: int, outcome: tuple[str, str], before: str, folder: Path) -> None:
    """A full disk is one line, and what was there is there still."""
    kind, text = outcome
    if kind not in ("done", "refused"):
        campaign.fail(f"disk {name}", f"limit {limit}: {text}")
    elif "Traceback" in text or "Exception ignored" in text:
        campaign.fail(f"disk {name}", f"limit {limit}: printed {text[-1500:]}")
    elif kind == "refused" and digest_of_folder(folder) != before:
        campaign.fail(f"disk {name}", f"limit {limit}: what was there has changed, or something half-made is left: "
                      f"{sorted(path.name for path in folder.rglob('.*'))}")


def _child(write: Callable[[Path], None], folder: Path, limit: int, pipe: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        try:
            write(folder)
            outcome = "done", ""
        except UserError as error:
            outcome = "refused", str(error)
        except BaseException:
            outcome = "raised", traceback.format_exc()
    pipe.send((outcome[0], outcome[1] + told.getvalue()))


def _received(pipe: Any) -> tuple[str, str]:
    try:
        return pipe.recv()
    except EOFError:
        return "died", "the child died"


def writers() -> dict[str, Callable[[Path], None]]:
    """What writes, by name."""
    return {"json": _json, "checkpoint": _checkpoint, "strategy": _strategy, "metrics": _metrics, "log": _log,
            "vocabulary": _vocabulary, "documents": _documents, "documents.gz": _gz, "documents.zst": _zst,
            "documents.parquet": _parquet}


def _json(folder: Path) -> None:
    from parallel.common.files import write_json

    write_json(folder / "a.json", {"a": list(range(2000))})


def _checkpoint(folder: Path) -> None:
    from parallel.checkpoint.full import save_checkpoint

    save_checkpoint(folder / "checkpoints", 1, [Plain(f"w{i}", np.ones((64, 64), np.float32)) for i in range(4)], (),
                    {"iteration": 1})


def _strategy(folder: Path) -> None:
    from parallel.checkpoint.strategy_file import SliceLayout, write_strategy

    write_strategy(folder / "s.ckpt", {f"layer.{i}": SliceLayout((2, 2), (1, -1), 0, 0) for i in range(200)})


def _metrics(folder: Path) -> None:
    from parallel.training.metrics_log import MetricsLog

    run_ = folder / "run"
    if run_.exists():  # a run appends to what is there: the trial is of a new one
        run_ = folder / ".." / "disk_run"
        shutil.rmtree(run_, ignore_errors=True)
    log = MetricsLog(run_)
    try:
        for step in range(200):
            log.write(step, loss=1.0 / (step + 1), learning_rate=1e-3)
        log.draw(run_ / "loss.png", "t")
    finally:
        log.close()


def _log(folder: Path) -> None:
    from recsys.data.log import prepare
    from recsys.settings import DataSettings

    path = folder.parent / "disk_log.csv"
    if not path.exists():
        path.write_text("user,item,click\n" + "".join(f"u{i % 50},{i % 70},{i % 2}\n" for i in range(3000)))
    cache = folder / ("cache" if not (folder / "cache").exists() else ".again")
    try:
        prepare(DataSettings.model_validate({
            "reader": "csv", "path": str(path), "labels": ["click"], "cache": str(cache),
            "features": [{"name": "user", "side": "user"}, {"name": "item", "side": "item"}]}), 4)
    finally:
        if cache.name == ".again":
            left = list(cache.iterdir()) if cache.exists() else []
            if not any(entry.name.startswith(".") for entry in left):
                shutil.rmtree(cache, ignore_errors=True)


def _vocabulary(folder: Path) -> None:
    from recsys.data.vocabulary import Vocabulary

    Vocabulary({"user": [str(i) for i in range(3000)]}, {"user": [1.0] * 3000}, {}, {}).save(folder / "v.json")


def _written(path: Path) -> None:
    from data_tools.documents import RecordWriter

    with RecordWriter(path) as writer:
        for number in range(300):
            writer.write({"id": str(number), "text": f"{number * 7919 % 1000} 文字" * 20, "source": "s"})


def _documents(folder: Path) -> None:
    _written(folder / "a.jsonl")


def _gz(folder: Path) -> None:
    _written(folder / "a.jsonl.gz")


def _zst(folder: Path) -> None:
    _written(folder / "a.jsonl.zst")


def _parquet(folder: Path) -> None:
    _written(folder / "a.parquet")
