"""The loop: what it logs, when it validates, saves and stops, and what bad input gets."""

import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from parallel.checkpoint.folder import list_checkpoints
from parallel.common.errors import UserError
from parallel.training import mindspore_backend
from parallel.training.data_source import prefetch
from parallel.training.metrics_log import Clock, read_metrics
from parallel.training.mindspore_backend import MindSporeBackend, measured_matmul_tflops
from parallel.training.settings import EarlyStopSettings, LossScaleSettings, OutputSettings, TrainSettings
from parallel.training.trainer import Run, Trainer
from tests.parallel.toy import Batches, make_step, settings


def trainer(folder, train=None, source=None, output=None, **options):
    train = train or settings()
    output = OutputSettings(**{"directory": str(folder), "checkpoint_every": 4, "tensorboard": False, **(output or {})})
    return Trainer(MindSporeBackend(make_step(train)), Run(source or Batches(), train, output, **options))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of 12 steps with everything on, shared by the tests that look at it."""
    folder = tmp_path_factory.mktemp("run")
    seen = []
    full = trainer(folder, settings(validate_every=5), output={"tensorboard": True, "keep": 2},
                   validation=Batches(seed=9),
                   evaluate=[lambda step: {"twice": 2 * step}], units="samples", units_per_step=8, flops_per_step=1e6,
                   describe={"model": "toy"}, on_step=lambda step, scalars: seen.append((step, scalars["loss"])))
    return folder, full.run(), seen, full


def test_figures(finished):
    folder, figures, seen, _ = finished
    assert figures["steps"] == 12 and figures["stopped"] is None
    assert figures["checkpoint"] == str(folder / "checkpoints" / "step_00000012")
    assert figures["samples_per_second"] > 0 and 0 < figures["mfu"] < 1 and figures["peak_tflops"] > 0
    assert math.isclose(figures["validation_perplexity"], math.exp(figures["validation_loss"]), rel_tol=1e-9)
    assert figures["twice"] == 24
    assert [step for step, _ in seen] == list(range(1, 13)) and seen[-1][1] < seen[0][1]
    assert "mfu_of_data_sheet" not in figures
    json.dumps(figures)


def test_share_of_the_data_sheet(finished, monkeypatch):
    _, figures, _, full = finished
    monkeypatch.setattr(full.backend, "data_sheet_tflops", lambda precision: 4 * figures["peak_tflops"])
    again = full.figures()
    assert again["data_sheet_tflops"] == 4 * figures["peak_tflops"]
    assert math.isclose(again["mfu_of_data_sheet"], figures["mfu"] / 4, rel_tol=1e-9)


def test_no_picture_without_matplotlib(finished, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    finished[3].log.draw(tmp_path / "loss.png", "toy")
    assert "loss.png is not drawn: matplotlib is not installed" in capsys.readouterr().err
    assert not (tmp_path / "loss.png").exists()


def test_log_and_pictures(finished):
    folder, figures, seen, _ = finished
    records = read_metrics(folder / "metrics.jsonl")
    losses = {r["step"]: r["loss"] for r in records if "loss" in r}
    assert list(losses) == [2, 4, 6, 8, 10, 12]
    assert math.isclose(losses[4], (seen[2][1] + seen[3][1]) / 2, rel_tol=1e-12) and figures["loss"] == losses[12]
    assert [r["step"] for r in records if "validation_loss" in r] == [5, 10, 12]
    assert (folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert events(folder / "tensorboard") == [
        (r["step"], name, value) for r in records for name, value in r.items() if name != "step"]


def events(folder):
    """(step, name, value) of every scalar in the folder's one event file, read by TensorBoard's own messages."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import masked_crc32c

    (path,) = folder.iterdir()
    data, at, found = path.read_bytes(), 0, []
    assert ".out.tfevents." in path.name
    while at < len(data):
        size, head = struct.unpack_from("<QI", data, at)
        body = data[at + 12:at + 12 + size]
        assert head == masked_crc32c(data[at:at + 8])
        assert struct.unpack_from("<I", data, at + 12 + size)[0] == masked_crc32c(body)
        found.append(Event.FromString(body))
        at += size + 16
    assert found[0].file_version == "brain.Event:2" and abs(found[0].wall_time - time.time()) < 3600
    assert found[1].step == 1 and found[1].session_log.status == SessionLog.START
    return [(event.step, value.tag, pytest.approx(value.simple_value, rel=1e-6))
            for event in found[2:] for value in event.summary.value]


def test_a_run_of_mindspore_imports_no_torch(tmp_path):
    code = ("import sys; from parallel.training.metrics_log import MetricsLog; "
            f"log = MetricsLog({str(tmp_path)!r}); log.write(1, loss=2.5); log.close(); "
            "assert 'torch' not in sys.modules and 'mindspore' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_validation_is_the_weighted_mean_without_dropout(finished):
    _, figures, _, full = finished
    total = weight = 0.0
    parameters = {p.name: p.read() for p in full.backend.parameters()}
    for index in range(5):
        x, y, mask = Batches(seed=9).batch(index)
        hidden = np.tanh(x @ parameters["weight1"] + parameters["bias1"])
        total += ((((hidden @ parameters["weight2"]) - y)**2).sum(1) * mask).sum()
        weight += mask.sum()
    assert math.isclose(figures["validation_loss"], total / weight, rel_tol=1e-5)


def test_keeps_the_newest_checkpoints(finished):
    folder = finished[0]
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["step_00000008", "step_00000012"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_00000008", "step_00000012"]


def test_a_finished_run_is_not_trained_again(finished):
    folder, figures, _, _ = finished
    source = Batches()
    again = trainer(folder, settings(validate_every=5), source).run()
    assert source.read == 0 and again["steps"] == 12 and again["loss"] == figures["loss"]
    assert again["validation_perplexity"] == figures["validation_perplexity"]


def test_never_refuses_to_lose_a_run(finished):
    with pytest.raises(UserError, match="already has checkpoints"):
        trainer(finished[0], output={"resume": "never"}).run()


def test_resume_from_a_path_without_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no checkpoint here"):
        trainer(tmp_path, output={"resume": str(tmp_path / "nowhere")}).run()


def test_sigterm_saves_and_stops(tmp_path):
    def stop(step, scalars):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    figures = trainer(tmp_path, on_step=stop).run()
    assert figures["stopped"] == "SIGTERM" and figures["steps"] == 3
    assert figures["checkpoint"].endswith("step_00000003") and signal.getsignal(signal.SIGTERM) is before


def test_early_stop(tmp_path):
    scores = iter([0.5, 0.7, 0.6, 0.65, 0.8])
    train = settings(validate_every=1, early_stop=EarlyStopSettings(metric="auc", mode="max", patience=2))
    figures = trainer(tmp_path, train, evaluate=[lambda step: {"auc": next(scores)}]).run()
    assert figures["stopped"] == "early_stop" and figures["steps"] == 4
    with pytest.raises(UserError, match="known: loss_of_something"):
        trainer(tmp_path / "other", train, evaluate=[lambda step: {"loss_of_something": 1.0}]).run()


def test_gives_up_when_nothing_is_finite(tmp_path):
    train = settings(max_skipped=3, loss_scale=LossScaleSettings(name="dynamic"))
    with pytest.raises(UserError, match="not finite"):
        trainer(tmp_path, train, Batches(broken=tuple(range(12)))).run()


def test_settings_say_what_is_wrong():
    with pytest.raises(UserError, match="accumulation does not divide"):
        TrainSettings(global_batch_size=8, accumulation=3)


def test_prefetch_keeps_order_and_raises_what_the_source_raises():
    def items():
        yield from range(5)
        raise UserError("record 5 is damaged")

    taken = []
    with pytest.raises(UserError, match="record 5"):
        for item in prefetch(items()):
            taken.append(item)
    assert taken == [0, 1, 2, 3, 4]


def test_clock_leaves_the_compile_out():
    clock = Clock(units_per_step=100, flops_per_step=2e9, peak_tflops=0.1, ranks=2)
    for _ in range(3):
        with clock.stepping():
            pass
    assert clock.steps == 2 and clock.compile_seconds is not None
    clock.seconds = 4.0
    assert clock.mean_rate() == 50.0
    assert math.isclose(clock.mean_mfu(), 0.5 * 2e9 / (0.1e12 * 2))


def test_measured_peak_is_the_fastest_of_the_products(monkeypatch):
    clock = iter([0.0, 9.0, 10.0, 10.5, 20.0, 20.25])  # a warm-up, then half a second and a quarter
    monkeypatch.setattr(mindspore_backend, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert measured_matmul_tflops(size=256, repeats=2) == pytest.approx(2 * 256**3 / 0.25 / 1e12)


class Shrinking(Batches):
    """From batch 2 on there are fewer rows."""

    def batch(self, index):
        return tuple(column[:4] if index >= 2 else column for column in super().batch(index))


def test_a_batch_of_another_form_is_refused_unless_its_source_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"input 0 of a batch is float32 \[4, 6\].*float32 \[8, 6\]"):
        trainer(tmp_path / "fixed", source=Shrinking()).run()
    source = Shrinking()
    source.forms_vary = True
    assert trainer(tmp_path / "varies", source=source).run()["steps"] == 12
