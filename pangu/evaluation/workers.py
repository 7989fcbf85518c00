"""The processes that share an evaluation: one, MindSpore's, or groups of ranks of a model over several devices."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pangu.generation.sharded.dealing import dealt_by_size, put_together
from pangu.generation.sharded.model import ShardedModel, open_sharded
from parallel.common.structured import parse_json
from parallel.launch.inference import PROGRAM, grouped, launch_inference, takes_torch
from parallel.launch.plan import add_node_arguments

if TYPE_CHECKING:
    from pangu.settings import Run

_NOT_PASSED = ("verb", "overrides", "passed", "print_config", "print_reference")


class Workers:
    """This process among those that share the work.

    Attributes: `rank` of `ranks`; `follows`: whether it only computes what another process says; `checkpoint`: where
    the weights come from.
    """

    rank, ranks, follows = 0, 1, False
    checkpoint: Path

    def identity(self) -> bytes:
        """What tells a checkpoint of another code from others."""
        return b""

    def load(self, share: bool) -> tuple[Any, Any]:
        """What generates and what scores, for `pangu.evaluation.language_model.LanguageModel`.

        Args:
            share: whether common beginnings are computed once.
        """
        raise NotImplementedError

    def gather(self, items: Any) -> list[Any]:
        """A JSON value of every process that shares the work, in their order."""
        return [items]

    def shared(self, sizes: Sequence[int], work: Callable[[list[int]], list[Any]]) -> list[Any]:
        """Results of all items, each of which one process has worked on.

        Args:
            sizes: of the items, by which they are dealt.
            work: results of the items with these numbers.
        """
        mine = dealt_by_size(sizes, self.ranks)[self.rank]
        return put_together(self.gather(list(zip(mine, work(mine), strict=True))), len(sizes))

    def follow(self) -> dict:
        """Computes what another process says until that is done."""
        raise NotImplementedError

    def close(self) -> None:
        """Everything has been worked on."""


class MindSporeWorkers(Workers):
    """Processes that msrun started, or one: each has the whole model.

    Args:
        settings, checkpoint, int8: see `pangu.generation.backend.load_model`.
    """

    def __init__(self, settings: Run, checkpoint: str | Path, int8: bool) -> None:
        from parallel.checkpoint.folder import resolve_checkpoint
        from parallel.training.device import start_device

        self.processes, self.checkpoint = start_device(), resolve_checkpoint(checkpoint)
        self.rank, self.ranks = self.processes.rank, self.processes.ranks
        self._model = settings, self.checkpoint, int8

    def load(self, share: bool) -> tuple[Any, Any]:
        """See `Workers`."""
        from pangu.generation.backend import load_model

        return load_model(*self._model), None

    def gather(self, items: Any) -> list[Any]:
        """See `Workers`."""
        if self.ranks == 1:
            return [items]
        from mindspore import Tensor, nn, ops

        class Gathered(nn.Cell):
            def __init__(self, group: str) -> None:
                super().__init__()
                self.all = ops.AllGather(group=group)

            def construct(self, x: Tensor) -> Tensor:
                return self.all(x)

        # Bytes travel as float32, which every backend gathers.
        cell, data = Gathered(self.processes.group), np.frombuffer(json.dumps(items).encode(), np.uint8)
        told = Tensor(np.array([len(data) % 4096, len(data) // 4096], np.float32))
        sizes = [int(size) for size in cell(told).asnumpy()]
        lengths = [low + 4096 * high for low, high in zip(sizes[::2], sizes[1::2], strict=True)]
        padded = np.zeros(max(lengths), np.float32)
        padded[:len(data)] = data
        parts = cell(Tensor(padded)).asnumpy().reshape(self.ranks, -1)
        return [parse_json(part[:length].astype(np.uint8).tobytes().decode(), max_bytes=1 << 32)
                for part, length in zip(parts, lengths, strict=True)]


class GroupWorkers(Workers):
    """Groups of ranks of a sharded model: the first of each group works, the others follow it."""

    def __init__(self, sharded: ShardedModel) -> None:
        self.sharded, self.checkpoint, self.identity = sharded, sharded.checkpoint, sharded.identity
        self.rank, self.ranks = sharded.member.group, sharded.member.groups
        self.follows = sharded.backend is None
        self.follow, self.close, self.gather = sharded.follow, sharded.close, sharded.member.gather

    def load(self, share: bool) -> tuple[Any, Any]:
        """See `Workers`."""
        from pangu.evaluation.span_scoring import SpanScorer

        backend = self.sharded.backend
        return backend, SpanScorer(backend, self.sharded.chunk, share)


def workers_of(settings: Run, checkpoint: str | Path, int8: bool) -> Workers:
    """Those that this process is one of; a sharded model is opened with it."""
    sharded = open_sharded(settings, checkpoint, int8)
    return GroupWorkers(sharded) if sharded is not None else MindSporeWorkers(settings, checkpoint, int8)


def is_worker() -> bool:
    """Whether a launch has started this process."""
    return PROGRAM in os.environ or int(os.environ.get("MS_WORKER_NUM", "1")) > 1


def wants_launch(arguments: argparse.Namespace) -> bool:
    """Whether an evaluation takes processes of its own. Without `--nproc` one process has the whole model, whatever
    layout its training had."""
    return (arguments.nproc or 1) * arguments.nodes > 1


def launch_evaluation(settings: Run, arguments: argparse.Namespace) -> dict:
    """The same command as `--nproc` processes on each machine; rank 0's figures."""
    from pangu.build import PACKAGE
    from parallel.launch.launcher import MindSporeLauncher
    from parallel.launch.machines import machines_of
    from parallel.training.agreement import facts_of

    command, nodes = ["-m", "pangu", "evaluate"], argparse.ArgumentParser()
    add_node_arguments(nodes)
    for name, value in vars(arguments).items():
        if name not in (*_NOT_PASSED, *vars(nodes.parse_args([]))) and value not in (None, False):
            command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    command += arguments.overrides
    logs = Path(arguments.output or Path(settings.output.directory) / "evaluation") / "logs"
    resolved, plan = grouped(settings, arguments)
    if takes_torch(resolved):
        return launch_inference(PACKAGE, resolved, plan, "evaluate", command, logs)
    machines = machines_of(plan, facts_of(settings.model_dump(mode="json")))
    with contextlib.closing(machines):
        machines.meet()
        return MindSporeLauncher(plan, command, logs, machines).run()
