"""The block `publish`: which versions a run puts out while it trains. Needs no MindSpore."""

from __future__ import annotations

from pydantic import Field

from parallel.common.settings import Settings


class PublishSettings(Settings):
    """Versions for servers that follow the run (`serve` key `follow`). None is written unless every_steps or
    every_seconds is given."""

    directory: str | None = None
    """Folder of the versions; null = `live` in output.directory."""
    every_steps: int | None = Field(None, ge=1)
    """Steps between versions."""
    every_seconds: float | None = Field(None, gt=0.0)
    """Seconds of event time between versions (streams only)."""
    full_every: int = Field(50, ge=1)
    """One in this many versions is complete; those between hold the dense weights and the rows that changed."""
    keep: int = Field(3, ge=1)
    """Newest versions that can be loaded from nothing; what they need is kept too, the rest is deleted."""

    @property
    def wanted(self) -> bool:
        """Whether the run publishes."""
        return self.every_steps is not None or self.every_seconds is not None
