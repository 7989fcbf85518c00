"""This process's part of a ranker over several devices: its shards of the weights and tables, and the passes over them.

A launch starts groups of op x stages processes. Evaluation runs the same loop on all of them: each group scores every
so many-th batch. Where requests come (serving, bench) a group's first rank leads: it tells the others a pass and its
inputs, and they follow until it ends.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.checkpoint.full import Checkpoint
from parallel.checkpoint.sharded import Slices
from parallel.common.errors import UserError
from parallel.common.progress import info
from parallel.launch.inference import DEVICE, PROGRAM, compare_settings
from recsys.data.columns import features_of
from recsys.data.features import assign_columns
from recsys.passes.tasks import USER_INPUTS, inference_kinds, shapes_inference, sizes_of, whole_spec
from recsys.passes.weights import Weights, WholeRows, is_eight
from recsys.saved_model import vocabulary_of
from recsys.tables.names import is_sparse

if TYPE_CHECKING:
    from recsys.settings import Run

_CAPTURED = ("auto", "cuda_graph", "inductor")
_TAKE = -1
_NOTHING = np.zeros(0, np.int32)


def is_sharded() -> bool:
    """Whether a launch runs graphs of a program in this process."""
    return PROGRAM in os.environ


@dataclass
class Values:
    """What a rank has of a checkpoint.

    Args:
        parts: of each parameter (`InferenceRank.part`).
        rows: of the tables.
    """

    parts: dict[str, tuple]
    rows: WholeRows


class ShardedRanker:
    """Args:
        settings: of the run.
        checkpoint: whole or in the slices of any layout; None = start values.
        verb: says which passes there are.

    Attributes: `rows`, of the tables, for encoded ids.

    Raises:
        UserError: no such checkpoint, one of another model or features, shards that part the groups of int8 weights,
            more rows on the host than the program's tables have, a program of other settings.
    """

    def __init__(self, settings: Run, checkpoint: Path | None, verb: str) -> None:
        from parallel.torch_runtime.inference.member import Member
        from parallel.torch_runtime.inference.rank import InferenceRank
        from parallel.torch_runtime.program import Program

        program = Program(os.environ[PROGRAM])
        wanted, held = (shapes_inference(tree) for tree in (settings.model_dump(mode="json"), program.settings))
        compare_settings(wanted, held, program.folder)
        missing = [kind for kind in inference_kinds(settings, verb) if not program.has(kind)]
        if missing:
            raise UserError(f"the program holds no {missing[0]} graph", where=program.folder,
                            hint=f"export it with --graphs {','.join(inference_kinds(settings, verb))}")
        kind = check_checkpoint(settings, checkpoint, program) if checkpoint is not None else None
        self.program, self.kinds = program, program.inference_kinds
        self.member = Member(program, os.environ.get(DEVICE, "cpu"))
        self.settings = settings
        self.whole = whole_spec(settings, sizes_of(settings))
        read, self.rows = self._reading(checkpoint)
        self.rank = InferenceRank(program, self.member, read, 0, settings.parallel.execution in _CAPTURED,
                                  eight=is_eight if kind is not None else None, group=(kind or {}).get("group"),
                                  compiled=settings.parallel.execution == "inductor", beside=USER_INPUTS)
        if self.first:
            info(f"{self.member.world} processes, {self.member.groups} of data x {self.member.size}")

    @property
    def first(self) -> bool:
        """Whether this is the process that answers and tells figures."""
        return self.member.rank == 0

    def run(self, kind: str, inputs: Sequence[np.ndarray]) -> Any:
        """A pass over this rank's shards, called by every rank of the group with the same inputs; its result (a tuple
        where the graph gives several) on the group's first rank, None elsewhere."""
        result = self.rank.run(kind, inputs)
        if isinstance(result, tuple):
            return tuple(item.float().cpu().numpy() for item in result)
        return None if result is None else result.float().cpu().numpy()

    # -- leading and following ----------------------------------------------------------------------------------------

    def lead(self, kind: str, inputs: Sequence[np.ndarray]) -> Any:
        """`run` on all ranks of the group, called by its first rank alone."""
        flat = [np.ascontiguousarray(array).reshape(-1).view(np.int32) for array in inputs]
        self.member.broadcast(np.concatenate([[np.int32(self.kinds.index(kind))], *flat]))
        return self.run(kind, inputs)

    def follow(self) -> dict:
        """What a rank that does not lead does until its group's first rank has ended."""
        while len(message := self.member.receive()):
            if message[0] == _TAKE:
                self.take(self.read(bytes(message[1:].astype(np.uint8)).decode()))
            else:
                kind = self.kinds[message[0]]
                self.run(kind, self._unpacked(kind, message[1:]))
        self.member.close()
        return {}

    def close(self) -> None:
        """Lets the ranks that follow end."""
        if self.member.leads:
            self.member.broadcast(_NOTHING)
        self.member.close()

    def _unpacked(self, kind: str, flat: np.ndarray) -> list[np.ndarray]:
        inputs, begin = [], 0
        for _, shape, dtype in self.program.tree["shapes"][kind]:
            size = int(np.prod(shape))
            inputs.append(flat[begin:begin + size].view(dtype).reshape(shape))
            begin += size
        return inputs

    # -- other values -------------------------------------------------------------------------------------------------

    def read(self, checkpoint: str | Path) -> Values:
        """What this rank has of another checkpoint.

        Raises:
            UserError: a parameter is missing or of another shape, or a table has too many rows.
        """
        read, rows = self._reading(Path(checkpoint))
        return Values({name: self.rank.part(name, read) for name in self.rank.weights.shapes}, rows)

    def take(self, values: Values) -> None:
        """Puts what `read` gave in place."""
        for name, part in values.parts.items():
            self.rank.weights.put(name, *part)
        self.rows = values.rows

    def _reading(self, checkpoint: Path | None) -> tuple[Callable[[str, Any], Any], WholeRows]:
        """`read(name, extent)` of the part of a parameter, of a checkpoint or (None) of the start values, and the rows
        of its tables. Those on the host are sharded as those in the graph are: by rows."""
        if checkpoint is None:
            from parallel.torch_runtime.program import start_of

            program = self.program
            return (lambda name, extent: start_of(program.by_name[name], extent, program.seed),
                    WholeRows(self.whole, self.whole, {}))
        weights, shapes = Weights(checkpoint, self.settings), {item.name: item.shape for item in self.program.tensors}
        known = vocabulary_of(checkpoint, self.settings).sizes()
        spec = assign_columns(features_of(self.settings.data), self.settings.model.embedding_size, known)
        slices = Slices(checkpoint).read
        if weights.quantized:
            from parallel.torch_runtime.inference.weights import widening

            slices = widening(slices, shapes)

        def read(name: str, extent: Any) -> Any:
            if not (weights.hosted and is_sparse(name)):
                return slices(name, extent)
            whole = weights.read(self.whole, name, shapes[name])
            return whole if extent is None else whole[tuple(slice(*part) for part in extent)].copy()

        return read, WholeRows(spec, self.whole, weights.keys())

    def lead_take(self, checkpoint: Path, values: Values) -> None:
        """`take` on all ranks of the group, of values that this one has read; called by its first rank alone."""
        path = np.frombuffer(str(checkpoint.resolve()).encode(), np.uint8).astype(np.int32)
        self.member.broadcast(np.concatenate([[np.int32(_TAKE)], path]))
        self.take(values)


def check_checkpoint(settings: Run, path: Path, program: Any) -> dict[str, Any] | None:
    """How a checkpoint is quantized, if it is.

    Raises:
        UserError: it cannot be read into shards of the run's passes.
    """
    opened = Checkpoint(path)
    kind = opened.state.get("quantization")
    own = vocabulary_of(path, settings).sizes()
    if any(sizes_of(settings).get(name, count) != count for name, count in own.items()):
        raise UserError("the checkpoint has another vocabulary than the passes were compiled for", where=path,
                        hint="set data.vocabulary to its vocabulary.json")
    return kind


class GroupScores:
    """What brings the groups' scores together (`recsys.evaluation.score_merging`): the first rank of each gives its
    own."""

    def __init__(self, ranker: ShardedRanker) -> None:
        self.member = ranker.member
        self.ranks, self.share = self.member.world, (self.member.group, self.member.groups)

    def exchange(self, values: list[float]) -> list[float]:
        """Adds lists of equal length over all ranks."""
        return self.member.communicator.add(values) if self.member.communicator is not None else values
