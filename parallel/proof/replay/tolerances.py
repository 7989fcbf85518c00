"""How far a replay may be from the one-device run, relative to the scale of what is compared: see docs/replay.md."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """Largest relative differences that still count as equal.

    Args:
        loss, norm, parameter, state: of a step's figures and what it leaves.
        node: of a single node's tensor, where the first wrong one is looked for.
    """

    loss: float
    norm: float
    parameter: float
    state: float
    node: float

    def hold(self, now: dict[str, float]) -> bool:
        """Whether the differences of a step are within."""
        return all(now[name] <= getattr(self, name) for name in ("loss", "norm", "parameter", "state"))


FLOAT64 = Bounds(1e-9, 1e-9, 1e-9, 1e-9, 1e-9)
"""Both sides in float64: sums in another order differ by 1e-15 of the summands, which leaves six digits for what
cancels and for what an optimizer amplifies; a mistake of a millionth in one rank is a thousand times the bound."""
MICRO_BATCHES = Bounds(2e-7, 2e-7, 2e-7, 2e-7, 1e-9)
"""Float64 where a layout's micro-batches are compared with the undivided batch and losses are masked means, whose
denominator is the tokens plus 1e-5 (`parallel.layers.loss.MaskedMean`, as in the released code): for micro-batches of
225 tokens that is 4e-8. A mistake of a millionth is still five times the bound."""
FLOAT32 = Bounds(1e-5, 1e-4, 1e-4, 1e-3, 1e-3)
"""Both sides in float32."""
HALF = {"fp16": Bounds(1e-4, 1e-3, 2e-2, 2e-2, 1e-2), "bf16": Bounds(8e-4, 8e-3, 1.6e-1, 1.6e-1, 8e-2)}
"""A graph in half precision, every result rounded as it declares, against MindSpore's float32 step, by
`train.precision`: about twice the largest that the tiny model shows for a parameter. Bfloat16 has three bits less than
float16, hence eight times the bounds."""
STEP = Bounds(1e-5, 1e-4, float("inf"), float("inf"), float("inf"))
"""The one-rank graph in float64 against MindSpore's own float32 step: what is compared is the loss and the norm."""
# The smallest scale of a moment, in largest first moments.
STATE_FLOOR = 1e-3


@dataclass(frozen=True)
class Difference:
    """How far a rank's part of one parameter or state is from the one-device run, relative to its scale."""

    relative: float
    name: str
    rank: int
