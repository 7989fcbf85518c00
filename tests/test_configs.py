"""Every YAML under configs/ is read by the class it is for and means what it says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from parallel.common.settings import read_yaml_tree
from parallel.sharding.slices import sharded_parameters
from parallel.task import build_task

ROOT = Path(__file__).resolve().parents[1]
# Made with commit 0587bfa: checkpoints and start values hang on these names, so no change of the code may change them.
NAMES = json.loads((ROOT / "tests" / "parameter_names.json").read_text(encoding="utf-8"))
MODELS = sorted([*(ROOT / "configs" / "pangu").glob("*.yaml"), *(ROOT / "configs" / "recsys").glob("*.yaml")])


@pytest.mark.parametrize("path", MODELS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_model_config_builds(path):
    task, settings, config = build_task(path)
    assert config.world == (config.devices or config.world)
    held = sharded_parameters(task.network, config)
    assert held and all(any(parameter.slice_of_rank(stage * config.data * config.op) is not None
                            for stage in range(config.pipeline.stages)) for parameter in held)
    assert all(size > 0 for item in task.inputs for size in item.shape)
    if (known := NAMES.get(f"{path.parent.name}/{path.stem}")) is not None:
        lines = [f"{p.name} {list(p.shape)} {p.requires_grad}" for p in task.network.get_parameters()]
        assert [len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()] == known


@pytest.mark.parametrize(("name", "parameters"), [
    ("350m", 345_368_576), ("2_6b", 2_625_295_360), ("13b", 12_800_870_400), ("200b", 206_861_008_896)])
def test_published_sizes(name, parameters):
    import math

    task, _, _ = build_task(ROOT / "configs" / "pangu" / f"{name}.yaml")
    assert sum(math.prod(item.shape) for item in task.network.get_parameters()) == parameters


@pytest.mark.parametrize("folder", ["pangu", "recsys"])
def test_tiny_configs_divide(folder):
    """The tiny configs can be sharded by 2 in every dimension and by 4 in data and op."""
    for path in sorted((ROOT / "configs" / folder).glob("tiny*.yaml")):
        everything = ["parallel.data=2", "parallel.op=2", "parallel.pipeline.stages=2",
                      "parallel.pipeline.micro_batches=2", "parallel.optimizer.shard=-1"]
        for words in (["parallel.data=4"], ["parallel.op=4"], everything):
            build_task(path, words)


def test_yaml_has_no_leftover_base():
    for path in MODELS:
        assert "base" not in read_yaml_tree(path)
