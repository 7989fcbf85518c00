"""How far a replay may be from the one-device run, relative to the scale of what is compared: see docs/replay.md."""

from __future__ import annotations

from dataclasses import dataclass

LOSS_TOLERANCE = 1e-5
PARAMETER_TOLERANCE = 1e-4
STATE_TOLERANCE = 1e-3
# The smallest scale of a moment, in largest first moments.
STATE_FLOOR = 1e-3


@dataclass(frozen=True)
class Difference:
    """How far a rank's part of one parameter or state is from the one-device run, relative to its scale."""

    relative: float
    name: str
    rank: int
