"""Compiling a stage without the layers of the others leaves the graph that compiling all of them leaves, but for the
numbers by which Send and Receive find each other."""

from __future__ import annotations

import dataclasses
import platform
import re
import shutil
from collections import Counter

import pytest

from parallel.proof.compile.graph import Graph
from parallel.proof.dryrun.rank_report import RankReport
from parallel.sharding.parallelize import parallelize
from parallel.training.sharded.stage_only import PlaceholderLayer, held_parameters, leave_out_other_stages
from tests.parallel import proof_networks as networks

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="the dry run needs g++ on x86-64")

FULL = {"recompute": {"policy": "full"}}
WET = {"layers": 8, "dropout": 0.1}


def message(graph: Graph) -> Counter:
    """Every node with its types, attributes and cell, how often it runs, and what its operands are."""
    found: Counter = Counter()
    for function, node, times in graph.walk():
        operands = tuple(source.op if (source := function.by_name.get(name)) else "input" for name in node.inputs)
        value = node.value.SerializeToString() if node.op == "Constant" and node.value is not None else b""
        scope = "" if node.op == "call" else unnumbered(node.scope)  # a call is named after its function's number
        attributes = str(sorted((key, item) for key, item in node.attributes.items() if key != "sr_tag"))
        found[node.op, tuple(node.outputs), attributes, scope, operands, value] += times
    return found


def output(report: RankReport) -> Counter:
    """Its collectives, but for what is numbered through the whole graph."""
    return Counter(dataclasses.replace(item, tag=None, scope=unnumbered(item.scope)) for item in report.collectives)


def unnumbered(scope: str) -> str:
    """A node's scope without its number among all nodes of the graph."""
    return re.sub(r"-op\d+$", "", scope)


def same(compiled, rank: int, **layout) -> None:
    """The two graphs of a rank are one."""
    full, own = (compiled("pangu", rank, own_stage=alone, **layout) for alone in (False, True))
    assert len(full.graph.main.nodes) == len(own.graph.main.nodes) > 500
    assert message(full.graph) == message(own.graph)
    assert full.graph.parameters == own.graph.parameters
    assert all(item.tag is None for item in own.collectives)
    assert output(full) == output(own)
    assert full.memory == own.memory


@pytest.mark.parametrize(("pipeline", "expected"), [
    ({"stages": 4}, 8 - 2 - 2),  # two of its own, the first and the last
    ({"stages": 4, "schedule": "interleaved", "interleave": 2}, 0),
    ({"stages": 1}, 0),
])
def test_the_layers_of_others_are_left_out(pipeline, expected) -> None:
    task, _, config = networks.pangu({"pipeline": pipeline}, {"layers": 8})
    network = parallelize(task.network, config)
    before = [item.name for item in network.trainable_params()]
    leave_out_other_stages(network, config, 1 if config.pipeline.stages > 1 else 0)
    assert sum(isinstance(cell, PlaceholderLayer) for _, cell in network.cells_and_names()) == expected
    held = [item.name for item in held_parameters(network)]
    layer = [name for name in before if name.startswith("layers.0.")]
    assert len(before) - len(held) == expected * len(layer) and set(held) <= set(before)


@pytest.mark.slow
def test_middle_stage(compiled) -> None:
    same(compiled, 2, data=1, op=2, pipeline={"stages": 4, "micro_batches": 4}, model=WET)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 5, 10, 15])
def test_every_stage_under_all_five(compiled, rank) -> None:
    same(compiled, rank, data=2, op=2, pipeline={"stages": 4, "micro_batches": 4}, optimizer={"shard": -1}, model=WET,
         **FULL)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("pipeline", [{"offsets": [1, 0, 0, -1]}, {"schedule": "gpipe"}], ids=["uneven", "gpipe"])
def test_other_schedules(compiled, rank, pipeline) -> None:
    same(compiled, rank, pipeline={"stages": 4, "micro_batches": 4} | pipeline, model={"layers": 8},
         recompute={"policy": "selective"})


@pytest.mark.slow
def test_micro_batches_written_out(compiled) -> None:
    same(compiled, 2, op=2, pipeline={"stages": 4, "micro_batches": 4}, model=WET, reuse=False)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_what_layers_take_beside_the_stream_still_crosses_borders(compiled, rank) -> None:
    """Stage 0 sends the bias to the other three for each of four micro-batches."""
    layout = {"pipeline": {"stages": 4, "micro_batches": 4}, "model": {"layers": 8}}
    full, own = (compiled("one_bias", rank, own_stage=alone, **layout) for alone in (False, True))
    assert output(full) == output(own)
    bias = [item for item in own.collectives if item.kind in ("Send", "Receive") and len(item.shape) == 4]
    assert {item.ranks for item in bias} == ({(0, 1), (0, 2), (0, 3)} if rank == 0 else {(2, 0)})
