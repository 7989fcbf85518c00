"""Verb `train`: PanGu-alpha on packed records."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mindspore.nn.utils import no_init_parameters

from pangu.adaptation.pairs import PairsDataset
from pangu.build import build, training_network
from pangu.config import ModelConfig, check_layout
from pangu.data.dataset import PackedDataset
from pangu.data.tokenizer import Tokenizer
from pangu.generation.generate import check_vocabulary
from parallel.common.errors import UserError
from parallel.common.progress import table
from parallel.layers.low_rank import is_adapter
from parallel.layers.parameter import initialize
from parallel.sharding.config import ParallelConfig
from parallel.training.device import Processes, set_seed, start_device
from parallel.training.mindspore_backend import MindSporeBackend, ShardedBackend
from parallel.training.optimizers import Optimizer
from parallel.training.settings import COMPUTE_DTYPES
from parallel.training.sharded.run import ShardedRun, needs_sharding
from parallel.training.step import TrainStep
from parallel.training.trainer import Run, Trainer

if TYPE_CHECKING:
    from pangu.settings import Run as RunSettings


def run(settings: RunSettings, arguments: argparse.Namespace) -> dict:
    """Trains, validates, saves; resumes where an earlier run of the same output folder stopped."""
    processes = start_device()
    parallel = settings.parallel.resolve(processes.ranks)
    check_layout(settings.model, parallel)
    sharded = needs_sharding(parallel, processes)
    _check_device(settings, processes)
    set_seed(settings.train.seed)
    trainer = sharded_trainer(settings, parallel, processes) if sharded else replicated_trainer(settings, processes)
    figures = trainer.run()
    if processes.rank == 0:
        table("Trained", ["figure", "value"], figures.items())
    return figures


def replicated_trainer(settings: RunSettings, processes: Processes) -> Trainer:
    """A trainer of which every process holds the whole model."""
    training, validation = sources(settings, (processes.rank, processes.ranks))
    return Trainer(MindSporeBackend(training_step(settings, processes)), _run(settings, training, validation))


def sharded_trainer(settings: RunSettings, parallel: ParallelConfig, processes: Processes) -> Trainer:
    """A trainer of which every process holds slices (Ascend)."""
    dtype = COMPUTE_DTYPES[settings.train.precision]
    data, _ = divmod(processes.rank % (parallel.data * parallel.op), parallel.op)
    training, validation = sources(settings, (data, parallel.data))
    run = ShardedRun(build(settings, parallel, dtype), settings.train, parallel, processes,
                 validated=validation is not None)
    return Trainer(ShardedBackend(run), _run(settings, training, validation))


def _run(settings: RunSettings, training: PackedDataset, validation: PackedDataset | None) -> Run:
    tokens = settings.train.global_batch_size * settings.model.sequence_length
    return Run(training, settings.train, settings.output, validation=validation, units_per_step=tokens,
               flops_per_step=tokens * flops_per_token(settings.model), describe=settings.model_dump(mode="json"),
               start_from=settings.adapt.checkpoint if settings.adapt is not None else None,
               is_new=is_adapter)


def training_step(settings: RunSettings, processes: Processes) -> TrainStep:
    """The model with start values, its loss and its optimizer, as one step."""
    train = settings.train
    with no_init_parameters():
        network = training_network(settings, COMPUTE_DTYPES[train.precision], weighted=True)
    initialize(network.model, train.seed)
    optimizer = Optimizer(network.trainable_params(), train.optimizer, train.steps)
    return TrainStep(network, optimizer, train, weighted=True, group=processes.group, rank=processes.rank,
                     ranks=processes.ranks)


def sources(settings: RunSettings, share: tuple[int, int]) -> tuple[PackedDataset, PackedDataset | None]:
    """Training and validation records, the `share` (number, of how many) of every batch."""
    data, model = settings.data, settings.model
    if settings.adapt is not None:
        return _pairs(settings, share)
    shared = {"batch_size": settings.train.global_batch_size, "sequence_length": model.sequence_length,
              "vocabulary_size": model.vocabulary_size, "shard": share,
              "eod_reset": data.eod_reset, "seed": settings.train.seed}
    training = PackedDataset(data.directory, shuffle=data.shuffle, **shared)
    if data.validation_directory is not None:
        return training, PackedDataset(data.validation_directory, shuffle=False, repeat=False, **shared)
    if not training.index.validation.records:
        return training, None
    # One pass, filled up with padding that has no weight: the perplexity is exactly that of the records.
    return training, PackedDataset(data.directory, split="validation", shuffle=False, repeat=False, **shared)


def _pairs(settings: RunSettings, share: tuple[int, int]) -> tuple[PairsDataset, PairsDataset | None]:
    tokenizer, adapt = Tokenizer(settings.data.tokenizer), settings.adapt
    check_vocabulary(tokenizer, settings.model.vocabulary_size)
    shared = {"batch_size": settings.train.global_batch_size, "seed": settings.train.seed,
              "sequence_length": settings.model.sequence_length, "shard": share}
    validation = None
    if adapt.validation is not None:
        validation = PairsDataset(adapt.validation, tokenizer, repeat=False, **shared)
    return PairsDataset(adapt.pairs, tokenizer, **shared), validation


def flops_per_token(model: ModelConfig) -> float:
    """Model FLOPs of one token, forward and backward: three times the forward matmuls.

    Forward: 2 for each weight of the layers and of the head, and 4 S D a layer for scores and mixing. The attention is
    counted whole, not halved for the causal mask; recomputation, norms and lookups are not counted. (Megatron-LM's
    convention.)
    """
    width, inner, length = model.hidden_size, model.ffn, model.sequence_length
    layer = 2 * (4 * width * width + 2 * width * inner) + 4 * length * width
    return 3.0 * (model.layers * layer + 2 * width * model.vocabulary_size)


def _check_device(settings: RunSettings, processes: Processes) -> None:
    train = settings.train
    if processes.target != "CPU":
        return
    if train.precision != "fp32":
        raise UserError("half precision is for Ascend; on the CPU it is slower and untested", where="train.precision",
                        value=train.precision, hint="train.precision=fp32")
    if train.global_batch_size % (processes.ranks * train.accumulation):
        raise UserError(f"{processes.ranks} processes x accumulation {train.accumulation} do not divide it",
                        where="train.global_batch_size", value=train.global_batch_size)
