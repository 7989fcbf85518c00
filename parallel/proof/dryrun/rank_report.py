"""The report of one compiled rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from parallel.proof.compile.casts import parameter_casts
from parallel.proof.compile.graph import Graph
from parallel.proof.compile.rank_compiler import Request
from parallel.proof.dryrun.accounting import Collective, Memory, coordinates, summary
from parallel.sharding.config import ParallelConfig


@dataclass
class RankReport:
    """One compiled rank, read and counted."""

    request: Request
    result: dict[str, Any]
    config: ParallelConfig
    graph: Graph
    layouts: dict[str, list]
    collectives: list[Collective]
    memory: Memory

    @property
    def rank(self) -> int:
        """The rank that was compiled."""
        return self.request.rank

    @property
    def stage(self) -> int:
        """Its pipeline stage."""
        return coordinates(self.rank, self.config)[0]

    def figures(self) -> dict[str, Any]:
        """The rank's JSON object."""
        held, casts = self.memory, parameter_casts(self.graph).values()
        return {
            "world": self.request.world, "rank": self.rank, "stage": self.stage,
            "seconds": round(self.result["seconds"], 2), "compile_seconds": round(self.result["compile_seconds"], 2),
            "cpu_seconds": round(self.result["cpu_seconds"], 2),
            "peak_rss_gb": round(self.result["peak_rss_gb"], 3), "parameter_bytes": held.parameters,
            "optimizer_bytes": held.optimizer, "gradient_bytes": held.gradients, "activation_bytes": held.activations,
            "parameter_casts": {"count": sum(item.count for item in casts), "bytes": sum(item.bytes for item in casts)},
            **summary(self.collectives),
        }  # fmt: skip
