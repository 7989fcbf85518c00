"""The slices that `parallel.sharding.slices` works out are those that MindSpore's partitioner gives every parameter."""

from pathlib import Path

import pytest

from parallel.sharding.slices import extent_shape, sharded_parameters
from parallel.task import build_task

CONFIGS = Path(__file__).parents[2] / "configs"
CONFIG = CONFIGS / "pangu" / "tiny.yaml"
EXPERTS = [CONFIGS / "recsys" / "tokenmixer_large_moe.yaml", "train.global_batch_size=16", "model.moe.experts=3"]
LAYOUTS = {
    "experts": [*EXPERTS, "parallel.data=4", "parallel.expert=2"],
    "experts sharded": [*EXPERTS, "parallel.data=4", "parallel.expert=2", "parallel.optimizer.shard=-1"],
    "tokens and experts": [*EXPERTS, "parallel.data=4", "parallel.op=2", "parallel.expert=2",
                           "model.op_sharding=tokens"],
    "all sharded": ["parallel.data=4", "parallel.op=2", "parallel.optimizer.shard=-1"],
    "sharded by 2": ["parallel.data=4", "parallel.op=2", "parallel.optimizer.shard=2"],
    "two stages": ["parallel.data=2", "parallel.op=2", "parallel.pipeline.stages=2",
                   "parallel.pipeline.micro_batches=2", "parallel.optimizer.shard=-1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_slices_are_those_of_the_compiled_graph(name, tmp_path):
    from parallel.proof.compile.rank_compiler import Request, compile_rank

    file, *words = LAYOUTS[name] if isinstance(LAYOUTS[name][0], Path) else [CONFIG, *LAYOUTS[name]]
    if file != CONFIG:
        words.append(f"data.cache={tmp_path}")
    task, _, config = build_task(file, words)
    rank = config.world - 3
    layouts = compile_rank(Request(config.world, rank, str(file), words)).layouts
    ours = {full.name: full.slice_of_rank(rank) for full in sharded_parameters(task.network, config)}
    assert {key for key, extent in ours.items() if extent is not None} == {key for key in layouts if key in ours}
    for key, extent in ours.items():
        if extent is not None:
            # Slice shape before optimizer shards, and the group that shards dim 0 again: "<size>-<hash>", or all.
            shape, group = list(layouts[key][2]), layouts[key][5]
            if group:
                shape[0] //= config.world if group == "hccl_world_group" else int(group.partition("-")[0])
            assert shape == list(extent_shape(extent)), key
