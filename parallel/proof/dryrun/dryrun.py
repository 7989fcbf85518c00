"""`python -m parallel dryrun`: compile the training graph of any rank of any cluster, and report what is in it."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError
from parallel.common.progress import info, progress, table
from parallel.proof.compile.graph import read_graph
from parallel.proof.compile.rank_compiler import Compiled, Compilers, Request
from parallel.proof.dryrun.accounting import collectives, coordinates, memory
from parallel.proof.dryrun.rank_report import RankReport
from parallel.sharding.config import ParallelConfig
from parallel.sharding.topology import Node, mesh_rows, place_nodes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, help="compile this rank (default 0)")
    which.add_argument("--ranks", metavar="all-distinct",
                       help="compile one rank of every kind of stage; the others are alike but for their neighbours")
    parser.add_argument("--strict", action="store_true",
                        help="fail where two layers disagree on a layout (an unexpected redistribution)")
    parser.add_argument("--html", metavar="FILE", help="write a report with pictures")
    parser.add_argument("--keep", metavar="DIR", help="keep graph, layouts and log of every compiled rank there")
    parser.add_argument("--devices-per-node", type=int, default=8, metavar="N", help="devices of a machine (default 8)")
    parser.add_argument("--nodes-per-rack", type=int, metavar="N",
                        help="machines of a rack (default: as many as the stages of one data coordinate need)")
    parser.add_argument("--flat", action="store_true",
                        help="write every micro-batch out instead of sharing one graph (slower, same figures)")
    parser.add_argument("--graph", default="step", metavar="KIND",
                        help="the training step (default), or a graph by which a trained model is used: decode, "
                             "prefill, score")
    parser.add_argument("--all-stages", action="store_true",
                        help="analyse the layers of other stages, too, which are dropped anyway (slower, same figures)")


def run(settings: None, arguments: argparse.Namespace) -> dict[str, Any]:
    """The verb.

    Raises:
        UserError: a layout that does not fit, a rank outside the world, and under --strict unexpected redistributions.
    """
    from parallel.task import load_run

    package, run_settings = load_run(arguments.config, arguments.overrides)
    everything = arguments.ranks is not None
    if everything and arguments.ranks != "all-distinct":
        raise UserError("ranks can only be all-distinct", where="--ranks", value=arguments.ranks,
                        hint="use --rank N for one rank")
    if arguments.graph != "step":
        from parallel.proof.dryrun import inference

        return inference.run(package, run_settings, arguments)
    config = run_settings.parallel.resolve()
    first = arguments.rank or 0
    if not 0 <= first < config.world:
        raise UserError(f"the layout has ranks 0 to {config.world - 1}", where="--rank", value=first)
    request = Request(config.world, first, str(Path(arguments.config).resolve()), list(arguments.overrides),
                      reuse=not arguments.flat, own_stage=not arguments.all_stages)
    info(f"compiling rank {first} of {config.world}: data {config.data}, op {config.op}, "
         f"stages {config.pipeline.stages} (compiled, not run)")
    reports = dry_run(request, all_distinct=everything, keep=Path(arguments.keep) if arguments.keep else None)
    nodes = _nodes(arguments, config)
    table("mesh", ["axis", "ranks of a group", "step", "the first group", "reaches"], mesh_rows(config, nodes))
    for report in reports:
        show(report)
    if arguments.html:
        from parallel.proof.dryrun.html_report import write_report

        write_report(Path(arguments.html), reports, nodes, title=Path(arguments.config).name)
    if arguments.strict:
        check(reports)
        check_transfers(reports)
    figures = reports[0].figures()
    if everything:
        figures |= {"seconds": round(sum(report.result["seconds"] for report in reports), 2),
                    "peak_rss_gb": round(max(report.result["peak_rss_gb"] for report in reports), 3),
                    "ranks": [report.figures() for report in reports]}
    return figures


def _nodes(arguments: argparse.Namespace, config: ParallelConfig) -> list[Node]:
    for flag in ("devices_per_node", "nodes_per_rack"):
        number = getattr(arguments, flag)
        if number is not None and number < 1:
            raise UserError("must be at least 1", where=f"--{flag.replace('_', '-')}", value=number)
    return place_nodes(config, arguments.devices_per_node, arguments.nodes_per_rack)


def dry_run(request: Request, *, all_distinct: bool = False, keep: Path | None = None) -> list[RankReport]:
    """Compiles and counts the rank of `request`, or one rank for every kind of stage.

    Raises:
        UserError: see `compile_rank`.
    """
    with Compilers() as compilers:
        reports = [_compiled(compilers, request, keep)]
        if all_distinct:
            others = [rank for rank in distinct_ranks(reports[0]) if rank != request.rank]
            for rank in progress(others, "dryrun"):
                reports.append(_compiled(compilers, Request(**{**asdict(request), "rank": rank}), keep))
    return sorted(reports, key=lambda report: report.rank)


def _compiled(compilers: Compilers, request: Request, keep: Path | None) -> RankReport:
    folders = [keep / f"rank_{request.rank}"] if keep is not None else None
    return read_rank(compilers.compile([request], folders)[0])


def read_rank(compiled: Compiled) -> RankReport:
    """Reads and counts what a child compiled."""
    config = ParallelConfig.model_validate(compiled.result["parallel"])
    graph, rank = read_graph(compiled.graph), compiled.request.rank
    held = memory(graph, set(compiled.result["trainable"]), rank, config, compiled.result["micro_batches"])
    found = collectives(graph, rank, config, compiled.result.get("redistributing", ()))
    if compiled.request.own_stage:  # the tags are numbered through the layers of all stages
        found = [replace(item, tag=None) for item in found]
    return RankReport(compiled.request, compiled.result, config, graph, compiled.layouts, found, held)


def distinct_ranks(report: RankReport) -> list[int]:
    """The first rank of every kind of stage: the first, the last, and one for each number of layers between them.

    Ranks of one stage hold slices of the same shapes and take part in the same collectives with other neighbours; what
    differs is only which rows of the vocabulary are theirs.
    """
    layers, per_stage = report.result["layers_of_stages"], report.config.data * report.config.op
    kinds: dict[tuple, int] = {}
    for stage, count in enumerate(layers):
        last = stage == len(layers) - 1
        # What a stage keeps alive under 1f1b depends on its number too, so memory is given for the earliest of a kind.
        kinds.setdefault((stage == 0, last, count), stage * per_stage)
    return sorted(kinds.values())


def check(reports: list[RankReport]) -> None:
    """Raises a `UserError` naming the first redistribution that no layer asked for."""
    for report in reports:
        wrong = [item for item in report.collectives if item.unexpected]
        if wrong:
            item = wrong[0]
            raise UserError(
                f"{sum(entry.times for entry in wrong)} unexpected redistributions on rank {report.rank}: two layers "
                f"disagree on a layout, the first is {item.kind} of {list(item.shape)} {item.dtype}",
                where=item.scope, hint="give both sides the same sharding")


def check_transfers(reports: list[RankReport]) -> None:
    """Raises a `UserError` if one compiled stage sends what the next one never receives, or waits for what never comes;
    on a cluster either would hang."""
    by_stage = {report.stage: report for report in reports}
    for stage, report in by_stage.items():
        other = by_stage.get(stage + 1)
        if other is None:
            continue
        for sender, receiver in ((report, other), (other, report)):
            sent, received = _transfers(sender, "Send", receiver.stage), _transfers(receiver, "Receive", sender.stage)
            if sent != received:
                shape, dtype = next(iter((sent - received) or (received - sent)))
                raise UserError(
                    f"stage {sender.stage} sends {sum(sent.values())} tensors to stage {receiver.stage}, which "
                    f"receives {sum(received.values())}; the first without a partner is {list(shape)} {dtype}",
                    where="pipeline", hint="make on each stage what it needs, or stop the gradient there")


def _transfers(report: RankReport, kind: str, peer_stage: int) -> Counter[tuple]:
    counts: Counter[tuple] = Counter()
    for item in report.collectives:
        if item.kind == kind and coordinates(item.ranks[1], report.config)[0] == peer_stage:
            counts[item.shape, item.dtype] += item.times
    return counts


def show(report: RankReport) -> None:
    """Prints the tables of one rank."""
    held, mib = report.memory, 2**20
    table(f"rank {report.rank}, stage {report.stage}: memory (MiB)", ["what", "MiB"],
          [["parameters", held.parameters / mib], ["optimizer states", held.optimizer / mib],
           ["gradients", held.gradients / mib], ["activations (estimate)", held.activations / mib]])
    rows: dict[tuple, list] = {}
    for item in report.collectives:
        key = (item.dimension, item.purpose, item.phase, item.kind, _ranks_text(item.ranks))
        entry = rows.setdefault(key, [0, 0, 0, ""])
        entry[0] += item.times
        entry[1] += item.bytes * item.times
        entry[2] += item.wire_bytes * item.times
        entry[3] = "unexpected" if item.unexpected else entry[3]
    table(f"rank {report.rank}: collectives of one step",
          ["dimension", "purpose", "phase", "kind", "ranks", "count", "MiB", "sent MiB", ""],
          [[*key, entry[0], entry[1] / mib, entry[2] / mib, entry[3]] for key, entry in sorted(rows.items())])


def _ranks_text(ranks: tuple[int, ...]) -> str:
    if len(ranks) <= 4:
        return " ".join(map(str, ranks))
    step = ranks[1] - ranks[0]
    return f"{ranks[0]} {ranks[1]} .. {ranks[-1]} ({len(ranks)}, step {step})"
