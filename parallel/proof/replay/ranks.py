"""All ranks of a layout: compiled, read, and which part of every parameter, state and input each of them holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parallel.common.errors import UserError
from parallel.common.start_value import NOT_KEPT
from parallel.proof.compile.graph import Graph, read_graph
from parallel.proof.compile.rank_compiler import Compiled, Compilers, Request
from parallel.proof.dryrun.accounting import coordinates
from parallel.proof.replay.collectives import group_ranks
from parallel.proof.replay.executor import Program, Rank, data_inputs, prepare
from parallel.proof.replay.inline import flat
from parallel.proof.replay.representatives import derived, representative_of, representatives, same_but_for_groups
from parallel.sharding.config import ParallelConfig
from parallel.sharding.slices import Extent, extent_shape, slice_of_mindspore
from parallel.training.settings import TrainSettings


@dataclass
class AllRanks:
    """All ranks of a layout, compiled and read.

    Args:
        config: resolved.
        programs: by rank.
        extents: for each rank, which part of every parameter, state and input it holds.
        count: micro-batches of a step.
        compiled_ranks: the ranks that were compiled; the others' graphs are those but for their groups (`distinct`).
    """

    config: ParallelConfig
    programs: list[Program]
    extents: list[dict[str, Extent]]
    count: int
    compiled_ranks: list[int]

    def start(self, values: dict[str, np.ndarray], exact: bool = False) -> list[Rank]:
        """Ranks that hold their parts of `values`; gradients that gather over micro-batches start at 0.

        Args:
            values: full parameters, states and counters by name.
            exact: compute in float64.

        Raises:
            UserError: a parameter of a graph has no start value.
        """
        ranks = []
        for number, (program, extents) in enumerate(zip(self.programs, self.extents, strict=True)):
            state = {}
            for name, kind in program.graph.parameters.items():
                dtype = np.dtype("float64" if exact and np.dtype(kind.dtype).kind == "f" else kind.dtype)
                if name.startswith(NOT_KEPT):
                    state[name] = np.zeros(kind.shape, dtype)
                elif name in values:
                    state[name] = np.array(part_of(values[name], extents.get(name)), dtype).reshape(kind.shape)
                else:
                    raise UserError("a parameter of the compiled graph is not one of the one-device step",
                                    where=f"rank {number}", value=name)
            ranks.append(Rank(number, program, state, exact))
        return ranks

    def inputs(self, batch: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """Each rank's rows of a global batch."""
        rows = []
        for program, extents in zip(self.programs, self.extents, strict=True):
            names = data_inputs(program)
            rows.append([part_of(item, extents.get(name)) for name, item in zip(names, batch, strict=True)])
        return rows

    def order(self, rows: int) -> np.ndarray:
        """Row order in which one device takes the same micro-batches: micro-batch k is the k-th part of every data
        rank's rows."""
        parts = np.arange(rows).reshape(self.config.data, self.count, -1)
        return parts.transpose(1, 0, 2).reshape(-1)


def compile_ranks(config: str, overrides: Sequence[str], compilers: Compilers, *, keep: str | None = None,
                  every_rank: bool = False, trust: bool = False) -> AllRanks:
    """Compiles the ranks of the layout in the file, in the types of `train.precision`, and reads what came out; see
    `compile_graphs`."""
    return read_ranks(*compile_graphs(config, overrides, compilers, keep=keep, every_rank=every_rank, trust=trust))


def compile_graphs(config: str, overrides: Sequence[str], compilers: Compilers, *, keep: str | None = None,
                   every_rank: bool = False, trust: bool = False, compute_dtype: str | None = None,
                   graph: str = "step") -> tuple[dict[int, Compiled], dict[int, Graph]]:
    """The compiled ranks of the layout in the file and their graphs, flat.

    Args:
        config: YAML file of a run.
        overrides: key.sub=value.
        compilers: what compiles.
        keep: folder for graphs, layouts and logs.
        every_rank: compile also the ranks whose graphs could be had from others (see `distinct`).
        trust: do not check that where there are but two data coordinates.
        compute_dtype, graph: see `Request`.

    Raises:
        UserError: see `compile_rank` and `prepare`.
    """
    from parallel.task import load_run

    settings = load_run(config, list(overrides))[1]
    layout = settings.parallel.resolve()
    shared = graph == "step" and needs_sharing(settings.train, layout)

    def compile_(ranks: Sequence[int]) -> dict[int, Compiled]:
        requests = [Request(layout.world, rank, str(Path(config).resolve()), list(overrides),
                            compute_dtype=compute_dtype, reuse=shared, graph=graph) for rank in ranks]
        folders = [Path(keep) / f"rank_{rank}" for rank in ranks] if keep else None
        return dict(zip(ranks, compilers.compile(requests, folders), strict=True))

    first = list(range(layout.world)) if every_rank else representatives(layout, trust)
    compiled = compile_(first)
    graphs = {rank: flat(read_graph(item.graph)) for rank, item in compiled.items()}
    if not same_but_for_groups(graphs, {rank: item.layouts for rank, item in compiled.items()}, layout):
        missing = [rank for rank in range(layout.world) if rank not in compiled]
        others = compile_(missing)
        compiled |= others
        graphs |= {rank: flat(read_graph(item.graph)) for rank, item in others.items()}
    return compiled, graphs


def needs_sharing(train: TrainSettings, layout: ParallelConfig) -> bool:
    """Whether MindSpore compiles the layout only with micro-batches that share one copy of the network's graph."""
    from parallel.training.sharded.step import micro_batches, needs_shared_graph

    return needs_shared_graph(layout, micro_batches(train, layout))


def read_ranks(compiled: dict[int, Compiled], graphs: dict[int, Graph]) -> AllRanks:
    """Makes the ranks' programs and finds which part of every parameter each holds."""
    result = next(iter(compiled.values())).result
    config = ParallelConfig.model_validate(result["parallel"])
    programs, extents = [], []
    for rank in range(config.world):
        source = rank if rank in compiled else representative_of(rank, config)
        graph = graphs[rank] if rank in compiled else derived(graphs[source], rank, config)
        programs.append(prepare(graph))
        extents.append(parameter_extents(rank, compiled[source].layouts, programs[-1], config))
    return AllRanks(config, programs, extents, result["micro_batches"], sorted(compiled))


def parameter_extents(rank: int, layouts: dict[str, list], program: Program, config: ParallelConfig) -> dict[str,
                                                                                                             Extent]:
    """The part of every parameter, state and input that a rank holds: op slices first, then the optimizer's shard.

    Args:
        rank: its number.
        layouts: MindSpore's layout list for each parameter.
        program: its graph made ready.
        config: resolved.

    Raises:
        UserError: the graph holds another shape than its layout says.
    """
    stage = coordinates(rank, config)[0]
    first = stage * config.data * config.op
    groups = {node.attributes.get("group"): group_ranks(node) for node in program.nodes if "group" in node.attributes}
    extents = {}
    for name, layout in layouts.items():
        held = program.graph.parameters.get(name)
        if not layout[6] and held is None:
            continue
        sharers = tuple(member - first for member in groups.get(layout[5], ())) if layout[5] else ()
        extent = slice_of_mindspore(layout, rank - first, sharers)
        if held is not None and extent_shape(extent) != held.shape:
            raise UserError(f"the graph holds shape {list(held.shape)}, its layout says {list(extent_shape(extent))}",
                            where=f"rank {rank}", value=name)
        extents[name] = extent
    return extents


def part_of(full: np.ndarray, extent: Extent | None) -> np.ndarray:
    """The elements of `full` in `extent`; all of them where there is none (nothing is sharded)."""
    return full if extent is None else full[tuple(slice(*pair) for pair in extent)]
