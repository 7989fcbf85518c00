"""Tables on the host: what 10^8 rows cost a training step, and lookup + update against torch and TorchRec.

    python scripts/bench/tables.py [--rows 100000,100000000] [--folder DIR] [--steps 30] [--rounds 7]
        [--hot N] [--torchrec PYTHON] [--ids N] [--skip-step] [--skip-peers]

1. A whole training step of configs/recsys/tokenmixer_large.yaml with tables of width 16 and row-wise Adagrad, whose
   users and items (and histories of items) are Zipf-distributed ids of that many rows in all, in files mapped into
   memory (--folder says where: on a disk the time of writing back comes in); every row is written before the clock
   starts. The sizes take turns in one process. Beside it the lookup and the update alone. `ratio` is the step with the
   fewest rows over the step with the most: the aim is 0.87 or more.
2. Lookup + update of one table (element-wise Adagrad, ids Zipf-distributed, --peer-rows rows): ours with ids found by
   hashing and by number, torch's EmbeddingBag with sparse gradients and its Adagrad, and the table of fbgemm that
   TorchRec's modules are made of, with its fused row-wise Adagrad, where --torchrec names a Python that has it.
3. With --ids N: memory of a table of width 8 that has met N ids, no two alike.

The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))

import turns  # noqa: E402 - beside this file

WIDTH, RATE = 16, 0.05
_CHUNK = 1 << 20


def main() -> None:
    """Runs both parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="100000,100000000", help="rows of the big tables, several with commas")
    parser.add_argument("--folder", help="where the files of the rows go (default: a temporary folder)")
    parser.add_argument("--steps", type=int, default=30, help="steps of one turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every size or side")
    parser.add_argument("--batch", type=int, default=512, help="samples of a step")
    parser.add_argument("--hot", type=int, help="rows of each width that stay on the device (data.tables.hot_rows)")
    parser.add_argument("--peer-rows", type=int, default=1_000_000, help="rows of the table of the peers")
    parser.add_argument("--peer-ids", type=int, default=16_384, help="ids of one of the peers' steps")
    parser.add_argument("--torchrec", metavar="PYTHON", help="a Python with torchrec and fbgemm-gpu-cpu")
    parser.add_argument("--skip-step", action="store_true", help="leave part 1 out")
    parser.add_argument("--skip-peers", action="store_true", help="leave part 2 out")
    parser.add_argument("--ids", type=int, help="measure the memory of a table of so many ids")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side == "memory":
        out = turns.private_stdout()
        turns.serve(memory_side(arguments.ids), dict, out)
        return
    if arguments.side:
        side(arguments)
        return
    print(turns.describe_machine(), file=sys.stderr)
    result: dict = {"unit": "ms a step", "threads": turns.threads()}
    if not arguments.skip_step:
        folder = Path(tempfile.mkdtemp(prefix="tables-", dir=arguments.folder))
        try:
            result |= steps_of_sizes([int(word) for word in arguments.rows.split(",")], arguments, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    if not arguments.skip_peers:
        result["peers"] = peers(arguments)
    if arguments.ids:
        result["memory"] = memory(arguments.ids)
    print(json.dumps(result))


# ---------------------------------------------------------------- part 1


def zipf(rows: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Ids of 0 .. rows - 1 with probability about 1 / rank, ranks scattered over the ids."""
    rank = np.floor(rows ** generator.random(count)).astype(np.int64) - 1
    return (rank * 2654435761 + 12345) % rows


class Sized:
    """The training step with tables of so many rows.

    Args:
        rows: of users and items together.
        batch: samples.
        folder: for the files.
        hot: rows of each width that stay on the device.
    """

    def __init__(self, rows: int, batch: int, folder: Path, hot: int | None) -> None:
        from parallel.layers.parameter import initialize
        from parallel.task import load_run
        from parallel.training.optimizers.run import Optimizer
        from recsys.build import loss_network
        from recsys.data.columns import features_of
        from recsys.data.features import assign_columns
        from recsys.tables.host import HostTables
        from recsys.tables.names import is_sparse
        from recsys.tables.step import HostedBackend, TableStep

        _, plain = load_run(str(ROOT / "configs/recsys/tokenmixer_large.yaml"))
        features = [feature.model_copy(update={"rows": rows // 2})
                    if feature.name in ("user_id", "item_id") or feature.target == "item_id" else feature
                    for feature in features_of(plain.data)]
        _, settings = load_run(str(ROOT / "configs/recsys/tokenmixer_large.yaml"), [
            "data.tables.place=host", f"data.tables.folder={folder}", "train.sparse_optimizer.name=rowwise_adagrad",
            f"train.sparse_optimizer.learning_rate={RATE}", f"train.global_batch_size={batch}",
            f"data.tables.hot_rows={hot or 'null'}"])
        self.rows, self.spec = rows, assign_columns(features, settings.model.embedding_size)
        self.tables = HostTables(settings, self.spec, batch)
        for name in ("user_id", "item_id"):
            fill(self.tables.tables[name], rows // 2, f"{rows:,} rows, {name}")
        network = loss_network(settings, self.tables.window, 1)
        initialize(network.model, 1)
        dense = [parameter for parameter in network.trainable_params() if not is_sparse(parameter.name)]
        self.backend = HostedBackend(TableStep(network, Optimizer(dense, settings.train.optimizer, 1000),
                                               settings.train), self.tables)
        self.generator, self.batch = np.random.default_rng(1), batch
        self.step(), self.step()

    def inputs(self) -> tuple:
        """A batch of the run."""
        from recsys.build import sample_batch

        ids, numbers, labels = sample_batch(self.spec, self.batch, 1, int(self.generator.integers(1 << 30)))
        for slot in self.spec.slots.values():
            if slot.rows > self.rows // 2:
                drawn = zipf(self.rows // 2, self.batch * slot.length, self.generator)
                ids[:, slot.start:slot.start + slot.length] = drawn.reshape(self.batch, -1) + 2 + slot.offset
        return ids, numbers, labels

    def step(self) -> float:
        """Seconds of one step, its batch drawn before."""
        batch = self.inputs()
        began = time.perf_counter()
        self.backend.step(batch)
        return time.perf_counter() - began

    def lookup(self) -> tuple[float, float]:
        """Seconds of a lookup and of an update without the network."""
        keys = self.tables.columns.keys(self.inputs()[0])
        gradients = [np.full((rows, width), 1e-6, np.float32) for width, rows in self.tables.window.tables.items()]
        if self.tables.hot is not None:
            from mindspore import Tensor

            gradients = [Tensor(gradient) for gradient in gradients]
        began = time.perf_counter()
        self.tables.fetch(keys, train=True)
        middle = time.perf_counter()
        self.tables.update(gradients)
        return middle - began, time.perf_counter() - middle


def fill(table: object, rows: int, what: str) -> None:
    """Writes every row, as after a long run."""
    began = time.perf_counter()
    for begin in range(0, rows, _CHUNK):
        keys = np.arange(begin, min(rows, begin + _CHUNK))
        table.meet(keys, np.ones(len(keys), np.float32), 1)
    print(f"{what}: written in {time.perf_counter() - began:.0f} s", file=sys.stderr)


def steps_of_sizes(sizes: list[int], arguments: argparse.Namespace, folder: Path) -> dict:
    """Milliseconds by size."""
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)
    sized = [Sized(rows, arguments.batch, folder / str(rows), arguments.hot) for rows in sizes]
    steps: dict[int, list[float]] = {rows: [] for rows in sizes}
    lookups: dict[int, list[tuple]] = {rows: [] for rows in sizes}
    for number in range(arguments.rounds):
        for one in sized if number % 2 == 0 else sized[::-1]:
            steps[one.rows].append(statistics.median(one.step() for _ in range(arguments.steps)))
            lookups[one.rows].append(tuple(np.median([one.lookup() for _ in range(arguments.steps)], 0)))
    found = {"rows": {}}
    for one in sized:
        lookup, update = np.median(lookups[one.rows], 0) * 1e3
        found["rows"][one.rows] = {"step": round(statistics.median(steps[one.rows]) * 1e3, 3),
                                   "lookup": round(lookup, 3), "update": round(update, 3),
                                   "gigabytes": round(one.tables.figures()["table_bytes"] / 1e9, 3)}
        print(f"{one.rows:>12,} rows: {found['rows'][one.rows]}", file=sys.stderr)
    few, many = min(sizes), max(sizes)
    found["ratio"] = round(turns.ratio(steps[few], steps[many]), 3)
    return found


# ---------------------------------------------------------------- part 2


def peers(arguments: argparse.Namespace) -> dict:
    """Ids per second of every side, and ours over each."""
    names = ["ours_hashed", "ours_direct", "ours_rowwise", "torch"]
    words = ["--peer-rows", str(arguments.peer_rows), "--peer-ids", str(arguments.peer_ids)]
    turns.require("torch")
    sides = [turns.Side(__file__, name, *words) for name in names]
    if arguments.torchrec:
        sides.append(turns.Side(__file__, "torchrec", *words, python=arguments.torchrec))
    checks = {one.name: one.about["check"] for one in sides if one.name in ("ours_hashed", "ours_direct", "torch")}
    if np.ptp(list(checks.values())) > 1e-3 * abs(checks["torch"]):
        sys.exit(f"error: the sides do not compute the same: {checks}")
    calls = max(1, round(0.3 / sides[-1].ask(calls=1)["seconds"]))
    seconds = turns.in_turns(sides, arguments.rounds, calls=calls)
    for one in sides:
        one.close()
    speed = {name: round(arguments.peer_ids * calls / statistics.median(values)) for name, values in seconds.items()}
    ratios = {name: {peer: round(turns.ratio(seconds[peer], seconds[name]), 2) for peer in ("torch", "torchrec")
                     if peer in seconds} for name in names[:3]}
    print(f"ids/s, lookup + update: {speed}; ours over the peers: {ratios}", file=sys.stderr)
    return {"ids_per_second": speed, "ratio": ratios}


def side(arguments: argparse.Namespace) -> None:
    """One side: answers {"calls": n} with seconds of n lookups and updates."""
    out = turns.private_stdout()
    rows, count = arguments.peer_rows, arguments.peer_ids
    make = {"torch": torch_side, "torchrec": torchrec_side}.get(arguments.side, our_side)
    step, check = make(rows, arguments.side)
    generator = np.random.default_rng(3)
    batches = [zipf(rows, count, generator) for _ in range(64)]
    for batch in batches[:3]:
        step(batch)
    about = {"check": check(batches[0][:256])}

    def answer(command: dict) -> dict:
        began = time.perf_counter()
        for number in range(command["calls"]):
            step(batches[number % len(batches)])
        return {"seconds": time.perf_counter() - began}

    turns.serve(about, answer, out)


def our_side(rows: int, name: str):
    """(step(ids), check(ids))."""
    from recsys.tables.dynamic import DynamicTable, Entries, Rule
    from recsys.tables.native import add_rows, unique

    rule = "rowwise_adagrad" if name == "ours_rowwise" else "adagrad"
    table = DynamicTable(WIDTH, rule, direct_rows=rows + 2 if name == "ours_direct" else 0)
    table.put(Entries(np.arange(rows), np.arange(rows, dtype=np.int32), start(rows),
                      np.zeros((rows, table.states), np.float32), np.ones(rows, np.float32), np.ones(rows, np.uint32)))
    moment, gradients = Rule(rule, RATE, 1e-10), {}

    def step(ids: np.ndarray) -> None:
        distinct, which, times = unique(ids)
        found = table.meet(distinct, times, 2)
        values = table.gather(found)
        looked_up = values[which]
        # As in torch the gradient comes for each id and is added up by row.
        own = gradients.setdefault(len(ids), np.full(looked_up.shape, 0.01, np.float32))
        table.update(found, add_rows(own, which, len(distinct)), moment)

    return step, lambda ids: float(table.gather(table.find(ids)).sum())


def start(rows: int) -> np.ndarray:
    """What every side starts from."""
    return np.random.default_rng(5).standard_normal((rows, WIDTH), dtype=np.float32) * np.float32(0.01)


def torch_side(rows: int, name: str):
    """The same with torch's sparse EmbeddingBag, one id a bag."""
    import torch

    bag = torch.nn.EmbeddingBag(rows, WIDTH, mode="sum", sparse=True, _weight=torch.from_numpy(start(rows)))
    optimizer = torch.optim.Adagrad(bag.parameters(), lr=RATE, eps=1e-10)

    def step(ids: np.ndarray) -> None:
        looked_up = bag(torch.from_numpy(ids)[:, None])
        optimizer.zero_grad()
        looked_up.backward(torch.full_like(looked_up, 0.01))
        optimizer.step()

    return step, lambda ids: float(bag.weight.detach()[torch.from_numpy(ids)].sum())


def torchrec_side(rows: int, name: str):
    """TorchRec's fused table on the CPU: fbgemm's row-wise Adagrad in the backward pass."""
    import torch
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, WIDTH, EmbeddingLocation.HOST, ComputeDevice.CPU)], optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=RATE, eps=1e-10)
    table.split_embedding_weights()[0].data.copy_(torch.from_numpy(start(rows)))

    def step(ids: np.ndarray) -> None:
        looked_up = table(torch.from_numpy(ids), torch.arange(len(ids) + 1))
        looked_up.backward(torch.full_like(looked_up, 0.01))

    return step, lambda ids: float(table.split_embedding_weights()[0].detach()[torch.from_numpy(ids)].sum())


# ---------------------------------------------------------------- part 3


def memory(ids: int) -> dict:
    """Peak resident bytes of a process that makes a table of so many ids, and seconds."""
    side = turns.Side(__file__, "memory", "--ids", str(ids))
    side.close()
    print(f"{ids:,} ids of width 8: {side.about}", file=sys.stderr)
    return side.about


def memory_side(ids: int) -> dict:
    """Fills the table with scattered ids and looks some up again."""
    import resource

    from recsys.tables.dynamic import DynamicTable

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    table, began = DynamicTable(8), time.perf_counter()
    for begin in range(0, ids, _CHUNK >> 3):
        keys = np.arange(begin, min(ids, begin + (_CHUNK >> 3))) * 2654435761 - 2**60
        table.meet(keys, np.ones(len(keys), np.float32), 1)
    assert len(table) == ids and (table.find(keys) >= 0).all() and table.find(np.array([2**60]))[0] < 0
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"gigabytes": round((after - before) * 1024 / 1e9, 3), "seconds": round(time.perf_counter() - began, 1)}


if __name__ == "__main__":
    main()
