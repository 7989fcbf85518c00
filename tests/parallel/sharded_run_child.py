"""What the processes of test_sharded_run do: a simulated cluster whose ranks are forks that talk through shared memory.

MindSpore compiles the real step of every rank; the step itself cannot be executed, so a stand-in takes its place in the
trainer's loop. Everything else is the code of a real run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

import numpy as np

from parallel.training.data_source import DataSource


class SharedSum:
    """Sums of lists of floats over forked processes; also their barrier."""

    def __init__(self, ranks: int) -> None:
        self.rank, self.barrier = 0, multiprocessing.Barrier(ranks, timeout=300)
        self.table = multiprocessing.Array("d", 8 * ranks)

    def __call__(self, values: list[float]) -> list[float]:
        self.table[8 * self.rank:8 * self.rank + len(values)] = values
        self.barrier.wait()
        table = np.array(self.table[:]).reshape(-1, 8)
        self.barrier.wait()
        return table[:, :len(values)].sum(0).tolist()


class Rows(DataSource):
    """Batches of which each process has its rows: row i of batch b holds the number 1000 b + i everywhere."""

    columns = ("records", "position_ids", "documents")
    steps_per_epoch = 8

    def __init__(self, inputs: list, share: tuple[int, int]) -> None:
        self.inputs, self.share, self.read = inputs, share, 0

    def batches(self, start_step: int):
        step = start_step
        while True:
            part, parts = self.share
            rows = self.inputs[0].shape[0] // parts
            numbers = 1000 * step + np.arange(part * rows, (part + 1) * rows)
            self.read += 1
            yield tuple(np.broadcast_to(numbers.reshape(-1, *[1] * (len(item.shape) - 1)), (rows, *item.shape[1:])
                                        ).astype(item.dtype) for item in self.inputs)
            step += 1


def records_of(settings, share: tuple[int, int]) -> DataSource:
    """Real packed records where the run's settings say that they are."""
    from pangu.train_on import sources

    return sources(settings, share)[0]


def run(rank: int, world: int, add: SharedSum, order: dict) -> None:
    """One rank: builds, compiles, takes start values or a checkpoint, trains by the stand-in, saves."""
    os.environ |= {"RANK_SIZE": str(world), "RANK_ID": str(rank)}
    from parallel.proof.compile.rank_compiler import _pretend_hccl

    _pretend_hccl()
    import mindspore as ms
    from mindspore import Tensor
    from mindspore.communication import init

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("Ascend")
    init()
    from parallel.task import build_task
    from parallel.training.device import Processes
    from parallel.training.mindspore_backend import ShardedBackend
    from parallel.training.sharded.run import ShardedRun, needs_sharding
    from parallel.training.trainer import Run, Trainer

    processes = Processes(rank, world, "hccl_world_group", "Ascend")
    task, settings, config = build_task(order["config"], order["overrides"], world)
    assert needs_sharding(config, processes)
    sharded = ShardedRun(task, settings.train, config, processes, validated=order["validated"], all_reduce=add)
    seen, graphs, real = [], set(), sharded.cell

    def stand_in(*batch: Tensor) -> tuple:
        seen.append([item.asnumpy() for item in batch])
        real.compile(*batch)  # which a call of the cell would do
        graphs.update(real.compile_cache)
        values = (4.0 - sharded.step.rank * 0.0, 1.0, True, 1.0, 0.1)
        return tuple(Tensor(value) for value in values)

    stand_in.set_train = lambda mode: None
    arrays = [item for item in task.inputs if item.name != "sample_numbers"]
    source = records_of(settings, sharded.rows) if order["records"] else Rows(arrays, sharded.rows)
    backend = ShardedBackend(sharded)
    sharded.cell = stand_in
    trainer = Trainer(backend, Run(source, settings.train, settings.output))
    figures = trainer.run()
    message = {"figures": figures, "rows": [[int(item.reshape(len(item), -1)[i, 0]) for i in range(len(item))]
                                            for item in seen[0]] if seen else [],
               "shapes": {item.name: list(item.shape) for item in backend.parameters()},
               "extents": {name: [list(pair) for pair in extent] for name, extent in sharded.holder.extents.items()},
               "validated": sharded.loss is not None, "graphs": len(graphs), "read": getattr(source, "read", None)}
    (Path(order["folder"]) / f"rank_{rank}.json").write_text(json.dumps(message, default=str), encoding="utf-8")


def main(path: Path) -> int:
    """Forks a process for every rank and waits for them."""
    order = json.loads(path.read_text(encoding="utf-8"))
    from parallel.proof.compile.rank_compiler import _import_early

    _import_early()
    import parallel.training.sharded.run
    import parallel.training.trainer  # noqa: F401

    add, forks = SharedSum(order["world"]), []
    for rank in range(order["world"]):
        fork = os.fork()
        if fork == 0:
            code = 1
            try:
                add.rank = rank
                run(rank, order["world"], add, order)
                code = 0
            except BaseException:
                traceback.print_exc()
                add.barrier.abort()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        forks.append(fork)
    return max(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) for fork in forks)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
