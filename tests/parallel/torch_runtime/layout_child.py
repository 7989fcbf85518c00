"""One rank of a program under test, in a process where MindSpore cannot be imported.

    python layout_child.py FOLDER RANK HOST:PORT MODE/FLOATING,...

FOLDER holds the program and batches.npz; what each way of running gave is written beside them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


class NoMindSpore:
    """Refuses the import, as a machine without it does."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mindspore":
            raise ModuleNotFoundError(f"{name} is not to be imported here")


sys.meta_path.insert(0, NoMindSpore())


def main(folder: Path, rank: int, address: str, ways: list[str]) -> None:
    """Runs all ways, one after the other in the same processes."""
    import torch

    from parallel.torch_runtime import regions
    from parallel.torch_runtime.program import Program
    from parallel.torch_runtime.step import TorchStep

    torch.set_num_threads(1)
    program, batches = Program(folder), np.load(folder / "batches.npz")
    steps = 1 + max(int(name.partition("_")[0]) for name in batches.files)
    for way in ways:
        mode, floating = way.split("/")
        # The mode of compiled regions, with Python in place of the compiler, which would take minutes here.
        regions.inductor = lambda function, inputs: function
        regions._compiled.clear()
        step = TorchStep(program, rank, device="cpu", mode="inductor" if mode == "regions" else mode,
                         floating=floating, address=address)
        part, parts = step.share
        results = []
        for number in range(steps):
            rows = [batches[f"{number}_{place}"] for place in range(len(program.inputs))]
            own = [item[part * len(item) // parts:(part + 1) * len(item) // parts] for item in rows]
            results.append(step.step(own))
        state = {name: tensor.double().numpy() for name, tensor in step.state.items()}
        np.savez(folder / f"{mode}-{floating}-{rank}.npz", results=json.dumps(results), **state)
    step.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4].split(","))
