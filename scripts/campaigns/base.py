"""What every part of the campaign shares: seeds, counts, failures kept as small as they can be made."""

from __future__ import annotations

import hashlib
import os
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError

MOST_WORK, MOST_WAIT = 20.0, 300.0
"""Seconds one input may take: of this process's work, which other load does not change, and by the clock, since what
hangs does not work."""


@dataclass
class Campaign:
    """One run of the campaign.

    Args:
        seed: of everything that is drawn; printed, and kept beside the counts.
        folder: where artefacts are made and failures kept.
        end: `time.monotonic()` at which no further trial begins.
        short: the few trials of the suite.
        before: counts of earlier runs.
    """

    seed: int
    folder: Path
    end: float
    short: bool = False
    before: Counter = field(default_factory=Counter)
    counts: Counter = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    _until: float | None = None

    def part(self, name: str) -> random.Random:
        """The random numbers of one part."""
        return random.Random(f"{self.seed} {name}")

    def more(self, done: int, short: int) -> bool:
        """Whether another trial begins: `short` of them in the suite, else until the part's time is up."""
        if self.short:
            return done < short
        return time.monotonic() < min(self.end, self._until or self.end)

    def share(self, seconds: float) -> None:
        """From here on a part has this many seconds."""
        self._until = time.monotonic() + seconds

    def count(self, what: str, by: int = 1) -> None:
        """Counts trials."""
        self.counts[what] += by

    def killed(self, name: str) -> int:
        """Kills of a job, earlier runs counted in."""
        return self.counts[f"kill {name}"] + self.before[f"kill {name}"]

    def fail(self, kind: str, what: str, data: bytes | str | None = None) -> None:
        """Keeps a failure: its input in a file of its own."""
        self.counts[f"failed {kind}"] += 1
        key = hashlib.sha256(f"{kind} {what.splitlines()[-1] if what else ''}".encode()).hexdigest()[:12]
        path = None
        if data is not None:
            path = self.folder / "failures" / f"{kind.replace(' ', '_').replace('/', '_')}-{key}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)
            path.with_name(path.name + ".txt").write_text(f"seed {self.seed}\n{what}\n", encoding="utf-8",
                                                          errors="backslashreplace")
        if all(known["key"] != key for known in self.failures):
            self.failures.append({"kind": kind, "key": key, "what": what[-1500:], "file": str(path) if path else None})

    def attempt(self, kind: str, call: Callable[[Any], Any], data: Any, allowed: tuple[type[Exception], ...] = (),
                shrink: bool = True) -> Any:
        """`call(data)`; an exception that is no `UserError` (or `allowed`) is a failure, kept with the smallest input
        that shows it (`shrink` off: where `call` does not read `data` itself). Returns the result, or the exception
        that was allowed."""
        self.count(kind)
        started = _clock()
        try:
            result = call(data)
        except (UserError, *allowed) as error:
            result = error
            if "\n" in str(error) or len(str(error)) > 5000:
                self.fail(kind, f"message of several lines or too long: {str(error)[:300]}", _text(data))
        except Exception as error:  # what the campaign looks for
            told, kind_of_error = traceback.format_exc(), type(error)
            small = shrunk(data, lambda part: _raises(call, part, kind_of_error, allowed)) if shrink and isinstance(
                data, (str, bytes)) else data
            self.fail(kind, told, _text(small))
            return error
        worked, waited = (now - then for now, then in zip(_clock(), started, strict=True))
        if worked > MOST_WORK or waited > MOST_WAIT:
            self.fail(kind, f"took {worked:.0f} s of work and {waited:.0f} s by the clock", _text(data))
        return result


def _clock() -> tuple[float, float]:
    """Seconds of work of this process and of children that have ended, and by the clock."""
    times = os.times()
    return sum(times[:4]), times.elapsed


def _text(data: Any) -> bytes | str:
    return data if isinstance(data, (bytes, str)) else repr(data)[:100_000]


def _raises(call: Callable[[Any], Any], data: Any, kind: type[Exception], allowed: tuple) -> bool:
    try:
        call(data)
    except (UserError, *allowed):
        return False
    except Exception as error:
        return type(error) is kind
    return False


def shrunk(data: Any, fails: Callable[[Any], bool], trials: int = 300) -> Any:
    """The smallest part of `data` found by leaving out parts that still fails (delta debugging, bounded)."""
    size = max(1, len(data) // 2)
    while size >= 1 and trials > 0:
        at, changed = 0, False
        while at < len(data) and trials > 0:
            trials -= 1
            smaller = data[:at] + data[at + size:]
            if len(smaller) < len(data) and fails(smaller):
                data, changed = smaller, True
            else:
                at += size
        if not changed or size > 1:
            size //= 2
    return data
