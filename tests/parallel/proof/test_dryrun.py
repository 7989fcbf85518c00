"""The dry run: which collectives a layout causes, how many and how large, derived here from the layout alone."""

from __future__ import annotations

import json
import platform
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from parallel.__main__ import VERBS
from parallel.common.command import main
from parallel.common.errors import UserError
from parallel.proof.compile.rank_compiler import Request, _failure, compile_rank
from parallel.proof.dryrun import dryrun
from parallel.proof.dryrun.dryrun import check, check_transfers, read_rank
from parallel.proof.dryrun.html_report import write_report
from parallel.proof.dryrun.rank_report import RankReport
from parallel.sharding.config import ParallelConfig
from parallel.sharding.topology import place_nodes
from parallel.task import load_run
from tests.parallel import proof_networks as networks

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="the dry run needs g++ on x86-64")

FLOAT = 4
CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "pangu"
Count = Counter


def found(report: RankReport) -> tuple[Count, Count]:
    """(runs, bytes) of the collectives by (kind, dimension, purpose, phase)."""
    runs, size = Counter(), Counter()
    for item in report.collectives:
        key = (item.kind, item.dimension, item.purpose, item.phase)
        runs[key] += item.times
        size[key] += item.times * item.bytes
    return runs, size


class Expected:
    """Collectives collected as (kind, dimension, purpose, phase) with their runs and bytes."""

    def __init__(self) -> None:
        self.runs, self.bytes = Counter(), Counter()

    def add(self, key: str, runs: int, elements: int, element: int = FLOAT) -> None:
        """`runs` collectives of `elements` numbers of `element` bytes each."""
        kind, dimension, purpose, phase = key.split()
        if runs:
            self.runs[kind, dimension, purpose, phase] += runs
            self.bytes[kind, dimension, purpose, phase] += runs * elements * element


def is_recomputed(report: RankReport) -> bool:
    """Whether the backward pass computes anything of the forward pass again."""
    return any(node.recomputed for _, node, _ in report.graph.walk())


def expected_pangu(rank: int, parallel: dict, model: dict = networks.PANGU, batch: int = networks.BATCH,
                   half: int = FLOAT) -> Expected:
    """What the layout of PanGu-alpha must cause on `rank`, by the rules of the layers.

    Row-parallel products end in an AllReduce over op, whose gradient is one too; the vocabulary-parallel lookup
    likewise, and of the loss's three reductions over the vocabulary all but the maximum have a gradient. `half` is the
    size of what products give and take; the lookup, the loss, parameters and their gradients are float32, but a weight
    is gathered in the type in which it is used.
    """
    config = ParallelConfig.model_validate(parallel).resolve()
    data, op, stages = config.data, config.op, config.pipeline.stages
    micro, layers = config.pipeline.micro_batches, model["layers"] // stages
    stage = rank // (data * op)
    first, last = stage == 0, stage == stages - 1
    width, inner, length = model["hidden_size"], 4 * model["hidden_size"], model["sequence_length"]
    table = model["vocabulary_size"] // (op if config.vocabulary else 1) * width
    tokens = batch * length // data // micro
    hidden = tokens * width
    out = Expected()
    if op > 1:
        out.add("AllReduce op activation forward", 2 * layers * micro, hidden, half)
        out.add("AllReduce op activation backward", 2 * layers * micro, hidden, half)
        if config.recompute.policy == "full":  # the block's last sum is kept
            out.add("AllReduce op activation recompute", layers * micro, hidden, half)
    if op > 1 and config.vocabulary:
        out.add("AllReduce op activation forward", 3 * micro * last, tokens)
        out.add("AllReduce op activation backward", 2 * micro * last, tokens)
        if data > 1:
            out.add("AllReduce op activation forward", micro * first, hidden)
            out.add("AllReduce op activation backward", micro * first, hidden)
        else:  # with the batch whole MindSpore writes the lookup's AllReduce as its two halves
            for kind, purpose, phase in (("ReduceScatter", "activation", "forward"),
                                         ("AllGather", "redistribution", "forward"),
                                         ("AllGather", "activation", "backward"),
                                         ("ReduceScatter", "activation", "backward")):
                out.add(f"{kind} op {purpose} {phase}", micro * first, hidden)
    if data > 1:
        out.add("AllReduce data loss forward", 2 * micro * last, 1)
        out.add("AllReduce data loss backward", micro * last, 1)
    sharded = [width * width // op] * 4 + [width // op] * 3 + [width * inner // op] * 2 + [inner // op]
    full = [width] * 6  # gammas, betas, biases behind an AllReduce
    ends = first * [length * width] + last * [length * width, width, width]
    if not config.vocabulary and op > 1:
        ends += [table]
    if config.optimizer_shard > 1:
        for size in sharded * layers:
            out.add("AllGather optimizer parameter forward", 1, size, half)
            out.add("ReduceScatter optimizer gradient backward", 1, size)
    elif data > 1:
        for size in sharded * layers:
            out.add("AllReduce data gradient backward", 1, size)
    if data > 1 and (config.vocabulary or op == 1):
        # With sharded states each of the shared table's two stages sums its own part before they are added; without,
        # the first sums what it gathered, to which it has added what the last sent.
        out.add("AllReduce data gradient backward", int(first or (last and config.optimizer_shard > 1)), table)
    if data * op > 1:
        for size in full * layers + ends:
            out.add(f"AllReduce {'data' if data > 1 else 'op'} gradient backward", 1, size)
    if config.world > 1:  # over the stage, and over the stages
        out.add("AllReduce norm norm forward", 1 + (stages > 1), 1)
    if stages > 1:
        out.add("AllReduce pipeline loss forward", 1, 2)  # loss and weight, which only the last stage computes
        for kind, end, phase in (("Send", not last, "forward"), ("Receive", not last, "backward"),
                                 ("Receive", not first, "forward"), ("Send", not first, "backward")):
            out.add(f"{kind} pipeline stage {phase}", micro * end, hidden, half)
            out.add(f"{kind} pipeline parameter {phase}", int(end and (first or last)), table)
    return out


PIPELINE = {"pipeline": {"stages": 2, "micro_batches": 4}}
SHARD, FULL = {"optimizer": {"shard": -1}}, {"recompute": {"policy": "full"}}
FAST = {
    "data": (0, {"data": 2}),
    "op": (1, {"op": 2}),
    "pipeline first": (0, PIPELINE),
    "data optimizer": (1, {"data": 4} | SHARD),
    "all five, first": (0, {"data": 2, "op": 2} | PIPELINE | SHARD | FULL),
    "all five, last": (7, {"data": 2, "op": 2} | PIPELINE | SHARD | FULL),
}
SLOW = {
    "pipeline last": (1, PIPELINE),
    "recompute": (0, {"data": 1} | FULL),
    "data op": (3, {"data": 2, "op": 2}),
    "data pipeline": (2, {"data": 2} | PIPELINE),
    "data recompute": (0, {"data": 2} | FULL),
    "op pipeline": (3, {"op": 2} | PIPELINE),
    "op recompute": (0, {"op": 4} | FULL),
    "op optimizer": (2, {"data": 2, "op": 2} | SHARD),
    "pipeline optimizer": (3, {"data": 2} | PIPELINE | SHARD),
    "pipeline recompute": (0, PIPELINE | FULL),
    "optimizer recompute": (0, {"data": 2} | SHARD | FULL),
}
CASES = [pytest.param(*case, id=name) for name, case in FAST.items()]
CASES += [pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()]


@pytest.mark.parametrize(("rank", "parallel"), CASES)
def test_collectives_of_pangu_follow_from_the_layout(compiled, rank: int, parallel: dict) -> None:
    report = compiled("pangu", rank, **parallel)
    expected = expected_pangu(rank, parallel)
    runs, size = found(report)
    assert runs == expected.runs
    assert size == expected.bytes
    assert is_recomputed(report) == ("recompute" in parallel)
    check([report])


def expected_ranker(rank: int, parallel: dict) -> Expected:
    """The same for `proof_networks.ranker`: four per-token feed-forward networks and a mean over the batch. A network's
    sum stands at its end, where recomputation does not run it again."""
    config, sizes = ParallelConfig.model_validate(parallel).resolve(), networks.RANKER
    data, op, stages = config.data, config.op, config.pipeline.stages
    micro, blocks = config.pipeline.micro_batches, sizes["blocks"] // stages
    stage = rank // (data * op)
    first, last = stage == 0, stage == stages - 1
    tokens, width, inner = sizes["tokens"], sizes["width"], sizes["inner"]
    stream = tokens * networks.BATCH // data // micro * width
    weights, inner_bias, bias = [tokens * width * inner // op] * 2, tokens * inner // op, tokens * width
    out = Expected()
    if op > 1:
        out.add("AllReduce op activation forward", blocks * micro, stream)
        out.add("AllReduce op activation backward", blocks * micro, stream)
    if data > 1:
        out.add("AllReduce data loss forward", micro * last, 1)
        out.add("AllReduce data loss backward", micro * last, 1)
    for size in [*weights, inner_bias] * blocks:
        if config.optimizer_shard > 1 and size != inner_bias:  # the layer keeps biases whole
            out.add("AllGather optimizer parameter forward", 1, size)
            out.add("ReduceScatter optimizer gradient backward", 1, size)
        elif data > 1:
            out.add("AllReduce data gradient backward", 1, size)
    if data * op > 1:  # the bias behind an AllReduce is whole on every rank of the stage
        out.add(f"AllReduce {'data' if data > 1 else 'op'} gradient backward", blocks, bias)
    if config.world > 1:
        out.add("AllReduce norm norm forward", 1 + (stages > 1), 1)
    out.add("AllReduce pipeline loss forward", int(stages > 1), 2)
    for kind, end, phase in (("Send", not last, "forward"), ("Receive", not last, "backward"),
                             ("Receive", not first, "forward"), ("Send", not first, "backward")):
        out.add(f"{kind} pipeline stage {phase}", micro * end, stream)
    return out


RANKER_FAST = {
    "op": (1, {"op": 4}),
    "data op optimizer": (3, {"data": 2, "op": 2} | SHARD),
    "four, last": (7, {"data": 2, "op": 2} | PIPELINE | SHARD),
}
RANKER_SLOW = {
    "data": (0, {"data": 4}),
    "data op": (0, {"data": 2, "op": 2}),
    "pipeline": (0, PIPELINE),
    "data pipeline": (3, {"data": 2} | PIPELINE),
    "op pipeline": (1, {"op": 2} | PIPELINE),
    "data optimizer": (1, {"data": 2} | SHARD),
    "four, first": (0, {"data": 2, "op": 2} | PIPELINE | SHARD),
    "recompute": (0, FULL),
    "data recompute": (1, {"data": 2} | FULL),
    "op recompute": (1, {"op": 2} | FULL),
    "pipeline recompute": (1, PIPELINE | FULL),
    "optimizer recompute": (1, {"data": 2} | SHARD | FULL),
    "pipeline optimizer": (2, {"data": 2} | PIPELINE | SHARD),
    "all five, first": (3, {"data": 2, "op": 2} | PIPELINE | SHARD | FULL),
    "all five, last": (4, {"data": 2, "op": 2} | PIPELINE | SHARD | FULL),
}
RANKER_CASES = [pytest.param(*case, id=name) for name, case in RANKER_FAST.items()]
RANKER_CASES += [pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in RANKER_SLOW.items()]


@pytest.mark.parametrize(("rank", "parallel"), RANKER_CASES)
def test_collectives_of_a_ranker_follow_from_the_layout(compiled, rank: int, parallel: dict) -> None:
    report = compiled("ranker", rank, **parallel)
    expected = expected_ranker(rank, parallel)
    runs, size = found(report)
    assert runs == expected.runs
    assert size == expected.bytes
    assert is_recomputed(report) == ("recompute" in parallel)
    check([report])


def test_layers_that_disagree_are_an_error_when_strict(compiled, monkeypatch, capsys) -> None:
    report = compiled("ranker", data=2, wrong=True)
    assert [item for item in report.collectives if item.unexpected]
    with pytest.raises(UserError, match="unexpected redistribution"):
        check([report])
    monkeypatch.setattr(dryrun, "dry_run", lambda *_, **__: [report])
    command = ["dryrun", "--config", str(CONFIGS / "tiny.yaml")]
    assert main("parallel", VERBS, command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["unexpected_redistributions"] > 0
    assert main("parallel", VERBS, [*command, "--strict"]) == 2
    message = capsys.readouterr()
    assert "unexpected redistribution" in message.err and not message.out


@pytest.mark.slow
def test_shared_and_inlined_micro_batches_communicate_alike(compiled) -> None:
    shared, flat = (found(compiled("pangu", 0, data=2, op=2, **PIPELINE, reuse=reuse)) for reuse in (True, False))
    assert shared == flat


@pytest.mark.slow
@pytest.mark.parametrize(("config", "rank"), [
    ("2_6b", 0), ("13b", 0), ("200b", 0), ("200b", 300), ("200b", 2047), ("2_6b_8", 7), ("13b_16", 0), ("200b_64", 63)])
def test_published_sizes_compile_in_their_layouts(config: str, rank: int) -> None:
    path = CONFIGS / f"{config}.yaml"
    settings = load_run(path)[1]
    report = read_rank(compile_rank(Request(settings.parallel.resolve().world, rank, str(path), own_stage=True)))
    check([report])
    expected = expected_pangu(rank, settings.parallel.model_dump(), settings.model.model_dump(),
                              settings.train.global_batch_size, half=2)
    runs, size = found(report)
    assert runs == expected.runs
    assert size == expected.bytes
    assert report.result["peak_rss_gb"] < 4.0


@pytest.mark.slow
def test_a_stage_sends_what_the_next_receives(compiled, tmp_path: Path) -> None:
    pair = [compiled("pangu", rank, data=2, op=2, **PIPELINE) for rank in (0, 4)]
    check_transfers(pair)
    write_report(tmp_path / "report.html", pair, place_nodes(pair[0].config, 2), "pair")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == 4
    assert "inside a node" in page and "across racks" in page and "--node-rank" in page
    lost = next(item for item in pair[1].collectives if item.kind == "Receive")
    pair[1].collectives.remove(lost)
    with pytest.raises(UserError, match="without a partner"):
        check_transfers(pair)


def test_what_mindspore_refuses_is_one_line_and_a_defect_is_not_a_refusal(tmp_path) -> None:
    request = Request(2, 0, builder="proof_networks:nothing", paths=[str(Path(__file__).parents[1])])
    with pytest.raises(RuntimeError, match="no attribute 'nothing'"):
        compile_rank(request)
    (tmp_path / "error.json").write_text(json.dumps({"kind": "ValueError", "what": "shapes differ"}), encoding="utf-8")
    refused = _failure(request, tmp_path, 1)
    assert isinstance(refused, UserError) and "shapes differ" in str(refused) and "\n" not in str(refused)


def test_a_compile_ends_with_whoever_asked_for_it():
    program = ("import os, time\nfrom parallel.proof.compile import rank_compiler as child\nfork = os.fork()\n"
               "if fork == 0:\n    time.sleep(60)\n"
               "child._exit_code(fork, parent=-1)")
    ended = subprocess.run([sys.executable, "-c", program], start_new_session=True, timeout=50, check=False)
    assert ended.returncode == -signal.SIGKILL
