"""Routed experts as Ascend gets them, compiled and executed by the replay's rules: without padding they give what all
experts over all rows give, from only the rows that chose them."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import numpy as np
import pytest

from parallel.common.start_value import start_value
from parallel.proof.compile.graph import read_graph
from parallel.proof.compile.rank_compiler import Request
from parallel.proof.replay.executor import run_step
from parallel.proof.replay.inline import flat
from parallel.proof.replay.ranks import read_ranks
from tests.parallel.proof_networks import BATCH, EXPERTS

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="the dry run needs g++ on x86-64")

TOKENS, ROUTED, CHOSEN = EXPERTS["tokens"], EXPERTS["experts"] - 1, EXPERTS["active"] - 1


@pytest.fixture(scope="module")
def used(compilers):
    """`used(dispatch, op)`: (compiled graphs by rank, result [T, B, D] of all ranks in float64)."""
    features = np.random.default_rng(3).standard_normal((BATCH, TOKENS, EXPERTS["width"]))

    def used(dispatch: str, op: int = 1) -> tuple:
        requests = [Request(op, rank, builder="proof_networks:experts", paths=[str(Path(__file__).parents[1])],
                            arguments={"parallel": {"op": op}, "dispatch": dispatch}, graph="used")
                    for rank in range(op)]
        compiled = dict(enumerate(compilers.compile(requests)))
        graphs = {rank: flat(read_graph(item.graph)) for rank, item in compiled.items()}
        world = read_ranks(compiled, graphs)
        values = {name: start_value(name, tuple(shape), tuple(start), 1) * (30.0 if "down" in name else 1.0)
                  for name, _, shape, _, start in compiled[0].result["tensors"]}
        found = run_step(world.start(values, exact=True), world.inputs([features]))
        whole = found[0] if len(found[0]) == TOKENS else np.concatenate(found)
        return graphs, whole

    return used


def rows_of(graph, op: str) -> int:
    """Rows of weights' products, by their first operand."""
    total = 0
    for _, node, times in graph.walk():
        if node.op == op:
            source = graph.main.by_name[node.inputs[0]]
            source = graph.main.by_name[source.inputs[0]] if source.op in ("MakeTuple", "MakeList") else source
            total += times * int(np.prod(source.outputs[0].shape[:-1]))
    return total


def test_sorted_rows_give_what_all_experts_over_all_rows_give(used):
    (padded,), expected = used("capacity")[0].values(), used("capacity")[1]
    (sorted_,), found = used("dropless")[0].values(), used("dropless")[1]
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max() and np.abs(expected).max() > 0.1
    assert rows_of(sorted_, "GroupedMatmul") == 3 * TOKENS * BATCH * CHOSEN
    shared = rows_of(sorted_, "BatchMatMul")  # the router and the shared expert
    assert rows_of(padded, "BatchMatMul") == shared + 3 * TOKENS * BATCH * ROUTED


def test_ranks_of_op_2_hold_their_tokens_experts_and_count_from_their_own_rows(used):
    expected = used("dropless")[1]
    graphs, found = used("dropless", op=2)
    assert np.abs(found - expected).max() < 1e-12 * np.abs(expected).max()
    for graph in graphs.values():
        assert rows_of(graph, "GroupedMatmul") == 3 * TOKENS * BATCH * CHOSEN // 2
        gathered = [node for _, node, _ in graph.walk() if node.op == "AllGather" and len(node.outputs[0].shape) == 4]
        assert not gathered, "weights are not gathered"
