"""`python -m parallel dryrun --graph decode`: what a device holds and sends while a trained model is used."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError
from parallel.common.progress import info, progress, table
from parallel.proof.compile.casts import parameter_casts
from parallel.proof.compile.graph import Graph, read_graph
from parallel.proof.compile.rank_compiler import Compiled, Compilers, Request
from parallel.proof.dryrun.accounting import Collective, collectives, coordinates, summary
from parallel.proof.export import inference_layout
from parallel.proof.replay.inline import flat
from parallel.sharding.config import ParallelConfig
from parallel.task import ModelPackage
from parallel.torch_runtime.program import CACHE
from parallel.training.settings import RunSettings

_SHARES_MEMORY = {"Load", "Depend", "Reshape", "TupleGetItem", "MakeTuple", "UpdateState", "ScatterUpdate",
                  "ScatterSub", "ExpandDims"}


@dataclass(frozen=True)
class Held:
    """Bytes on one rank.

    Args:
        weights: its shards.
        cache: its shard of the cache of the shape that the graph is compiled with.
        activations: results that are alive at once, at most; an estimate from the graph, no planner of device memory
            has seen it.
    """

    weights: int
    cache: int
    activations: int


def run(package: ModelPackage, settings: RunSettings, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compiles a graph of inference on one rank of a group, or on the first of every stage, and reports it.

    Args:
        package: the model's.
        settings: of the run.
        arguments: those of the verb.

    Raises:
        UserError: a kind that the model has not, a layout that does not fit it, a rank outside the group.
    """
    check_kind(package, settings, arguments.graph)
    for flag in ("html", "flat", "all_stages"):
        if getattr(arguments, flag):
            raise UserError("is for the training step", where=f"--{flag.replace('_', '-')}", hint="leave it out")
    overrides = [*arguments.overrides, *inference_layout(settings.parallel.forward().resolve())]
    config = settings.parallel.forward().resolve()
    size = config.op * config.pipeline.stages
    ranks = list(range(0, size, config.op)) if arguments.ranks is not None else [arguments.rank or 0]
    if not 0 <= ranks[0] < size:
        raise UserError(f"a group has ranks 0 to {size - 1}", where="--rank", value=ranks[0])
    info(f"compiling the {arguments.graph} graph of a group of {size}: op {config.op}, stages {config.pipeline.stages} "
         "(compiled, not run)")
    found = []
    with Compilers() as compilers:
        for rank in progress(ranks, "dryrun"):
            request = Request(size, rank, str(Path(arguments.config).resolve()), overrides, graph=arguments.graph)
            folders = [Path(arguments.keep) / f"rank_{rank}"] if arguments.keep else None
            found.append(_figures(compilers.compile([request], folders)[0]))
    figures, wrong = dict(found[0]), sum(item["unexpected_redistributions"] for item in found)
    if arguments.strict and wrong:
        raise UserError(f"{wrong} unexpected redistributions: two layers disagree on a layout", where="--strict")
    return figures if len(found) == 1 else figures | {"ranks": found}


def check_kind(package: ModelPackage, settings: RunSettings, kind: str) -> None:
    """Raises a UserError unless the model has such a graph of inference."""
    kinds = package.inference_kinds(settings)
    if kind not in kinds:
        raise UserError("no such graph", where="--graph", value=kind, hint=f"known: {', '.join(('step', *kinds))}")


def _figures(compiled: Compiled) -> dict[str, Any]:
    config = ParallelConfig.model_validate(compiled.result["parallel"])
    graph, rank = flat(read_graph(compiled.graph)), compiled.request.rank
    sent = collectives(graph, rank, config, compiled.result["redistributing"])
    held = held_by(graph)
    _show(rank, coordinates(rank, config)[0], held, sent)
    return {"rank": rank, "world": config.world, "graph": compiled.request.graph, "weight_bytes": held.weights,
            "cache_bytes": held.cache, "activation_bytes": held.activations, "tokens": compiled.result["tokens"],
            "parameter_casts": sum(item.count for item in parameter_casts(graph).values()),
            **summary(sent), "seconds": round(compiled.result["seconds"], 2)}


def held_by(graph: Graph) -> Held:
    """What the rank of a flat graph holds."""
    weights = sum(kind.bytes for name, kind in graph.parameters.items() if not name.startswith(CACHE))
    cache = sum(kind.bytes for name, kind in graph.parameters.items() if name.startswith(CACHE))
    last: dict[str, int] = {}
    for place, node in enumerate(graph.main.nodes):
        last |= dict.fromkeys(node.inputs, place)
    alive: dict[str, int] = {}
    now = most = 0
    for place, node in enumerate(graph.main.nodes):
        if node.op != "Constant" and node.op not in _SHARES_MEMORY:
            alive[node.name] = sum(kind.bytes for kind in node.outputs)
            now += alive[node.name]
        most = max(most, now)
        for name in {name for name in node.inputs if last[name] == place}:
            now -= alive.pop(name, 0)
    return Held(weights, cache, most)


def _show(rank: int, stage: int, held: Held, sent: list[Collective]) -> None:
    mib = 2**20
    table(f"rank {rank}, stage {stage}: memory (MiB)", ["what", "MiB"],
          [["weights", held.weights / mib], ["cache", held.cache / mib],
           ["activations (estimate)", held.activations / mib]])
    rows: dict[tuple, list] = {}
    for item in sent:
        entry = rows.setdefault((item.dimension, item.purpose, item.kind, len(item.ranks)), [0, 0])
        entry[0] += item.times
        entry[1] += item.wire_bytes * item.times
    table(f"rank {rank}: collectives of one call", ["dimension", "purpose", "kind", "ranks", "count", "sent MiB"],
          [[*key, count, wire / mib] for key, (count, wire) in sorted(rows.items())])
