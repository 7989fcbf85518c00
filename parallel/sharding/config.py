"""`ParallelConfig`: the one block that says how a model is sharded over devices."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from parallel.common.errors import UserError
from parallel.common.settings import Settings


class PipelineConfig(Settings):
    """Stages along the layers, fed with micro-batches."""

    stages: int = Field(1, ge=1)
    """Number of pipeline stages; consecutive layers share a stage."""
    micro_batches: int = Field(1, ge=1)
    """Micro-batches a global batch is split into; at least the number of stages, or stages are idle. Not given:
    as many as stages."""
    schedule: Literal["1f1b", "gpipe", "interleaved"] = "1f1b"
    """Order of forward and backward passes. 1f1b holds the fewest activations; interleaved gives each stage several
    chunks of layers and shrinks the bubble."""
    interleave: int = Field(1, ge=1)
    """Chunks of layers a stage holds under the interleaved schedule."""
    offsets: list[int] | None = None
    """Layers that each stage has more (or fewer) than the even share; one number a stage, together 0."""


class OptimizerShardConfig(Settings):
    """Optimizer parallelism: states (and, by level, gradients and weights) sharded along the data axis."""

    shard: int = Field(1, ge=-1)
    """Devices that share one set of optimizer states: 1 = none, -1 = all of the data axis, else a divisor of it."""
    level: Literal[1, 2, 3] = 1
    """What is sharded (MindSpore's hsdp levels): 1: weights and states; 2: the gradients of micro-batches too; 3: the
    backward pass gathers the weights again (not with pipeline stages)."""
    threshold_kb: int = Field(0, ge=0)
    """Parameters smaller than this many KiB are not sharded. 0 shards every parameter that its layer allows."""


class RecomputeConfig(Settings):
    """Activations thrown away in the forward pass and computed again in the backward pass."""

    policy: Literal["none", "full", "selective"] = "none"
    """none; full: every block; selective: only the cells named in `cells`."""
    cells: list[str] = Field(default_factory=lambda: ["attention.core"])
    """Under selective: names inside a block whose activations are recomputed."""
    slice_activations: bool = False
    """Shards what is kept for recomputing over the op axis too."""
    communication: bool = True
    """Whether the op axis's AllReduce is run again in the recomputation (true), or its result kept (false)."""


class MindSporeConfig(Settings):
    """How MindSpore runs its graphs; none of it changes what they compute. null leaves what MindSpore and CANN take by
    themselves."""

    device: Literal["GPU"] | None = None
    """GPU: MindSpore's own CUDA backend on NVIDIA GPUs, an experimental target that proves the path of a cluster and is
    slow (docs/mindspore_cuda.md). null: Ascend where there is one, else the CPU."""
    jit_level: Literal["O0", "O1", "O2"] | None = None
    """Optimisation of the back end: O0 kernel by kernel, O1 fused kernels, O2 the whole graph sunk (Ascend only)."""
    share_graph: bool = True
    """Micro-batches share one copy of the network's graph, which compiles as fast as one micro-batch. What optimizer
    sharding does not split (everything without it, else the word table and vectors) is then cast to half precision for
    every micro-batch again. false: every micro-batch is written out and a parameter is cast once a step; compiling
    takes as many times longer as there are micro-batches. Not with gpipe, interleaved, or optimizer levels above 1."""
    compile_cache: str | None = None
    """Folder in which compiled graphs are kept, so that the same ranks start faster the next time (experimental in
    MindSpore)."""
    deterministic: bool = False
    """Kernels and reductions that give the same bits every time; slower."""
    memory_gb: float | None = Field(None, gt=0.0)
    """Most device memory that a process takes, GB."""
    memory_level: Literal["O0", "O1"] | None = None
    """Level at which memory is planned: O1 packs it tighter."""
    hccl_connect_seconds: int | None = Field(None, ge=120, le=7200)
    """Seconds that devices wait for each other while they connect (HCCL_CONNECT_TIMEOUT; CANN takes 120). Ascend only;
    long enough for the slowest compile of a rank."""
    hccl_exec_seconds: int | None = Field(None, ge=1, le=2147483647)
    """Seconds that a collective waits for the slowest device (HCCL_EXEC_TIMEOUT). Ascend only."""
    hccl_buffer_mb: int | None = Field(None, ge=1, le=1 << 20)
    """MB of the buffer that two devices share, for each communication group (HCCL_BUFFSIZE; CANN takes 200). Ascend
    only."""

    def chosen(self, *prefixes: str) -> list[str]:
        """Names of the keys (that begin so) which are not at their default."""
        default = type(self)()
        return [name for name in type(self).model_fields if name.startswith(prefixes or "")
                and getattr(self, name) != getattr(default, name)]


class ParallelConfig(Settings):
    """How a model is sharded: data x op x pipeline = devices; the other dimensions reuse these axes.

    Paper: PanGu-alpha section 4 (the five dimensions). Exactly one of the axes may be -1: it takes the rest.
    """

    devices: int | None = Field(None, ge=1)
    """Number of devices the block is written for. None = the number of processes that were started, and without a
    launcher the product of the axes."""
    data: int = Field(1, ge=-1)
    """Data-parallel degree: shards the batch."""
    op: int = Field(1, ge=-1)
    """Tensor-parallel degree: shards attention heads, feed-forward width and vocabulary."""
    pipeline: PipelineConfig = PipelineConfig()
    """Pipeline parallelism."""
    optimizer: OptimizerShardConfig = OptimizerShardConfig()
    """Optimizer parallelism along the data axis."""
    recompute: RecomputeConfig = RecomputeConfig()
    """Rematerialisation."""
    expert: int = Field(1, ge=1)
    """Expert-parallel degree: shards the experts; a divisor of data (experts live on the data axis)."""
    sequence: bool = False
    """Sequence parallelism: shards residual stream and layer norms over the op axis along the tokens."""
    vocabulary: bool = True
    """Shards word embedding and head over the op axis along the vocabulary; false replicates them."""
    micro_batch_interleave: int = Field(1, ge=1)
    """Parts a micro-batch is split into so that the op communication of one overlaps the computation of another."""
    backend: Literal["auto", "mindspore", "torch"] = "auto"
    """What runs the graphs. auto: MindSpore where it can run the layout (everything on Ascend; one device and data
    parallelism on the CPU), and torch elsewhere, over gloo on CPUs and NCCL on NVIDIA GPUs."""
    execution: Literal["auto", "exact", "eager", "cuda_graph", "inductor"] = "auto"
    """How torch runs a graph. exact: op by op in the graph's order; eager: with fused nodes; cuda_graph: the same,
    captured once; inductor: compiled, slow to start and fast after. auto: exact on CPUs, cuda_graph on GPUs."""
    mindspore: MindSporeConfig = MindSporeConfig()
    """How MindSpore runs its graphs; refused where torch runs them."""
    gradient_fusion_groups: int = Field(4, ge=1)
    """Groups of layers whose gradient communication is fused into one call each."""

    @property
    def world(self) -> int:
        """Product of data, op and pipeline stages; defined once no axis is -1."""
        return self.data * self.op * self.pipeline.stages

    @property
    def optimizer_shard(self) -> int:
        """The optimizer shard size with -1 resolved to the data axis."""
        return self.data if self.optimizer.shard == -1 else self.optimizer.shard

    def beyond_data(self) -> dict[str, int]:
        """What a resolved block asks for beyond whole networks side by side: degrees by key, those above 1."""
        degrees = {"op": self.op, "pipeline.stages": self.pipeline.stages, "optimizer.shard": self.optimizer_shard,
                   "expert": self.expert, "micro_batch_interleave": self.micro_batch_interleave}
        return {name: degree for name, degree in degrees.items() if degree > 1}

    @property
    def fuses_otherwise(self) -> bool:
        """Whether `gradient_fusion_groups` is not the default and there is something to fuse."""
        default = type(self).model_fields["gradient_fusion_groups"].default
        return self.world > 1 and self.gradient_fusion_groups != default

    def layout(self) -> str:
        """The layout in words, of a resolved block: "data 2 x op 2 x stages 2, optimizer shard 2"."""
        axes = {"data": self.data, "op": self.op, "stages": self.pipeline.stages}
        more = {"optimizer shard": self.optimizer_shard, "expert": self.expert,
                "micro-batches": self.pipeline.micro_batches}
        words = [" x ".join(f"{name} {degree}" for name, degree in axes.items() if degree > 1) or "one device"]
        words += [f"{name} {degree}" for name, degree in more.items() if degree > 1]
        words += ["sequence parallel"] if self.sequence and self.op > 1 else []
        words += [f"recompute {self.recompute.policy}"] if self.recompute.policy != "none" else []
        return ", ".join(words)

    def forward(self) -> ParallelConfig:
        """A copy without what only training has: what shards a model that is used."""
        pipeline = self.pipeline.model_copy(update={"micro_batches": self.pipeline.stages, "schedule": "1f1b",
                                                    "interleave": 1})
        return self.model_copy(update={"pipeline": pipeline, "sequence": False, "expert": 1,
                                       "optimizer": OptimizerShardConfig(), "recompute": RecomputeConfig(),
                                       "micro_batch_interleave": 1, "mindspore": MindSporeConfig(),
                                       "gradient_fusion_groups": ParallelConfig().gradient_fusion_groups}, deep=True)

    def resolve(self, devices: int | None = None) -> ParallelConfig:
        """A copy with -1 filled in, checked against the number of devices.

        Args:
            devices: what was started; None takes `self.devices`, and without that the product.

        Raises:
            UserError: the product differs from the number of devices, or an axis does not divide.
        """
        devices = devices or self.devices
        config = self.model_copy(deep=True)
        if config.pipeline.stages > 1 and "micro_batches" not in config.pipeline.model_fields_set:
            config.pipeline.micro_batches = config.pipeline.stages
        free = [axis for axis in ("data", "op") if getattr(self, axis) == -1]
        if len(free) > 1:
            raise UserError("only one axis may be -1", where="parallel", value=f"data {self.data}, op {self.op}")
        for axis in ("data", "op"):
            if getattr(self, axis) == 0:
                raise UserError("must be at least 1 (or -1 for the rest)", where=f"parallel.{axis}", value=0)
        if free:
            self._fill(config, free[0], devices)
        if devices is not None and config.world != devices:
            raise UserError(
                f"data {config.data} x op {config.op} x pipeline.stages {config.pipeline.stages} = {config.world}, "
                f"but there are {devices} devices", where="parallel", hint="set one of data and op to -1")
        config._check()
        return config

    def _fill(self, config: ParallelConfig, axis: str, devices: int | None) -> None:
        if devices is None:
            raise UserError("-1 needs the number of devices", where=f"parallel.{axis}", value=-1,
                            hint="set parallel.devices")
        taken = -config.world
        if devices % taken:
            raise UserError(f"{devices} devices do not divide by the other axes ({taken})", where=f"parallel.{axis}",
                            value=-1)
        setattr(config, axis, devices // taken)

    def _check(self) -> None:
        stages, shard = self.pipeline.stages, self.optimizer.shard
        if self.mindspore.device is not None and self.backend != "mindspore":
            raise UserError("MindSpore's CUDA backend is experimental and is never chosen by itself",
                            where="parallel.mindspore.device", value=self.mindspore.device,
                            hint="set parallel.backend to mindspore too")
        if shard == 0 or (shard > 0 and self.data % shard):
            raise UserError(f"must divide the data axis ({self.data})", where="parallel.optimizer.shard", value=shard,
                            hint="use -1 for all of the data axis")
        if self.optimizer.level > 1 and shard == 1:
            raise UserError("nothing is sharded whose level this could be", where="parallel.optimizer.level",
                            value=self.optimizer.level, hint="set it to 1, or optimizer.shard to -1")
        if self.data % self.expert:
            raise UserError(f"must divide the data axis ({self.data})", where="parallel.expert", value=self.expert)
        if self.pipeline.micro_batches < stages:
            raise UserError(f"must be at least the number of stages ({stages})",
                            where="parallel.pipeline.micro_batches", value=self.pipeline.micro_batches,
                            hint=f"set it to {stages} or a multiple")
        if stages > 1 and self.pipeline.schedule == "interleaved" and self.pipeline.interleave < 2:
            raise UserError("the interleaved schedule needs at least 2 chunks a stage",
                            where="parallel.pipeline.interleave", value=self.pipeline.interleave,
                            hint="set it to 2, or pipeline.schedule: 1f1b")
        if stages > 1 and self.optimizer_shard > 1 and self.optimizer.level == 3:
            raise UserError("MindSpore 2.9 does not compile level 3 with pipeline stages",
                            where="parallel.optimizer.level", value=3, hint="set it to 2, or pipeline.stages: 1")
        if self.pipeline.interleave > 1 and self.pipeline.schedule != "interleaved":
            raise UserError("needs the interleaved schedule", where="parallel.pipeline.interleave",
                            value=self.pipeline.interleave, hint="set pipeline.schedule: interleaved")
        if not self.mindspore.share_graph and (self.pipeline.schedule != "1f1b" or self.optimizer.level > 1):
            raise UserError("MindSpore compiles this schedule or level only where micro-batches share a graph",
                            where="parallel.mindspore.share_graph", value=False, hint="leave it out")
        offsets = self.pipeline.offsets
        if offsets is not None and (len(offsets) != stages or sum(offsets) != 0):
            raise UserError(f"needs {stages} numbers that add up to 0", where="parallel.pipeline.offsets",
                            value=offsets)


def divides(divisor: int, number: int, *, where: str, what: str, hint: str | None = None) -> None:
    """Raises a `UserError` naming the key unless `divisor` divides `number`."""
    if number % divisor:
        raise UserError(f"{what} {number} does not divide by {divisor}", where=where, value=divisor, hint=hint)
