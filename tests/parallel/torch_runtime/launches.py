"""Launches of small runs of both families over gloo, on real packed records and click logs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from parallel.checkpoint.sharded import Slices
from parallel.training.metrics_log import read_metrics
from tests.parallel.torch_runtime.records import LENGTH, VOCABULARY

ROOT = Path(__file__).parents[3]
COMMON = ["train.log_every=1", "train.validate_every=8", "train.validation_batches=2", "output.tensorboard=false",
          "output.loss_curve=false", "output.checkpoint_every=4", "train.peak_tflops=1"]
PANGU = ["--config", str(ROOT / "configs/pangu/tiny.yaml"), "model.layers=3", "model.hidden_size=32", "model.heads=4",
         f"model.sequence_length={LENGTH}", f"model.vocabulary_size={VOCABULARY}", "train.global_batch_size=16",
         "train.optimizer.schedule.warmup_steps=4", *COMMON]
RANKER = ["train.global_batch_size=64", "data.synthetic.samples=4000", *COMMON]


@dataclass
class Launched:
    """A launch that has ended: its JSON line (None without one), what it said, its exit code."""

    figures: dict | None
    errors: str
    code: int
    folder: Path

    def losses(self) -> dict[int, float]:
        """Training losses by step."""
        return {r["step"]: r["loss"] for r in read_metrics(self.folder / "metrics.jsonl") if "loss" in r}

    def log(self) -> list[dict]:
        """The metrics log but what depends on the clock."""
        timed = ("tokens_per_second", "samples_per_second", "mfu")
        return [{k: v for k, v in r.items() if k not in timed} for r in read_metrics(self.folder / "metrics.jsonl")]

    def checkpoint(self) -> Slices:
        """The last checkpoint."""
        return Slices(self.figures["checkpoint"])


def config_of(family: str, data: Path) -> list[str]:
    """Arguments of a run: "pangu", or the name of a file under configs/recsys."""
    if family == "pangu":
        return [*PANGU, f"data.directory={data}"]
    return ["--config", str(ROOT / f"configs/recsys/{family}.yaml"), *RANKER, f"data.cache={data}"]


@dataclass
class Launch:
    """A running launch of `ranks` processes, of a config file or of an exported program."""

    arguments: list[str] | Path
    folder: Path
    ranks: int
    environment: dict = field(default_factory=dict)
    more: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        words = ["parallel.torch_runtime", "run", str(self.arguments)]
        if isinstance(self.arguments, list):
            words = ["parallel", "launch", *self.arguments, "--nproc", str(self.ranks)]
        command = [sys.executable, "-m", *words, *self.more, f"output.directory={self.folder}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **self.environment}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True)

    def wait_for_step(self, step: int, seconds: float = 300.0) -> None:
        """Until the log holds a step."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            if any(r["step"] >= step for r in read_metrics(self.folder / "metrics.jsonl")):
                return
            time.sleep(0.02)
        raise AssertionError(f"never came to step {step}: {self.process.stderr.read()[-3000:]}")

    def rank_pids(self) -> list[int]:
        """Processes of the ranks, by rank."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid:
                    variables = (path / "environ").read_bytes().split(b"\0")
                    rank = next(v for v in variables if v.startswith(b"RANK="))
                    found[int(rank[5:])] = int(path.name)
            except (OSError, StopIteration, ValueError):
                continue
        return [found[rank] for rank in sorted(found)]

    def kill(self, rank: int) -> float:
        """kill -9 of a rank; seconds until the launch has ended."""
        os.kill(self.rank_pids()[rank], signal.SIGKILL)
        began = time.monotonic()
        self.process.wait(timeout=60)
        return time.monotonic() - began

    def end(self, seconds: float = 500.0) -> Launched:
        """Waits for the launch."""
        output, errors = self.process.communicate(timeout=seconds)
        lines = [line for line in output.splitlines() if line.startswith("{")]
        return Launched(json.loads(lines[-1]) if lines else None, errors, self.process.returncode, self.folder)


def launch(arguments: list[str] | Path, folder: Path, ranks: int, more: list[str] | None = None,
           **environment: str) -> Launched:
    """A launch from start to end; it must go well."""
    ended = Launch(arguments, folder, ranks, environment, more or []).end()
    assert ended.code == 0, ended.errors[-4000:]
    return ended


def run_command(package: str, words: list[str]) -> tuple[int, dict | None, str]:
    """A command of a package: exit code, JSON line, what it said."""
    done = subprocess.run([sys.executable, "-m", package, *words], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return done.returncode, json.loads(lines[-1]) if lines else None, done.stderr


def assert_same_tensors(one: Slices, other: Slices) -> None:
    """Bit for bit."""
    assert set(one.tensors) == set(other.tensors)
    for name in one.tensors:
        np.testing.assert_array_equal(one.read(name), other.read(name), err_msg=name)
