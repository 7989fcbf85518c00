"""How far a layout scales: `python -m parallel.planning.scaling --config F`; docs/scaling.md discusses what it prints.

Data parallelism grows from the config file's own layout; op, stages and recompute stay. `fixed`: the batch stays,
so that each replica has fewer micro-batches; `growing`: the batch grows with the devices.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from typing import Any

from parallel.common.progress import table
from parallel.planning.planner import Estimate, Planner, planner_for
from parallel.sharding.config import ParallelConfig


def with_batch(planner: Planner, batch: int) -> Planner:
    """The same model, trained with another global batch."""
    other, task = copy.copy(planner), planner.task
    old = task.inputs[0].shape[0]
    inputs = [dataclasses.replace(item, shape=(batch, *item.shape[1:])) for item in task.inputs]
    other.task = dataclasses.replace(task, inputs=inputs, tokens=task.tokens * batch // old)
    other.model_flops = planner.model_flops * batch / old
    other._descriptions, other._costs, other._known_holdings = {}, {}, {}
    return other


def scaled(planner: Planner, config: ParallelConfig, times: int, growing: bool) -> Estimate | None:
    """The layout with `times` the data axis; None where the batch is used up."""
    rows = planner.task.inputs[0].shape[0] // config.data
    wide = config.model_copy(deep=True)
    wide.data, wide.devices = config.data * times, config.world * times
    if growing:
        return with_batch(planner, planner.task.inputs[0].shape[0] * times).evaluate(wide)
    if rows % times:
        return None
    wide.pipeline.micro_batches = max(1, config.pipeline.micro_batches // times)
    return planner.evaluate(wide)


def study(planner: Planner, config: ParallelConfig, most: int = 100_000) -> list[dict[str, Any]]:
    """Rows of the table up to `most` devices."""
    last = most // config.world
    steps = [2**power for power in range(last.bit_length()) if 2**power <= last]
    rows = []
    for times in [*steps, *([last] if steps and last != steps[-1] else [])]:
        for growing in (False, True):
            found = scaled(planner, config, times, growing)
            if found is None:
                continue
            rows.append({"devices": found.devices, "batch": "growing" if growing else "fixed",
                         "micro_batches": found.micro_batches, "step_seconds": found.step_seconds, "mfu": found.mfu,
                         "bubble": found.bubble, "gradients_share": found.parts["gradients"] / found.step_seconds})
    return rows


def main() -> None:
    """Prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="config file of any model with a parallel block")
    parser.add_argument("--cluster", default="configs/cluster/ascend910.yaml", help="description of the cluster")
    parser.add_argument("--most", type=int, default=100_000, help="largest number of devices")
    arguments, overrides = parser.parse_known_args()
    planner, settings = planner_for(arguments.config, overrides, arguments.cluster)
    rows = study(planner, settings.parallel.resolve(), arguments.most)
    table("scaling along data", list(rows[0]), [list(row.values()) for row in rows])
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
