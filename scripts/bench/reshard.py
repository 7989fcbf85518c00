"""Seconds and peak memory of resharding a 350M training checkpoint: data 2 x op 4, op 2 x 4 stages, one device.

A full checkpoint of random numbers with two moments is made first (4.1 GB; the chain takes four times that on the
disk). Each step is a command in a process of its own; what comes out at the end must be the beginning, byte for byte.

    python scripts/bench/reshard.py [--config configs/pangu/350m.yaml] [--folder runs] [key=value ...]
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MOMENTS = ("adam_m.", "adam_v.")
LAYOUTS = {
    "data 2, op 4": ["parallel.devices=8", "parallel.data=2", "parallel.op=4"],
    "op 2, 4 stages": ["parallel.devices=8", "parallel.data=1", "parallel.op=2", "parallel.pipeline.stages=4",
                       "parallel.pipeline.micro_batches=4"],
    "one device": ["parallel.devices=1", "parallel.data=1"],
}


def make_checkpoint(folder: Path, config: str, overrides: list[str]) -> None:
    """A full training checkpoint of random numbers in `folder`."""
    from parallel.checkpoint.folder import OPTIMIZER_FILE, PARAMETERS_FILE
    from parallel.checkpoint.sharded import Slices
    from parallel.checkpoint.writing import write_checkpoint, write_full, write_index, write_rank
    from parallel.task import build_task

    task, _, _ = build_task(config, [*overrides, *LAYOUTS["one device"]])
    shapes = {item.name: tuple(item.shape) for item in task.network.get_parameters()}
    tensors = [(prefix + name, OPTIMIZER_FILE if prefix else PARAMETERS_FILE, "F32", shape,
                tuple((0, size) for size in shape)) for prefix in ("", *MOMENTS) for name, shape in shapes.items()]

    def read(name: str, box: tuple) -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        return rng.standard_normal([stop - start for start, stop in box], np.float32)

    size = sum(4 * int(np.prod(shape)) for *_, shape, _ in tensors)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        write_index(Path(scratch), write_rank(Path(scratch), 0, 1, tensors, read), 1)
        write_checkpoint(folder, size, lambda place: write_full(place, Slices(scratch)), {"step": 1, "iteration": 1})


def reshard(config: str, source: Path, target: Path, words: list[str]) -> dict:
    """The JSON line of `python -m parallel reshard`."""
    command = [sys.executable, "-m", "parallel", "reshard", "--config", config, "--from", str(source), "--to",
               str(target), *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
                          env={**os.environ, "GLOG_v": "3"})
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Prints each step and one JSON object at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(ROOT / "configs" / "pangu" / "350m.yaml"))
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the checkpoints lie meanwhile")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    told: dict = {"seconds": {}, "peak_rss_gb": {}, "load": round(os.getloadavg()[0], 1)}
    Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="reshard-", dir=arguments.folder) as scratch:
        first = source = Path(scratch) / "whole"
        make_checkpoint(first, arguments.config, arguments.overrides)
        for name, words in LAYOUTS.items():
            target = Path(scratch) / name.replace(" ", "_").replace(",", "")
            figures = reshard(arguments.config, source, target, [*arguments.overrides, *words])
            told["parameters"] = figures["parameters"]
            told["seconds"][name], told["peak_rss_gb"][name] = figures["seconds"], figures["peak_rss_gb"]
            print(f"to {name}: {figures['seconds']:.1f} s, {figures['peak_rss_gb']:.2f} GB", file=sys.stderr)
            source = target
        files = sorted(path.name for path in first.iterdir())
        _, wrong, missing = filecmp.cmpfiles(first, source, files, shallow=False)
        told["identical"] = not wrong and not missing and len(files) == 4
    print(json.dumps(told))


if __name__ == "__main__":
    main()
