"""This process's part of a model over several devices, from what its launch says and a checkpoint of any layout."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pangu.checkpoints.foreign import ForeignCheckpoint
from pangu.generation.backend import Backend
from pangu.generation.sharded.replacing import Models
from pangu.generation.sharded.runner import SpanRunner
from pangu.generation.sharded.shapes import SLOTS, shapes_inference
from pangu.generation.weights import check_parameters, parameter_shapes
from parallel.checkpoint.full import Checkpoint
from parallel.common.errors import UserError
from parallel.common.progress import info
from parallel.launch.inference import DEVICE, PROGRAM, compare_settings

if TYPE_CHECKING:
    from pangu.settings import Run
    from parallel.torch_runtime.inference.rank import InferenceRank

_CAPTURED = ("auto", "cuda_graph", "inductor")
_OURS = ("layout*.json", "step_*", "checkpoints/step_*")
_THEIRS = ("*.ckpt", "rank_*/*.ckpt", "*.safetensors", "*.bin", "*.pt", "**/mp_rank_*/model_optim_rng.pt")


class ShardedBackend(Backend):
    """A `Backend` whose one runner was made when the model was opened.

    Args:
        config: the model's sizes.
        runner: the one.
        drop: gives the model up on all processes.
    """

    has_cache = True

    def __init__(self, config: Any, runner: SpanRunner, drop: Callable[[], None]) -> None:
        self.config, self._runner, self._drop = config, runner, drop

    def runner(self, sequences: int, tokens: int, chunk: int) -> SpanRunner:
        """See `Backend`; the cache has the size that the settings gave it."""
        return self._runner

    def close(self) -> None:
        """See `Backend`."""
        self._drop()


class ShardedModel:
    """Args:
        settings: a `pangu.settings.Run`.
        checkpoint: see `open_checkpoint`.
        int8: whether products of few rows take int8 weights, quantized while they are read; so do those of a quantized
            checkpoint.
        cache_bytes: memory for keys and values on each device; None = enough for `generate.batch_size` sequences.

    Attributes: `member`, this process among all; `backend`, what its group's first rank generates with, None elsewhere;
    `checkpoint`, where the weights came from.

    Raises:
        UserError: no such checkpoint or one of another model; a program of other settings; a cache larger than the
            memory that is left.
    """

    def __init__(self, settings: Run, checkpoint: str | Path, int8: bool = False, cache_bytes: int | None = None
                 ) -> None:
        from parallel.torch_runtime.inference.member import Member
        from parallel.torch_runtime.program import Program

        self.program, self.settings, self.int8 = Program(os.environ[PROGRAM]), settings, int8
        check_program(self.program.settings, settings, self.program.folder)
        opened = open_checkpoint(checkpoint, settings.model)
        self.checkpoint = opened.path
        self.identity = opened.identity if isinstance(opened, ForeignCheckpoint) else bytes
        self.member = Member(self.program, os.environ.get(DEVICE, "cpu"))
        self.blocks = self._blocks(cache_bytes)
        self.models = Models(self.member, self._another, self.blocks)
        self.models.first(self._rank(opened))
        self.backend = self._backend(0) if self.member.leads else None
        if self.member.rank == 0:
            info(f"{self.member.world} processes, {self.member.groups} of data x {self.member.size}; a cache of "
                 f"{self.blocks * SLOTS} tokens")

    def _rank(self, opened: Checkpoint | ForeignCheckpoint) -> InferenceRank:
        """The graphs with this process's part of a checkpoint's weights."""
        from parallel.torch_runtime.inference.rank import InferenceRank
        from parallel.torch_runtime.inference.weights import widening

        kind, read = opened.state.get("quantization"), opened.read
        if kind is not None:
            read = widening(read, {tensor.name: tensor.shape for tensor in self.program.tensors})
        return InferenceRank(self.program, self.member, read, (self.blocks + 1) * SLOTS,
                             self.settings.parallel.execution in _CAPTURED, group=(kind or {}).get("group"),
                             eight=(lambda name: True) if self.int8 or kind is not None else None)

    def _another(self, path: str) -> InferenceRank:
        """As `_rank`, beside the model that is there.

        Raises:
            UserError: the memory does not hold two.
        """
        needed, free = self._needed(self.blocks), self._free()
        if free is not None and needed > free:
            raise UserError(f"a second model beside the first needs {needed / 1e9:.2f} GB on each device, and "
                            f"{free / 1e9:.2f} GB are left", where="reload", hint="start the server again")
        return self._rank(open_checkpoint(path, self.settings.model))

    def _backend(self, number: int) -> ShardedBackend:
        runner = SpanRunner(self.models.held[number], self.models.sender(number), self.blocks, self.settings.model,
                            self.models.lock)
        return ShardedBackend(self.settings.model, runner, lambda: self.models.drop(number))

    def load(self, checkpoint: str | Path) -> tuple[Backend, str]:
        """Another model of the same sizes, beside the ones that are there, on all processes of the group, and where it
        came from. For the group's first rank.

        Args:
            checkpoint: see `open_checkpoint`.

        Raises:
            UserError: it cannot be opened here, or not loaded on one of the ranks: then on none.
        """
        path = str(Path(open_checkpoint(checkpoint, self.settings.model).path).resolve())
        self.backend = self._backend(self.models.load(path))
        return self.backend, path

    @property
    def rank(self) -> InferenceRank:
        """This process's graphs of the newest model."""
        return self.models.held[max(self.models.held)]

    @property
    def chunk(self) -> int:
        """Tokens that one call of the graph for prompts reads."""
        return self.rank.shape("prefill")["ids"][1]

    @property
    def first(self) -> bool:
        """Whether this is the process that reads prompts, answers and tells figures."""
        return self.member.rank == 0

    def check_one_group(self) -> None:
        """Raises a UserError where several groups would serve."""
        if self.member.groups > 1:
            raise UserError("a server is one group of op x stages processes", where="--nproc", value=self.member.world,
                            hint=f"start {self.member.size}, and a server for each further group")

    def follow(self) -> dict:
        """What a rank that does not lead does until its group's first rank has ended, which alone heeds signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        try:
            self.models.follow()
        except RuntimeError as error:
            # That of the other process is the one to be told.
            info(f"the first process of the group has ended: {str(error).splitlines()[0]}")
            return {"exit_code": 1}
        self.models.release()
        self.member.close()
        return {}

    def close(self) -> None:
        """Lets the ranks that follow end."""
        self.models.end()
        self.member.close()

    def _needed(self, blocks: int) -> int:
        """Bytes of this process's weights and of a cache."""
        from parallel.torch_runtime.inference.rank import cache_bytes_per_slot, weight_bytes

        number = self.member.number
        return weight_bytes(self.program, number) + (blocks + 1) * SLOTS * cache_bytes_per_slot(self.program, number)

    def _free(self) -> int | None:
        from parallel.torch_runtime.inference.rank import free_bytes

        return free_bytes(self.member.device)

    def _blocks(self, cache_bytes: int | None) -> int:
        from parallel.torch_runtime.inference.rank import cache_bytes_per_slot, weight_bytes

        number, whole = self.member.number, -(-self.settings.model.sequence_length // SLOTS)
        block_bytes = SLOTS * cache_bytes_per_slot(self.program, number)
        blocks = whole * self.settings.generate.batch_size
        if cache_bytes is not None:
            blocks = max(whole, min(blocks, cache_bytes // block_bytes))
        weights, free = weight_bytes(self.program, number), self._free()
        if free is not None and self._needed(blocks) > free:
            fits = (free - weights) // (whole * block_bytes)
            raise UserError(f"the cache needs {(blocks + 1) * block_bytes / 1e9:.2f} GB on each device beside weights "
                            f"of {weights / 1e9:.2f} GB, and {free / 1e9:.2f} GB are left", where="generate.batch_size",
                            value=self.settings.generate.batch_size,
                            hint=f"{fits} fits" if fits > 0 else "raise parallel.op or parallel.pipeline.stages")
        return blocks


def open_sharded(settings: Run, checkpoint: str | Path, int8: bool = False, cache_bytes: int | None = None
                 ) -> ShardedModel | None:
    """The part of this process where a launch runs graphs of a program; None where a model is whole in one process."""
    return ShardedModel(settings, checkpoint, int8, cache_bytes) if PROGRAM in os.environ else None


def open_checkpoint(path: str | Path, config: Any) -> Checkpoint | ForeignCheckpoint:
    """A checkpoint to be read part by part: of this project, whole or in the slices of any layout (a run's folder means
    its newest), or of another code.

    Raises:
        UserError: none is there, or it is of another model.
    """
    path = Path(path)
    if path.is_file() or (not _has(path, _OURS) and _has(path, _THEIRS)):
        return ForeignCheckpoint(path, config)
    opened = Checkpoint(path)
    if opened.state.get("quantization") is None:  # else weights are stored in other shapes
        check_parameters(opened, parameter_shapes(config))
    return opened


def _has(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def check_program(exported: dict[str, Any], settings: Run, folder: Path) -> None:
    """Raises a `UserError` naming the first key in which a run's settings shape other graphs than a program's."""
    compare_settings(*(shapes_inference(tree) for tree in (settings.model_dump(mode="json"), exported)), folder)
