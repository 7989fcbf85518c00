"""The one-device runs that a replay is compared with: the training step on MindSpore's CPU kernels in float32, and the
graph of one rank executed in float64 as the ranks of the layout are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from parallel.proof.compile.graph import read_graph
from parallel.proof.compile.rank_compiler import Compilers, Request
from parallel.proof.replay.executor import run_step
from parallel.proof.replay.ranks import AllRanks, read_ranks
from parallel.sharding.config import ParallelConfig

_ONE_DEVICE = ("parallel.devices=null", "parallel.data=1", "parallel.op=1", "parallel.pipeline.stages=1",
               "parallel.pipeline.micro_batches=1", "parallel.pipeline.schedule=1f1b", "parallel.pipeline.interleave=1",
               "parallel.pipeline.offsets=null", "parallel.optimizer.shard=1", "parallel.expert=1",
               "parallel.sequence=false", "parallel.micro_batch_interleave=1", "parallel.recompute.policy=none")


@dataclass
class History:
    """What a run did: loss and norm of each step (of all ranks that know them), parameters and states at the end."""

    losses: list[list[float]] = field(default_factory=list)
    norms: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    values: list[dict[str, np.ndarray]] = field(default_factory=list)


class OneDevice:
    """The plain run that everything is compared with: the training step on one CPU device.

    It takes the layout's micro-batches one after the other, and nothing else of the layout.

    Args:
        config: YAML file of a run.
        overrides: key.sub=value.
        compilers: what compiles the graph of one rank; None starts processes of its own.

    Raises:
        UserError: the settings do not fit together.
    """

    def __init__(self, config: str, overrides: Sequence[str], compilers: Compilers | None = None) -> None:
        from parallel.task import load_run
        from parallel.training.device import start_device
        from parallel.training.sharded.step import micro_batches

        start_device(target="CPU")
        self.config = config
        # The other side of whatever the layout has fused.
        package, settings = load_run(config, list(overrides))
        self.overrides = [*overrides, *package.written_out(settings)]
        self.compilers = compilers
        self.single: dict[int, AllRanks] = {}
        self.histories: dict[bytes, History] = {}
        self.exact_histories: dict[bytes, History] = {}
        self.package, self.settings = load_run(config, self.overrides)
        self.count = micro_batches(self.settings.train, self.settings.parallel.resolve())
        self._build()
        self.start = {item.name: item.asnumpy().copy() for item in self.step.get_parameters()}

    def _build(self) -> None:
        """The network at its start values and its step, not compiled yet."""
        from parallel.layers.parameter import initialize
        from parallel.training.optimizers.row_gradients import row_tables
        from parallel.training.optimizers.run import run_optimizer
        from parallel.training.step import TrainStep, enable_weighted_loss

        train = self.settings.train.model_copy(update={"accumulation": self.count})
        self.task = self.package.build(self.settings, ParallelConfig(), "float32")
        initialize(self.task.network, train.seed)
        network, is_sparse = self.task.network, self.task.is_sparse
        optimizer = run_optimizer(network.trainable_params(), train, is_sparse, row_tables(network))
        self.step = TrainStep(network, optimizer, train, weighted=enable_weighted_loss(network))

    def compiled(self, count: int | None = None) -> AllRanks:
        """The same network as a world of one rank, compiled like a layout; compiled when first asked for.

        Args:
            count: micro-batches; None = those of the layout. Their gradients are not accumulated on a single rank,
                so only forward nodes are of use where there are several.
        """
        count = self.count if count is None else count
        if count not in self.single:
            request = Request(1, 0, str(Path(self.config).resolve()),
                              [*self.overrides, *_ONE_DEVICE, f"train.accumulation={count}"],
                              compute_dtype="float32", reuse=False)
            if self.compilers is not None:
                compiled = self.compilers.compile([request])[0]
            else:
                with Compilers() as compilers:
                    compiled = compilers.compile([request])[0]
            self.single[count] = read_ranks({0: compiled}, {0: read_graph(compiled.graph)})
        return self.single[count]

    def exact(self, steps: int, order: np.ndarray) -> History:
        """`run` by the graph of one rank, executed in float64.

        It takes the batch undivided: the loss is a sum over samples divided by their weights, which several
        micro-batches give as well, but for rounding.
        """
        known = self.exact_histories.get(order.tobytes())
        if known is not None and len(known.losses) >= steps:
            return known
        world, history = self.compiled(1), History()
        ranks = world.start(self.start, exact=True)
        for number in range(steps):
            begin = time.monotonic()
            loss, norm, *_ = run_step(ranks, world.inputs([item[order] for item in self.batch(number)]))[0]
            history.losses.append([float(loss)])
            history.norms.append([float(norm)])
            history.seconds.append(time.monotonic() - begin)
            history.values.append({name: value.copy() for name, value in ranks[0].state.items()})
        self.exact_histories[order.tobytes()] = history
        return history

    def reach(self, name: str) -> float:
        """How far one step can move an element of a parameter, roughly: the learning rate of its optimizer."""
        sparse = self.settings.train.sparse_settings()
        if sparse is not None and self.task.is_sparse and self.task.is_sparse(name):
            return sparse.learning_rate
        return self.settings.train.optimizer.learning_rate

    def batch(self, step: int) -> tuple[np.ndarray, ...]:
        """The global batch of a step."""
        return self.task.sample(self.settings.train.seed + 1000 * step)

    def run(self, steps: int, order: np.ndarray) -> History:
        """Trains from the start values on the batches, their rows in `order`; what was run before is not run again."""
        import mindspore as ms

        known = self.histories.get(order.tobytes())
        if known is not None and len(known.losses) >= steps:
            return known
        if self.histories:
            # A compiled step does not see its optimizer's states set from outside.
            self._build()
        history = History()
        for number in range(steps):
            batch = [ms.Tensor(np.ascontiguousarray(item[order])) for item in self.batch(number)]
            begin = time.monotonic()
            loss, norm, *_ = self.step(*batch)
            history.losses.append([float(loss.asnumpy())])
            history.norms.append([float(norm.asnumpy())])
            history.seconds.append(time.monotonic() - begin)
            history.values.append({item.name: item.asnumpy().copy() for item in self.step.get_parameters()})
        self.histories[order.tobytes()] = history
        return history
