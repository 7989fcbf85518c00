"""Every option of the parallel block does what it says to the compiled graph; figures are derived from the layout.

Network: `proof_networks.pangu`, 2 layers (the query layer included) of width 16; the ranker blocks for experts and
sparse optimizers. One option at a time, against the same layout without it.
"""

from __future__ import annotations

import platform
import shutil
from collections import Counter
from pathlib import Path

import pytest

from parallel.proof.compile.casts import RECEIVED, parameter_casts
from parallel.proof.compile.graph import read_graph
from parallel.proof.compile.rank_compiler import Request
from parallel.proof.dryrun.dryrun import read_rank
from parallel.sharding.config import ParallelConfig
from parallel.task import load_run
from tests.parallel import proof_networks as networks

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="the dry run needs g++ on x86-64")]

MICRO = 4
STAGES = {"pipeline": {"stages": 2, "micro_batches": MICRO}}
FULL = {"recompute": {"policy": "full"}}
LAYERS, WIDTH, TOKENS = networks.PANGU["layers"], networks.PANGU["hidden_size"], networks.BATCH * 8
INNER, VOCABULARY = 4 * WIDTH, networks.PANGU["vocabulary_size"]
HIDDEN = 4 * TOKENS * WIDTH  # bytes of the residual stream of a global batch
MATRICES = [4 * WIDTH * WIDTH] * 4 + [4 * WIDTH * INNER] * 2  # bytes of one layer's
BIASES = [4 * WIDTH] * 3 + [4 * INNER]  # those that optimizer shards split


def pipeline(**more) -> dict:
    """The block of two stages with more said about it."""
    return {"pipeline": STAGES["pipeline"] | more}


def runs(report, *words: str) -> int:
    """How often collectives run that have all `words` as kind, dimension, purpose or phase."""
    return sum(item.times for item in report.collectives if set(words) <= _words(item))


def size(report, *words: str) -> int:
    """Their bytes."""
    return sum(item.times * item.bytes for item in report.collectives if set(words) <= _words(item))


def _words(item) -> set[str]:
    return {item.kind, item.dimension, item.purpose, item.phase}


def test_level_1_keeps_full_gradients_and_level_2_shards_them(compiled):
    reports = [compiled("pangu", 0, data=2, optimizer={"shard": -1, "level": level}, **STAGES) for level in (1, 2)]
    sharded = sum(MATRICES) + sum(BIASES)  # one layer a stage
    assert [size(report, "ReduceScatter", "gradient") for report in reports] == [sharded, MICRO * sharded]
    assert reports[0].memory.gradients - reports[1].memory.gradients == sharded // 2
    assert reports[0].memory.parameters == reports[1].memory.parameters


def test_level_3_gathers_weights_again_for_the_backward_pass(compiled):
    first, third = (compiled("pangu", 0, data=2, optimizer={"shard": -1, "level": level}) for level in (1, 3))
    assert runs(first, "AllGather", "parameter", "recompute") == 0
    assert runs(third, "AllGather", "parameter", "recompute") == LAYERS * len(MATRICES)  # biases are not read again
    assert size(third, "AllGather", "parameter", "recompute") == LAYERS * sum(MATRICES)
    assert size(third, "AllGather", "parameter", "forward") == size(first, "AllGather", "parameter", "forward")


def test_a_threshold_leaves_small_parameters_unsharded(compiled):
    report = compiled("pangu", 0, data=2, optimizer={"shard": -1, "threshold_kb": 2})
    assert size(report, "ReduceScatter", "gradient") == LAYERS * 2 * 4 * WIDTH * INNER  # 4 KiB each; the rest is below


def test_a_partial_shard_gathers_among_its_ranks_and_sums_over_the_others(compiled):
    report = compiled("pangu", 0, data=4, optimizer={"shard": 2})
    gathers = [item for item in report.collectives if item.kind == "AllGather"]
    assert {item.ranks for item in gathers} == {(0, 1)}
    sums = [item for item in report.collectives if item.kind == "AllReduce" and item.purpose == "gradient"]
    assert {item.ranks for item in sums} >= {(0, 2)}


@pytest.mark.parametrize("rank", [0, 1])
def test_gpipe_communicates_as_1f1b_and_keeps_all_micro_batches(compiled, rank):
    one, all_ = compiled("pangu", rank, **STAGES), compiled("pangu", rank, **pipeline(schedule="gpipe"))
    assert Counter(map(_key, one.collectives)) == Counter(map(_key, all_.collectives))
    ahead = {0: 2, 1: 1}[rank]  # 1f1b: as many as stages are left
    assert all_.memory.activations * ahead == one.memory.activations * MICRO


def _key(item) -> tuple:
    return item.kind, item.dimension, item.purpose, item.phase, item.bytes, item.times


@pytest.mark.parametrize("rank", [0, 1])
def test_interleaved_chunks_cross_more_often(compiled, rank):
    block = pipeline(schedule="interleaved", interleave=2)
    report = compiled("pangu", rank, model={"layers": 4}, **block)
    sends = {0: 2, 1: 1}[rank]  # chunks 0 1 on stages 0 1, 2 3 on 0 1 again: 0 sends twice, 1 once
    part = HIDDEN // MICRO
    for kind, times, phase in (("Send", sends, "forward"), ("Receive", 3 - sends, "forward"),
                               ("Receive", sends, "backward"), ("Send", 3 - sends, "backward")):
        assert size(report, kind, "stage", phase) == MICRO * times * part, (kind, phase)
    assert report.result["layers_of_stages"] == [2, 2]


def test_uneven_stages(compiled):
    block = pipeline(offsets=[1, -1])
    first, last = (compiled("pangu", rank, model={"layers": 4}, **block) for rank in (0, 1))
    assert first.result["layers_of_stages"] == [3, 1]
    layer = sum(MATRICES) + sum(BIASES) + 6 * 4 * WIDTH
    # Position and query table are of one size, the word table lies on both; the last stage has the final norm.
    assert first.memory.parameters - last.memory.parameters == 2 * layer - 2 * 4 * WIDTH


def test_parts_of_a_micro_batch_speak_in_halves(compiled):
    full, parts = (compiled("pangu", 0, data=2, op=2, micro_batch_interleave=count, **STAGES) for count in (1, 2))
    for phase in ("forward", "backward"):
        assert runs(parts, "op", "activation", phase) == 2 * runs(full, "op", "activation", phase)
        assert size(parts, "op", "activation", phase) == size(full, "op", "activation", phase)
    for words in (("gradient",), ("parameter",), ("norm",)):
        assert size(parts, *words) == size(full, *words)


def test_sequence_parallelism_turns_sums_into_halves(compiled):
    full, sharded = (compiled("pangu", 0, op=2, sequence=sequence) for sequence in (False, True))
    # Each of the two row-parallel products of a layer; left are the three sums over the vocabulary.
    assert [runs(report, "AllReduce", "op", "activation", "forward") for report in (full, sharded)] == [2 * LAYERS + 3,
                                                                                                        3]
    assert size(sharded, "ReduceScatter", "activation", "forward") == (2 * LAYERS + 1) * HIDDEN  # and the lookup
    assert size(sharded, "AllGather", "redistribution", "forward") == (2 * LAYERS + 1) * HIDDEN  # and the head
    assert not [item for item in sharded.collectives if item.unexpected]
    assert sharded.memory.activations < full.memory.activations


def test_slicing_what_is_kept_gathers_before_recomputing(compiled):
    kept, sliced = (compiled("pangu", 0, op=2, model={"layers": 4},
                             recompute={"policy": "full", "slice_activations": slices}) for slices in (False, True))
    # MindSpore slices the inputs of the layers between the first and the last (seen with 4 and with 6 layers).
    assert [runs(report, "AllGather", "recompute") for report in (kept, sliced)] == [0, 4 - 2]
    assert size(sliced, "AllGather", "recompute") == 2 * HIDDEN
    # In float32 nothing is gained: the gradient of a layer's first norm reads the layer's input itself, whole.
    assert sliced.memory.activations - kept.memory.activations == 2 * HIDDEN // 2


def test_slicing_in_half_precision_keeps_one_part_of_each_input(compilers):
    config, layers, op = Path(__file__).parents[3] / "configs" / "pangu" / "tiny.yaml", 5, 2
    words = ["train.precision=fp16", "parallel.recompute.policy=full", f"model.layers={layers}", f"parallel.op={op}"]
    kept, sliced = (read_rank(compilers.compile([Request(op, 0, str(config), [*words, key])])[0]) for key in
                    ("parallel.recompute.slice_activations=false", "parallel.recompute.slice_activations=true"))
    _, settings = load_run(config, words)
    hidden = 2 * settings.train.global_batch_size * settings.model.sequence_length * settings.model.hidden_size
    assert kept.memory.activations - sliced.memory.activations == (layers - 2) * (hidden - hidden // op)


def test_kept_sums_are_not_run_again(compiled):
    again, kept = (compiled("pangu", 0, op=2, recompute={"policy": "full", "communication": communication})
                   for communication in (True, False))
    assert runs(again, "AllReduce", "op", "recompute") == LAYERS  # the last sum of a block is not needed again
    assert runs(kept, "AllReduce", "op", "recompute") == 0
    assert kept.memory.activations > again.memory.activations


def test_selective_recomputation_recomputes_the_named_cells(compiled):
    none, selective, full = (compiled("pangu", 0, op=2, recompute={"policy": policy})
                             for policy in ("none", "selective", "full"))
    assert full.memory.activations < selective.memory.activations < none.memory.activations
    again = {node.scope for _, node, _ in selective.graph.walk() if node.recomputed}
    assert again and all("core" in scope for scope in again)


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_fused_in_groups(compiled, groups):
    report = compiled("pangu", 0, data=2, gradient_fusion_groups=groups, model={"layers": 4})
    numbers = {item.fusion for item in report.collectives if item.purpose == "gradient"}
    assert numbers == {1, *(2 + i for i in range(groups))}  # 1 for what stands before the layers


def test_an_unsharded_vocabulary_needs_no_sums_over_it(compiled):
    sharded, full = (compiled("pangu", 0, data=2, op=2, vocabulary=vocabulary) for vocabulary in (True, False))
    row_sums = 2 * LAYERS
    assert runs(full, "AllReduce", "op", "activation", "forward") == row_sums
    assert runs(sharded, "AllReduce", "op", "activation", "forward") == row_sums + 1 + 3  # the lookup; max, sum, pick
    assert full.memory.parameters - sharded.memory.parameters == 4 * VOCABULARY // 2 * WIDTH


def test_dropout_communicates_nothing_and_compiles_on_every_stage(compiled):
    for rank in (0, 7):
        dry, wet = (compiled("pangu", rank, data=2, op=2, model={"dropout": rate}, **STAGES, **FULL)
                    for rate in (0.0, 0.1))
        assert Counter(map(_key, dry.collectives)) == Counter(map(_key, wet.collectives))
        assert wet.memory.largest_constant <= 4 * networks.PANGU["heads"] * 8  # numbers of heads x positions


def half(compilers, parallel: dict, rank: int = 0, precision: str = "float16", **train):
    """The graph of a rank with products in half precision."""
    world = ParallelConfig.model_validate(parallel).resolve().world
    request = Request(world, rank, builder="proof_networks:halved", paths=[str(Path(__file__).parents[1])],
                      arguments={"parallel": parallel, "train": train, "compute_dtype": precision})
    return read_graph(compilers.compile([request])[0].graph)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_sharded_weights_are_cast_once_a_step(compilers, precision):
    """Before they are gathered, for all micro-batches, so that half of the bytes travel; what optimizer sharding leaves
    out (the word table, vectors) is cast for every one."""
    graph = half(compilers, {"data": 2, "optimizer": {"shard": -1}}, precision=precision, accumulation=MICRO)
    casts = {name: item.count for name, item in parameter_casts(graph).items()}
    gathered = [(times, node.outputs[0].dtype, len(node.outputs[0].shape)) for _, node, times in graph.walk()
                if node.op == "AllGather" and node.instance.startswith("parallel_optimizer")]
    assert casts["embedding.word.table"] == MICRO
    matrices = [name for name, kind in graph.parameters.items()
                if name.endswith(".weight") and not name.startswith(("accu_grads.", "adam"))]
    assert len(matrices) == LAYERS * 6 and all(casts[name] == 1 for name in matrices)
    halves = [item for item in gathered if item[2] == 2 and item[1] == precision]
    assert len(halves) == LAYERS * 6 and all(times == 1 for times, _, _ in halves)


@pytest.mark.parametrize(("block", "rank", "train"), [
    ({"data": 2}, 0, {"accumulation": MICRO}), ({"data": 2, "optimizer": {"shard": -1}, **STAGES}, 3, {})])
def test_micro_batches_without_a_shared_graph_cast_every_parameter_once_a_step(compilers, block, rank, train):
    """Also the word table that the first stage sends to the last."""
    shared, flat = (parameter_casts(half(compilers, block | {"mindspore": {"share_graph": share}}, rank, **train))
                    for share in (True, False))
    assert shared.keys() == flat.keys() and all(item.count == 1 for item in flat.values())
    again = {name: item.count for name, item in shared.items() if item.count > 1}
    assert set(again.values()) == {MICRO}
    assert len(again) == len(shared) if rank == 0 else set(again) == {RECEIVED}
    assert sum(item.bytes for item in flat.values()) < sum(item.bytes for item in shared.values())
