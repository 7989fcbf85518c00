"""`replay --grid`: one config file under many layouts, each compared with one device, as one table.

A new layout is one line in LAYOUTS. Where the model, the partitioner or MindSpore refuses a layout the table says why.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from parallel.common.errors import UserError
from parallel.common.progress import Bar, info, table
from parallel.proof.compile.rank_compiler import Compilers
from parallel.proof.replay.lockstep import Replay
from parallel.proof.replay.ranks import AllRanks, compile_ranks
from parallel.proof.replay.reference import OneDevice
from parallel.proof.replay.settings import check_layout, check_size, with_defaults


def _keys(data: int = 1, op: int = 1, stages: int = 1, micro: int = 0, shard: int = 1, recompute: str = "",
          more: str = "") -> str:
    """Overrides of a layout; recompute "full", "selective" or "sliced"."""
    found = [f"parallel.data={data}", f"parallel.op={op}", f"parallel.pipeline.stages={stages}"]
    if stages > 1:
        found.append(f"parallel.pipeline.micro_batches={micro or stages}")
    if shard != 1:
        found.append(f"parallel.optimizer.shard={shard}")
    if recompute:
        found.append(f"parallel.recompute.policy={'full' if recompute == 'sliced' else recompute}")
    if recompute == "sliced":
        found.append("parallel.recompute.slice_activations=true")
    return " ".join([*found, *more.split()])


@dataclass(frozen=True)
class Layout:
    """A layout of the grid.

    Args:
        name: what `--grid` takes.
        keys: overrides, space-separated.
        twin: a layout that must end equal bit for bit: the same sharding without recomputation.
    """

    name: str
    keys: str
    twin: str = ""


# The epsilon: see docs/replay.md for what float32 rounds.
_SPARSE = "train.sparse_optimizer.name=adagrad train.sparse_optimizer.learning_rate=1e-2 " \
          "train.sparse_optimizer.epsilon=1e-2"
_FLASH = "model.attention=flash model.hidden_size=64"  # heads of 16, which it asks for
LAYOUTS = (
    # Each dimension alone.
    Layout("one", _keys()),
    Layout("data", _keys(data=2)),
    Layout("data_4", _keys(data=4)),
    Layout("op", _keys(op=2)),
    Layout("op_4", _keys(op=4)),
    Layout("stages", _keys(stages=2)),
    Layout("stages_4", _keys(stages=4, more="model.layers=4")),
    Layout("optimizer", _keys(data=2, shard=-1)),
    Layout("recompute", _keys(recompute="full"), "one"),
    # Each pair.
    Layout("data_op", _keys(data=2, op=2)),
    Layout("data_stages", _keys(data=2, stages=2)),
    Layout("data_recompute", _keys(data=2, recompute="full"), "data"),
    Layout("op_stages", _keys(op=2, stages=2)),
    Layout("op_optimizer", _keys(data=2, op=2, shard=-1)),
    Layout("op_recompute", _keys(op=2, recompute="full"), "op"),
    Layout("stages_optimizer", _keys(data=2, stages=2, shard=-1)),
    Layout("stages_recompute", _keys(stages=2, recompute="full"), "stages"),
    Layout("optimizer_recompute", _keys(data=2, shard=-1, recompute="full"), "optimizer"),
    # Three and all five.
    Layout("data_op_stages", _keys(2, 2, 2)),
    Layout("four", _keys(2, 2, 2, shard=-1)),
    Layout("all_five", _keys(2, 2, 2, shard=-1, recompute="full"), "four"),
    Layout("all_five_sequence", _keys(2, 2, 2, shard=-1, recompute="full", more="parallel.sequence=true")),
    Layout("all_five_data_4", _keys(4, 2, 2, shard=-1, recompute="full")),
    Layout("all_five_op_4", _keys(2, 4, 2, shard=-1, recompute="full")),
    Layout("all_five_stages_4", _keys(2, 2, 4, shard=-1, recompute="full", more="model.layers=4")),
    Layout("data_4_op_4", _keys(4, 4, shard=-1)),
    Layout("data_4_stages_4", _keys(data=4, stages=4, more="model.layers=4")),
    # The optimizer's levels and shares.
    Layout("optimizer_half", _keys(data=4, shard=2)),
    Layout("optimizer_level_2", _keys(data=2, shard=-1, more="parallel.optimizer.level=2")),
    Layout("optimizer_level_3", _keys(data=2, shard=-1, more="parallel.optimizer.level=3")),
    Layout("op_optimizer_level_2", _keys(2, 2, shard=-1, more="parallel.optimizer.level=2")),
    Layout("op_optimizer_level_3", _keys(2, 2, shard=-1, more="parallel.optimizer.level=3")),
    # Gradient accumulation.
    Layout("accumulation", _keys(data=2, more="train.accumulation=2")),
    Layout("accumulation_op", _keys(op=2, more="train.accumulation=2")),
    Layout("accumulation_optimizer", _keys(data=2, shard=-1, more="train.accumulation=2")),
    Layout("accumulation_op_optimizer", _keys(2, 2, shard=-1, more="train.accumulation=2")),
    Layout("accumulation_level_2", _keys(data=2, shard=-1, more="train.accumulation=2 parallel.optimizer.level=2")),
    # Vocabulary, sequence, what recomputation keeps.
    Layout("op_whole_vocabulary", _keys(op=2, more="parallel.vocabulary=false")),
    Layout("stages_whole_vocabulary", _keys(op=2, stages=2, more="parallel.vocabulary=false")),
    Layout("sequence", _keys(op=2, more="parallel.sequence=true")),
    Layout("data_sequence", _keys(2, 2, more="parallel.sequence=true")),
    Layout("op_selective", _keys(op=2, recompute="selective"), "op"),
    Layout("op_sliced", _keys(op=2, recompute="sliced"), "op"),
    Layout("op_kept_communication", _keys(op=2, recompute="full", more="parallel.recompute.communication=false"), "op"),
    Layout("data_op_sliced", _keys(2, 2, recompute="sliced"), "data_op"),
    Layout("stages_sliced", _keys(op=2, stages=2, recompute="sliced"), "op_stages"),
    # Schedules and shares of the stages.
    Layout("gpipe", _keys(stages=2, micro=4, more="parallel.pipeline.schedule=gpipe")),
    Layout("1f1b", _keys(stages=2, micro=4)),
    Layout("interleaved", _keys(stages=2, micro=4, more="parallel.pipeline.schedule=interleaved "
                                "parallel.pipeline.interleave=2 model.layers=4")),
    Layout("uneven_stages", _keys(stages=2, more="model.layers=4 parallel.pipeline.offsets=[1,-1]")),
    Layout("uneven_stages_back", _keys(2, 1, 2, shard=-1, more="model.layers=4 parallel.pipeline.offsets=[-1,1]")),
    # Dropout: masks belong to samples and positions, whoever holds them.
    Layout("dropout", _keys(2, 2, more="model.dropout=0.1")),
    Layout("dropout_stages", _keys(2, 1, 2, more="model.dropout=0.1")),
    Layout("dropout_accumulation", _keys(data=2, more="train.accumulation=2 model.dropout=0.1")),
    Layout("dropout_all_five", _keys(2, 2, 2, shard=-1, recompute="full", more="parallel.sequence=true "
                                     "model.dropout=0.1")),
    # Attention by Ascend's fused operator, against the written-out form on one device.
    Layout("flash", _keys(2, 2, more=_FLASH)),
    Layout("flash_recompute", _keys(2, 2, recompute="full", more=_FLASH), "flash"),
    Layout("flash_all_five", _keys(2, 2, 2, shard=-1, recompute="full", more=f"parallel.sequence=true {_FLASH}")),
    Layout("flash_dropout", _keys(2, 2, more=f"{_FLASH} model.dropout=0.1")),
    Layout("flash_dropout_all_five", _keys(2, 2, 2, shard=-1, recompute="selective",
                                           more=f"{_FLASH} model.dropout=0.1")),
    # What rankers have besides: tables with an optimizer of their own, tokens sharded, experts on the data axis.
    Layout("sparse_optimizer", _keys(data=2, shard=-1, more=_SPARSE)),
    Layout("sparse_optimizer_op", _keys(2, 2, shard=-1, more=f"{_SPARSE} train.accumulation=2")),
    Layout("sparse_optimizer_stages", _keys(2, 1, 2, more=_SPARSE)),
    Layout("tokens", _keys(op=2, more="model.op_sharding=tokens")),
    Layout("data_tokens", _keys(2, 2, shard=-1, more="model.op_sharding=tokens")),
    Layout("tokens_all_five", _keys(2, 2, 2, shard=-1, recompute="full", more="model.op_sharding=tokens")),
    Layout("tokens_naive", _keys(2, 2, more="model.op_sharding=tokens_naive")),
    Layout("expert", _keys(data=2, more="parallel.expert=2")),
    Layout("expert_4", _keys(data=4, more="parallel.expert=4")),
    Layout("expert_half", _keys(data=4, shard=2, more="parallel.expert=2")),
    Layout("expert_optimizer", _keys(data=2, shard=-1, more="parallel.expert=2")),
    Layout("expert_tokens", _keys(2, 2, more="parallel.expert=2 model.op_sharding=tokens")),
    Layout("expert_stages", _keys(data=2, stages=2, more="parallel.expert=2")),
    Layout("expert_all_five", _keys(2, 2, 2, shard=-1, recompute="full", more="parallel.expert=2 "
                                    "model.op_sharding=tokens")),
)


# What a model says to a layout that does not fit it, and the word for it; any other refusal (one of MindSpore's own,
# say) is a defect.
REFUSALS = {
    "stack of": "no stack", "how its cells follow": "no stack", "more stages than": "layers",
    "leave a stage without a layer": "layers", "routed experts": "experts", "has no experts": "experts",
    "sharded along their width": "experts", "unknown key": "key", "residual stream": "residual",
    "no such cell": "cells",
    "divide": "sizes", "are not sharded": "not sharded", "run 1f1b only": "1f1b only",
    "are not kept sharded": "level 1",
}


@dataclass
class Cell:
    """One layout's row.

    Args:
        layout: which.
        figures: the verb's figures; None where it was refused.
        digest: see `Replay.digest`.
        refused: why it was refused, "" otherwise.
    """

    layout: Layout
    figures: dict[str, Any] | None
    digest: str = ""
    refused: str = ""


def chosen(names: str) -> list[Layout]:
    """The layouts of `--grid`: "all", or names with commas between.

    Raises:
        UserError: an unknown name.
    """
    known = {layout.name: layout for layout in LAYOUTS}
    wanted = list(known) if names == "all" else [name for name in names.split(",") if name]
    for name in wanted:
        if name not in known:
            raise UserError("no such layout", where="--grid", value=name, hint=f"known: all, {', '.join(known)}")
    if not wanted:
        raise UserError("names no layout", where="--grid", value=names, hint="all, or names with commas between")
    return [known[name] for name in wanted]


def run_grid(arguments: argparse.Namespace) -> dict[str, Any]:
    """The verb's figures under `--grid`."""
    layouts = chosen(arguments.grid)
    with Compilers(arguments.processes) as compilers:
        compilers.start()
        cells = []
        with Bar(len(layouts), "layouts") as bar:
            for cell in replay_all(arguments.config, arguments.overrides, layouts, compilers, arguments.steps,
                                   every_rank=arguments.every_rank, exact=not arguments.float32):
                cells.append(cell)
                bar.advance(last=cell.layout.name)
    show(cells, arguments.config)
    return summary(cells)


def replay_all(config: str, overrides: Sequence[str], layouts: Sequence[Layout], compilers: Compilers, steps: int = 3,
               *, sizes: Sequence[str] = (), references: References | None = None,
               every_rank: bool = False, trust: bool = False, exact: bool = True) -> Iterator[Cell]:
    """Replays `config` under each layout; one is compiled while the one before is executed.

    Args:
        config: YAML file of a run.
        overrides: key.sub=value; they come after a layout's own and win.
        sizes: key.sub=value; a layout's own come after them and win.
        layouts: in this order.
        compilers: what compiles.
        steps: training steps to compare.
        references: one-device runs of this file that are already there.
        every_rank, trust: see `compile_ranks`.
        exact: see `Replay`.
    """
    references = references or References(config, compilers)

    def keys_of(layout: Layout) -> list[str]:
        return with_defaults(config, [*sizes, *layout.keys.split(), *overrides])

    def compiled(layout: Layout) -> AllRanks:
        keys = keys_of(layout)
        check_size(config, keys)
        check_layout(config, keys)
        return compile_ranks(config, keys, compilers, every_rank=every_rank, trust=trust)

    with ThreadPoolExecutor(1) as pool:
        pending = [pool.submit(compiled, layout) for layout in layouts]
        try:
            for layout, future in zip(layouts, pending, strict=True):
                try:
                    world = future.result()
                    replay = Replay(world, references.of(keys_of(layout)), steps, quiet=True, exact=exact)
                    yield Cell(layout, replay.run(), replay.digest())
                except UserError as error:
                    yield Cell(layout, None, refused=str(error))
        finally:
            pool.shutdown(cancel_futures=True)


class References:
    """One-device runs; layouts that take the same micro-batches of the same model share one.

    Args:
        config: YAML file of a run.
        compilers: see `OneDevice`.
    """

    def __init__(self, config: str, compilers: Compilers | None = None) -> None:
        self.config, self.compilers, self.known = config, compilers, {}

    def of(self, overrides: Sequence[str]) -> OneDevice:
        """The run for these overrides."""
        from parallel.task import load_run
        from parallel.training.sharded.step import micro_batches

        settings = load_run(self.config, list(overrides))[1]
        described = settings.model_dump(mode="json", exclude={"parallel": True, "train": {"accumulation": True}})
        key = json.dumps([described, micro_batches(settings.train, settings.parallel.resolve())], sort_keys=True)
        if key not in self.known:
            self.known[key] = OneDevice(self.config, overrides, self.compilers)
        return self.known[key]


def bitwise(cells: Sequence[Cell]) -> dict[str, bool]:
    """For each layout with a twin that was replayed too, whether both ended equal bit for bit."""
    digests = {cell.layout.name: cell.digest for cell in cells if cell.digest}
    return {cell.layout.name: cell.digest == digests[cell.layout.twin]
            for cell in cells if cell.digest and cell.layout.twin in digests}


def show(cells: Sequence[Cell], title: str) -> None:
    """Prints the table, and below it why layouts were refused."""
    same, rows = bitwise(cells), []
    for cell in cells:
        name, figures = cell.layout.name, cell.figures
        if figures is None:
            rows.append([name, "refused", "", "", "", "", ""])
            continue
        twin = {True: f"= {cell.layout.twin}", False: f"not {cell.layout.twin}"}.get(same.get(name), "")
        verdict = "equal" if figures["equal"] else "deadlock" if "deadlock" in figures else "different"
        rows.append([name, verdict, figures["world"], figures["max_loss_difference"],
                     figures["max_parameter_difference"], twin, figures["step_seconds"]])
    table(f"{title}: layouts against one device (differences are relative)",
          ["layout", "", "world", "loss", "parameters", "bit for bit", "s a step"], rows)
    for cell in cells:
        if cell.figures is None:
            info(f"{cell.layout.name} is refused: {cell.refused}")


def summary(cells: Sequence[Cell]) -> dict[str, Any]:
    """The grid's JSON object; exit_code 1 unless all layouts that were replayed are equal, bit for bit where they must
    be."""
    ran, same = [cell for cell in cells if cell.figures is not None], bitwise(cells)
    equal = all(cell.figures["equal"] for cell in ran) and all(same.values()) and bool(ran)
    rows = [{"layout": cell.layout.name, "refused": cell.refused} if cell.figures is None else
            {"layout": cell.layout.name, **cell.figures, **({"bitwise": same[cell.layout.name]}
                                                            if cell.layout.name in same else {})} for cell in cells]
    for row in rows:
        row.pop("exit_code", None)
    largest = {f"max_{key}_difference": max((cell.figures[f"max_{key}_difference"] for cell in ran), default=None)
               for key in ("loss", "parameter")}
    return {"world": max((cell.figures["world"] for cell in ran), default=0), "equal": equal, **largest,
            "layouts": rows, "exit_code": 0 if equal else 1}
