"""Layouts that a ranker does not have are refused in one line, before anything is compiled."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel.common.errors import UserError
from parallel.proof.replay.settings import check_layout

CONFIGS = Path(__file__).parents[2] / "configs"
REFUSED = {
    "sequence": ("tokenmixer_large", "parallel.op=2 parallel.sequence=true", "residual stream"),
    "schedule": ("rankmixer", "parallel.pipeline.stages=2 parallel.pipeline.schedule=gpipe", "run 1f1b only"),
    "level": ("dlrm_mlp", "parallel.data=2 parallel.optimizer.shard=-1 parallel.optimizer.level=2 train.accumulation=2",
              "are not kept sharded"),
    "expert width": ("tokenmixer_large_moe", "parallel.op=2", "sharded along their width"),
    "inner width": ("rankmixer", "parallel.op=2 model.width=32 model.ffn_ratio=0.78125", "inner width"),
    "mixed inner width": ("tokenmixer_large", "parallel.op=2 model.heads=6 model.ratio=0.58",
                          "networks of mixed tokens"),
    "separated mixed inner width": ("tokenmixer_large_ug_sep", "parallel.op=2 model.heads=8 model.ratio=0.62",
                                    "networks of mixed tokens"),
    "separated tokens": ("tokenmixer_large_ug_sep", "parallel.op=2 model.op_sharding=tokens", "are not sharded"),
    "tokens": ("rankmixer", "parallel.op=3 model.op_sharding=tokens parallel.vocabulary=false", "or mixing heads"),
    "no experts": ("rankmixer", "parallel.data=2 parallel.expert=2", "no routed experts"),
    "no stack, cut": ("dlrm_mlp", "parallel.op=2 parallel.pipeline.stages=2", "no stack of blocks"),
    "layers": ("rankmixer", "parallel.pipeline.stages=4", "more stages than layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layout_the_model_does_not_have_is_refused(name):
    model, overrides, words = REFUSED[name]
    with pytest.raises(UserError) as caught:
        check_layout(str(CONFIGS / f"recsys/{model}.yaml"), overrides.split())
    assert words in str(caught.value), str(caught.value)


def test_what_is_refused_is_accepted_without_the_one_thing():
    for model, overrides in (
            ("dlrm_mlp", "parallel.data=2 parallel.optimizer.shard=-1 parallel.optimizer.level=2"),
            ("dlrm_mlp", "parallel.data=2 parallel.optimizer.shard=-1 train.accumulation=2"),
            ("rankmixer", "parallel.op=2 model.op_sharding=tokens"), ("rankmixer", "parallel.pipeline.stages=2"),
            ("tokenmixer_large_ug_sep", "parallel.pipeline.stages=2")):
        check_layout(str(CONFIGS / f"recsys/{model}.yaml"), overrides.split())
