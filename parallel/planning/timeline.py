"""When each stage does what: forward and backward passes of all micro-batches under a pipeline schedule.

`timeline` follows the dependencies: each pass starts when its stage is free and its input is there. Tests hold it
against a discrete-event simulation of another make and against the closed forms. Times are seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple


class Pass(NamedTuple):
    """One pass of one micro-batch through one chunk of layers of one stage."""

    kind: str  # "F" or "B"
    micro_batch: int
    chunk: int


@dataclass
class Timeline:
    """Start and end of every pass, by stage in the order in which they run."""

    passes: list[list[tuple[Pass, float, float]]]

    @property
    def end(self) -> float:
        """When the last pass ends."""
        return max(end for stage in self.passes for _, _, end in stage)

    @property
    def bubble(self) -> float:
        """Share of all stages' time in which they are idle."""
        busy = sum(end - start for stage in self.passes for _, start, end in stage)
        return 1.0 - busy / (self.end * len(self.passes)) if self.end else 0.0


def order(schedule: str, stages: int, stage: int, micro_batches: int, chunks: int = 1) -> list[Pass]:
    """Passes of one stage in order.

    gpipe: all forward, then all backward. 1f1b: one forward pass ahead for each stage that follows, then one of each
    (PipeDream-flush). interleaved: the same with several chunks a stage, micro-batches in groups of as many as stages
    (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).
    """
    if schedule == "gpipe":
        return ([Pass("F", i, 0) for i in range(micro_batches)] + [Pass("B", i, 0) for i in range(micro_batches)])
    groups = [range(first, min(first + stages, micro_batches)) for first in range(0, micro_batches, stages)]
    forward = [Pass("F", i, chunk) for group in groups for chunk in range(chunks) for i in group]
    backward = [Pass("B", i, chunk) for group in groups for chunk in reversed(range(chunks)) for i in group]
    ahead = stages - stage - 1
    if chunks > 1:
        ahead = 2 * ahead + (chunks - 1) * stages
    ahead = min(ahead, len(forward))
    passes = forward[:ahead]
    for index, following in enumerate(forward[ahead:]):
        passes += [following, backward[index]]
    return passes + backward[len(forward) - ahead:]


@cache
def held_at_once(schedule: str, stages: int, stage: int, micro_batches: int, chunks: int = 1) -> tuple:
    """How many micro-batches of each chunk a stage has been through forward but not backward, at its fullest moments
    (those of which no other has as many of every chunk)."""
    if stages == 1:
        return ((1,) * chunks,)
    counts, moments = [0] * chunks, set()
    for item in order(schedule, stages, stage, micro_batches, chunks):
        counts[item.chunk] += 1 if item.kind == "F" else -1
        moments.add(tuple(counts))
    return tuple(moment for moment in moments
                 if not any(other != moment and all(map(int.__ge__, other, moment)) for other in moments))


def most_held(kept: Sequence[int], schedule: str, stages: int, stage: int, micro_batches: int) -> int:
    """Bytes held at the fullest moment by a stage that keeps `kept[c]` bytes of a micro-batch for chunk c."""
    return max(sum(size * times for size, times in zip(kept, moment, strict=True))
               for moment in held_at_once(schedule, stages, stage, micro_batches, len(kept)))


def needs(stage: int, item: Pass, stages: int, chunks: int) -> tuple[int, Pass] | None:
    """(stage, pass) whose result a pass waits for, beside its own stage's order; None for the first ones."""
    kind, micro_batch, chunk = item
    if kind == "F":
        if stage > 0:
            return stage - 1, Pass("F", micro_batch, chunk)
        return (stages - 1, Pass("F", micro_batch, chunk - 1)) if chunk > 0 else None
    if stage < stages - 1:
        return stage + 1, Pass("B", micro_batch, chunk)
    if chunk < chunks - 1:
        return 0, Pass("B", micro_batch, chunk + 1)
    return stage, Pass("F", micro_batch, chunk)


def timeline(schedule: str, forward: list[list[float]], backward: list[list[float]], micro_batches: int,
             transfer: float = 0.0, late: list[list[float]] | None = None) -> Timeline:
    """Start and end of every pass by following dependencies.

    Args:
        schedule: gpipe, 1f1b or interleaved.
        forward, backward: seconds of one micro-batch, by stage and chunk.
        micro_batches: how many.
        transfer: seconds from one stage's end to the next stage's start.
        late: seconds at the end of a backward pass, by stage and chunk, after what it sends is ready (gradients of
            weights, where they come last); None = none.
    """
    stages, chunks = len(forward), len(forward[0])
    orders = [order(schedule, stages, stage, micro_batches, chunks) for stage in range(stages)]
    ends: dict[tuple[int, Pass], float] = {}
    done: list[list[tuple[Pass, float, float]]] = [[] for _ in range(stages)]
    waiting: dict[tuple[int, Pass], int] = {}
    ready = deque(range(stages))
    while ready:
        stage = ready.popleft()
        while len(done[stage]) < len(orders[stage]):
            item = orders[stage][len(done[stage])]
            before = needs(stage, item, stages, chunks)
            if before is not None and before not in ends:
                waiting[before] = stage
                break
            free = done[stage][-1][2] if done[stage] else 0.0
            arrived = 0.0 if before is None else ends[before] + (transfer if before[0] != stage else 0.0)
            if late is not None and before is not None and before[1].kind == "B":
                arrived -= late[before[0]][before[1].chunk]
            start = max(free, arrived)
            end = start + (forward if item.kind == "F" else backward)[stage][item.chunk]
            ends[stage, item] = end
            done[stage].append((item, start, end))
            if (stage, item) in waiting:
                ready.append(waiting.pop((stage, item)))
    if any(len(passes) < len(wanted) for passes, wanted in zip(done, orders, strict=True)):
        raise ValueError(f"the order of {schedule} waits for itself")
    return Timeline(done)


def bound(stage_seconds: list[float], micro_batches: int, chunks: int = 1) -> float:
    """A quick estimate for unequal stages: the slowest works through all micro-batches, the others fill and drain."""
    slowest = max(stage_seconds)
    return micro_batches * slowest + (sum(stage_seconds) - slowest) / chunks
