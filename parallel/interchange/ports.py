"""What a pass is fed and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Port:
    """An input or output of a pass: its name, its element type, its shape (a size that is a name is free)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def described(self) -> dict[str, Any]:
        """JSON for whoever serves the pass."""
        return {"name": self.name, "type": self.dtype, "shape": list(self.shape)}
