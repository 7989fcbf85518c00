"""Verb `quantize`: a checkpoint with int8 weights from a float one, each layer's error, the AUC before and after."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.checkpoint.folder import parameter_bytes, resolve_checkpoint
from parallel.checkpoint.full import Checkpoint, save_checkpoint
from parallel.common.errors import UserError
from parallel.common.progress import table
from parallel.training.device import start_device
from recsys.data.vocabulary import VOCABULARY
from recsys.saved_model import settings_of

if TYPE_CHECKING:
    from recsys.settings import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("--checkpoint", metavar="DIR", required=True, help="the run or checkpoint to quantize")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the quantized one")
    parser.add_argument("--run-config", metavar="FILE",
                        help="the run's settings (default: those kept in the checkpoint)")
    parser.add_argument("--group", type=int, choices=[128],
                        help="a scale for each 128 inputs of an output (default: one for each output)")
    parser.add_argument("--part", choices=["train", "validation", "test", "none"], default="test",
                        help="rows for the AUC before and after; none: skip it")
    parser.add_argument("--rows", type=int, default=200_000, metavar="N", help="rows at most (default 200000)")


def run(settings: None, arguments: argparse.Namespace) -> dict:
    """Quantizes, evaluates and writes `<out>/checkpoints/step_*` and `<out>/vocabulary.json`.

    Raises:
        UserError: nothing to quantize, the checkpoint is quantized already or damaged, or the log cannot be read.
    """
    from parallel.layers.int8 import prepare, products
    from recsys.evaluation.evaluate import load_model, open_log
    from recsys.quantization.layers import quantize_model

    start_device()
    source = resolve_checkpoint(arguments.checkpoint)
    state = Checkpoint(source).state
    if state.get("quantization"):
        raise UserError("is quantized already", where=source)
    if Path(arguments.output).resolve() in [source.resolve(), *source.resolve().parents]:
        raise UserError("the quantized checkpoint needs a folder of its own", where="--output", value=arguments.output)
    run_settings = settings_of(source, arguments.run_config)
    log = open_log(run_settings, str(source))
    model, _ = load_model(run_settings, log, str(source))
    before = _auc(model, log, run_settings, arguments)
    errors = quantize_model(model, arguments.group)
    shapes = {product.name: product.shape for product in products(model)}
    kept = {key: value for key, value in state.items() if key not in ("format", "version", "step")}
    target = save_checkpoint(Path(arguments.output) / "checkpoints", int(state.get("step", 0)),
                             list(model.get_parameters()), (),
                             {**kept, "quantization": {"bits": 8, "group": arguments.group}})
    log.vocabulary.save(Path(arguments.output) / VOCABULARY)
    mode = prepare(model)
    after = _auc(model, log, run_settings, arguments)
    table("Relative error of each weight, ||W - qs|| / ||W||", ["weight", "shape", "error"],
          [[name, " x ".join(map(str, shapes[name])), f"{error:.5f}"] for name, error in errors.items()])
    return {"max_relative_error": max(errors.values()), "auc_before": before, "auc_after": after,
            "bytes_before": parameter_bytes(source), "bytes_after": parameter_bytes(target), "checkpoint": str(target),
            "quantized": len(errors), "group": arguments.group, "products": mode}


def _auc(model: Any, log: Any, settings: Run, arguments: argparse.Namespace) -> float | None:
    from recsys.evaluation.log_metrics import Evaluation

    if arguments.part == "none":
        return None
    rows = log.parts[arguments.part]
    if len(rows) == 0:
        raise UserError("this part has no rows", where="--part", value=arguments.part)
    batch = min(settings.train.global_batch_size * 4, len(rows))
    return Evaluation(model, rows, log.labels, batch, limit=-(-arguments.rows // batch))(0)["auc"]
