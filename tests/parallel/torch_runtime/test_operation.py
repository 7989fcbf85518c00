"""Runs that go on by themselves: restarts after a killed rank, ranks that wait too long, profiled steps, preflight."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import signal
import time

import pytest

from parallel.common.errors import PeerError
from tests.parallel.torch_runtime.launches import Launch, assert_same_tensors, config_of, launch

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None or importlib.util.find_spec("torch") is None,
    reason="exporting needs g++ on x86-64, running needs torch")


@pytest.mark.slow
def test_a_killed_rank_and_a_restart_equal_the_straight_run(straight, tmp_path):
    running = Launch(straight.folder / "program", tmp_path / "run", 2, more=["--max-restarts", "1"])
    running.wait_for_step(6)
    os.kill(running.rank_pids()[1], signal.SIGKILL)
    ended = running.end()
    assert ended.code == 0, ended.errors[-3000:]
    assert ended.figures["restarts"] == 1 and ended.figures["failed_rank"] is None
    assert "rank 1 was ended by SIGKILL" in ended.errors and "(restart 1 of at most 1)" in ended.errors
    assert ended.errors.count("going on from") == 1
    assert (tmp_path / "run" / "logs" / "rank_1.before_restart_1.log").is_file()
    assert ended.log() == straight.log()
    assert_same_tensors(ended.checkpoint(), straight.checkpoint())


@pytest.mark.slow
def test_a_mistake_of_the_users_is_not_tried_again(straight, tmp_path):
    (tmp_path / "run").mkdir()
    ended = Launch(straight.folder / "program", tmp_path / "run", 2,
                   more=["--max-restarts", "3", f"data.directory={tmp_path / 'nowhere'}"]).end()
    assert ended.code == 2 and ended.figures["restarts"] == 0


@pytest.mark.slow
def test_a_rank_that_waits_too_long_says_for_what(straight, tmp_path):
    running = Launch(straight.folder / "program", tmp_path / "run", 2, more=["train.stall_after=4"])
    running.wait_for_step(3)
    victim = running.rank_pids()[1]
    os.kill(victim, signal.SIGSTOP)
    began = time.monotonic()
    try:
        ended = running.end(seconds=120.0)
    finally:
        if os.path.exists(f"/proc/{victim}"):
            os.kill(victim, signal.SIGCONT)
    assert time.monotonic() - began < 60.0 and ended.code == PeerError.exit_code
    told = [line for line in ended.errors.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "rank 0 of 2 has waited" in told[0] and "at step" in told[0], ended.errors[-2000:]
    assert "of ranks 0 1" in told[0] and "rank 1 did not answer" in told[0]
    log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert "stack of rank 0" in log and "parallel/torch_runtime/" in log


@pytest.mark.slow
def test_steps_of_a_window_are_profiled(straight, tmp_path):
    ended = launch(straight.folder / "program", tmp_path / "run", 2, more=["train.profile.start=3",
                                                                           "train.profile.steps=2"])
    assert ended.log() == straight.log()
    for rank in (0, 1):
        trace = json.loads((tmp_path / "run" / "profile" / f"rank_{rank}.json").read_text())
        names = {event.get("name", "") for event in trace["traceEvents"]}
        assert any("mm" in name for name in names) and any("gloo" in name for name in names)


@pytest.mark.slow
def test_preflight_sums_along_every_axis(tmp_path):
    """And says what is wrong: not enough disk."""
    from tests.parallel.torch_runtime.launches import ROOT, run_command

    words = ["preflight", "--config", str(ROOT / "configs/pangu/tiny.yaml"), "--nproc", "4", "parallel.data=2",
             "parallel.op=2", "--mb", "1", f"output.directory={tmp_path}"]
    code, told, errors = run_command("parallel", words)
    assert code == 0 and set(told["axes"]) == {"op", "data", "all"} and not told["problems"], errors
    assert told["axes"]["data"]["ranks"] == 2 and told["axes"]["all"]["ranks"] == 4 and told["versions"]["torch"]
    code, told, errors = run_command("parallel", [*words, "output.keep=1000000"])
    assert code == 2 and any("checkpoints and" in problem for problem in told["problems"])


@pytest.mark.slow
def test_a_stage_between_others_reads_no_data(tmp_path):
    """Four stages of a ranker: the middle ones are fed zeros, and the losses are those of one process."""
    from parallel.torch_runtime.program import Program

    order = [*config_of("tokenmixer_large", tmp_path / "clicks"), "model.layers=4", "train.steps=4"]
    alone = launch([*order, "parallel.backend=torch"], tmp_path / "alone", 1)
    staged = launch([*order, "parallel.pipeline.stages=4", "parallel.pipeline.micro_batches=4"], tmp_path / "run", 4)
    program = Program(tmp_path / "run" / "program")
    used = [program.graph(rank).used_inputs() for rank in range(4)]
    assert used[0] and used[3] and not used[1] and not used[2]
    expected, got = alone.losses(), staged.losses()
    for step, loss in expected.items():
        assert got[step] == pytest.approx(loss, rel=1e-4)


def test_zeros_stand_for_batches_that_nobody_reads():
    import numpy as np

    from parallel.training.data_source import DataSource, UnreadSource

    class Never(DataSource):
        columns, steps_per_epoch = ("ids", "labels"), 7

        def batches(self, start_step):
            raise AssertionError("read")

    source = UnreadSource(Never(), [("ids", (2, 3), "int32"), ("labels", (2, 1), "float32"),
                                    ("sample_numbers", (2,), "int32")])
    ids, labels = next(source.batches(5))
    assert source.steps_per_epoch == 7 and ids.dtype == np.int32 and labels.shape == (2, 1) and not ids.any()
