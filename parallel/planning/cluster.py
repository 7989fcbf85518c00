"""What the planner knows of a cluster and its software: the files under configs/cluster/."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from parallel.common.settings import Settings
from parallel.planning.cost.segments import Collective, Work
from parallel.planning.mesh import Mesh
from parallel.planning.runtime.settings import RuntimeSettings


class LinkSettings(Settings):
    """One level of the network, as one device sees it."""

    bandwidth_gb: float = Field(25.0, gt=0)
    """GB/s that one device can send while it receives as much."""
    latency_us: float = Field(10.0, ge=0)
    """Microseconds until the first byte arrives, software included."""


class EfficiencySettings(Settings):
    """How much of the hardware real programs get: one set of constants for all clusters; see docs/planning.md."""

    products: float = Field(0.75, gt=0, le=1)
    """Share of the peak that very large matrix products reach."""
    half_size: float = Field(128, ge=0)
    """Least dim of a product (on one rank) at which half of that is reached: d / (d + half_size)."""
    memory: float = Field(0.6, gt=0, le=1)
    """Share of the memory bandwidth that elementwise kernels get."""
    communication: float = Field(0.5, gt=0, le=1)
    """Share of a link's bandwidth that collectives get."""
    overlap: float = Field(0.5, ge=0, le=1)
    """Share of the first forward and last backward passes under which weights and gradients travel unseen."""
    op_overlap: float = Field(0.8, ge=0, le=1)
    """Share of the op axis's communication that goes unseen where products are run in parts with it."""
    kernel_us: float = Field(5.0, ge=0)
    """Least microseconds of a kernel."""
    jitter: float = Field(0.0, ge=0, lt=1)
    """Share of the step lost to waiting for the slowest device for each doubling of the devices beyond one node."""


class ClusterSettings(Settings):
    """Devices, memory and network. Figures of one device are those of its maker unless a comment says otherwise."""

    name: str = "cluster"
    """For reports."""
    peak_tflops: float = Field(256.0, gt=0)
    """Half-precision matrix products of one device, in 10^12 FLOP/s."""
    memory_gb: float = Field(32.0, gt=0)
    """Device memory in GB (10^9 bytes)."""
    usable_memory: float = Field(0.94, gt=0, le=1)
    """Share of it that a run may take."""
    memory_bandwidth_gb: float = Field(1200.0, gt=0)
    """GB/s between device memory and cores."""
    devices_per_node: int = Field(8, ge=1)
    """Devices in one server."""
    devices_per_group: int | None = Field(None, ge=1)
    """Devices of a server that are linked more closely with each other; None = all alike."""
    nodes_per_rack: int = Field(16, ge=1)
    """Servers under one switch."""
    group: LinkSettings | None = None
    """Between devices of a group; None = as in the server."""
    node: LinkSettings = LinkSettings(bandwidth_gb=90.0, latency_us=5.0)
    """Between devices of a server."""
    rack: LinkSettings = LinkSettings(bandwidth_gb=12.5, latency_us=15.0)
    """Between servers of a rack."""
    across: LinkSettings = LinkSettings(bandwidth_gb=12.5, latency_us=25.0)
    """Between racks."""
    placement: Literal["stages_inside", "stages_outside"] = "stages_inside"
    """stages_inside: stages next to each other, data outside (PanGu-alpha Fig. 5; the rank table is ordered so).
    stages_outside: MindSpore's own numbering of ranks."""
    fused: list[str] = Field(default_factory=list)
    """Cells (ends of their paths) that the software runs as one kernel, so that nothing inside goes through memory:
    attention.core where there is a flash attention."""
    overlapped: bool = False
    """Whether the software runs products in parts with the op axis's communication (Megatron-LM's
    tp-comm-overlap, MindSpeed's mc2)."""
    efficiency: EfficiencySettings = EfficiencySettings()
    """Constants of the software."""
    runtime: RuntimeSettings | None = None
    """A runtime that runs a graph node by node, a kernel at each (configs/cluster/h200.yaml has one); None = as the
    constants say."""

    @property
    def usable_bytes(self) -> int:
        """Memory that a run may take."""
        return int(self.memory_gb * 1e9 * self.usable_memory)

    def seconds_of(self, work: Work) -> float:
        """Time of a rank's cores for `work`: products by size, the rest by memory traffic, none below the least."""
        if self.runtime is not None:
            return self.runtime.seconds_of(work.started)
        own = self.efficiency
        peak, memory = self.peak_tflops * 1e12, self.memory_bandwidth_gb * 1e9 * own.memory
        seconds = 0.0
        for (flops, least, moved), times in work.products.items():
            share = own.products * least / (least + own.half_size)
            seconds += times * max(flops / (peak * share), moved / memory, own.kernel_us * 1e-6)
        return seconds + max(work.bytes / memory, work.kernels * own.kernel_us * 1e-6)


class Network:
    """Times of collectives for one layout on one cluster."""

    def __init__(self, cluster: ClusterSettings, mesh: Mesh) -> None:
        self.cluster, self.mesh = cluster, mesh
        config = mesh.config
        stages = config.pipeline.stages
        inside = cluster.placement == "stages_inside"
        strides, stride = {}, 1
        for factor in reversed(mesh.everything):
            if inside and stride == config.op and factor in mesh.data_factors:
                stride *= stages
            strides[factor] = stride
            stride *= mesh.degree_of[factor]
        self.strides = strides
        node, rack = cluster.devices_per_node, cluster.devices_per_node * cluster.nodes_per_rack
        levels = [(node, cluster.node), (rack, cluster.rack), (None, cluster.across)]
        if cluster.group is not None and cluster.devices_per_group is not None:
            levels.insert(0, (cluster.devices_per_group, cluster.group))
        self.levels: list[tuple[int | None, LinkSettings]] = levels
        self.stage_stride = config.op if inside else config.data * config.op
        self._known: dict[tuple, float] = {}

    def link(self, extent: int) -> LinkSettings:
        """The slowest link among ranks whose numbers differ by up to `extent`."""
        return next(link for devices, link in self.levels if devices is None or extent < devices)

    def members(self, factors: tuple[int, ...]) -> list[int]:
        """Ranks of a group that can reach each other at each level (the last: all of them)."""
        return [math.prod(min(self.mesh.degree_of[factor], max(1, devices // self.strides[factor])) if devices else
                          self.mesh.degree_of[factor] for factor in factors) for devices, _ in self.levels]

    def seconds_of(self, collective: Collective) -> float:
        """Time of one collective: rings inside the closest level, then across the next with a part for each device."""
        key = (collective.kind, collective.factors, collective.bytes)
        if key not in self._known:
            self._known[key] = self._collective(collective)
        return self._known[key]

    def _collective(self, collective: Collective) -> float:
        if collective.kind in ("Send", "Receive"):
            return self.transfer(collective.bytes)
        if not collective.factors:
            return 2 * self.cluster.across.latency_us * 1e-6 * math.log2(max(2, self.mesh.config.pipeline.stages))
        seconds, inside = 0.0, 1
        for (_, link), ranks in zip(self.levels, self.members(collective.factors), strict=True):
            seconds += self._ring(collective.bytes / inside, ranks // inside, link)
            inside = ranks
        return (2 if collective.kind == "AllReduce" else 1) * seconds

    def _ring(self, size: float, ranks: int, link: LinkSettings) -> float:
        if ranks <= 1:
            return 0.0
        rate = link.bandwidth_gb * 1e9 * self.cluster.efficiency.communication
        return size * (ranks - 1) / ranks / rate + link.latency_us * 1e-6 * math.log2(ranks)

    def transfer(self, size: int) -> float:
        """Seconds from one stage to the next."""
        link = self.link(self.stage_stride)
        return size / (link.bandwidth_gb * 1e9 * self.cluster.efficiency.communication) + link.latency_us * 1e-6
