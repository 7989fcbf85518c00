"""What to change so that a layout that does not fit does, and what a run needs of memory with each such change."""

from __future__ import annotations

from typing import Any

from parallel.common.errors import UserError
from parallel.planning.planner import Planner
from parallel.sharding.config import ParallelConfig


def hints(planner: Planner, config: ParallelConfig) -> str:
    """The single change that makes a layout fit at the least cost of time, or by how much the best one falls short."""
    trials: list[tuple[str, dict[str, Any]]] = [
        ("parallel.optimizer.shard=-1", {"optimizer": {"shard": -1}}),
        ("parallel.recompute.policy=full", {"recompute": {"policy": "full"}}),
        ("parallel.recompute.slice_activations=true", {"recompute": {"slice_activations": True}}),
        ("parallel.optimizer.level=2", {"optimizer": {"level": 2}}),
        ("parallel.optimizer.level=3", {"optimizer": {"level": 3}}),
        ("parallel.sequence=true", {"sequence": True}), ("parallel.vocabulary=true", {"vocabulary": True})]
    for factor in (2, 4, 8):
        count = config.pipeline.micro_batches * factor
        trials.append((f"parallel.pipeline.micro_batches={count}", {"pipeline": {"micro_batches": count}}))
        for name, change in (("op", {"op": config.op * factor}),
                             ("pipeline.stages", {"pipeline": {"stages": config.pipeline.stages * factor}})):
            value = config.op * factor if name == "op" else config.pipeline.stages * factor
            trials.append((f"parallel.{name}={value} on {config.world * factor} devices", {**change, "devices": None}))
    fits, least = [], None
    for text, change in trials:
        trial = _changed(config, change)
        try:
            trial = trial.resolve()
            if trial == config or not planner.divides(trial, trial.pipeline.micro_batches):
                continue
            estimate = planner.evaluate(trial, exact=False)
        except UserError:
            continue
        if estimate.missing <= 0:
            fits.append((estimate.step_seconds * trial.world, text))
        elif least is None or estimate.missing < least[0]:
            least = (estimate.missing, text)
    if fits:
        return f"{min(fits)[1]} makes it fit"
    return f"no single change makes it fit; {least[1]} leaves {size_text(least[0])} too much" if least else ""


def memory_needs(planner: Planner, config: ParallelConfig) -> dict[str, Any]:
    """What a device of the fullest stage holds, for a run that finds its memory too small.

    Args:
        planner: of the run.
        config: resolved.

    Returns:
        "bytes", "kinds" (bytes by kind) and "changes": [key, value, bytes with it], those that need less, the cheapest
        in time first.
    """
    own = planner.evaluate(config, exact=False)
    micro = config.pipeline.micro_batches
    trials = [("parallel.recompute.policy", "full", {"recompute": {"policy": "full"}}),
              ("parallel.optimizer.shard", -1, {"optimizer": {"shard": -1}}),
              ("parallel.pipeline.micro_batches", 2 * micro, {"pipeline": {"micro_batches": 2 * micro}}),
              ("train.accumulation", 2 * planner.train.accumulation, {})]
    found = []
    for key, value, change in trials:
        if (key.endswith("micro_batches") and config.pipeline.stages == 1) or (
                key == "train.accumulation" and config.pipeline.stages > 1):
            continue
        before, trial = planner.train, _changed(config, change)
        try:
            trial = trial.resolve()
            if key == "train.accumulation":
                planner.train = before.model_copy(update={"accumulation": value})
            count = max(trial.pipeline.micro_batches, planner.train.accumulation)
            if not planner.divides(trial, count):
                continue
            estimate = planner.evaluate(trial, exact=False)
        except UserError:
            continue
        finally:
            planner.train = before
        if estimate.fullest.total < own.fullest.total:
            found.append((estimate.step_seconds, [key, value, int(estimate.fullest.total)]))
    return {"bytes": int(own.fullest.total), "kinds": {kind: int(size) for kind, size in own.fullest.parts().items()},
            "changes": [item for _, item in sorted(found, key=lambda pair: pair[0])]}


def _changed(config: ParallelConfig, change: dict[str, Any]) -> ParallelConfig:
    tree = config.model_dump()
    for key, value in change.items():
        if isinstance(value, dict):
            tree[key].update(value)
        else:
            tree[key] = value
    tree["pipeline"]["micro_batches"] = max(tree["pipeline"]["micro_batches"], tree["pipeline"]["stages"])
    return ParallelConfig.model_validate(tree)


def size_text(size: int) -> str:
    """Bytes as MB or GB."""
    return f"{size / 1e9:.1f} GB" if size > 1e8 else f"{size / 1e6:.1f} MB"
