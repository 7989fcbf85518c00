"""The search for a layout: every way to use N devices that fits, by what a step takes: verb `plan`."""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError
from parallel.common.files import atomic_write
from parallel.common.progress import Bar, info, table
from parallel.common.yaml_core import dump_yaml
from parallel.planning.estimate import figures_of, show
from parallel.planning.hints import hints, size_text
from parallel.planning.planner import Estimate, Planner, planner_for
from parallel.planning.report import recompute_name, write_report
from parallel.sharding.config import ParallelConfig, RecomputeConfig

TEN = 10
_MOST_MICRO_BATCHES = 256
_MOST_COUNTS = 6
_INTERLEAVES = (2, 4)
_FINALISTS = 12
_MOST_COMPILED = 3
_COMPARED = ("parameters", "optimizer", "gradients", "activations")
_NO_RECOMPUTE = RecomputeConfig()
_COLUMNS = ("data", "op", "stages", "micro", "chunks", "recompute", "shard", "sequence")


@dataclass
class Search:
    """What a search found.

    Args:
        best: the ten best that fit, exactly worked out.
        lost: why the others lost, and how many.
        tried: layouts looked at.
        seconds: of the search.
        nearest: where nothing fits, the layout that is least too large.
        losers: every other layout with its quick estimate (None: not worked out) and why it lost.
    """

    best: list[Estimate]
    lost: Counter = field(default_factory=Counter)
    tried: int = 0
    seconds: float = 0.0
    nearest: Estimate | None = None
    losers: list[tuple[ParallelConfig, Estimate | None, str]] = field(default_factory=list)

    def lose(self, config: ParallelConfig, quick: Estimate | None, reason: str) -> None:
        """Notes a layout that is not among the best."""
        self.lost[reason.partition(":")[0]] += 1
        self.losers.append((config, quick, reason))


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def layouts(planner: Planner, devices: int, base: ParallelConfig) -> Iterator[ParallelConfig]:
    """Layouts of `devices` worth a look: op within two nodes, stages no more than layers, micro-batches that divide.

    Per shape (data, op, stages) these are crossed: micro-batches x recompute (none, the cells named in the config,
    full, full with what is kept sliced over op) x optimizer shard x sequence x interleave.
    """
    layers, batch = max(1, planner.units - 2), planner.task.inputs[0].shape[0]
    for op in divisors(devices):
        if op > 2 * planner.cluster.devices_per_node:
            break
        for stages in divisors(devices // op):
            data = devices // op // stages
            if stages > layers or batch % data or (planner.units == 1 and stages > 1):
                continue
            yield from _choices(planner, base, data, op, stages, batch // data, layers)


def _choices(planner: Planner, base: ParallelConfig, data: int, op: int, stages: int, rows: int,
             layers: int) -> Iterator[ParallelConfig]:
    counts = [count for count in divisors(rows) if stages <= count <= _MOST_MICRO_BATCHES]
    if stages == 1:
        counts = counts[:1] + [count for count in counts[1:] if rows // count in (1, 2, 4, 8, 16)]
    policies = _policies(planner, base) if planner.units > 1 else (("none", False),)
    # A shard must divide a slice's rows; where all of the data axis cannot, its largest power of 2 often does.
    power = data & -data
    shards = ([1] if data * op == 1 else [1, -1]) + ([power] if power not in (1, data) else [])
    sequences = (False, True) if op > 1 and _has_sequence(planner) else (False,)
    # The largest micro-batches run best, the smallest hold least and fill the pipeline.
    counts = sorted({*counts[:_MOST_COUNTS // 2], *counts[-_MOST_COUNTS // 2:]})
    for count, shard, sequence, (policy, sliced) in itertools.product(counts, shards, sequences, policies):
        if sliced and (sequence or op == 1):
            continue  # then nothing that is kept is replicated on the ranks of op
        chunks = [1] + [chunk for chunk in _INTERLEAVES if stages > 1 and stages * chunk <= layers
                        and count % stages == 0]
        for chunk in chunks:
            config = _config(base, data, op, stages, count, shard, sequence, chunk)
            config.recompute.policy, config.recompute.slice_activations = policy, sliced
            yield config


def _policies(planner: Planner, base: ParallelConfig) -> tuple[tuple[str, bool], ...]:
    """(policy, slice activations), those that cost least time first."""
    found, _ = planner.description(1, 1)
    scopes = {f".{operation.scope}." for operation in found.operations if operation.layer}
    named = all(any(f".{name}." in scope for scope in scopes) for name in base.recompute.cells)
    selective = (("selective", False),) if named and base.recompute.cells else ()
    return (("none", False), *selective, ("full", False), ("full", True))


def _has_sequence(planner: Planner) -> bool:
    """Whether a layer of the model can be sharded along the residual stream's tokens."""
    found, _ = planner.description(1, 1)
    return any(axes and "residual" in axes for operation in found.operations for axes in operation.wanted)


def _config(base: ParallelConfig, data: int, op: int, stages: int, count: int, shard: int, sequence: bool,
            chunk: int) -> ParallelConfig:
    config = base.model_copy(deep=True)
    config.devices, config.data, config.op, config.sequence = data * op * stages, data, op, sequence
    config.expert = base.expert if data % base.expert == 0 else 1
    config.vocabulary = base.vocabulary or stages > 1
    config.pipeline.offsets, config.pipeline.stages, config.pipeline.micro_batches = None, stages, count
    config.pipeline.schedule, config.pipeline.interleave = ("interleaved" if chunk > 1 else "1f1b"), chunk
    config.optimizer.shard = shard
    config.optimizer.level = config.optimizer.level if shard != 1 else 1
    return config


def search(planner: Planner, devices: int, base: ParallelConfig, progress: bool = True) -> Search:
    """Tries every layout quickly, then works the best ones out exactly.

    Raises:
        UserError: no layout of this number of devices divides model and batch.
    """
    started, found, fitting = time.monotonic(), Search([]), []
    nearest: tuple[int, ParallelConfig] | None = None
    todo, roomy = list(layouts(planner, devices, base)), set()
    with Bar(len(todo) if progress else None, "plan") as bar:
        for config in todo:
            bar.advance(1)
            if not planner.divides(config, config.pipeline.micro_batches):
                found.lose(config, None, "an axis does not divide")
                continue
            found.tried += 1
            kept = _without_recompute(config)
            if kept in roomy:
                # Its twin that keeps everything fits already, and recomputing can only cost time.
                found.lose(config, None, "recomputation")
                continue
            quick = planner.evaluate(config, exact=False, ends_only=True)
            if quick.missing > 0:
                found.lose(config, quick, f"memory: {size_text(quick.missing)} too much")
                if nearest is None or quick.missing < nearest[0]:
                    nearest = (quick.missing, config)
                continue
            roomy.add(kept)
            fitting.append((quick.step_seconds, len(fitting), quick))
    if not fitting and nearest is None:
        raise UserError("no layout of this number of devices divides the model and the batch", where="--devices",
                        value=devices, hint="choose a number with more small factors, or another global batch")
    fitting.sort(key=lambda entry: entry[:2])
    exact = [planner.evaluate(entry[2].config) for entry in fitting[:_FINALISTS]]
    exact = sorted((item for item in exact if item.missing <= 0), key=lambda item: item.step_seconds)
    found.best = exact[:TEN]
    for _, _, quick in fitting[_FINALISTS:]:
        found.lose(quick.config, quick, main_loss(quick, found.best[0]) if found.best else "memory")
    for item in exact[TEN:]:
        found.lose(item.config, item, main_loss(item, found.best[0]))
    if not found.best and nearest is not None:
        found.nearest = planner.evaluate(nearest[1])
    found.seconds = time.monotonic() - started
    return found


def write_list(path: Path, found: Search) -> None:
    """Writes a CSV file with one row for every layout looked at: the best first, then the others and why they lost."""
    rows = [(item.config, item, "" if item is found.best[0] else main_loss(item, found.best[0]))
            for item in found.best]
    with atomic_write(path) as file:
        writer = csv.writer(file)
        writer.writerow([*_COLUMNS, "step_seconds", "mfu", "memory_gb", "lost_by"])
        for config, estimate, reason in [*rows, *found.losers]:
            figures = (["", "", ""] if estimate is None else
                       [f"{estimate.step_seconds:.5g}", f"{estimate.mfu:.4f}", f"{estimate.fullest.total / 1e9:.2f}"])
            writer.writerow([*_cells(config), *figures, reason])


def _cells(config: ParallelConfig) -> list[Any]:
    return [config.data, config.op, config.pipeline.stages, config.pipeline.micro_batches, config.pipeline.interleave,
            recompute_name(config), config.optimizer.shard, str(config.sequence)]


def _without_recompute(config: ParallelConfig) -> str:
    return config.model_copy(update={"recompute": _NO_RECOMPUTE}).model_dump_json()


def main_loss(loser: Estimate, winner: Estimate) -> str:
    """The part of a step in which a layout loses most against the winner."""
    names = {"compute": "smaller products", "recompute": "recomputation", "op": "op communication", "bubble": "bubble",
             "gradients": "gradient communication", "update": "update", "waiting": "waiting"}
    gaps = {name: loser.parts[name] - winner.parts[name] for name in names}
    return names[max(gaps, key=gaps.get)]


def block(config: ParallelConfig) -> dict[str, Any]:
    """The `parallel:` block, defaults left out."""
    tree, plain = config.model_dump(mode="json"), ParallelConfig().model_dump(mode="json")

    def differing(mine: dict, usual: dict) -> dict:
        out = {}
        for key, value in mine.items():
            if isinstance(value, dict):
                value = differing(value, usual[key])
                if value:
                    out[key] = value
            elif value != usual[key]:
                out[key] = value
        return out

    return differing(tree, plain)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `plan`."""
    parser.add_argument("--cluster", metavar="FILE", default="configs/cluster/ascend910.yaml",
                        help="YAML file that describes devices and network, or the name of one of configs/cluster "
                        "(default: %(default)s)")
    parser.add_argument("--devices", type=int, metavar="N", help="how many devices (default: those of the config file)")
    parser.add_argument("--output", metavar="FILE", help="write the best layout's parallel block as YAML")
    parser.add_argument("--html", metavar="FILE", help="write a report with pictures")
    parser.add_argument("--list", metavar="FILE", help="write every layout that was tried, and why it lost, as CSV")
    parser.add_argument("--confirm", action=argparse.BooleanOptionalAction, default=True,
                        help="compile the first stage of the best layout (dry run) and compare; where it does not "
                        "compile, the next best (default: yes)")


def run(settings: None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Verb `plan`."""
    planner, run_settings = planner_for(arguments.config, arguments.overrides, arguments.cluster)
    own = _own_layout(run_settings.parallel, arguments.devices)
    devices = own.world if arguments.devices is None else arguments.devices
    if devices < 1:
        raise UserError("must be at least 1", where="--devices", value=devices)
    found = search(planner, devices, own)
    info(f"{found.tried} layouts in {found.seconds:.1f} s; lost by: "
         + ", ".join(f"{name} {count}" for name, count in found.lost.most_common()))
    if not found.best:
        raise nothing_fits(planner, found, devices)
    _show_best(found)
    best, paper = found.best[0], None
    show(best, planner)
    if own.world == devices:
        paper = compare_with_own(planner, own, best)
    text = dump_yaml({"parallel": block(best.config)})
    info(text)
    if arguments.output:
        with atomic_write(Path(arguments.output)) as file:
            file.write(text)
    if arguments.list:
        write_list(Path(arguments.list), found)
    if arguments.html:
        write_report(Path(arguments.html), planner, best, title=Path(arguments.config).name, search=found)
    figures = {"best": block(best.config), **figures_of(best, planner),
               "paper_layout_step_seconds": paper.step_seconds if paper else None, "tried": found.tried,
               "seconds": found.seconds, "lost": dict(found.lost)}
    if arguments.confirm:
        figures |= confirm(arguments.config, arguments.overrides, found)
    return figures


def compare_with_own(planner: Planner, own: ParallelConfig, best: Estimate) -> Estimate | None:
    """The estimate of the config file's own layout, with why it is slower than the best one; None where the model does
    not have it, as with fewer layers than the file's stages."""
    try:
        estimate = planner.evaluate(own)
    except UserError as error:
        info(f"the config file's own layout is not this model's: {error}")
        return None
    info(f"the config file's own layout: step {estimate.step_seconds:.4g} s, {estimate.fullest.total / 1e9:.1f} GB"
         + (", does not fit" if estimate.missing > 0 else "") + f"; it loses by {main_loss(estimate, best)}")
    return estimate


def nothing_fits(planner: Planner, found: Search, devices: int) -> UserError:
    """By how much the layout that is least too large does not fit, and which single change would make it fit."""
    near = found.nearest
    layout = dump_yaml(block(near.config), flow=True)
    return UserError(f"nothing fits: the nearest layout needs {size_text(near.missing)} more than a device has",
                     where=f"{devices} devices", value=layout, hint=hints(planner, near.config))


def _own_layout(own: ParallelConfig, devices: int | None) -> ParallelConfig:
    """The config file's layout; where it fits no number of devices, only what does not depend on it."""
    try:
        return own.resolve()
    except UserError:
        if devices is None:
            raise
        return own.model_copy(update={"data": 1, "op": 1, "devices": None, "expert": 1}).resolve()


def _show_best(found: Search) -> None:
    winner = found.best[0]
    rows = []
    for item in found.best:
        rows.append([*_cells(item.config), item.step_seconds, f"{item.mfu:.1%}", item.fullest.total / 1e9,
                     "" if item is winner else main_loss(item, winner)])
    table("the ten best layouts", [*_COLUMNS, "step s", "MFU", "GB", "loses by"], rows)


def confirm(config: str, overrides: list[str], found: Search) -> dict[str, Any]:
    """Dry-runs the first stage of the best layout that compiles and holds its bytes against the estimate's.

    Returns:
        confirmed: {kind: [planner's bytes, dry run's]} or None; confirmed_place: 1 if it was the best;
        confirm_seconds: what that took.
    """
    from parallel.proof.compile.rank_compiler import Request
    from parallel.proof.dryrun.dryrun import dry_run

    started = time.monotonic()
    for rank, item in enumerate(found.best[:_MOST_COMPILED], 1):
        info(f"dry run of layout {rank} (compiled, not run): {block(item.config)}")
        words = [*overrides, *_words("parallel", item.config.model_dump(mode="json"))]
        try:
            report = dry_run(Request(item.config.world, 0, str(Path(config).resolve()), words,
                                     own_stage=True))[0]
        except UserError as error:
            info(f"layout {rank} is not confirmed: {error}")
            continue
        result = _compared(item, report)
        table("first stage: here and in the dry run", ["what", "planner", "dry run"],
              [[name, *pair] for name, pair in result.items()])
        return {"confirmed": result, "confirmed_place": rank, "confirm_seconds": time.monotonic() - started}
    return {"confirmed": None, "confirmed_place": None, "confirm_seconds": time.monotonic() - started}


def _compared(item: Estimate, report: Any) -> dict[str, list[int]]:
    estimated, dry = item.memory[0], report.memory
    result = {name: [getattr(estimated, name), getattr(dry, name)] for name in _COMPARED}
    mine = sum(collective.bytes * times for collective, times in item.stages[0].collectives.items())
    return result | {"communication": [mine,
                                       sum(collective.bytes * collective.times for collective in report.collectives)]}


def _words(prefix: str, tree: dict[str, Any]) -> list[str]:
    words = []
    for key, value in tree.items():
        if isinstance(value, dict):
            words += _words(f"{prefix}.{key}", value)
        else:
            words.append(f"{prefix}.{key}={dump_yaml(value, flow=True)}")
    return words
