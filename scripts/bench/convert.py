"""Time and memory of merging 512 slices, as 2.6B and 13B are published, at the scale of 350M, against MindSpore's own.

Slices of random numbers are made first (1.4 GB). Each side runs in a process of its own, so that its peak memory is its
own; the peer is `mindspore.transform_checkpoints`, which merges the same slices with the same strategy file but leaves
the three .npy tables out (12 % of the numbers), names and matrices as they are.

    python scripts/bench/convert.py [--width 1024] [--layers 24] [--rounds 1]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

PEER = """
import json, re, sys, time
import mindspore as ms
began = time.perf_counter()
ms.transform_checkpoints(sys.argv[1], sys.argv[2], "whole", sys.argv[3])
print(json.dumps({"seconds": time.perf_counter() - began,
                  "peak_rss_gb": int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / (1 << 20)}))
"""


def make_slices(folder: Path, config) -> None:
    """512 files, three tables and the strategy, of random numbers, written by the converter."""
    from pangu.checkpoints.names import keys
    from pangu.checkpoints.slices import release_layouts, write_slices

    rng, arrays = np.random.default_rng(0), {}
    for key in keys(config, "mindspore"):
        arrays[key.foreign] = rng.standard_normal(key.their_shape, np.float32)
    write_slices(folder, release_layouts(config),
                 [(name, "F32", value.shape, lambda value=value: value) for name, value in arrays.items()])


def run(command: list[str]) -> dict:
    """The JSON of a process's last line, with its wall time."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                          env={**os.environ, "GLOG_v": "3"}, stderr=subprocess.DEVNULL)
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "wall": time.perf_counter() - began}


def main() -> None:
    """Prints each round and one JSON object at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    from pangu.config import ModelConfig

    sizes = {"hidden_size": arguments.width, "layers": arguments.layers, "heads": 16}
    rows = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_slices(folder / "slices", ModelConfig(**sizes))
        for rank in range(512):  # the folders that MindSpore asks for
            (folder / "ranks" / f"rank_{rank}").mkdir(parents=True)
            link = folder / "ranks" / f"rank_{rank}" / f"c{rank}.ckpt"
            link.symlink_to(folder / "slices" / f"filerted_{rank}.ckpt")
        for number in range(arguments.rounds):
            for name in rows:
                target = folder / f"{name}{number}"
                ours = ["-m", "pangu", "convert", "--from", "mindspore-512", "--to", "pangu", "--slices",
                        str(folder / "slices"), "--strategy", str(folder / "slices" / "strategy.ckpt"), "--output",
                        str(target), *(f"model.{key}={value}" for key, value in sizes.items())]
                peer = ["-c", PEER, str(folder / "ranks"), str(target), str(folder / "slices" / "strategy.ckpt")]
                rows[name].append(run(ours if name == "ours" else peer))
                print(f"round {number + 1}, {name}: {rows[name][-1]['seconds']:.1f} s, "
                      f"{rows[name][-1]['peak_rss_gb']:.2f} GB")
                shutil.rmtree(target)
    best = {name: min(row["seconds"] for row in found) for name, found in rows.items()}
    print(json.dumps({"ratio": round(best["peer"] / best["ours"], 2), "ours": round(best["ours"], 2),
                      "peer": round(best["peer"], 2), "unit": "s", "slices": 512,
                      "parameters": rows["ours"][0]["parameters"],
                      "ours_peak_gb": max(row["peak_rss_gb"] for row in rows["ours"]),
                      "peer_peak_gb": round(max(row["peak_rss_gb"] for row in rows["peer"]), 3),
                      "threads": os.environ.get("OMP_NUM_THREADS", f"all of {os.cpu_count()}"),
                      "malloc": {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")}}))


if __name__ == "__main__":
    main()
