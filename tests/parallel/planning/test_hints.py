"""What a run needs of memory, and what it would need with a key changed."""

from __future__ import annotations

from parallel.planning.hints import memory_needs
from parallel.planning.planner import planner_for


def test_memory_needs_name_changes_that_need_less():
    planner, settings = planner_for("configs/pangu/tiny.yaml", ["parallel.data=2"], "h100")
    needs = memory_needs(planner, settings.parallel.resolve())
    assert needs["bytes"] == needs["kinds"]["total"] > 0
    assert {key for key, _, _ in needs["changes"]} >= {"parallel.optimizer.shard", "train.accumulation"}
    assert all(0 < size < needs["bytes"] for _, _, size in needs["changes"])
