"""What replay needs of a run's settings, and whether a layout can be replayed at all."""

from __future__ import annotations

from collections.abc import Sequence

from parallel.common.errors import UserError

MOST_RANKS = 64
# What a user's own overrides, which come after these, may change. From a warm-up's first learning rate, 0, nothing
# would move. Adam divides by the root of the second moment: a gradient that is 0 but for rounding (an attention key's
# bias) would become a full step in a random direction, hence a larger epsilon.
_DEFAULTS = ("train.precision=fp32", "train.optimizer.schedule.warmup_steps=0", "train.optimizer.epsilon=1e-3",
             "train.clip_norm=1.0", "model.dropout=0.0", "train.loss_scale.name=none")
# The same for the tables' own optimizer, where there is one.
_SPARSE_DEFAULTS = ("train.sparse_optimizer.schedule.warmup_steps=0", "train.sparse_optimizer.epsilon=1e-3")


def with_defaults(config: str, overrides: Sequence[str]) -> list[str]:
    """The user's overrides behind those that replay needs, as far as the file's settings know them.

    Raises:
        UserError: the overrides do not fit the file.
    """
    from parallel.task import load_run

    kept: list[str] = []
    for item in _DEFAULTS:
        try:
            load_run(config, [*kept, item])
            kept.append(item)
        except UserError:  # a model without this key
            continue
    package, settings = load_run(config, [*kept, *overrides])
    if settings.train.sparse_settings() is not None:
        kept += _SPARSE_DEFAULTS
    kept += package.replay_overrides(settings)
    return [*kept, *overrides]


def check_size(config: str, overrides: Sequence[str]) -> None:
    """Raises a `UserError` if the settings are wrong or the layout has too many ranks for one process, or nothing that
    is sharded."""
    from parallel.task import load_run
    from parallel.training.sharded.step import micro_batches

    settings = load_run(config, list(overrides))[1]
    layout = settings.parallel.resolve()
    if layout.world == 1 and micro_batches(settings.train, layout) > 1:
        raise UserError("MindSpore's partitioner accumulates no gradients of micro-batches on a single rank",
                        where="train.accumulation", value=micro_batches(settings.train, layout),
                        hint="nothing is sharded there (training uses the plain step); give data, op or stages 2")
    if layout.world > MOST_RANKS:
        raise UserError(
            f"replay holds all ranks in one process, at most {MOST_RANKS}; data {layout.data} x op {layout.op} x "
            f"pipeline.stages {layout.pipeline.stages} are", where="parallel", value=layout.world,
            hint="replay a layout with the same axes and smaller degrees, 2 or 4 each")


def check_layout(config: str, overrides: Sequence[str]) -> None:
    """Raises a `UserError` if the layout does not fit the network or the batch, before anything is compiled."""
    from parallel.sharding.parallelize import parallelize
    from parallel.task import build_task, load_run
    from parallel.training.sharded.step import input_shapes

    # This process has no kernels of Ascend's.
    package, settings = load_run(config, list(overrides))
    task, settings, layout = build_task(config, [*overrides, *package.written_out(settings)])
    input_shapes(task, settings.train, layout)
    parallelize(task.network, layout)
