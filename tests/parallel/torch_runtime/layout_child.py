"""Ranks of programs under test, in processes where MindSpore cannot be imported.

Reads lines of JSON {"folder", "ranks", "address", "ways"} from stdin. For each it forks a process a rank, which has
torch imported already, and answers with a line of their exit codes; where one fails the others are ended. The folder
holds the program and batches.npz; what each way (MODE/FLOATING) of running gave is written beside them, and what a rank
said on stderr as `rank-N.log`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
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

    from parallel.torch_runtime import buckets
    from parallel.torch_runtime.fusion import regions
    from parallel.torch_runtime.program import Program
    from parallel.torch_runtime.step import TorchStep

    torch.set_num_threads(1)
    program, batches = Program(folder), np.load(folder / "batches.npz")
    steps = 1 + max(int(name.partition("_")[0]) for name in batches.files)
    for way in ways:
        mode, floating = way.split("/")
        # The mode of compiled regions, with Python in place of the compiler, which would take minutes here.
        regions.inductor = lambda function, inputs, **_: function
        regions._compiled.clear()
        buckets.LARGE = 0  # sums as small as these are to be treated as large ones
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


def serve() -> None:
    """See the module."""
    import torch

    from parallel.torch_runtime import step  # noqa: F401
    from parallel.torch_runtime.fusion import regions  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        children, codes = [_forked(job, rank) for rank in range(job["ranks"])], {}
        while len(codes) < len(children):
            child, status = os.wait()
            codes[child] = os.waitstatus_to_exitcode(status)
            if codes[child] > 0:
                for other in children:
                    if other not in codes:
                        os.kill(other, signal.SIGKILL)
        print(json.dumps([codes[child] for child in children]), flush=True)


def _forked(job: dict, rank: int) -> int:
    folder = Path(job["folder"])
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        errors = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(errors, 2)
        main(folder, rank, job["address"], job["ways"])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
