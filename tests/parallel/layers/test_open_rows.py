"""ReLU-gated experts as Ascend gets them, compiled and executed by the replay's rules: from only the open pairs of a
row and an expert they give what all experts over all rows give."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import numpy as np
import pytest

from parallel.common.start_value import start_value
from parallel.proof.compile.graph import read_graph
from parallel.proof.compile.rank_compiler import Request
from parallel.proof.replay import numpy_ops
from parallel.proof.replay.executor import run_step
from parallel.proof.replay.inline import flat
from parallel.proof.replay.ranks import read_ranks
from tests.parallel.layers.test_routed import rows_of
from tests.parallel.proof_networks import BATCH, GATED

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="the dry run needs g++ on x86-64")
TOKENS, EXPERTS = GATED["tokens"], GATED["experts"]


@pytest.fixture(scope="module")
def used(compilers):
    """`used(dispatch, op, tokens, bias)`: (compiled graphs by rank, result [T, B, O] of all ranks in float64)."""
    features = np.random.default_rng(3).standard_normal((BATCH, TOKENS, GATED["width"]))
    known: dict = {}

    def used(dispatch: str, op: int = 1, tokens: str = "tokens", bias: float = 0.0) -> tuple:
        key = (dispatch, op, tokens)
        if key not in known:
            known[key] = dict(enumerate(compilers.compile([Request(
                op, rank, builder="proof_networks:gates", paths=[str(Path(__file__).parents[1])],
                arguments={"parallel": {"op": op}, "dispatch": dispatch, "tokens": tokens}, graph="used")
                for rank in range(op)])))
        compiled = known[key]
        graphs = {rank: flat(read_graph(item.graph)) for rank, item in compiled.items()}
        world = read_ranks(compiled, graphs)
        values = {}
        for number, (name, _, shape, _, start) in enumerate(compiled[0].result["tensors"]):
            values[name] = start_value(name, tuple(shape), tuple(start), 1)
            if "bias" in name and shape:  # gates that are open by halves, and other biases that are not 0
                values[name] = np.random.default_rng(number).standard_normal(shape) * 0.5
            if "infer_router.bias" in name:
                values[name] = values[name] * 0.2 + bias
        found = run_step(world.start(values, exact=True), world.inputs([features]))
        return graphs, found[0] if len(found[0]) == TOKENS else np.concatenate(found)

    return used


def counted(monkeypatch) -> list[int]:
    """Rows that each grouped product multiplies, filled as graphs run; behind the last end stands what is no number."""
    rows, rule = [], numpy_ops.RULES["GroupedMatmul"]

    def grouped(node, *inputs):
        (y,), last = rule(node, *inputs), int(inputs[7][-1])
        rows.append(last)
        y[last:] = np.nan
        return (y,)

    monkeypatch.setitem(numpy_ops.RULES, "GroupedMatmul", grouped)
    return rows


def test_open_pairs_give_what_all_pairs_give(used, monkeypatch):
    expected = used("dense")[1]
    rows = counted(monkeypatch)
    found = used("dropless")[1]
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max() and np.abs(expected).max() > 0.1
    assert rows[0] == rows[1] and 0.2 < rows[0] / (TOKENS * EXPERTS * BATCH) < 0.8


@pytest.mark.parametrize("bias, share", [(50.0, 1.0), (-50.0, 0.0)])
def test_nothing_is_dropped_with_all_gates_open_and_nothing_computed_with_none(bias, share, used, monkeypatch):
    expected = used("dense", bias=bias)[1]
    rows = counted(monkeypatch)
    found = used("dropless", bias=bias)[1]
    assert rows == [share * TOKENS * EXPERTS * BATCH] * 2
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def test_ranks_of_op_2_hold_their_tokens_experts_and_send_nothing(used, monkeypatch):
    expected = used("dropless")[1]
    rows = counted(monkeypatch)
    graphs, found = used("dropless", 2)
    assert np.abs(found - expected).max() < 1e-12 * np.abs(expected).max()
    assert len(rows) == 4 and len({*rows}) > 1
    for graph in graphs.values():
        assert rows_of(graph, "GroupedMatmul") == TOKENS * EXPERTS * BATCH
        assert not [node.op for _, node, _ in graph.walk() if node.op.startswith("All")]


@pytest.mark.parametrize("tokens, sparse", [("tokens_naive", True), ("width", False)])
def test_other_layouts_give_what_one_device_gives(tokens, sparse, used):
    expected = used("dense")[1]
    graphs, found = used("dropless", 2, tokens)
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()
    assert all(bool(rows_of(graph, "GroupedMatmul")) == sparse for graph in graphs.values())
