"""Two or more programs measured in turns: each side is a process of its own that waits while the others work.

All sides get the same malloc settings and the same number of threads. A bench that uses this calls `serve` when it was
started as a side and otherwise `Side` and `in_turns`.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(8 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
          "MALLOC_TOP_PAD_": str(512 << 20)}
_PAUSE = 0.02  # seconds in which the last side's threads go to sleep


def threads() -> int:
    """Cores this process may use: every side gets this many threads."""
    return len(os.sched_getaffinity(0))


def environment() -> dict[str, str]:
    """The environment of every side."""
    return {**os.environ, **MALLOC, "OMP_NUM_THREADS": str(threads()), "GLOG_v": "3", "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": str(ROOT)}


def require(*packages: str) -> None:
    """Ends the program in one line when a package that only benches need is missing."""
    for package in packages:
        try:
            version(package)
        except PackageNotFoundError:
            print(f"error: this bench compares with {package}, which is not installed; "
                  'install the extra: pip install -c scripts/constraints.txt -e ".[bench]"', file=sys.stderr)
            sys.exit(2)


class Side:
    """One side in a process of its own.

    Args:
        script: the bench.
        name: options of `serve`.
        arguments: further words on its command line.
        python: the interpreter, where another environment has the peer.
    """

    def __init__(self, script: str, name: str, *arguments: str, python: str = sys.executable) -> None:
        self.name = name
        self.process = subprocess.Popen([python, script, "--side", name, *arguments], env=environment(),
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.about = self._read()

    def ask(self, **command: object) -> dict:
        """Sends a command and waits for its answer."""
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            print(f"error: the side {self.name} of the bench ended with code {self.process.wait()}", file=sys.stderr)
            sys.exit(1)
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(about: dict, answer: Callable[[dict], dict], out: object) -> None:
    """The loop of a side: commands come as JSON lines on stdin, answers go to `out` (see `private_stdout`)."""
    print(json.dumps(about), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=out, flush=True)


def private_stdout() -> object:
    """stdout for answers alone: whatever libraries print goes to stderr from here on."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out


def in_turns(sides: list[Side], rounds: int, **command: object) -> dict[str, list[float]]:
    """Seconds of each side in each round; the order turns round every time."""
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(rounds):
        for side in sides if number % 2 == 0 else sides[::-1]:
            seconds[side.name].append(side.ask(**command)["seconds"])
            time.sleep(_PAUSE)
    return seconds


def ratio(peer: list[float], ours: list[float]) -> float:
    """Median over the rounds of peer / ours."""
    return statistics.median(p / o for p, o in zip(peer, ours, strict=True))


def describe_machine() -> str:
    """One line about cores, threads, load and malloc."""
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    return (f"{model}, {threads()} threads on every side, load {os.getloadavg()[0]:.1f}, "
            f"{' '.join(f'{key}={value}' for key, value in MALLOC.items())}")
