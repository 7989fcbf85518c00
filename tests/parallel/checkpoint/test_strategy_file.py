"""MindSpore's strategy files: what we write MindSpore reads, and what it says is what our slices are."""

from __future__ import annotations

import mindspore as ms
import pytest
from mindspore.nn.utils import no_init_parameters

from pangu.config import ModelConfig
from pangu.model import PanGuAlpha, TrainingLoss
from parallel.checkpoint.strategy_file import SliceLayout, read_strategy, write_strategy
from parallel.common.errors import UserError
from parallel.sharding.config import ParallelConfig
from parallel.sharding.slices import sharded_parameters

LAYOUTS = {
    "dp2 op4": {"data": 2, "op": 4},
    "dp4 op2 sharded": {"data": 4, "op": 2, "optimizer": {"shard": -1}},
    "sharded by 2": {"data": 4, "op": 2, "optimizer": {"shard": 2}},
    "op2 pp2": {"data": 2, "op": 2, "pipeline": {"stages": 2, "micro_batches": 2}, "optimizer": {"shard": -1}},
}


@pytest.fixture(scope="module")
def network():
    with no_init_parameters():
        return TrainingLoss(PanGuAlpha(ModelConfig(layers=2, hidden_size=16, heads=4, vocabulary_size=64,
                                                   sequence_length=8)))


@pytest.fixture(params=LAYOUTS, scope="module")
def written(request, network, tmp_path_factory):
    config = ParallelConfig.model_validate(LAYOUTS[request.param]).resolve()
    full_parameters = sharded_parameters(network, config)
    path = tmp_path_factory.mktemp("strategy") / "strategy.ckpt"
    write_strategy(path, layouts_of(full_parameters))
    return path, full_parameters, config


def layouts_of(full_parameters):
    """Layouts of all parameters of a network, from `parallel.sharding.slices.sharded_parameters`."""
    layouts = {}
    for full in full_parameters:
        extents = full.slice_of_rank
        mesh = {axis: degree for axis, degree in extents.mesh.items() if axis != "expert" or degree > 1}
        axes = list(mesh)
        dims = tuple(-1 if axis is None else len(axes) - 1 - axes.index(axis) for axis in extents.mesh_axes)
        slice_shape = tuple(size // (mesh[axis] if axis else 1)
                            for size, axis in zip(extents.shape, extents.mesh_axes, strict=True))
        sharded = extents.shard > 1
        layouts[full.name] = SliceLayout(tuple(mesh.values()), dims, extents.shard_step if sharded else 0,
                                         extents.shard if sharded else 0, tuple(sorted(extents.stages or {0})),
                                         slice_shape)
    return layouts


def test_what_is_read_is_what_was_written(written):
    path, full_parameters, _ = written
    assert read_strategy(path) == layouts_of(full_parameters)


def test_the_layouts_give_every_rank_its_extent(written):
    path, full_parameters, config = written
    layouts, per_stage = read_strategy(path), config.data * config.op
    for full in full_parameters:
        for rank in range(config.world):
            stage, place = divmod(rank, per_stage)
            layout = layouts[full.name]
            extent = layout.extent(place, full.shape) if config.pipeline.stages == 1 or stage in layout.stages else None
            assert extent == full.slice_of_rank(rank), (full.name, rank)


def test_mindspore_reads_it(written):
    path, full_parameters, config = written
    stages = config.pipeline.stages
    found = ms.parallel.build_searched_strategy(str(path))
    assert {name.partition("-")[2] if stages > 1 else name for name in found} == {full.name for full in full_parameters}
    weight = next(name for name in found if name.endswith("layers.0.attention.query.weight"))
    assert list(found[weight].dev_matrix[0].dim) == [config.data, config.op]
    assert list(found[weight].tensor_map[0].dim) == [0, -1]
    assert list(found[weight].param_split_shape[0].dim) == [16 // config.op, 16]


def test_mindspore_plans_a_transformation_with_it(network, tmp_path):
    """To one device every rank is needed once for each slice; back, rank 3 of 8 needs the one device."""
    config = ParallelConfig.model_validate(LAYOUTS["dp2 op4"]).resolve()
    source, single = tmp_path / "dp2_op4.ckpt", tmp_path / "one.ckpt"
    write_strategy(source, layouts_of(sharded_parameters(network, config)))
    write_strategy(single, layouts_of(sharded_parameters(network, ParallelConfig())))
    assert sorted(ms.parallel.rank_list_for_transform(0, str(source), str(single))) == [0, 1, 2, 3]
    assert ms.parallel.rank_list_for_transform(3, str(single), str(source)) == [0]


@pytest.mark.parametrize(("content", "message"), [(b"\xff" * 40, "not a strategy file"), (b"", "names no parameter")])
def test_a_file_of_something_else(tmp_path, content, message):
    (tmp_path / "strategy.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_strategy(tmp_path / "strategy.ckpt")
    with pytest.raises(UserError, match="no such strategy file"):
        read_strategy(tmp_path / "absent.ckpt")
