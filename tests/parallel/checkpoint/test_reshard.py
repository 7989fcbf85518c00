"""Slices follow the layouts, and a checkpoint sharded, resharded and put together is the same, bit for bit."""

import argparse
import json
import threading
import tracemalloc

import numpy as np
import pytest
from mindspore import Parameter, Tensor

from parallel.checkpoint import reshard
from parallel.checkpoint.full import load_checkpoint, save_checkpoint
from parallel.checkpoint.safetensors_file import SafetensorsFile
from parallel.checkpoint.sharded import Slices
from parallel.checkpoint.writing import Holder, SlicedSave, write_checkpoint, write_index, write_rank
from parallel.common.errors import UserError
from parallel.layers.embedding import Embedding, TiedHead
from parallel.layers.linear import Linear
from parallel.layers.norm import LayerNorm
from parallel.sharding.config import ParallelConfig
from parallel.sharding.layout import Layer
from parallel.sharding.slices import extent_shape, holders, sharded_parameters, slice_of_mindspore
from parallel.sharding.trainable import Trainable


class Block(Layer):
    def __init__(self):
        super().__init__()
        self.norm = LayerNorm(16)
        self.mapping = Linear(16, 32, style="column", std=0.1)
        self.projection = Linear(32, 16, style="row", std=0.1)


class Model(Layer, Trainable):
    """A table used first and last, three blocks: what a pipeline needs to know."""

    def __init__(self):
        super().__init__()
        self.embedding = Embedding(24, 16, std=0.1, axis="vocabulary")
        self.first, self.second, self.third = Block(), Block(), Block()
        self.head = TiedHead(axis="vocabulary")

    def pipeline_cells(self):
        return [[self.embedding], self.first, self.second, self.third, [self.head]]

    def shared_parameters(self):
        return [(self.embedding.table, [self.embedding, self.head])]


def config(**changes):
    return ParallelConfig(**changes).resolve()


LAYOUTS = {
    "dp2 op4": config(data=2, op=4),
    "op2 pp3": config(op=2, pipeline={"stages": 3, "micro_batches": 3}),
    "dp4 op2 all sharded": config(data=4, op=2, optimizer={"shard": -1}),
    "dp4 sharded by 2": config(data=4, optimizer={"shard": 2}),
    "all": config(data=2, op=2, pipeline={"stages": 2, "micro_batches": 2}, optimizer={"shard": -1}),
}


@pytest.fixture(scope="module")
def model():
    return Model()


@pytest.fixture(scope="module")
def full(model, tmp_path_factory):
    """A whole checkpoint of the model with moments."""
    folder, rng = tmp_path_factory.mktemp("whole"), np.random.default_rng(0)
    parameters = [Parameter(Tensor(rng.standard_normal(p.shape).astype(np.float32)), name=p.name)
                  for p in model.get_parameters()]
    states = [Parameter(Tensor(rng.standard_normal(p.shape).astype(np.float32)), name=f"adam_{k}.{p.name}")
              for k in "mv" for p in parameters]
    return save_checkpoint(folder, 7, parameters, states, {"iteration": 7, "counters": {"step": 7}})


def resharded(source, target, model, layout):
    """What the verb does, for a model without a config file."""
    slices = Slices(source)
    plans = reshard.rank_plans(slices, holders(sharded_parameters(model, layout), layout), layout.world)

    def write(folder):
        write_index(folder, [item for rank, plan in enumerate(plans)
                             for item in write_rank(folder, rank, layout.world, plan, slices.read)], layout.world)

    return write_checkpoint(target, 0, write, slices.state)


def old_layout(folder, rank, ranks, written):
    """The layout of its own that every rank wrote until version 2."""
    tensors = {item.name: {"file": item.file, "dtype": item.dtype, "crc32": item.crc32, "full_shape": item.shape,
                           "shape": extent_shape(item.extent), "box": item.extent} for item in written}
    (folder / f"layout-{rank:05d}-of-{ranks:05d}.json").write_text(json.dumps(
        {"format": "parallel.checkpoint", "version": 1, "rank": rank, "ranks": ranks, "tensors": tensors}))


def merge(source, target):
    return reshard.run_merge(None, argparse.Namespace(source=str(source), target=str(target)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_there_and_back_is_the_identity(full, model, tmp_path, name):
    sharded = resharded(full, tmp_path / "sharded", model, LAYOUTS[name])
    merge(sharded, tmp_path / "back")
    for file in ("parameters.safetensors", "optimizer.safetensors"):
        assert_same_file(full / file, tmp_path / "back" / file)
    assert json.loads((tmp_path / "back" / "state.json").read_text())["iteration"] == 7


def test_from_layout_to_layout(full, model, tmp_path):
    names = list(LAYOUTS)
    source = full
    for number, name in enumerate(names):
        source = resharded(source, tmp_path / str(number), model, LAYOUTS[name])
    direct = resharded(full, tmp_path / "direct", model, LAYOUTS[names[-1]])
    files = sorted(path.name for path in direct.iterdir())
    assert files == sorted(path.name for path in source.iterdir()) and len(files) == 8 * 2 + 2
    assert all((direct / name).read_bytes() == (source / name).read_bytes() for name in files)


def assert_same_file(one, other):
    first, second = SafetensorsFile(one), SafetensorsFile(other)
    assert set(first.entries) == set(second.entries)
    assert all(np.array_equal(first.read(name), second.read(name)) for name in first.entries)


def extents(model, layout, name):
    full = {w.name: w for w in sharded_parameters(model, layout)}[name]
    return [full.slice_of_rank(rank) for rank in range(layout.world)]


def test_slices_of_op_and_data(model):
    layout = LAYOUTS["dp2 op4"]
    columns = [((8 * op, 8 * op + 8), (0, 16)) for op in range(4)]
    assert extents(model, layout, "first.mapping.weight") == columns * 2
    assert extents(model, layout, "first.projection.weight")[5] == ((0, 16), (8, 16))
    assert extents(model, layout, "first.projection.bias") == [((0, 16),)] * 8
    assert extents(model, layout, "embedding.table")[3] == ((18, 24), (0, 16))


def test_slices_of_stages(model):
    layout = LAYOUTS["op2 pp3"]
    held = [extent is not None for extent in extents(model, layout, "second.norm.gamma")]
    assert held == [False, False, True, True, False, False]
    held = [extent is not None for extent in extents(model, layout, "embedding.table")]
    assert held == [True, True, False, False, True, True], "the shared table lies on the first and the last stage"


def test_slices_of_the_optimizer_shard(model):
    assert extents(model, LAYOUTS["dp4 op2 all sharded"], "first.mapping.weight")[3] == ((20, 24), (0, 16))
    assert extents(model, LAYOUTS["dp4 op2 all sharded"], "embedding.table")[3] == ((12, 24), (0, 16))
    assert [extent[0] for extent in extents(model, LAYOUTS["dp4 sharded by 2"], "first.mapping.weight")] == [
        (0, 16), (16, 32), (0, 16), (16, 32)]
    assert extents(model, LAYOUTS["dp4 sharded by 2"], "first.norm.gamma") == [((0, 16),)] * 4


def test_slices_of_a_compiled_layout():
    entry = [[4, 2], [0, -1], [64, 128], 0, True, "4-123", [128, 128]]
    assert slice_of_mindspore(entry, 5) == ((64, 128), (0, 128))
    assert slice_of_mindspore(entry, 5, [1, 3, 5, 7]) == ((96, 112), (0, 128))
    assert extent_shape(slice_of_mindspore([[4, 2], [-1, 0], [128, 64], 0, True, "", [128, 128]], 6)) == (128, 64)


def test_one_device_reads_slices_and_a_rank_reads_its_part(full, model, tmp_path):
    sharded = resharded(full, tmp_path / "sharded", model, LAYOUTS["all"])
    expected = SafetensorsFile(full / "parameters.safetensors")
    parameters = [Parameter(Tensor(np.zeros(p.shape, np.float32)), name=p.name) for p in model.get_parameters()]
    assert load_checkpoint(sharded, parameters)["iteration"] == 7
    assert all(np.array_equal(p.asnumpy(), expected.read(p.name)) for p in parameters)
    layout = LAYOUTS["dp4 op2 all sharded"]
    mine = {w.name: w.slice_of_rank(3) for w in sharded_parameters(model, layout)}
    parts = [Parameter(Tensor(np.zeros(extent_shape(extent), np.float32)), name=name) for name, extent in mine.items()]
    moments = [Parameter(Tensor(np.zeros(p.shape, np.float32)), name=f"adam_{k}.{p.name}") for k in "mv" for p in parts]
    load_checkpoint(sharded, parts, moments, mine)
    moved = SafetensorsFile(full / "optimizer.safetensors").read("adam_v.first.mapping.weight")
    got = next(p for p in moments if p.name == "adam_v.first.mapping.weight").asnumpy()
    assert np.array_equal(got, moved[20:24])


def slice_of(file, name, extent):
    return Tensor(np.array(file.map(name)[tuple(slice(start, stop) for start, stop in extent)]))


def test_every_rank_saves_its_slices(full, model, tmp_path):
    layout = LAYOUTS["all"]
    full_parameters = sharded_parameters(model, layout)
    files = [SafetensorsFile(full / name) for name in ("parameters.safetensors", "optimizer.safetensors")]
    barrier = threading.Barrier(layout.world, timeout=60)

    def save(rank):
        extents = {w.name: w.slice_of_rank(rank) for w in full_parameters if w.slice_of_rank(rank) is not None}
        holder = Holder(rank, layout.world, extents, {w.name: w.shape for w in full_parameters}, barrier.wait,
                        lambda: holders(full_parameters, layout, rank))
        parameters = [Parameter(slice_of(files[0], name, extent), name=name) for name, extent in extents.items()]
        states = [Parameter(slice_of(files[1], f"adam_{k}.{name}", extent), name=f"adam_{k}.{name}")
                  for k in "mv" for name, extent in extents.items()]
        SlicedSave(tmp_path / "run", 9, parameters, states, {"iteration": 9}, 1, holder).run(barrier.wait)

    threads = [threading.Thread(target=save, args=(rank,)) for rank in range(layout.world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step_00000009"]
    merge(tmp_path / "run", tmp_path / "back")
    for file in ("parameters.safetensors", "optimizer.safetensors"):
        assert_same_file(full / file, tmp_path / "back" / file)


def test_the_first_stages_copy_of_a_shared_table_counts(tmp_path):
    """The last stage's copy is sent to it at every step and updated by nobody: the first's is read and merged."""
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    extent = ((0, 6), (0, 4))
    for rank, value in ((0, 1.0), (1, 7.0)):
        own = write_rank(folder, rank, 2, [("table", "parameters.safetensors", "F32", (6, 4), extent),
                                           (f"own.{rank}", "parameters.safetensors", "F32", (2,), ((0, 2),))],
                         lambda name, part, value=value: np.full([b - a for a, b in part], value, np.float32))
        old_layout(folder, rank, 2, own)
    (folder / "state.json").write_text("{}")
    assert (Slices(folder).read("table") == 1.0).all()
    reshard.run_merge(None, argparse.Namespace(source=str(folder), target=str(tmp_path / "whole")))
    merged = Slices(tmp_path / "whole")
    assert (merged.read("table") == 1.0).all() and (merged.read("own.1") == 7.0).all()


def test_slices_of_experts():
    """data 4 = 2 replicas x 2 of the expert axis: experts are sharded by the inner half of the data coordinate."""
    from parallel.layers.experts.moe import SparsePertokenMoE

    class Experts(Layer):
        def __init__(self):
            super().__init__()
            self.moe = SparsePertokenMoE(4, 8, 24, experts=3, active=2)

    layout = config(data=4, op=2, expert=2)
    full_parameters = {full.name: full for full in sharded_parameters(Experts(), layout)}
    gate = full_parameters["moe.gate_weight"]
    assert gate.shape == (4, 2, 8, 8)
    for rank in range(8):
        expert = rank // 2 % 2
        assert gate.slice_of_rank(rank) == ((0, 4), (expert, expert + 1), (0, 8), (0, 8))
    sharded = {w.name: w for w in sharded_parameters(Experts(),
                                                     config(data=4, op=2, expert=2, optimizer={"shard": -1}))}
    # Whoever holds the same experts shares their states: both replicas x both places of the unused op axis.
    parts = [sharded["moe.gate_weight"].slice_of_rank(rank)[0] for rank in (0, 1, 4, 5)]
    assert parts == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_what_is_wrong_is_said(full, model, tmp_path):
    sharded = resharded(full, tmp_path / "sharded", model, LAYOUTS["dp2 op4"])
    with pytest.raises(UserError, match="exists already"):
        merge(sharded, sharded)
    file = sharded / "parameters-00003-of-00008.safetensors"
    data = bytearray(file.read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="have changed"):
        merge(sharded, tmp_path / "no")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sharded"], "nothing half-written"
    (sharded / "layout.json").rename(sharded / "layout-00002-of-00008.json")
    with pytest.raises(UserError, match="layout 0 of 8 is missing"):
        Slices(sharded)
    full_parameters = {w.name: w for w in sharded_parameters(Block(), LAYOUTS["dp2 op4"])}
    with pytest.raises(UserError, match="lacks parameter norm.gamma"):
        reshard._compare(Slices(full), full_parameters)


def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    rows, width, count = 4096, 128, 12
    parameters = [Parameter(Tensor(np.ones((rows, width), np.float32)), name=f"p{i}") for i in range(count)]
    source = save_checkpoint(tmp_path / "source", 1, parameters)
    tracemalloc.start()
    merge(source, tmp_path / "merged")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3.5 * rows * width * 4, "less than the twelve tensors by far"
