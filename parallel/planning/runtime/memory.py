"""The fullest moment of a stage that a runtime runs node by node.

Parameters and moments are there all along, gradients that micro-batches accumulate into, too. A step is fullest as the
backward pass of one of its segments runs, with what earlier segments keep, the half-precision copies of weights that
are still to be read, and the gradients of the segments behind it; or as the update runs over all gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from parallel.planning.cost.network import NetworkCost
from parallel.planning.cost.segments import Segment, SegmentCost
from parallel.planning.describe import Description
from parallel.planning.memory import Holdings, Memory, Stage, is_recomputed, kept_on_stage, stages_of_units
from parallel.planning.runtime.settings import RuntimeSettings
from parallel.sharding.config import ParallelConfig


def by_walking(figures: Stage, description: Description, cost: NetworkCost, config: ParallelConfig,
               micro_batches: int, holdings: Holdings, stage: int, runtime: RuntimeSettings) -> None:
    """Puts the fullest moment in place of the memory that `stage_figures` gives.

    Args:
        figures: of a rank of `stage`; its memory is changed.
        description, cost, config, micro_batches, holdings, stage: as of `stage_figures`; `cost` has its walks.
        runtime: of the cluster.
    """
    homes = stages_of_units(description.units, config)
    parts, computed_again = [], set()
    for segment, part in zip(cost.segments, cost.costs, strict=True):
        if homes[segment.unit] == stage:
            again = is_recomputed(segment.unit, description.units, config)
            kept = sum(size for *_, size in kept_on_stage(segment, part, again, description, cost, homes))
            parts.append((segment, part, kept))
            if again:
                computed_again.add(segment.unit)
    copies: Counter = Counter()
    for units, _, total in holdings.groups:
        here = [unit for unit in units if homes[unit] == stage]
        if here:
            copies[max(here)] += total.memory.weight_copies
    sharded = config.optimizer_shard if config.optimizer_shard > 1 else 1
    sent = sum(collective.bytes * times for collective, times in figures.collectives.items()
               if collective.kind == "Send")
    borrows = any(min(homes[unit] for unit in units) < stage for units, _, _ in holdings.groups
                  if any(homes[unit] == stage for unit in units))
    _fill(figures.memory, runtime, holdings.optimizer, parts, copies, micro_batches, sharded, sent, borrows,
         config.pipeline.stages > 1, computed_again)


def _fill(memory: Memory, runtime: RuntimeSettings, optimizer: str, parts: Sequence[tuple[Segment, SegmentCost, int]],
         copies: dict[int, int], micro_batches: int, sharded: float, sent: int, borrows: bool,
         staged: bool, again: set[int]) -> None:
    """Writes a stage's memory by kind: activations, copies of weights and gradients as they are at the fullest moment.

    Args:
        memory: with the stage's parameters, moments, gradients in float32, and activations of all micro-batches in
            flight; changed in place.
        runtime, optimizer: whose update.
        parts: the stage's segments with their costs and the bytes that each keeps, in the order of the forward pass.
        copies: bytes of the half-precision copies of weights that are first read in a unit.
        micro_batches: of a step.
        sharded: parts that a gradient is scattered into, over the ranks of an optimizer shard.
        sent: bytes of the step's messages, which stay until its end.
        borrows: whether the stage uses a parameter of an earlier one: its gradients are made at the end of all.
        staged: whether there are stages.
        again: units that are computed again as a whole.
    """
    own = sum(kept for _, _, kept in parts)
    # Without stages the graph lists the forward passes of all micro-batches first.
    others = max(0, memory.activations - own) if staged else (micro_batches - 1) * own
    accumulated = memory.gradients if micro_batches > 1 else 0
    most, best = -1, (0, 0, 0, 0)
    before, gradients, put_off = own, 0, 0
    for segment, cost, kept in reversed(parts):
        alive = sum(size for unit, size in copies.items() if unit <= segment.unit and
                    (unit not in again or unit == segment.unit))
        extra = cost.walk.backward + put_off
        extra += max(0, cost.walk.kept - kept)  # recomputed: what it keeps is made again first
        total = before + alive + gradients + extra
        if total > most:
            most, best = total, (before, alive, gradients, extra)
        before -= kept
        gradients += cost.walk.gradients
        put_off += cost.walk.put_off
    scattered = gradients * (1 + 1 / sharded if sharded > 1 else 1)
    at_end = int(scattered + runtime.update_of(optimizer).held * memory.parameters / 4)
    if others and put_off:
        # The gradients of a micro-batch's weights come under the next one's passes: what they read is still there, and
        # so are those of the one before, not yet added, and the tables' of all before the last two.
        walks, alive = [cost.walk for _, cost, _ in parts], sum(copies.values())
        extra = put_off + alive + max(1, micro_batches - 2) * sum(walk.tables for walk in walks)
        if own + alive + extra > most:
            most, best = own + alive + extra, (own, alive, 0, extra)
    kept, alive, gradients, extra = best
    memory.reused, memory.communication = 0, sent
    if borrows:
        memory.communication += (micro_batches - 1) * max((cost.walk.borrowed for _, cost, _ in parts), default=0)
    if at_end > most + others:
        memory.activations, memory.weight_copies, memory.gradients, memory.workspace = 0, 0, accumulated + at_end, 0
    else:
        memory.activations, memory.weight_copies = others + kept, alive
        memory.gradients, memory.workspace = accumulated + gradients, extra
    memory.workspace += int(runtime.workspace_mb * 1e6)
