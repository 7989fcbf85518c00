"""Verb `export`: the partitioned graphs of all ranks as a portable program (`parallel.torch_runtime.program`).

Only ranks whose graphs differ in more than their groups are compiled, as replay does. Programs are kept in a cache
under the digest of everything that shapes a graph: settings, the code that builds and shards networks, MindSpore's
version.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.common.errors import UserError
from parallel.common.files import cache_folder
from parallel.common.folders import sweep_once, temporary_name
from parallel.common.progress import info
from parallel.common.settings import Settings
from parallel.proof.compile.graph import Node, attribute_value
from parallel.proof.compile.rank_compiler import Compiled, Compilers
from parallel.proof.dryrun.accounting import COLLECTIVES, coordinates
from parallel.proof.replay.collective_order import wrong_order
from parallel.proof.replay.collectives import Call, address, group_ranks
from parallel.proof.replay.executor import BFLOAT16, Program, constant, data_inputs
from parallel.proof.replay.ranks import AllRanks, compile_graphs, read_ranks
from parallel.sharding.config import ParallelConfig
from parallel.torch_runtime import program as portable

if TYPE_CHECKING:
    from parallel.task import ModelPackage
    from parallel.training.settings import RunSettings

_PROJECT = Path(__file__).resolve().parents[2]
# What a rule reads; everything else says how the partitioner came by a node.
_ATTRIBUTES = ("axis", "paddings", "output_num", "begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask",
               "shrink_axis_mask", "epsilon", "reverse", "exclusive", "equation", "op", "split_dim", "concat_dim",
               "root_rank")
_MARKS = ("micro", "mirror_user_id", "pipeline_param")
_SOURCES = ("parallel/layers", "parallel/sharding", "parallel/training", "parallel/proof/compile",
            "parallel/proof/export.py", "parallel/torch_runtime/graph.py", "parallel/torch_runtime/program.py")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the program")
    parser.add_argument("--graphs", metavar="LIST", help="step, loss, scores with commas between (default: all that "
                        "the model has); or those of inference, as decode, prefill, score")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1),
                        help="processes that compile at once (default: 2, or 1 on one core)")


def run(settings: None, arguments: argparse.Namespace) -> dict[str, Any]:
    """The verb.

    Raises:
        UserError: a layout that does not fit or that MindSpore refuses.
    """
    from parallel.task import load_run

    if not Path(arguments.config).is_file():
        raise UserError("no such file", where="--config", value=arguments.config)
    started = time.monotonic()
    kinds = [kind for kind in (arguments.graphs or "").split(",") if kind]
    package, settings = load_run(arguments.config, list(arguments.overrides))
    served = package.inference_kinds(settings)
    if set(kinds) and not ("step" in kinds and set(kinds) <= set(portable.KINDS)) and not set(kinds) <= set(served):
        raise UserError(f"the graphs are step, and any of loss and scores; or any of {', '.join(served)}",
                        where="--graphs", value=arguments.graphs)
    if set(kinds) & set(served):
        make, settings = exported_inference, _inference_run(arguments.config, arguments.overrides)[2]
    else:
        make = exported
    made = make(arguments.config, arguments.overrides, processes=arguments.processes, kinds=kinds)
    target = Path(arguments.output)
    _copy(made, target, settings.model_dump(mode="json"), config=Path(arguments.config).name,
          overrides=list(arguments.overrides))
    opened = portable.Program(target)
    first = next(iter(opened.ranks[0].graphs))
    return {"world": opened.world, "distinct_graphs": len({rank.graphs[first] for rank in opened.ranks}),
            "bytes": sum(path.stat().st_size for path in target.iterdir()),
            "seconds": round(time.monotonic() - started, 2), "program": str(target)}


def _copy(source: Path, target: Path, settings: dict[str, Any], **more: Any) -> None:
    """Copies a program for a run with the same graphs: what shapes no graph (where its data are, how it is executed) is
    that run's own. `more` are further entries of program.json.gz."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name != portable.FILE:
            shutil.copyfile(path, target / path.name)
    tree, shaping = portable.Program(source).tree, portable.shaping(settings)["parallel"]
    own = {key: value for key, value in settings["parallel"].items() if key not in shaping and key != "devices"}
    portable.write_program_file(target, tree | {"settings": settings, "parallel": tree["parallel"] | own, **more})


def _inference_run(config: str, overrides: Sequence[str]) -> tuple[ModelPackage, list[str], RunSettings]:
    """The model's package, the overrides that end in the layout of its graphs of inference, and the settings under
    them."""
    from parallel.task import load_run

    package, settings = load_run(config, list(overrides))
    overrides = [*overrides, *inference_layout(settings.parallel.forward().resolve())]
    return package, overrides, load_run(config, overrides)[1]


def exported(config: str, overrides: Sequence[str], *, processes: int = 1, kinds: Sequence[str] | None = None,
             compilers: Compilers | None = None) -> Path:
    """Folder in the cache with the program of a run; compiled if it is not there.

    Args:
        config: YAML file of a run.
        overrides: key.sub=value.
        processes: that compile at once.
        kinds: which graphs; None = step, loss, and scores where the model has them.
        compilers: what compiles; None = started here.

    Raises:
        UserError: see `run`.
    """
    from parallel.proof.replay.settings import check_layout
    from parallel.task import load_run

    overrides = [*overrides, "parallel.backend=torch"]  # what a model leaves to the backend
    package, settings = load_run(config, overrides)
    kinds = tuple(kinds or ("step", "loss", *(("scores",) if package.has_scores else ())))
    shaping = portable.shaping(settings.model_dump(mode="json"))
    return _cached(config, overrides, digest_of(settings, kinds, shaping), kinds, processes, compilers,
                   lambda: check_layout(config, list(overrides)))


def exported_inference(config: str, overrides: Sequence[str], *, processes: int = 1,
                       kinds: Sequence[str] | None = None, compilers: Compilers | None = None) -> Path:
    """`exported` for the graphs that generate and score, of one group of data parallelism.

    Args:
        config, overrides, processes, compilers: see `exported`.
        kinds: of the model's `inference_kinds`; None = all.

    Raises:
        UserError: a model without such graphs, or a layout that does not fit it.
    """
    package, overrides, settings = _inference_run(config, overrides)
    kinds = tuple(kinds or package.inference_kinds(settings))
    if not kinds:
        raise UserError("this model has no graphs of inference", where="model.name", value=settings.model.name)
    shaping = package.shapes_inference(settings.model_dump(mode="json"))
    return _cached(config, overrides, digest_of(settings, kinds, shaping), kinds, processes, compilers,
                   lambda: package.check_inference(settings))


def inference_layout(config: ParallelConfig) -> list[str]:
    """Overrides that leave of a resolved layout what shards a forward pass: op and stages, of one data group."""
    return [f"parallel.op={config.op}", "parallel.data=1", "parallel.expert=1", "parallel.devices=null",
            "parallel.sequence=false", "parallel.micro_batch_interleave=1", "parallel.recompute.policy=none",
            "parallel.optimizer.shard=1", "parallel.optimizer.level=1", "parallel.pipeline.schedule=1f1b",
            "parallel.pipeline.interleave=1", f"parallel.pipeline.micro_batches={config.pipeline.stages}"]


def _cached(config: str, overrides: Sequence[str], digest: str, kinds: Sequence[str], processes: int,
            compilers: Compilers | None, check: Callable[[], None]) -> Path:
    """The folder of the program with this digest, made if it is missing or damaged."""
    folder = cache_folder() / "programs" / digest
    if (folder / portable.FILE).is_file():
        try:
            portable.Program(folder).check()
            return folder
        except UserError as error:
            info(f"{error.where}: {error.what}; it is compiled anew")
            shutil.rmtree(folder)
    check()
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep_once(folder.parent)
    hidden = temporary_name(folder)
    try:
        if compilers is not None:
            write_program(config, overrides, hidden, compilers, digest, kinds)
        else:
            with Compilers(processes) as own:
                write_program(config, overrides, hidden, own, digest, kinds)
        try:
            hidden.rename(folder)
        except OSError:  # another process was first, and its program is the same
            if not (folder / portable.FILE).is_file():
                raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return folder


def digest_of(settings: Settings, kinds: Sequence[str] = (), tree: dict[str, Any] | None = None) -> str:
    """Hash of everything that shapes the graphs of a run: its settings (`tree`, as JSON; None = those of training) and
    the code."""
    tree = portable.shaping(settings.model_dump(mode="json")) if tree is None else tree
    found = hashlib.sha256(json.dumps([portable.VERSION, list(kinds), tree], sort_keys=True).encode())
    found.update(importlib.metadata.version("mindspore").encode())
    package = type(settings).__module__.partition(".")[0]
    for place in (*_SOURCES, package):
        path = _PROJECT / place
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            found.update(file.read_bytes())
    return found.hexdigest()[:24]


def write_program(config: str, overrides: Sequence[str], folder: Path, compilers: Compilers, digest: str,
                  kinds: Sequence[str] = ("step",)) -> None:
    """Compiles every kind of graph of a run's layout and writes the program into `folder`."""
    from parallel.task import load_run

    settings = load_run(config, list(overrides))[1]
    compiled = {kind: compile_graphs(config, overrides, compilers, graph=kind) for kind in kinds}
    write_compiled(folder, {kind: (own[0], read_ranks(*own)) for kind, own in compiled.items()}, settings,
                   digest=digest, config=Path(config).name, overrides=list(overrides),
                   needs=_needs(config, overrides))


def _needs(config: str, overrides: Sequence[str]) -> dict[str, Any] | None:
    """What the run needs of a device's memory by the estimate, for a machine that has not enough and no MindSpore to
    work it out; None where the planner knows no such layout."""
    from parallel.planning.hints import memory_needs
    from parallel.planning.planner import planner_for

    try:
        planner, settings = planner_for(config, list(overrides), "h100")
        return memory_needs(planner, settings.parallel.resolve())
    except UserError:
        return None


def write_compiled(folder: Path, worlds: dict[str, tuple[dict[int, Compiled], AllRanks]], settings: Settings,
                   **more: Any) -> None:
    """Writes what was compiled for all ranks as a program.

    Args:
        folder: of the program.
        worlds: for each kind of graph what was compiled and read; the first is "step" or one of inference.
        settings: of the run.
        more: further entries of program.json.gz; `digest` is one.

    Raises:
        UserError: ranks whose collectives do not agree.
    """
    results = {kind: _first(compiled) for kind, (compiled, _) in worlds.items()}
    read = {kind: world for kind, (_, world) in worlds.items()}
    for kind, world in read.items():
        problem = wrong_order(world.programs)
        if problem:
            raise UserError(f"the ranks' collectives do not agree: {problem}", where=f"{kind} graph")
    main = next(iter(worlds))
    step = results[main]
    writer = portable.Writer(folder)
    tensors = [portable.Tensor(name, kind, tuple(shape), dtype, tuple(start))
               for name, kind, shape, dtype, start in step["tensors"]]
    ranks, groups = [], {"groups": set(), "messages": set()}
    for number in range(len(read[main].programs)):
        ranks.append(_rank(number, read, writer, groups))
    writer.finish(
        tensors=tensors, inputs=step["whole_inputs"], ranks=ranks, parallel=step["parallel"],
        settings=settings.model_dump(mode="json"), micro_batches=step["micro_batches"], tokens=step["tokens"],
        figures=step["figures"], shapes={kind: result["whole_inputs"] for kind, result in results.items()},
        **{key: sorted(listed) for key, listed in groups.items()},
        mindspore=importlib.metadata.version("mindspore"),
        ordered_messages={kind: ordered_messages(world.programs) for kind, world in read.items()}, **more,
    )


def _first(compiled: dict[int, Compiled]) -> dict[str, Any]:
    return next(iter(compiled.values())).result


def _rank(number: int, worlds: dict[str, AllRanks], writer: portable.Writer, known: dict[str, set]) -> portable.Rank:
    """Writes a rank's graphs and adds their groups to the `known` ones of the world."""
    graphs, groups, extents = {}, {}, {}
    for kind, world in worlds.items():
        made = converted(world.programs[number], number)
        for node in made.nodes:
            if "group" in node.attributes:
                key = "messages" if node.op in ("Send", "Receive") else "groups"
                known[key].add(made.groups[node.attributes["group"]])
        graphs[kind], groups[kind] = writer.add(made), made.groups
        extents = {**world.extents[number], **extents}
    main = next(iter(worlds.values()))
    stage, data, op = coordinates(number, main.config)
    return portable.Rank(number, stage, data, op, graphs, groups, extents,
                         tuple(sorted(main.programs[number].copies)))


def ordered_messages(programs: Sequence[Program]) -> bool:
    """Whether every receiver takes a sender's messages in the order in which they are sent, which a transport without
    tags asks for."""
    sent, taken = defaultdict(list), defaultdict(list)
    for rank, item in enumerate(programs):
        for node in item.nodes:
            if node.op in ("Send", "Receive"):
                source, target, _, tag = address(Call(rank, node, None))
                (sent if node.op == "Send" else taken)[source, target].append(tag)
    return sent == taken


def converted(program: Program, rank: int) -> portable.Graph:
    """A rank's graph in the portable form."""
    graph = program.graph
    numbers: dict[str, int] = {}
    inputs = data_inputs(program)
    for name in (*inputs, *graph.parameters, *program.constants):
        numbers[name] = len(numbers)
    nodes, groups = [], []
    for node in program.nodes:
        numbers[node.name] = len(numbers)
        nodes.append(_node(node, numbers, groups, rank))
    constants = [_literal(node.value) for node in graph.main.nodes if node.op == "Constant"]
    types = {node.name: node.outputs for node in graph.main.nodes}
    fed = [(name, portable.Kind(*_kind(types.get(name)))) for name in inputs]
    held = [(name, portable.Kind(kind.shape, kind.dtype)) for name, kind in graph.parameters.items()]
    return portable.Graph(fed, held, constants, nodes, numbers[graph.main.result], groups)


def _kind(outputs: Any) -> tuple[tuple[int, ...], str]:
    return (outputs[0].shape, outputs[0].dtype) if outputs else ((), "")


def _node(node: Node, numbers: dict[str, int], groups: list[tuple[int, ...]], rank: int) -> portable.Node:
    attributes = {key: node.attributes[key] for key in _ATTRIBUTES if node.attributes.get(key) is not None}
    if node.op in COLLECTIVES:
        members = group_ranks(node)
        if node.op in ("Send", "Receive"):
            source, target, _, tag = address(Call(rank, node, None))
            members, attributes["tag"] = (source, target), tag
        if members not in groups:
            groups.append(members)
        attributes["group"] = groups.index(members)
    marks = {key: node.marks[key] for key in _MARKS if node.marks.get(key) is not None}
    if "duplicated" in node.marks:
        marks["recomputed"] = True
    if node.instance and node.op in COLLECTIVES:
        marks["instance"] = node.instance
    return portable.Node(node.op, [numbers[name] for name in node.inputs],
                         [portable.Kind(kind.shape, kind.dtype) for kind in node.outputs], attributes, node.scope,
                         marks, numbers[node.name])


def _literal(value: Any) -> Any:
    """A constant's protobuf attribute in the portable form."""
    if value is None:
        return None
    if len(value.tensors) == 1 and not value.values:
        proto = value.tensors[0]
        array = constant(value)
        dtype = "bfloat16" if proto.data_type == BFLOAT16 else array.dtype.name
        kind = portable.Kind(array.shape, dtype)
        if array.size and (array == array.reshape(-1)[0]).all():
            return portable.Literal(kind, array.reshape(-1)[0].item())
        if dtype == "bfloat16":
            array = (array.view(np.uint32) >> 16).astype(np.uint16)
        return portable.Literal(kind, data=np.ascontiguousarray(array))
    if value.type in (type(value).TUPLE, type(value).LIST):
        return tuple(_item(item) for item in value.values)
    return _plain(attribute_value(value))


def _item(value: Any) -> Any:
    found = _literal(value)
    return found[0] if isinstance(found, tuple) and len(found) == 1 and not value.values else found


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_plain(item) for item in value)
    return None if dataclasses.is_dataclass(value) else value

