"""How long a runtime that runs node by node takes from the last gradient to the end of a step."""

from __future__ import annotations

from parallel.planning.memory import Stage
from parallel.planning.runtime.settings import RuntimeSettings

_CAST = 6  # bytes of an element that is read in float32 and written in half precision, or the other way about
_TIED = 18  # of an element whose gradients are two: one is widened, and both are added
_TOGETHER = 8  # tensors whose squares are summed by one kernel
_ADDED = 10  # of an element of a gradient that is added to others in float32


def update_seconds(runtime: RuntimeSettings, stage: Stage, optimizer: str, data: int, micro_batches: int) -> float:
    """From the last gradient to the end of the step, and the copies of weights.

    Args:
        runtime: of the cluster.
        stage: parameters that a rank updates, and holds.
        optimizer: whose update.
        data: ranks over which gradients are summed.
        micro_batches: whose gradients are added.
    """
    own, held = runtime.update_of(optimizer), stage.memory.parameters / 4
    several = micro_batches > 1
    wide = own.wide or data > 1
    width = 4 if wide or several else 2
    seconds = runtime.moving("update", held * (own.bytes + (0 if own.wide else width)), own.kernels * stage.tensors)
    seconds += runtime.moving("square", held * width, stage.tensors / _TOGETHER)
    own_part = held / max(1, stage.parameters)
    seconds += runtime.moving("narrow", own_part * stage.copied * _CAST, stage.tensors)
    seconds += runtime.moving("pass", stage.tied * _TIED, 2)
    if several:
        seconds += runtime.moving("pass", stage.parameters * (_ADDED * micro_batches + 4),
                               stage.tensors * (micro_batches + 1))
    elif wide:
        seconds += runtime.moving("widen", stage.copied * _CAST, stage.tensors)
    return seconds
