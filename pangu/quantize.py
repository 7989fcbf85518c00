"""Verb `quantize`: a checkpoint with int8 weights from a float one; errors, and the perplexity before and after."""

from __future__ import annotations

import argparse
import math
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.checkpoint.folder import parameter_bytes, resolve_checkpoint
from parallel.checkpoint.full import Checkpoint, save_checkpoint
from parallel.common.errors import UserError
from parallel.common.progress import info, progress, table
from parallel.layers.int8_numbers import GROUP

if TYPE_CHECKING:
    from pangu.settings import Run

_TOKENS_AT_ONCE = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("--checkpoint", metavar="DIR", help="what to quantize (none: the newest of output.directory)")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the quantized checkpoint")
    parser.add_argument("--group", type=int, choices=[GROUP],
                        help="a scale for each 128 inputs of an output (default: one for each output)")
    parser.add_argument("--records", type=int, default=64, metavar="N",
                        help="held-out records for the perplexity before and after (default 64; 0: skip it)")


def run(settings: Run, arguments: argparse.Namespace) -> dict:
    """Quantizes and writes `<output>/checkpoints/step_*`, which the other verbs take as --checkpoint.

    Raises:
        UserError: the checkpoint is quantized already or damaged, a weight is not finite, or there are no records.
    """
    from pangu import int8
    from pangu.generation.backend import load_model
    from parallel.layers.int8 import prepare, products
    from parallel.training.device import start_device

    start_device()
    source = resolve_checkpoint(arguments.checkpoint or settings.output.directory)
    state = Checkpoint(source).state
    if state.get("quantization"):
        raise UserError("is quantized already", where=source)
    if Path(arguments.output).resolve() in [source.resolve(), *source.resolve().parents]:
        raise UserError("the quantized checkpoint needs a folder of its own", where="--output", value=arguments.output)
    model = load_model(settings, source)
    before = perplexity(model, settings, arguments.records)
    gone = int8.swap(model, arguments.group)
    errors = int8.fill(model, gone)
    shapes = {product.name: product.shape[1:] for product in products(model)}
    kept = {key: value for key, value in state.items() if key not in ("format", "version", "step")}
    target = save_checkpoint(Path(arguments.output) / "checkpoints", int(state.get("step", 0)),
                             list(model.get_parameters()), (),
                             {**kept, "quantization": {"bits": 8, "group": arguments.group}})
    mode = prepare(model)
    after = perplexity(model, settings, arguments.records)
    table("Relative error of each weight, ||W - qs|| / ||W||", ["weight", "shape", "error"],
          [[name, " x ".join(map(str, shapes[name])), f"{error:.5f}"] for name, error in errors.items()])
    return {"bytes_before": parameter_bytes(source), "bytes_after": parameter_bytes(target),
            "perplexity_before": before, "perplexity_after": after, "max_relative_error": max(errors.values()),
            "checkpoint": str(target), "quantized": len(errors), "group": arguments.group, "products": mode}


def perplexity(model: Any, settings: Run, records: int) -> float | None:
    """exp of the mean loss of training (`pangu.model.TrainingLoss`) over held-out records; None for 0 records.

    Args:
        model: a `PanGuAlpha`, float or, prepared, int8.
        settings: a `pangu.settings.Run`, whose records are read; without held-out ones, those that it is trained on.
        records: how many at most.
    """
    if records <= 0:
        return None
    from mindspore import Tensor

    source = _records(settings, max(1, min(records, _TOKENS_AT_ONCE // settings.model.sequence_length)))
    batches = min(-(-records // source.batch_size), source.steps_per_epoch)
    loss, total, weight = _record_loss(model), 0.0, 0.0
    for batch in progress(islice(source.batches(0), batches), "perplexity", batches):
        nll, counted = loss(*(Tensor(array) for array in batch))
        total, weight = total + float(nll.asnumpy()), weight + float(counted.asnumpy())
    mean = total / max(weight, 1.0)
    return math.exp(mean) if mean < 700.0 else math.inf


def _records(settings: Run, batch: int) -> Any:
    from pangu.data.dataset import PackedDataset
    from pangu.data.packing import read_index

    data, model = settings.data, settings.model
    split = "train"
    if data.validation_directory is None:
        if read_index(data.directory).validation.records:
            split = "validation"
        else:
            info("no held-out records: the perplexity is that of records the model was trained on")
    return PackedDataset(data.validation_directory or data.directory, batch_size=batch, seed=0,
                         sequence_length=model.sequence_length, vocabulary_size=model.vocabulary_size, shuffle=False,
                         eod_reset=data.eod_reset, split=split, repeat=False)


def _record_loss(model: Any) -> Any:
    """A cell: records, positions, documents -> sum of the loss over counted tokens, and how many those are."""
    from mindspore import dtype as mstype
    from mindspore import nn, ops

    from parallel.layers.loss import CrossEntropy

    class RecordLoss(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.model, self.pad_id = model, model.config.pad_id
            self.cross_entropy = CrossEntropy(model.config.vocabulary_size)

        def construct(self, records_BR, positions_BS, documents_BS):
            ids_BS, labels_N = records_BR[:, :-1], ops.reshape(records_BR[:, 1:], (-1,))
            hidden_ND = self.model.hidden(ids_BS, positions_BS, documents_BS)
            nll_N = self.cross_entropy(self.model.logits(hidden_ND), labels_N)
            counted_N = ops.cast(ops.reshape(ids_BS, (-1,)) != self.pad_id, mstype.float32)
            return ops.sum(nll_N * counted_N), ops.sum(counted_N)

    return RecordLoss().set_train(False)
