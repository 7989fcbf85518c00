"""Keys of the block `data.tables`. Needs no MindSpore."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from parallel.common.settings import Settings


class TableSettings(Settings):
    """Where the embedding tables are and how they are looked up."""

    place: Literal["graph", "host"] = "graph"
    """graph: tables are parameters of the network, in full on the device (or sharded by the op axis). host: rows are on
    the host, the device sees the rows of one step, and the optimizer touches no others; over several processes (data
    x op) each holds the rows of its share of the ids."""
    folder: str | None = None
    """host: folder for the rows' files (scratch: what lasts is in the checkpoints), for tables larger than the memory;
    null = in memory."""
    window: int | None = Field(None, ge=1)
    """host: rows of each width that a step may use on a device; null = the most that a batch can name. A step that
    needs more ends the run with one line."""
    hot_rows: int | None = Field(None, ge=1)
    """host, one process of MindSpore: rows of each width, those met most often, that stay on the device with their
    optimizer's state; results are the same to the bit. The window then needs room for the others only. Null = none."""
    hot_every: int = Field(100, ge=1)
    """host: steps between two choices of the hot rows."""
    sweep_every: int | None = Field(None, ge=1)
    """host: steps between two sweeps that evict expired ids (see expire_after and expire_below of a feature); null =
    none."""
    exchange_kb: int = Field(1024, ge=1)
    """host, several processes: bytes / 1024 that two processes hand each other in one round; more is sent in further
    rounds."""
