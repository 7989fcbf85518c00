"""Real runs over gloo: real records and clicks, the real launcher, trainer, checkpoints; killed and resumed."""

from __future__ import annotations

import importlib.util
import os
import platform
import random
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from tests.parallel.torch_runtime.launches import Launch, assert_same_tensors, config_of, launch
from tests.parallel.torch_runtime.records import packed

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None or importlib.util.find_spec("torch") is None,
    reason="exporting needs g++ on x86-64, running needs torch")

STEPS = 16
DEEP = ["parallel.pipeline.stages=2", "parallel.pipeline.micro_batches=2"]
# name: (family, processes, keys). The first one by default, the others slow.
LAYOUTS = {
    "pangu data 2, sharded optimizer": ("pangu", 2, ["parallel.data=2", "parallel.optimizer.shard=-1"]),
    "rankmixer op 2": ("rankmixer", 2, ["parallel.op=2"]),
    "pangu op 2, dropout": ("pangu", 2, ["parallel.op=2", "model.dropout=0.1"]),
    "pangu 2 stages": ("pangu", 2, DEEP),
    "pangu op 2 x 2 stages": ("pangu", 4, ["parallel.op=2", *DEEP]),
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
DEFAULT = list(LAYOUTS)[:1]
NAMES = [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in LAYOUTS]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("records") / "out", documents=400, shards=2)


def arguments(name: str, records: Path, steps: int = STEPS) -> list[str]:
    family, _, keys = LAYOUTS[name]
    data = records if family == "pangu" else records.parent / "clicks"
    return [*config_of(family, data), *keys, f"train.steps={steps}"]


@pytest.mark.parametrize("name", NAMES)
def test_killed_and_resumed_equals_uninterrupted(name, records, tmp_path):
    """A rank dies by SIGKILL at a random moment; the launch ends with one line and goes on where it was saved. The
    second and third run the program that the first exported, as a machine without MindSpore would."""
    ranks, order = LAYOUTS[name][1], arguments(name, records)
    uninterrupted = launch(order, tmp_path / "straight", ranks)
    assert uninterrupted.figures["backend"] == "torch" and uninterrupted.figures["world"] == ranks
    assert uninterrupted.figures["steps"] == STEPS and uninterrupted.figures["layout"] != "one device"
    random.seed(os.urandom(4))
    victim, moment = random.randrange(ranks), random.randint(5, STEPS - 4)  # the first checkpoint is of step 4
    program = tmp_path / "straight" / "program"
    running = Launch(program, tmp_path / "killed", ranks)
    running.wait_for_step(moment)
    pids = running.rank_pids()
    assert running.kill(victim) < 30.0
    killed = running.end()
    assert killed.code == 128 + signal.SIGKILL, killed.errors[-3000:]
    message = [line for line in killed.errors.splitlines() if line.startswith("error: ")]
    assert len(message) == 1 and f"rank {victim} was ended by SIGKILL" in message[0]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    resumed = launch(program, tmp_path / "killed", ranks)
    assert "going on from" in resumed.errors
    assert resumed.log() == uninterrupted.log()
    assert_same_tensors(resumed.checkpoint(), uninterrupted.checkpoint())
    for key in ("loss", "validation_loss", "auc"):
        assert resumed.figures.get(key) == uninterrupted.figures.get(key)


# From where, on how many processes; to where, on how many.
MOVES = [
    ("pangu", ["parallel.data=2", "parallel.op=2"], 4, [*DEEP, "parallel.optimizer.shard=1"], 2),
    ("pangu", DEEP, 2, ["parallel.backend=mindspore"], 1),
    ("pangu", ["parallel.backend=mindspore"], 1, ["parallel.op=2", "parallel.sequence=true"], 2),
    ("rankmixer", ["parallel.data=2", "parallel.optimizer.shard=-1"], 2, ["parallel.op=2"], 2),
    ("rankmixer", ["parallel.op=2"], 2, ["parallel.backend=mindspore"], 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "first", "ranks", "second", "others"), MOVES)
def test_a_run_goes_on_under_another_layout_and_backend(family, first, ranks, second, others, records, tmp_path):
    """The next 10 losses are those of the uninterrupted run, and the checkpoint comes back as it was."""
    data = records if family == "pangu" else records.parent / "clicks"
    order = [*config_of(family, data), "train.optimizer.schedule.decay_steps=20", "train.steps=20"]
    uninterrupted = launch([*order, *first], tmp_path / "straight", ranks)
    begun = Launch([*order, *first], tmp_path / "moved", ranks)
    begun.wait_for_step(9)
    begun.process.send_signal(signal.SIGTERM)
    stopped = begun.end()
    assert stopped.code == 0 and stopped.figures["stopped"] == "SIGTERM", stopped.errors[-3000:]
    at = stopped.figures["steps"]
    moved = launch([*order, *second], tmp_path / "moved", others)
    assert moved.figures["steps"] == 20
    expected, got = uninterrupted.losses(), moved.losses()
    np.testing.assert_allclose([got[step] for step in range(at + 1, 21)],
                               [expected[step] for step in range(at + 1, 21)], rtol=1e-5)
    for key in ("validation_loss", "validation_logloss"):
        if key in uninterrupted.figures:
            np.testing.assert_allclose(moved.figures[key], uninterrupted.figures[key], rtol=1e-4)


@pytest.mark.slow
def test_checkpoints_there_and_back_are_identical(records, tmp_path):
    """Sharded one way, loaded and saved under another layout, and back: not one bit differs."""
    order = [*config_of("pangu", records), "train.steps=4"]
    first = launch([*order, "parallel.data=2", "parallel.optimizer.shard=-1"], tmp_path / "a", 2)
    for name, keys, ranks in (("b", ["parallel.op=2"], 2), ("c", DEEP, 2)):
        # A run that is at its end trains no more; a signal that came early makes it save where it stands.
        again = launch([*order, *keys, f"output.resume={first.figures['checkpoint']}"], tmp_path / name, ranks)
        assert again.figures["steps"] == 4
        assert_same_tensors(again.checkpoint(), first.checkpoint())


@pytest.mark.slow
def test_overflow_is_skipped_on_all_ranks_alike(records, tmp_path):
    """float16 from a scale of 2^32: the first steps do not count, the same on both ranks, and training goes on."""
    order = [*config_of("pangu", records), "parallel.op=2", "train.precision=fp16", "train.steps=24"]
    ended = launch(order, tmp_path / "run", 2)
    scales = [record["loss_scale"] for record in ended.log() if "loss_scale" in record]
    assert scales[0] == 2.0**32 and scales[-1] < 2.0**32
    state = ended.checkpoint().state["counters"]
    assert state["iteration"] == 24 and 0 < state["step"] < 24
    losses = [loss for loss in ended.losses().values() if loss is not None]
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("attempt", range(5))
def test_a_signal_stops_all_ranks_together(records, tmp_path, number, attempt):
    running = Launch([*config_of("pangu", records), "parallel.op=2", "train.steps=2000"], tmp_path / "run", 2)
    running.wait_for_step(2 + attempt)
    running.process.send_signal(number)
    ended = running.end()
    assert ended.code == 0, ended.errors[-3000:]
    assert ended.figures["stopped"] == signal.Signals(number).name and ended.figures["steps"] < 2000
    assert ended.figures["checkpoint"].endswith(f"{ended.figures['steps']:08d}")


@pytest.mark.slow
def test_workers_end_with_a_launcher_that_is_killed(records, tmp_path):
    running = Launch([*config_of("pangu", records), "parallel.op=2", "train.steps=2000"], tmp_path / "run", 2)
    running.wait_for_step(2)
    pids = running.rank_pids()
    running.process.kill()
    running.process.wait()
    deadline = time.monotonic() + 30.0
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.slow
def test_what_a_user_can_repair_is_one_line(records, tmp_path):
    order = [*config_of("pangu", records), "parallel.op=2", "train.steps=2"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused = Launch([*order, "--master", address], tmp_path / "port", 2).end()
    assert refused.code == 2 and "cannot listen here" in refused.errors
    running = Launch([*order, "train.steps=2000"], tmp_path / "one", 2)
    running.wait_for_step(1)
    second = Launch(order, tmp_path / "one", 2).end()
    running.process.send_signal(signal.SIGTERM)
    assert second.code == 2 and "another run has this folder" in second.errors
    assert running.end().code == 0
