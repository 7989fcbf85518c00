"""What a run leaves for the eye: metrics.jsonl, TensorBoard events, loss.png, and its speed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel.common.files import atomic_write, explain_os_error
from parallel.common.json_text import dump_json
from parallel.common.lines import split_lines
from parallel.common.progress import info
from parallel.common.structured import BadText, parse_object
from parallel.training.operation.event_file import EventFile

_FLUSH_SECONDS = 30.0


class MetricsLog:
    """Appends one JSON object per line to `metrics.jsonl` and the same scalars to TensorBoard.

    A resumed run first drops the lines after its first step, so that the file reads like that of an uninterrupted run.

    Args:
        directory: folder of the run.
        start_step: lines of later steps are dropped.
        tensorboard: write event files too.
    """

    def __init__(self, directory: str | Path, start_step: int = 0, tensorboard: bool = True) -> None:
        self.directory = Path(directory)
        self.path = self.directory / "metrics.jsonl"
        self.records = [r for r in read_metrics(self.path) if r.get("step", 0) <= start_step] if start_step else []
        with atomic_write(self.path) as file:
            file.writelines(_line(record) for record in self.records)
        self._events = _Events(self.directory / "tensorboard", start_step + 1) if tensorboard else None

    def write(self, step: int, **values: float | int | None) -> None:
        """Adds a line; values that are None are left out, NaN and infinity are written as null."""
        record = {"step": step, **{name: value for name, value in values.items() if value is not None}}
        self.records.append(record)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_line(record))
        except OSError as error:
            raise explain_os_error(error, self.path) from error
        if self._events is not None:
            self._events.add(step, {name: value for name, value in record.items() if name != "step" and isinstance(
                value, (int, float)) and math.isfinite(value)})

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric."""
        points = [(r["step"], r[name]) for r in self.records if isinstance(r.get(name), (int, float))]
        return [step for step, _ in points], [value for _, value in points]

    def close(self) -> None:
        """Flushes TensorBoard."""
        if self._events is not None:
            self._events.close()

    def draw(self, path: str | Path, title: str) -> None:
        """Draws training and validation loss over the steps as a PNG; nothing if there is no point yet or no
        matplotlib."""
        curves = {name: self.series(name) for name in ("loss", "validation_loss")}
        if not any(steps for steps, _ in curves.values()):
            return
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            info(f"{path} is not drawn: matplotlib is not installed")
            return

        # Without pyplot, whose registry keeps every figure's canvas alive: a drawing would cost about 1 MB for good.
        figure = Figure(figsize=(8, 4.5), dpi=100)
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for (name, (steps, values)), style in zip(curves.items(), ("-", "o-"), strict=True):
            if steps:
                axes.plot(steps, values, style, markersize=4, linewidth=1.2,
                          label=name.replace("validation_loss", "validation").replace("loss", "training"))
        axes.set(xlabel="step", ylabel="loss", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.tight_layout()
        with atomic_write(path, "wb") as file:
            figure.savefig(file, format="png")
        figure.clear()


class _Events:
    """A TensorBoard event file, written where it is called, so that a full disk is one line.

    Args:
        directory: of the event files.
        purge_step: what earlier files say of this and later steps is not shown.
    """

    def __init__(self, directory: Path, purge_step: int) -> None:
        self.directory, self._flushed = directory, time.monotonic()
        with self._explained():
            self._file = EventFile(directory, purge_step)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Adds scalars of a step."""
        with self._explained():
            self._file.add(step, values)
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._file.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes."""
        with self._explained():
            self._file.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise explain_os_error(error, self.directory) from error


def _line(record: dict) -> str:
    return dump_json(record) + "\n"


def read_metrics(path: str | Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line truncated by a crash is dropped."""
    records = []
    if Path(path).is_file():
        for line in split_lines(Path(path).read_text(encoding="utf-8", errors="replace")):
            try:
                records.append(parse_object(line))
            except BadText:
                continue
    return [record for record in records if isinstance(record.get("step"), int)]



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

    def _share(self, rate: float | None, tflops: float | None) -> float | None:
        if rate is None or not self.flops or not tflops:
            return None
        return rate / self.units * self.flops / (tflops * 1e12 * self.ranks)

    def mfu(self) -> float | None:
        """Share of the peak over the last steps, in [0, 1]."""
        return self._share(self.rate(), self.peak_tflops)

    def mean_mfu(self, tflops: float | None = None) -> float | None:
        """Share of the peak (or of `tflops` of a device) over the run, in [0, 1]."""
        return self._share(self.mean_rate(), self.peak_tflops if tflops is None else tflops)

    def shown(self, units: str) -> dict[str, str]:
        """For the progress bar."""
        rate, mfu = self.rate(), self.mfu()
        shown = {f"{units}/s": f"{rate:,.0f}"} if rate else {}
        return {**shown, **({"mfu": f"{100 * mfu:.0f} %"} if mfu else {})}
