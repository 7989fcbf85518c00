"""Real runs over gloo: real records and clicks, the real launcher, trainer, checkpoints; killed, stopped and resumed."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.parallel.torch_runtime.launches import Launch, assert_same_tensors, config_of, launch, packed

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None or importlib.util.find_spec("torch") is None,
    reason="exporting needs g++ on x86-64, running needs torch")

STEPS = 16
DEEP = ["parallel.pipeline.stages=2", "parallel.pipeline.micro_batches=2"]
# name: (family, processes, keys). The first two by default, the others slow.
LAYOUTS = {
    "pangu data 2, sharded optimizer": ("pangu", 2, ["parallel.data=2", "parallel.optimizer.shard=-1"]),
    "rankmixer op 2": ("rankmixer", 2, ["parallel.op=2"]),
    "pangu op 2, dropout": ("pangu", 2, ["parallel.op=2", "model.dropout=0.1"]),
    "pangu 2 stages": ("pangu", 2, DEEP),
    "pangu data 2 x op 2, sequence parallel": ("pangu", 4, ["parallel.data=2", "parallel.op=2",
                                                            "parallel.sequence=true"]),
    "pangu op 2, recompute": ("pangu", 2, ["parallel.op=2", "parallel.recompute.policy=full"]),
    "pangu data 2, accumulation": ("pangu", 2, ["parallel.data=2", "parallel.backend=torch", "train.accumulation=2"]),
    "pangu data 2, bf16": ("pangu", 2, ["parallel.data=2", "train.precision=bf16"]),
    "pangu op 2, fp16": ("pangu", 2, ["parallel.op=2", "train.precision=fp16", "train.loss_scale.initial=1048576"]),
    "pangu all dimensions": ("pangu", 8, ["parallel.data=2", "parallel.op=2", *DEEP, "parallel.optimizer.shard=-1",
                                          "parallel.recompute.policy=full"]),
    "rankmixer data 2, sharded optimizer": ("rankmixer", 2, ["parallel.data=2", "parallel.optimizer.shard=-1"]),
    "experts": ("tokenmixer_large_moe", 2, ["parallel.data=2", "parallel.expert=2"]),
    "tokenmixer 2 stages": ("tokenmixer_large", 2, DEEP),
}
DEFAULT = list(LAYOUTS)[:2]
NAMES = [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in LAYOUTS]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("records") / "out")


def arguments(name: str, records: Path, steps: int = STEPS) -> list[str]:
    family, _, keys = LAYOUTS[name]
    data = records if family == "pangu" else records.parent / "clicks"
    return [*config_of(family, data), *keys, f"train.steps={steps}"]


@pytest.mark.parametrize("name", NAMES)
def test_killed_and_resumed_equals_straight(name, records, tmp_path):
    """A rank dies by SIGKILL at a random moment; the launch ends with one line and goes on where it was saved."""
    ranks, order = LAYOUTS[name][1], arguments(name, records)
    straight = launch(order, tmp_path / "straight", ranks)
    assert straight.figures["backend"] == "torch" and straight.figures["world"] == ranks
    assert straight.figures["steps"] == STEPS and straight.figures["layout"] != "one device"
    random.seed(os.urandom(4))
    victim, moment = random.randrange(ranks), random.randint(4, STEPS - 4)
    running = Launch(order, tmp_path / "killed", ranks)
    running.wait_for_step(moment)
    pids = running.rank_pids()
    assert running.kill(victim) < 30.0
    killed = running.end()
    assert killed.code == 128 + signal.SIGKILL, killed.errors[-3000:]
    told = [line for line in killed.errors.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and f"rank {victim} was ended by SIGKILL" in told[0]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    resumed = launch(order, tmp_path / "killed", ranks)
    assert "going on from" in resumed.errors
    assert resumed.log() == straight.log()
    assert_same_tensors(resumed.checkpoint(), straight.checkpoint())
    for key in ("loss", "validation_loss", "auc"):
        assert resumed.figures.get(key) == straight.figures.get(key)
