"""The training loop, whatever the model and the backend: data in, steps, log, validation, checkpoints, resume, stop.

A run that is stopped and resumed gives bit for bit what the uninterrupted run gives: batch i depends only on (seed, i),
dropout on (seed, step), and parameters, moments and counters are saved exactly. Nothing here imports a framework: the
step, its device and the other processes are a `parallel.training.backend.Backend`.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from parallel.checkpoint.folder import checkpoint_path, list_checkpoints, resolve_checkpoint
from parallel.checkpoint.full import load_checkpoint
from parallel.checkpoint.newest import agreed_checkpoint
from parallel.common.errors import UserError
from parallel.common.ownership import owned
from parallel.common.progress import Bar, info
from parallel.training.agreement import agree
from parallel.training.backend import Backend
from parallel.training.companions import Companion, restore_all, states_of
from parallel.training.data_source import (
    BatchForm,
    DataSource,
    NumberedSource,
    UnreadSource,
    WaitingSource,
    prefetch,
)
from parallel.training.metrics_log import Clock, MetricsLog
from parallel.training.operation.profile import ProfileWindow
from parallel.training.operation.saving import RESTARTS, Saver
from parallel.training.operation.stall import ACTIVITY, watched
from parallel.training.resume_notes import changed_settings
from parallel.training.settings import OutputSettings, TrainSettings
from parallel.training.stop import StopRequest
from parallel.training.validation import Validation


@dataclass
class Run:
    """What is trained on and what is reported about it; the same on every backend.

    Args:
        source: training batches, this process's rows (`Backend.share`).
        settings, output: the `train:` and `output:` blocks.
        validation: validation batches, this process's rows; adds validation_loss and validation_perplexity.
        evaluate: functions `evaluate(step) -> {metric: value}` called at every validation (AUC and the like), on every
            process, with the same result on all.
        units: what the speed is counted in ("tokens", "samples").
        units_per_step: how many units a step holds, over all ranks.
        flops_per_step: model FLOPs of a step forward and backward over all ranks (no recompute), for the MFU.
        describe: JSON values kept in every checkpoint's state under "run" (the run's settings, say).
        title: of the progress bar and the loss curve.
        layout: how the network is sharded, for the figures.
        on_step: called as `on_step(step, outputs)` after every step.
        stop: what has asked for a stop before the trainer listens.
        companions: what goes along with the run (see `parallel.training.companions`).
        start_from: a checkpoint whose parameters a run that begins takes, or a folder of such; None = start values.
        is_new: by name, parameters that such a checkpoint does not have.
    """

    source: DataSource
    settings: TrainSettings
    output: OutputSettings
    validation: DataSource | None = None
    evaluate: Sequence[Callable[[int], dict]] = ()
    units: str = "tokens"
    units_per_step: int = 1
    flops_per_step: float | None = None
    describe: dict = field(default_factory=dict)
    title: str = "train"
    layout: str = "one device"
    on_step: Callable[[int, dict], None] | None = None
    stop: StopRequest = field(default_factory=StopRequest.of_process)
    companions: Sequence[Companion] = ()
    start_from: str | None = None
    is_new: Callable[[str], bool] = lambda name: False


class Trainer:
    """Runs a backend's step over a run's batches. `run()` returns the figures of the run."""

    def __init__(self, backend: Backend, run: Run) -> None:
        self.backend, self.plan = backend, run
        self.settings, self.output = run.settings, run.output
        source = self._read_or_not(run.source)
        self.source = NumberedSource(source, *backend.share) if backend.numbered else source
        self.form = None if run.source.forms_vary else BatchForm(backend.inputs)
        self.stream = run.source if isinstance(run.source, WaitingSource) else None
        self.evaluators, self.companions = list(run.evaluate), tuple(run.companions)
        for companion in self.companions:
            companion.save, companion.go_back = lambda: self.save(at_once=True), self.go_back
        if run.validation is not None:
            self.evaluators.insert(0, Validation(backend, self._read_or_not(run.validation),
                                                 run.settings.validation_batches))
        self.on_step = run.on_step
        self.directory = Path(run.output.directory)
        self.checkpoints = self.directory / "checkpoints"
        self.profile = ProfileWindow(backend, run.settings.profile, self.directory)
        self.saver = Saver(backend, run.output, self.checkpoints, self.companions)
        self.iteration, self.window, self.skipped = 0, [], 0
        self.early_stop: dict[str, Any] = {"best": None, "bad": 0}
        self.last: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        self.more_figures: dict[str, Any] = {}
        self.stop = run.stop
        self.stopped_by: str | None = None
        self.log: MetricsLog | None = None

    def _read_or_not(self, source: DataSource) -> DataSource:
        """A stream is always read: what has been read of it is what all processes have trained on."""
        if self.backend.reads or isinstance(source, WaitingSource):
            return source
        return UnreadSource(source, self.backend.inputs)

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Trains from the run's current step to its end (or early stop, or a signal) and returns its figures.

        Raises:
            UserError: nothing to read, a checkpoint that does not fit, gradients that stay non-finite, no disk space.
        """
        # A stream may be waiting for events that do not come; with other ranks it is they who end the wait together.
        interrupt = self.stream.interrupt if self.stream is not None and self.backend.ranks == 1 else None
        with (owned(self.directory, self.plan.title, self.backend.rank == 0), self.stop.listening(interrupt),
              watched(self.backend.rank, self.backend.ranks, self.settings.stall_after)):
            agree(self.backend, self.plan.describe)
            self.restore()
            chief = self.backend.rank == 0
            self.log = MetricsLog(self.directory, self.iteration, self.output.tensorboard) if chief else None
            self.clock = Clock(self.plan.units_per_step, self.plan.flops_per_step, self._peak(), self.backend.ranks)
            try:
                with Bar(self.settings.steps, self.plan.title, self.iteration) as bar:
                    self._loop(bar if chief else None)
                if self.settings.peak_tflops is None and self.clock.peak_tflops is not None:
                    # Other work on the machine may have slowed the first measurement.
                    self.clock.peak_tflops = max(self.clock.peak_tflops, self._peak())
                self._finish()
            finally:
                if self.log is not None:
                    self.log.close()
            # Who leaves early takes the others' collectives along.
            self.backend.barrier()
        return self.figures()

    def _loop(self, bar: Bar | None) -> None:
        self.stopped_by = self.stopped_by or self.stop.agreed(self.backend)
        while self.iteration < self.settings.steps and self.stopped_by is None:
            for count, outputs in self._outputs():
                self._after_step(count, outputs, bar)
                if self.stopped_by is not None or self.iteration >= self.settings.steps:
                    break
            else:
                self._data_ended()

    def _data_ended(self) -> None:
        """A stream may end a run; other sources repeat their epochs."""
        if self.stream is None or not self.stream.ends:
            raise UserError("the training data ended", value=self.iteration, hint="sources repeat their epochs")
        self.stopped_by = self.stopped_by or self.stop.asked or "end of data"
        if self.iteration and not self.metrics:
            self.validate()
        self.save(at_once=True)

    def _outputs(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(steps done, results of the last of them) until the run's last step."""
        if self.settings.data_sink:
            yield from self._sunk_outputs()
            return
        batches = self.source.batches(self.iteration)
        if self.stream is None or self.stream.read_ahead:
            batches = prefetch(itertools.islice(batches, self.settings.steps - self.iteration))
        try:
            for batch in batches:
                for companion in self.companions:
                    companion.before_step(self.iteration, batch)
                if self.form is not None:
                    self.form.check(batch)
                ACTIVITY.step = self.iteration + 1
                self.profile.before_step(self.iteration + 1)
                with self.clock.stepping():
                    outputs = self.backend.step(batch)
                self.profile.after_step(self.iteration + 1)
                yield 1, outputs
        finally:
            batches.close()
            self.profile.close()

    def _sunk_outputs(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Stretches of log_every steps run by the device alone."""
        if self.settings.profile is not None:
            raise UserError("the steps of a sunk stretch are not told apart", where="train.profile",
                            hint="set it to null, or train.data_sink to false")
        for companion in self.companions:
            if type(companion).before_step is not Companion.before_step:
                raise UserError(f"{companion.name} sees every batch, and a sunk stretch shows none",
                                where="train.data_sink", value=True, hint="set it to false")
        steps = self.settings.steps - self.iteration
        size = math.gcd(steps, self.settings.log_every)
        stretches = self.backend.stretches(self.source, self.iteration, steps, size)
        for _ in range(steps // size):
            with self.clock.stepping(size):
                done = next(stretches)
            yield done

    def _after_step(self, count: int, outputs: dict[str, Any], bar: Bar | None) -> None:
        self.iteration += count
        self.last = outputs
        self._count_skipped(outputs)
        if outputs["finite"]:
            self.window.append(outputs["loss"])
        if self.on_step is not None:
            self.on_step(self.iteration, outputs)
        for companion in self.companions:
            companion.after_step(self.iteration, outputs)
        if bar is not None:
            bar.advance(count, loss=f"{outputs['loss']:.4f}", **self.clock.shown(self.plan.units))
        if self._due(self.settings.log_every):
            self._write_log(outputs)
        last = self.iteration >= self.settings.steps
        if self._due(self.settings.validate_every) or last:
            self.validate()
        # A signal reaches the ranks between different steps; from here on all of them say the same.
        self.stopped_by = self.stop.agreed(self.backend)
        self.saver.look()
        if self._due(self.output.checkpoint_every) or last or self.stopped_by:
            self.save(at_once=last or self.stopped_by is not None)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.iteration % every == 0

    def _count_skipped(self, outputs: dict[str, Any]) -> None:
        self.skipped = 0 if outputs["finite"] else self.skipped + 1
        if self.skipped > self.settings.max_skipped:
            raise UserError(f"{self.skipped} steps in a row gave gradients that are not finite", where="train",
                            value=self.iteration, hint="lower the learning rate or look at the data")

    def _write_log(self, outputs: dict[str, Any]) -> None:
        loss = float(np.mean(self.window)) if self.window else math.nan
        self.window = []
        if self.log is not None:
            self.log.write(self.iteration, loss=loss, learning_rate=outputs["learning_rate"],
                           global_norm=outputs["global_norm"], loss_scale=outputs["loss_scale"],
                           **{f"{self.plan.units}_per_second": self.clock.rate()}, mfu=self.clock.mfu())

    def _finish(self) -> None:
        if self.log is not None and self.output.loss_curve:
            self.log.draw(self.directory / "loss.png", self.plan.title)
        for companion in self.companions:
            self.more_figures.update(companion.finish(self.iteration))

    def figures(self) -> dict[str, Any]:
        """The JSON line of the run: steps, last training loss, metrics, speed, MFU, newest checkpoint, where it ran."""
        loss = self.log.series("loss")[1] if self.log is not None else []
        stated = self.backend.data_sheet_tflops(self.settings.precision)
        sheet = {} if stated is None else {"mfu_of_data_sheet": self.clock.mean_mfu(stated),
                                           "data_sheet_tflops": stated}
        return {
            "steps": self.iteration, "loss": loss[-1] if loss else self.last.get("loss"), **self.metrics,
            f"{self.plan.units}_per_second": self.clock.mean_rate(), "mfu": self.clock.mean_mfu(),
            "peak_tflops": self.clock.peak_tflops, **sheet,
            "checkpoint": str(self.saver.newest) if self.saver.newest is not None else None, "stopped": self.stopped_by,
            "backend": self.backend.name, "layout": self.plan.layout, "world": self.backend.ranks, **self.more_figures,
        }

    # -- validation and early stop ------------------------------------------------------------------------------------

    def validate(self) -> dict[str, float]:
        """Runs all evaluators, logs what they return, and decides on an early stop."""
        metrics: dict[str, float] = {}
        for evaluate in self.evaluators:
            metrics.update({name: float(value) for name, value in evaluate(self.iteration).items()})
        self.metrics = metrics
        if metrics and self.log is not None:
            self.log.write(self.iteration, **metrics)
            if self.output.loss_curve:
                self.log.draw(self.directory / "loss.png", self.plan.title)
        self._watch(metrics)
        return metrics

    def _watch(self, metrics: dict[str, float]) -> None:
        watch = self.settings.early_stop
        if watch is None:
            return
        if watch.metric not in metrics:
            raise UserError("no such validation metric", where="train.early_stop.metric", value=watch.metric,
                            hint=f"known: {', '.join(metrics) or 'none'}")
        value = metrics[watch.metric] if watch.mode == "min" else -metrics[watch.metric]
        best = self.early_stop["best"]
        if best is None or value < best - watch.minimum_change:
            self.early_stop = {"best": value, "bad": 0}
        else:
            self.early_stop["bad"] += 1
            if self.early_stop["bad"] >= watch.patience:
                self.stop.ask("early_stop")

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, *, at_once: bool = False) -> None:
        """Begins a checkpoint of this iteration: rank 0's, or every rank's slices; `at_once`: it is in place on
        return."""
        for companion in self.companions:
            companion.before_checkpoint(self.checkpoints, self.iteration)
        counters = {counter.name: counter.read().item() for counter in self.backend.counters()}
        state = {"iteration": self.iteration, "counters": counters, "window": list(self.window),
                 "skipped": self.skipped, "early_stop": self.early_stop, "metrics": _json_floats(self.metrics),
                 "train": {"seed": self.settings.seed, "global_batch_size": self.settings.global_batch_size},
                 "companions": states_of(self.companions, self.iteration), "run": self.plan.describe}
        states = self.backend.states() if self.output.save_optimizer else ()
        self.saver.save(self.iteration, states, state, at_once=at_once)

    def restore(self) -> None:
        """Goes on from the checkpoint that `output.resume` names, if any.

        Raises:
            UserError: resume is `never` and there are checkpoints; the checkpoint does not fit; the ranks found
                different ones.
        """
        path, resume = None, self.output.resume
        if int(os.environ.get(RESTARTS, "0")) and list_checkpoints(self.checkpoints):
            resume = "auto"  # where it began, this run began from something else, and has come further since
        if resume == "auto":
            path = agreed_checkpoint(self.checkpoints, self.backend, self.saver.disks, self._check_files)
        elif resume != "never":
            path = resolve_checkpoint(resume)
        elif found := list_checkpoints(self.checkpoints):
            raise UserError("the run already has checkpoints", where=self.checkpoints, value=found[-1].name,
                            hint="choose another output.directory or output.resume=auto")
        if path is not None:
            self._load(path)
        elif self.plan.start_from is not None:
            self._start_from(resolve_checkpoint(self.plan.start_from))
        self._same_on_all_ranks()
        if path is not None and self.backend.rank == 0:
            info(f"going on from {path} (step {self.iteration})")
            if self.iteration >= self.settings.steps:
                info(f"nothing is left to train: train.steps is {self.settings.steps}")

    def _check_files(self, path: Path, part: int, parts: int) -> None:
        for companion in self.companions:
            companion.check_files(path, part, parts)

    def _load(self, path: Path) -> None:
        extents = self.backend.holder.extents if self.backend.holder is not None else None
        state = load_checkpoint(path, self.backend.parameters(), self.backend.states(), extents)
        self._take_state(state, path)
        restore_all(self.companions, state.get("companions", {}), path)

    def go_back(self, step: int) -> None:
        """Returns to the checkpoint of an earlier step of this run."""
        self.saver.settle()
        self._load(checkpoint_path(self.checkpoints, step))
        if self.log is not None:
            self.log.close()
            self.log = MetricsLog(self.directory, self.iteration, self.output.tensorboard)

    def _start_from(self, path: Path) -> None:
        extents = self.backend.holder.extents if self.backend.holder is not None else None
        known = [item for item in self.backend.parameters() if not self.plan.is_new(item.name)]
        load_checkpoint(path, known, (), extents)
        if self.backend.rank == 0:
            info(f"starting from the parameters of {path}")

    def _same_on_all_ranks(self) -> None:
        """Refuses to go on when the ranks are at different steps, each knowing its own disk only."""
        first, = self.backend.exchange([float(self.iteration) if self.backend.rank == 0 else 0.0])
        different, = self.backend.exchange([float(first != self.iteration)])
        if different:
            raise UserError("the ranks would go on from different steps", where=self.checkpoints,
                            value=f"{self.iteration} here, {first:.0f} on rank 0",
                            hint="all machines of a run share output.directory")

    def _take_state(self, state: dict, path: Path) -> None:
        try:
            counters = state["counters"]
            for counter in self.backend.counters():
                counter.assign(np.asarray(counters[counter.name], counter.read().dtype).reshape(counter.shape))
            self.iteration = int(state["iteration"])
            self.window, self.skipped = list(state["window"]), int(state["skipped"])
            self.early_stop = dict(state["early_stop"])
            watch = self.settings.early_stop
            if watch is not None and self.early_stop["bad"] >= watch.patience:
                self.stopped_by = "early_stop"
            self.metrics = {k: math.nan if v is None else v for k, v in state["metrics"].items()}
        except (KeyError, TypeError, ValueError, OverflowError):
            raise UserError("the checkpoint's state.json is damaged", where=path,
                            hint="use another checkpoint") from None
        self.saver.newest = path
        was, now = state.get("run") or {"train": state.get("train", {})}, self.plan.describe
        if self.backend.rank == 0:
            for line in changed_settings(was, now or {"train": {
                    key: getattr(self.settings, key) for key in ("seed", "global_batch_size")}}):
                info(line)

    def _peak(self) -> float | None:
        if self.settings.peak_tflops is not None or self.plan.flops_per_step is None:
            return self.settings.peak_tflops
        return self.backend.peak_tflops(self.settings.precision)


def _json_floats(metrics: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
