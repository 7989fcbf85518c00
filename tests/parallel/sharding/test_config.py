"""`ParallelConfig`: the product is the number of devices; what does not divide is refused with its key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.common.errors import UserError
from parallel.sharding.config import ParallelConfig


@given(data=st.integers(1, 16), op=st.integers(1, 8), stages=st.integers(1, 8),
       free=st.sampled_from(["data", "op", ""]))
def test_the_free_axis_takes_the_rest(data, op, stages, free):
    sizes = {"data": data, "op": op}
    world = data * op * stages
    given_sizes = {**sizes, **({free: -1} if free else {})}
    config = ParallelConfig(**given_sizes, pipeline={"stages": stages, "micro_batches": stages}).resolve(world)
    assert (config.data, config.op, config.world) == (data, op, world)
    block = ParallelConfig(**given_sizes, pipeline={"stages": stages, "micro_batches": stages})
    if free and world == sizes[free]:  # the others are 1, so the free axis takes any number
        assert block.resolve(world * 2 + 1).world == world * 2 + 1
    else:
        with pytest.raises(UserError):
            block.resolve(world * 2 + 1)


@pytest.mark.parametrize(("block", "devices", "part"), [
    ({"data": 2, "op": 2}, 8, "data 2 x op 2 x pipeline.stages 1 = 4, but there are 8 devices"),
    ({"data": -1, "op": -1}, 8, "only one axis"),
    ({"data": -1}, None, "set parallel.devices"),
    ({"data": -1, "op": 3}, 8, "do not divide"),
    ({"data": 0}, None, "at least 1"),
    ({"data": 4, "optimizer": {"shard": 3}}, 4, "parallel.optimizer.shard"),
    ({"data": 4, "expert": 3}, 4, "parallel.expert"),
    ({"pipeline": {"stages": 4, "micro_batches": 2}}, 4, "set it to 4"),
    ({"pipeline": {"stages": 2, "micro_batches": 2, "offsets": [1, 1]}}, 2, "add up to 0"),
    ({"pipeline": {"stages": 1, "interleave": 2}}, 1, "interleaved schedule"),
    ({"pipeline": {"stages": 2, "micro_batches": 2, "schedule": "interleaved"}}, 2, "at least 2 chunks"),
    ({"data": 2, "pipeline": {"stages": 2, "micro_batches": 2}, "optimizer": {"shard": -1, "level": 3}}, 4,
     "does not compile level 3"),
    ({"data": 2, "optimizer": {"shard": -1, "level": 2}, "mindspore": {"share_graph": False}}, 2,
     "parallel.mindspore.share_graph"),
])
def test_what_does_not_fit_names_its_key(block, devices, part):
    with pytest.raises(UserError) as caught:
        ParallelConfig(**block).resolve(devices)
    assert part in str(caught.value)


def test_optimizer_shard_minus_one_is_the_data_axis():
    assert ParallelConfig(data=8, optimizer={"shard": -1}).resolve().optimizer_shard == 8
    assert ParallelConfig(data=8, optimizer={"shard": 4}).resolve().optimizer_shard == 4


def test_there_are_as_many_micro_batches_as_stages_by_default():
    assert ParallelConfig(pipeline={"stages": 4}).resolve().pipeline.micro_batches == 4
    assert ParallelConfig(pipeline={"stages": 4, "micro_batches": 8}).resolve().pipeline.micro_batches == 8
    assert ParallelConfig().resolve().pipeline.micro_batches == 1
    with pytest.raises(UserError, match="at least the number of stages"):
        ParallelConfig(pipeline={"stages": 4, "micro_batches": 1}).resolve()
