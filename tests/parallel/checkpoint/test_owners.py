"""Who writes which slice: each once a disk, evenly, by an answer that all ranks have; one index at 2,048 ranks."""

from collections import Counter

import numpy as np
import pytest

from parallel.checkpoint import index, sharded
from parallel.checkpoint.owners import Disks, held_alike, owned_slices, volume, written_by
from parallel.checkpoint.sharded import Slices
from parallel.checkpoint.writing import write_index, write_rank
from parallel.common.errors import UserError
from parallel.sharding.config import ParallelConfig
from parallel.sharding.slices import FullParameter, SliceOfRank, holders

# A layer as PanGu-alpha's, for one device: name, shape, what shards its dims.
LAYER = [("norm.gamma", (64,), (None,)), ("qkv.weight", (64, 192), (None, "op")), ("qkv.bias", (192,), ("op",)),
         ("mapping.weight", (64, 256), (None, "op")), ("projection.weight", (256, 64), ("op", None)),
         ("projection.bias", (64,), (None,))]


def parameters(config, layers=4):
    """A table on the first and the last stage, and layers spread over the stages."""
    ends = {0, config.pipeline.stages - 1}
    found = [("table", (4096, 64), ("op", None), ends, False)]
    for layer in range(layers):
        stage = {layer * config.pipeline.stages // layers}
        found += [(f"{layer}.{name}", shape, axes, stage, True) for name, shape, axes in LAYER]
    return [FullParameter(name, shape, SliceOfRank(shape, axes, stages, config, shardable))
            for name, shape, axes, stages, shardable in found]


def tensors_of(listed):
    return [(f"{kind}{full.name}", full.name, 4) for full in listed for kind in ("", "adam_m.", "adam_v.")]


LAYOUTS = {
    "replicas": ParallelConfig(data=16, op=4),
    "sharded": ParallelConfig(data=16, op=4, optimizer={"shard": -1}),
    "sharded in part": ParallelConfig(data=16, op=2, optimizer={"shard": 4}),
    "stages": ParallelConfig(data=8, op=2, pipeline={"stages": 4, "micro_batches": 4}),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("disks", [1, 8])
def test_every_slice_is_written_once_a_disk_and_by_one_who_holds_it(name, disks):
    config = LAYOUTS[name].resolve()
    listed, where = parameters(config), Disks(config.world, config.world // disks)
    shapes = {full.name: full.shape for full in listed}
    known = holders(listed, config)
    by_disk: dict[tuple, Counter] = {}
    for piece in owned_slices(tensors_of(listed), known, where):
        owner = sharded.parameter_of(piece.name)
        held = next(full for full in listed if full.name == owner).slice_of_rank(piece.rank)
        assert all(a <= start and stop <= b for (start, stop), (a, b) in zip(piece.extent, held, strict=True))
        by_disk.setdefault((where.of(piece.rank), piece.name), Counter())[piece.extent] += 1
    for (disk, name_), found in by_disk.items():
        assert set(found.values()) == {1}
        owner = sharded.parameter_of(name_)
        own = range(disk * where.each, (disk + 1) * where.each)
        wanted = {extent for extent, ranks in known[owner].items() if set(ranks) & set(own)}
        assert sum(map(volume, found)) == sum(map(volume, wanted))
        if disks == 1:
            assert sum(map(volume, found)) == np.prod(shapes[owner])


@pytest.mark.parametrize("name", ["replicas", "sharded in part"])
def test_it_is_spread_evenly_and_every_rank_knows_it(name):
    config = LAYOUTS[name].resolve()
    listed, disks = parameters(config), Disks.shared(config.world)
    loads, told = Counter(), Counter()
    for piece in owned_slices(tensors_of(listed), holders(listed, config), disks):
        loads[piece.rank] += piece.bytes
    total = sum(12 * int(np.prod(full.shape)) for full in listed)
    assert sum(loads.values()) == total and max(loads.values()) < 1.3 * total / config.world
    for rank in (0, 7, config.world - 1):
        own = written_by(rank, tensors_of(listed), holders(listed, config, rank), disks)
        told[rank] = sum(4 * volume(extent) for extent in own.values())
        assert told[rank] == loads[rank]


def test_a_borrowed_table_is_written_by_its_owners():
    config = LAYOUTS["stages"].resolve()
    ranks = {rank for owners in holders(parameters(config), config)["table"].values() for rank in owners}
    assert ranks == set(range(16))
    found = held_alike([(0, {"a": ((0, 2),)}), (1, {"a": ((0, 2),), "b": ((0, 1),)})], ["a"])
    assert found == {"a": {((0, 2),): [0, 1]}}


def test_disks_hold_equally_many_ranks():
    with pytest.raises(UserError, match="equally many ranks"):
        Disks(10, 4)


def test_one_index_at_2048_ranks(tmp_path, monkeypatch):
    """16 stages of data 16 x op 8 with states of 16 shards: a rank that goes on reads one layout and its own slices."""
    config = ParallelConfig(data=16, op=8, pipeline={"stages": 16, "micro_batches": 16},
                            optimizer={"shard": -1}).resolve()
    listed = parameters(config, layers=16)
    shapes, plans = {full.name: full.shape for full in listed}, {}
    for piece in owned_slices(tensors_of(listed), holders(listed, config), Disks.shared(2048)):
        plans.setdefault(piece.rank, []).append((piece.name, "parameters.safetensors", "F32",
                                                 shapes[sharded.parameter_of(piece.name)], piece.extent))
    written = [index.Written(name, kind, dtype, shape, extent, f"{kind}-{rank}", 0)
               for rank, plan in plans.items() for name, kind, dtype, shape, extent in plan]
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    # Of all the files those of the ranks that hold what rank 1500 does.
    wanted = {full.name: full.slice_of_rank(1500) for full in listed}
    wanted = {name: extent for name, extent in wanted.items() if extent is not None}
    near = {rank for rank, plan in plans.items()
            if any(sharded.parameter_of(name) in wanted and extent == wanted[sharded.parameter_of(name)]
                   for name, *_, extent in plan)}
    assert len(near) <= 3 * len(wanted), "each slice of a parameter and its moments lies in one place"
    checked = []
    for rank in near:
        checked += write_rank(folder, rank, 2048, plans[rank],
                              lambda name, extent: np.full([b - a for a, b in extent], extent[0][0], np.float32))
    rest = [item for item in written if int(item.file.rpartition("-")[2]) not in near]
    write_index(folder, [*checked, *rest], 2048)
    opened = Counter()

    def counted(kind, call):
        def counting(path, *rest):
            opened[kind] += 1
            return call(path, *rest)
        return counting

    monkeypatch.setattr(index, "read_sealed_json", counted("layouts", index.read_sealed_json))
    monkeypatch.setattr(sharded, "SafetensorsFile", counted("files", sharded.SafetensorsFile))
    monkeypatch.setattr(sharded, "_overlaps", counted("looks", sharded._overlaps))
    slices = Slices(folder)
    count = sum(len(tensor.slices) for tensor in slices.tensors.values())
    assert count == len(written) and opened["layouts"] == 1 and opened["files"] == 0
    for name, extent in wanted.items():
        assert (slices.read(name, extent) == extent[0][0]).all()
    assert opened["looks"] == len(wanted) < 20 and opened["files"] <= len(wanted)
