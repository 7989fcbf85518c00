"""Verb `estimate`: what a step of any model takes on a described cluster (conventions: `planner.py`)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError
from parallel.common.progress import info, table
from parallel.planning.checkpoint import checkpoint_bytes
from parallel.planning.hints import hints
from parallel.planning.planner import Estimate, Planner, planner_for
from parallel.planning.report import write_report
from parallel.sharding.config import ParallelConfig
from parallel.training.sharded.step import check_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `estimate`."""
    parser.add_argument("--cluster", metavar="FILE", default="configs/cluster/ascend910.yaml",
                        help="YAML file that describes devices and network, or the name of one of configs/cluster "
                        "(default: %(default)s)")
    parser.add_argument("--tokens", type=float, metavar="N", default=None,
                        help="tokens (samples) to train on, for days and device-hours; default: steps x batch")
    parser.add_argument("--serve", action="store_true",
                        help="of a trained model that generates: devices that hold it, tokens/s, time to the first")
    parser.add_argument("--html", metavar="FILE", help="write a report with pictures")


def run(settings: None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Verb `estimate`."""
    if arguments.serve:
        from parallel.planning import serving

        for flag in ("html", "tokens"):
            if getattr(arguments, flag):
                raise UserError("is for training", where=f"--{flag}", hint="leave it out")
        return serving.run(arguments)
    planner, run_settings = planner_for(arguments.config, arguments.overrides, arguments.cluster)
    config = run_settings.parallel.resolve()
    count = max(config.pipeline.micro_batches, run_settings.train.accumulation)
    if not planner.divides(config, count):
        raise UserError("an axis does not divide what it shards, or data x micro-batches the batch", where="parallel",
                        value=f"data {config.data}, op {config.op}, micro-batches {count}")
    check_rows(planner.task.most_rows, planner.task.inputs[0].shape[0] // (
        config.data * count * config.micro_batch_interleave))
    check_cells(planner, config)
    estimate = planner.evaluate(config)
    show(estimate, planner)
    tokens = arguments.tokens or float(estimate.tokens) * run_settings.train.steps
    figures = figures_of(estimate, planner)
    saved = checkpoint_bytes(planner.task, run_settings.train, config)
    figures |= {"checkpoint_bytes": saved.written, "checkpoint_bytes_held": saved.held,
                "checkpoint_bytes_of_largest_rank": saved.largest, "checkpoint_slices": saved.slices}
    info(f"a checkpoint: {saved.written / 1e9:.4g} GB in {saved.slices:,} slices, each written once; at most "
         f"{saved.largest / 1e6:.4g} MB a rank (all that the ranks hold, replicas too: {saved.held / 1e9:.4g} GB)")
    hours = tokens / estimate.tokens * estimate.step_seconds / 3600
    figures |= {"tokens": tokens, "days": hours / 24, "device_hours": hours * estimate.devices}
    info(f"{tokens:.3g} tokens: {hours / 24:.1f} days, {hours * estimate.devices:,.0f} device-hours")
    if estimate.missing > 0:
        figures["hint"] = hints(planner, config)
        info(f"does not fit: {estimate.missing / 1e9:.1f} GB too much on the fullest stage; {figures['hint']}")
    if arguments.html:
        write_report(Path(arguments.html), planner, estimate, title=Path(arguments.config).name)
    return figures


def check_cells(planner: Planner, config: ParallelConfig) -> None:
    """Raises a `UserError` if a cell that is to be recomputed is in no layer: nothing would be."""
    if config.recompute.policy != "selective":
        return
    scopes = {f".{operation.scope}." for operation in planner.description(1, config.data)[0].operations}
    for name in config.recompute.cells:
        if not any(f".{name}." in scope for scope in scopes):
            raise UserError("no such cell in a layer", where="parallel.recompute.cells", value=name)


def figures_of(estimate: Estimate, planner: Planner) -> dict[str, Any]:
    """The JSON line."""
    return {
        "parameters": planner.parameters, "model_flops_per_token": planner.model_flops / estimate.tokens,
        "memory_bytes_per_device": estimate.fullest.total, "memory_by_kind": estimate.fullest.parts(),
        "memory_bytes_per_stage": [memory.total for memory in estimate.memory], "fits": estimate.missing <= 0,
        "missing_bytes": max(0, estimate.missing), "step_seconds": estimate.step_seconds, "mfu": estimate.mfu,
        "tokens_per_second_per_device": estimate.tokens_per_second_per_device, "bubble": estimate.bubble,
        "seconds_by_part": estimate.parts, "communication_bytes": estimate.communication_bytes,
        "devices": estimate.devices, "cluster": planner.cluster.name,
    }  # fmt: skip


def show(estimate: Estimate, planner: Planner) -> None:
    """Tables of one layout."""
    names = list(vars(estimate.fullest))
    table(f"memory of one device of each stage (GB of {estimate.limit / 1e9:.1f})", ["stage", *names, "total"],
          [[str(stage), *(getattr(memory, name) / 1e9 for name in names), memory.total / 1e9]
           for stage, memory in enumerate(estimate.memory)])
    table("one step (slowest stage)", ["what", "ms"], [[name, 1e3 * value] for name, value in estimate.parts.items()])
    table("communication of one rank in a step", ["dimension", "MB"],
          [[name, size / 1e6] for name, size in estimate.communication_bytes.items() if size])
    info(f"{planner.parameters:,} parameters, {planner.model_flops / estimate.tokens:.3g} FLOPs per token (forward "
         f"products x 3), "
         f"step {estimate.step_seconds:.4g} s, MFU {estimate.mfu:.1%} of {planner.cluster.peak_tflops:g} "
         f"TFLOP/s, {estimate.tokens_per_second_per_device:.4g} tokens/s per device, bubble {estimate.bubble:.1%}")
