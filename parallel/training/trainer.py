"""The training loop, whatever the model: data in, steps, log, validation, checkpoints, resume, clean stop.

A run that is stopped and resumed gives bit for bit what the straight run gives: batch i depends only on (seed, i),
dropout on (seed, step), and parameters, moments and counters are saved exactly.
"""

from __future__ import annotations

import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from parallel.checkpoint.folder import checkpoint_path, list_checkpoints, resolve_checkpoint
from parallel.checkpoint.sharded import Holder, save_slices
from parallel.checkpoint.whole import load_checkpoint, save_checkpoint
from parallel.common.errors import UserError
from parallel.common.progress import Bar, note
from parallel.training.companions import Companion, restore_all, states_of
from parallel.training.data_source import DataSource, NumberedSource, prefetch
from parallel.training.device import DeviceSum
from parallel.training.metrics_log import MetricsLog, measured_matmul_tflops
from parallel.training.settings import OutputSettings, TrainSettings
from parallel.training.step import TrainStep


def set_seed(seed: int) -> None:
    """Seeds MindSpore and NumPy; call before the network is built."""
    ms.set_seed(seed)
    np.random.seed(seed)


class MeanLoss(nn.Cell):
    """(loss x weight, weight) of a batch, for validation; see `parallel.training.step` for what a network returns."""

    def __init__(self, network: nn.Cell, weighted: bool, group: str | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.weighted = network, weighted
        self.reduce = ops.AllReduce(ops.ReduceOp.SUM, group) if group is not None else None

    def construct(self, *batch: Tensor) -> tuple:
        """Two float32 scalars, summed over the ranks of the group."""
        if self.weighted:
            loss, weight = self.network(*batch)
        else:
            loss, weight = self.network(*batch), Tensor(1.0, ms.float32)
        weight = ops.cast(weight, ms.float32)
        total = ops.cast(loss, ms.float32) * weight
        if self.reduce is not None:
            total, weight = self.reduce(total), self.reduce(weight)
        return total, weight


class Validation:
    """Mean loss over a validation source and its exponential, the perplexity. Callable as `evaluate(step) -> dict`.

    Args:
        step: the training step whose network is validated (with dropout off).
        source: batches of fixed shape.
        batches: how many to use; None = steps_per_epoch.
    """

    def __init__(self, step: TrainStep, source: DataSource, batches: int | None = None) -> None:
        self.step, self.source = step, source
        self.count = min(batches or source.steps_per_epoch, source.steps_per_epoch)
        self.cell = MeanLoss(step.network, step.weighted, step.group if step.ranks > 1 else None)

    def __call__(self, step: int) -> dict[str, float]:
        """{"validation_loss", "validation_perplexity"}; a perplexity too large for a float is infinite."""
        total = weight = 0.0
        self.cell.set_train(False)
        try:
            for batch in itertools.islice(self.source.batches(0), self.count):
                part, part_weight = self.cell(*map(Tensor, batch))
                total += float(part.asnumpy())
                weight += float(part_weight.asnumpy())
        finally:
            self.step.set_train(True)
        loss = total / weight if weight else math.nan
        perplexity = math.exp(loss) if loss < 700.0 else math.inf
        return {"validation_loss": loss, "validation_perplexity": perplexity}


class Trainer:
    """Runs a `TrainStep` over a source. `run()` returns the figures of the run.

    Args:
        step: the training step.
        source: training batches, this rank's rows.
        settings, output: the `train:` and `output:` blocks.
        validation: validation batches, or what gives their metrics as `evaluate` does; adds validation_loss and
            validation_perplexity.
        evaluate: functions `evaluate(step) -> {metric: value}` called at every validation (AUC and the like).
        units: what the speed is counted in ("tokens", "samples").
        units_per_step: how many units a step holds, over all ranks.
        flops_per_step: model FLOPs of a step forward and backward over all ranks (no recompute), for the MFU.
        describe: JSON values kept in every checkpoint's state under "run" (the run's settings, say).
        on_step: called as `on_step(step, {"loss", "global_norm", ...})` after every step.
        cell: called in place of `step`: the cell that MindSpore's automatic parallelism wraps around it.
        holder: for a cut network, which slices this process holds; None saves whole parameters from rank 0.
        exchange: adds lists of floats over all processes; None = AllReduce on the device.
        companions: what goes along with the run (see `parallel.training.companions`).
    """

    def __init__(self, step: TrainStep, source: DataSource, settings: TrainSettings, output: OutputSettings, *,
                 validation: DataSource | Callable[[int], dict] | None = None,
                 evaluate: Sequence[Callable[[int], dict]] = (),
                 units: str = "tokens", units_per_step: int = 1, flops_per_step: float | None = None,
                 describe: dict | None = None, title: str = "train",
                 on_step: Callable[[int, dict], None] | None = None, cell: nn.Cell | None = None,
                 holder: Holder | None = None,
                 exchange: Callable[[list[float]], list[float]] | None = None,
                 companions: Sequence[Companion] = ()) -> None:
        self.step, self.settings, self.output = step, settings, output
        self.source = NumberedSource(source, *step.share) if step.numbered else source
        self.evaluators, self.companions = list(evaluate), tuple(companions)
        for companion in self.companions:
            companion.save, companion.go_back = self.save, self.go_back
        if validation is not None:
            self.evaluators.insert(0, validation if callable(validation)
                                   else Validation(step, validation, settings.validation_batches))
        self.units, self.units_per_step, self.flops_per_step = units, units_per_step, flops_per_step
        self.describe, self.title, self.on_step = describe or {}, title, on_step
        self.cell, self.holder = cell if cell is not None else step, holder
        self.exchange = exchange or (DeviceSum(step.group) if step.ranks > 1 else None)
        self.directory = Path(output.directory)
        self.checkpoints = self.directory / "checkpoints"
        counter_names = {p.name for p in step.counters()}
        self.parameters = [p for p in step.network.get_parameters() if p.name not in counter_names]
        self.states = step.optimizer.states()
        self.iteration, self.window, self.skipped = 0, [], 0
        self.early_stop: dict[str, Any] = {"best": None, "bad": 0}
        self.last: dict[str, float] = {}
        self.metrics: dict[str, float] = {}
        self.stopped_by: str | None = None
        self.checkpoint: Path | None = None
        self.log: MetricsLog | None = None

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Trains from where the run stands to its end (or early stop, or a signal) and returns its figures.

        Raises:
            UserError: nothing to read, a checkpoint that does not fit, gradients that stay non-finite, no disk space.
        """
        self.restore()
        chief = self.step.rank == 0
        self.log = MetricsLog(self.directory, self.iteration, self.output.tensorboard) if chief else None
        self.clock = Clock(self.units_per_step, self.flops_per_step, self._peak(), self.step.ranks)
        try:
            with _signals(self), Bar(self.settings.steps, self.title, self.iteration) as bar:
                self._loop(bar if chief else None)
            if self.settings.peak_tflops is None and self.clock.peak_tflops is not None:
                # Other work on the machine may have slowed the first measurement.
                self.clock.peak_tflops = max(self.clock.peak_tflops, self._peak())
            self._finish()
        finally:
            if self.log is not None:
                self.log.close()
        return self.figures()

    def _loop(self, bar: Bar | None) -> None:
        self.cell.set_train(True)
        while self.iteration < self.settings.steps and self.stopped_by is None:
            for count, outputs in self._outputs():
                self._after_step(count, outputs, bar)
                if self.stopped_by is not None or self.iteration >= self.settings.steps:
                    break
            else:
                self._data_ended()

    def _data_ended(self) -> None:
        """A source with `ends` (a stream) may end a run; others repeat their epochs."""
        if not getattr(self.source, "ends", False):
            raise UserError("the training data ended", value=self.iteration, hint="sources repeat their epochs")
        self.stopped_by = self.stopped_by or "end of data"
        if self.iteration and not self.metrics:
            self.validate()
        self.save()

    def _outputs(self) -> Iterator[tuple[int, dict[str, float]]]:
        """(steps done, scalars of the last of them) until the run's last step."""
        if self.settings.data_sink:
            yield from self._sunk_outputs()
            return
        batches = self.source.batches(self.iteration)
        if getattr(self.source, "read_ahead", True):
            batches = prefetch(itertools.islice(batches, self.settings.steps - self.iteration))
        try:
            for batch in batches:
                for companion in self.companions:
                    companion.before_step(self.iteration, batch)
                with self.clock.stepping():
                    results = self.cell(*map(Tensor, batch))
                    outputs = _scalars(results)
                yield 1, outputs
        finally:
            batches.close()

    def _sunk_outputs(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Stretches of log_every steps run by the device alone (Ascend only, never run by us)."""
        if ms.get_context("device_target") == "CPU":
            raise UserError("data sink needs an Ascend device", where="train.data_sink", hint="set it to false")
        steps = self.settings.steps - self.iteration
        size = math.gcd(steps, self.settings.log_every)
        sink = ms.data_sink(self.cell, self.source.mindspore_dataset(self.iteration, steps), sink_size=size)
        for _ in range(steps // size):
            with self.clock.stepping(size):
                outputs = _scalars(sink())
            yield size, outputs

    def _after_step(self, count: int, outputs: dict[str, float], bar: Bar | None) -> None:
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
            bar.advance(count, loss=f"{outputs['loss']:.4f}", **self.clock.shown(self.units))
        if self._due(self.settings.log_every):
            self._write_log(outputs)
        last = self.iteration >= self.settings.steps
        if self._due(self.settings.validate_every) or last:
            self.validate()
        self._agree_on_stop()
        if self._due(self.output.checkpoint_every) or last or self.stopped_by:
            self.save()

    def _due(self, every: int | None) -> bool:
        return every is not None and self.iteration % every == 0

    def _count_skipped(self, outputs: dict[str, float]) -> None:
        self.skipped = 0 if outputs["finite"] else self.skipped + 1
        if self.skipped > self.settings.max_skipped:
            raise UserError(f"{self.skipped} steps in a row gave gradients that are not finite", where="train",
                            value=self.iteration, hint="lower the learning rate or look at the data")

    def _write_log(self, outputs: dict[str, float]) -> None:
        loss = float(np.mean(self.window)) if self.window else math.nan
        self.window = []
        if self.log is not None:
            self.log.write(self.iteration, loss=loss, learning_rate=outputs["learning_rate"],
                           global_norm=outputs["global_norm"], loss_scale=outputs["loss_scale"],
                           **{f"{self.units}_per_second": self.clock.rate()}, mfu=self.clock.mfu())

    def _finish(self) -> None:
        if self.log is not None and self.output.loss_curve:
            self.log.draw(self.directory / "loss.png", self.title)

    def figures(self) -> dict[str, Any]:
        """The JSON line of the run: steps, last training loss, metrics, speed, MFU, newest checkpoint."""
        loss = self.log.series("loss")[1] if self.log is not None else []
        return {
            "steps": self.iteration, "loss": loss[-1] if loss else self.last.get("loss"), **self.metrics,
            f"{self.units}_per_second": self.clock.mean_rate(), "mfu": self.clock.mean_mfu(),
            "peak_tflops": self.clock.peak_tflops,
            "checkpoint": str(self.checkpoint) if self.checkpoint is not None else None, "stopped": self.stopped_by,
        }

    # -- validation and early stop ------------------------------------------------------------------------------------

    def validate(self) -> dict[str, float]:
        """Runs all evaluators, logs what they return, and decides on an early stop."""
        metrics: dict[str, float] = {}
        for evaluate in self.evaluators:
            metrics.update({name: float(value) for name, value in evaluate(self.iteration).items()})
        self.cell.set_train(True)
        self.metrics = metrics
        if metrics and self.log is not None:
            self.log.write(self.iteration, **metrics)
            if self.output.loss_curve:
                self.log.draw(self.directory / "loss.png", self.title)
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
                self.stopped_by = "early_stop"

    def _agree_on_stop(self) -> None:
        """A signal may reach the ranks between different steps; they stop together at the next."""
        if self.exchange is not None:
            wanted, = self.exchange([1.0 if self.stopped_by else 0.0])
            if wanted and self.stopped_by is None:
                self.stopped_by = "another rank"

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self) -> Path | None:
        """Writes a checkpoint of this iteration: rank 0 alone, or every rank its slices."""
        if self.step.rank != 0 and self.holder is None:
            return None
        counters = {p.name: p.asnumpy().item() for p in self.step.counters()}
        state = {"iteration": self.iteration, "counters": counters, "window": self.window, "skipped": self.skipped,
                 "early_stop": self.early_stop, "metrics": _json_floats(self.metrics),
                 "train": {"seed": self.settings.seed, "global_batch_size": self.settings.global_batch_size},
                 "companions": states_of(self.companions, self.iteration), "run": self.describe}
        what = (self.checkpoints, self.iteration, self.parameters, self.states if self.output.save_optimizer else (),
                state, self.output.keep)
        self.checkpoint = save_checkpoint(*what) if self.holder is None else save_slices(*what, self.holder)
        for companion in self.companions:
            companion.after_checkpoint(self.iteration)
        return self.checkpoint

    def restore(self) -> None:
        """Goes on from the checkpoint that `output.resume` names, if any.

        Raises:
            UserError: resume is `never` and there are checkpoints; the checkpoint does not fit.
        """
        found = list_checkpoints(self.checkpoints)
        if self.output.resume == "never":
            if found:
                raise UserError("the run already has checkpoints", where=self.checkpoints, value=found[-1].name,
                                hint="choose another output.directory or output.resume=auto")
            return
        if self.output.resume == "auto":
            if not found:
                return
            path = found[-1]
        else:
            path = resolve_checkpoint(self.output.resume)
        boxes = self.holder.boxes if self.holder is not None else None
        state = load_checkpoint(path, self.parameters, self.states, boxes)
        self._take_state(state, path)
        restore_all(self.companions, state.get("companions", {}), path)
        if self.step.rank == 0:
            note(f"going on from {path} (step {self.iteration})")

    def go_back(self, step: int) -> None:
        """Returns to the checkpoint of an earlier step of this run."""
        path = checkpoint_path(self.checkpoints, step)
        state = load_checkpoint(path, self.parameters, self.states, self.holder.boxes if self.holder else None)
        self._take_state(state, path)
        restore_all(self.companions, state.get("companions", {}), path)
        if self.log is not None:
            self.log.close()
            self.log = MetricsLog(self.directory, self.iteration, self.output.tensorboard)

    def _take_state(self, state: dict, path: Path) -> None:
        try:
            counters = state["counters"]
            for parameter in self.step.counters():
                parameter.set_data(Tensor(counters[parameter.name], parameter.dtype))
            self.iteration = int(state["iteration"])
            self.window, self.skipped = list(state["window"]), int(state["skipped"])
            self.early_stop = dict(state["early_stop"])
            watch = self.settings.early_stop
            if watch is not None and self.early_stop["bad"] >= watch.patience:
                self.stopped_by = "early_stop"
            self.metrics = {k: math.nan if v is None else v for k, v in state["metrics"].items()}
        except (KeyError, TypeError, ValueError):
            raise UserError("the checkpoint's state.json is damaged", where=path,
                            hint="use another checkpoint") from None
        self.checkpoint = path
        was = state.get("train", {})
        for key in ("seed", "global_batch_size"):
            if was.get(key, getattr(self.settings, key)) != getattr(self.settings, key):
                note(f"note: train.{key} was {was[key]} and is {getattr(self.settings, key)}: the run will differ from "
                     "one that was never stopped")

    def _peak(self) -> float | None:
        if self.settings.peak_tflops is not None or self.flops_per_step is None:
            return self.settings.peak_tflops
        return measured_matmul_tflops() if ms.get_context("device_target") == "CPU" else None


class Clock:
    """Time spent in steps; the first one, which compiles, and validation and checkpoints are left out of the rates."""

    def __init__(self, units_per_step: int, flops_per_step: float | None, peak_tflops: float | None,
                 ranks: int) -> None:
        self.units, self.flops, self.peak_tflops, self.ranks = units_per_step, flops_per_step, peak_tflops, ranks
        self.compile_seconds: float | None = None
        self.seconds, self.steps = 0.0, 0
        self.recent: list[tuple[float, int]] = []

    @contextmanager
    def stepping(self, steps: int = 1) -> Iterator[None]:
        """Around one call of the step."""
        started = time.perf_counter()
        yield
        spent = time.perf_counter() - started
        if self.compile_seconds is None:
            self.compile_seconds = spent
            return
        self.seconds += spent
        self.steps += steps
        self.recent = [*self.recent[-19:], (spent, steps)]

    def rate(self) -> float | None:
        """Units per second over the last steps."""
        seconds = sum(spent for spent, _ in self.recent)
        return self.units * sum(steps for _, steps in self.recent) / seconds if seconds else None

    def mean_rate(self) -> float | None:
        """Units per second over the run."""
        return self.units * self.steps / self.seconds if self.seconds else None

    def _share(self, rate: float | None) -> float | None:
        if rate is None or not self.flops or not self.peak_tflops:
            return None
        return rate / self.units * self.flops / (self.peak_tflops * 1e12 * self.ranks)

    def mfu(self) -> float | None:
        """Share of the peak over the last steps, in [0, 1]."""
        return self._share(self.rate())

    def mean_mfu(self) -> float | None:
        """Share of the peak over the run, in [0, 1]."""
        return self._share(self.mean_rate())

    def shown(self, units: str) -> dict[str, str]:
        """For the progress bar."""
        rate, mfu = self.rate(), self.mfu()
        shown = {f"{units}/s": f"{rate:,.0f}"} if rate else {}
        return {**shown, **({"mfu": f"{100 * mfu:.0f} %"} if mfu else {})}


def _scalars(results: tuple) -> dict[str, float]:
    names = ("loss", "global_norm", "finite", "loss_scale", "learning_rate")
    return {name: value.asnumpy().item() for name, value in zip(names, results, strict=True)}


def _json_floats(metrics: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


@contextmanager
def _signals(trainer: Trainer) -> Iterator[None]:
    """SIGINT and SIGTERM end the run after the current step, with a checkpoint; a second SIGINT ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if trainer.stopped_by is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        trainer.stopped_by = name
        note(f"{name}: stopping after this step; a checkpoint will be saved")
        if trainer.exchange is None and hasattr(trainer.source, "interrupt"):
            trainer.source.interrupt()  # a stream may be waiting for events that do not come

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
