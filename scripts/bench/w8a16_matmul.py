"""Products of float32 activations with int8 weights (parallel/kernels/w8a16.cpp) against MindSpore's float32 MatMul.

Both are graphs of one process that take turns, call by call, on weights that go round among several matrices, so that
none is in a cache. Sizes 4096 x 4096 and 4096 x 16384, 1 to 512 rows.

    python scripts/bench/w8a16_matmul.py [--rows 1,4,16,32,64,128,256,512] [--rounds 15]

Last line of stdout: JSON; `ratio` is the geometric mean over 1 and 4 rows of both sizes, int8 over float32 time;
`crossover` the least number of rows from which int8 is not faster, null if it is always.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

from turns import environment, threads  # noqa: E402

MARK = "W8A16_MATMUL_STARTED"
MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,4,16,32,64,128,256,512", help="rows of the activations")
    parser.add_argument("--rounds", type=int, default=15, help="calls of each side")
    arguments = parser.parse_args()
    if MARK not in os.environ:  # malloc reads its settings when a process starts
        os.execvpe(sys.executable, [sys.executable, *sys.argv], {**environment(), MARK: "1"})
    import mindspore

    from parallel.common.progress import table
    from recsys.quantization.matmul_speed import geometric_mean, measure

    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    found = measure(tuple(int(rows) for rows in arguments.rows.split(",")), rounds=arguments.rounds)
    table("W8A16 product against MindSpore's MatMul, medians", ["K x O", "M", "int8 ms", "float32 ms", "ratio"],
          [[f"{row['inputs']} x {row['outputs']}", row["rows"], f"{row['int8_ms']:.3f}", f"{row['float32_ms']:.3f}",
            f"{row['ratio']:.3f}"] for row in found])
    few = [row for row in found if row["rows"] in (1, 4)] or found
    slower = [row["rows"] for row in found if row["ratio"] >= 1.0]
    print(json.dumps({
        "ratio": geometric_mean([row["ratio"] for row in few]),
        "ours": geometric_mean([row["int8_ms"] for row in few]),
        "peer": geometric_mean([row["float32_ms"] for row in few]),
        "unit": "ms, geometric mean of medians", "peer_name": f"mindspore {mindspore.__version__} MatMul",
        "crossover": min(slower, default=None), "threads": threads(),
        "malloc": {name: os.environ.get(name) for name in MALLOC}, "rows": found}))


if __name__ == "__main__":
    main()
