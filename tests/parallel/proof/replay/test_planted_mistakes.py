"""Planted mistakes in a real layout are found and located."""

from __future__ import annotations

import dataclasses
import platform
import shutil

import pytest

from parallel.proof.compile.graph import Function, Graph
from parallel.proof.replay.executor import Program, prepare
from parallel.proof.replay.numpy_ops import RULES

TINY = ["model.layers=2", "model.hidden_size=32", "model.sequence_length=16", "model.vocabulary_size=64",
        "train.global_batch_size=8"]
CONFIG = "configs/pangu/tiny.yaml"
needs_compiler = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="the dry run needs g++ on x86-64")


@pytest.fixture(scope="module")
def layout(root, compilers):
    """(world, one-device run, steps) of data 2 x op 2 with optimizer sharding and sequence parallelism."""
    from parallel.proof.replay.ranks import compile_ranks
    from parallel.proof.replay.reference import OneDevice
    from parallel.proof.replay.settings import with_defaults

    config = str(root / CONFIG)
    overrides = with_defaults(config, [*TINY, "parallel.data=2", "parallel.op=2", "parallel.optimizer.shard=-1",
                                       "parallel.sequence=true"])
    return compile_ranks(config, overrides, compilers), OneDevice(config, overrides)


def planted(world, change):
    """The world with `change(rank, node) -> node or None` applied to every node (None keeps it)."""
    programs: list[Program] = []
    for number, program in enumerate(world.programs):
        main = program.main
        nodes = [change(number, item) or item for item in main.nodes]
        made = Graph(Function(main.name, main.inputs, nodes, main.result), {}, program.graph.parameters)
        programs.append(prepare(made))
    return dataclasses.replace(world, programs=programs)


def replayed(layout, change, steps: int = 1) -> dict:
    """Figures of a replay with a mistake."""
    from parallel.proof.replay.lockstep import Replay

    world, reference = layout
    return Replay(planted(world, change), reference, steps).run()


@needs_compiler
class TestPlantedMistakes:
    def test_without_a_mistake_both_runs_are_equal(self, layout):
        figures = replayed(layout, lambda rank, item: None, 3)
        assert figures["equal"] and figures["exit_code"] == 0 and figures["world"] == 4
        assert 0 < figures["max_parameter_difference"] < 1e-11 and figures["max_loss_difference"] < 1e-11
        assert figures["precision"] == "float64"
        assert 0 < figures["one_rank_loss_difference"] < 1e-5 and 0 < figures["one_rank_norm_difference"] < 1e-4

    def test_float32_is_an_option(self, layout):
        from parallel.proof.replay.lockstep import Replay

        figures = Replay(*layout, 2, exact=False).run()
        assert figures["equal"] and figures["precision"] == "float32" and "one_rank_loss_difference" not in figures
        assert 1e-11 < figures["max_parameter_difference"] < 1e-4

    def test_a_millionth_in_one_rank(self, layout, monkeypatch):
        """One product of one rank is wrong by 1e-6: float32 could not tell it from rounding."""
        monkeypatch.setitem(RULES, "Planted", lambda item, *inputs: RULES["MatMul"](item, *inputs) * (1 + 1e-6))

        def change(rank, item):
            wrong = rank == 1 and item.op == "MatMul" and "feed_forward" in item.scope and not item.backward
            return dataclasses.replace(item, op="Planted") if wrong else None

        figures = replayed(layout, change)
        assert not figures["equal"] and figures["exit_code"] == 1
        assert 1e-9 < figures["max_parameter_difference"] < 1e-3
        assert figures["divergence"]["node"] and "feed_forward" in figures["divergence"]["node"]

    def test_a_wrong_rule_is_wrong_on_all_ranks_and_found_by_mindspore(self, layout, monkeypatch):
        monkeypatch.setitem(RULES, "Softmax", lambda item, x, *_: RULES["LogSoftmax"](item, x) * 0 + 1 / x.shape[-1])
        layout[1].exact_histories.clear()
        try:
            figures = replayed(layout, lambda rank, item: None)
        finally:
            layout[1].exact_histories.clear()
        assert figures["max_loss_difference"] < 1e-9 and "divergence" not in figures
        assert not figures["equal"] and figures["exit_code"] == 1
        assert figures["one_rank_loss_difference"] > 1e-5 or figures["one_rank_norm_difference"] > 1e-4

    def test_dropped_allreduce(self, layout):
        """The sum over the vocabulary's slices that the loss needs is left out."""
        def change(rank, item):
            if item.op == "AllReduce" and "cross_entropy" in item.scope and not item.backward \
                    and item.attributes.get("op") == "sum":
                return dataclasses.replace(item, op="TensorMove", attributes={})
            return None

        figures = replayed(layout, change)
        assert not figures["equal"] and figures["exit_code"] == 1
        found = figures["divergence"]
        assert "cross_entropy-CrossEntropy" in found["node"] and found["node"].startswith("ReduceSum")
        assert found["line"].startswith("parallel/layers/loss.py:")

    def test_wrong_group(self, layout):
        """The embedding's sum runs over the data axis instead of the op axis."""
        def change(rank, item):
            if item.op in ("AllReduce", "ReduceScatter") and "word-Embedding" in item.scope and not item.backward:
                wrong = [[rank % 2], [rank % 2 + 2]]
                return dataclasses.replace(item, attributes={**item.attributes, "group_rank_ids": wrong})
            return None

        found = replayed(layout, change)["divergence"]
        assert "word-Embedding" in found["node"] and found["parameter"] == "embedding.word.table"
        assert found["line"].startswith("parallel/layers/embedding.py:")

    def test_mean_taken_twice(self, layout):
        """Each gradient shard of one weight is divided by the ranks once more."""
        def change(rank, item):
            own = item.marks.get("mirror_user_id") == "layers.0.feed_forward.mapping.weight"
            if item.op == "ReduceScatter" and own:
                return dataclasses.replace(item, attributes={**item.attributes, "op": "mean"})
            return None

        import parallel.proof.replay.collectives as collectives

        collectives._REDUCTIONS["mean"] = lambda a, b: (a + b) / 2
        try:
            figures = replayed(layout, change)
        finally:
            del collectives._REDUCTIONS["mean"]
        assert not figures["equal"]
        assert figures["divergence"]["parameter"].endswith("layers.0.feed_forward.mapping.weight")

    def test_slice_of_the_wrong_half(self, layout):
        """Both ranks of the op axis look up the first half of the vocabulary."""
        world, _ = layout
        offsets = {item.inputs[1] for item in world.programs[1].nodes
                   if item.op == "Sub" and "word-Embedding" in item.scope and not item.backward}
        other = {item.name: item for item in world.programs[0].main.nodes if item.op == "Constant"}
        name = next(iter(offsets))
        first = next(item.inputs[1] for item in world.programs[0].nodes
                     if item.op == "Sub" and "word-Embedding" in item.scope and not item.backward)

        def change(rank, item):
            return dataclasses.replace(item, value=other[first].value) if rank % 2 and item.name == name else None

        found = replayed(layout, change)["divergence"]
        assert "word-Embedding" in found["node"]

    def test_layer_norm_that_is_not_synchronised(self, layout):
        """Under sequence parallelism each rank sees some tokens only: the gradient of gamma must be summed over all."""
        def change(rank, item):
            if item.op == "AllReduce" and item.marks.get("mirror_user_id") == "layers.0.norm2.gamma":
                return dataclasses.replace(item, op="TensorMove", attributes={})
            return None

        found = replayed(layout, change)["divergence"]
        assert found["parameter"] == "layers.0.norm2.gamma" and "norm2-LayerNorm" in found["node"]
        assert found["line"].startswith("parallel/layers/norm.py:")
        assert found["ranks"] == (0, 1, 2, 3)

    def test_two_collectives_of_one_shape_in_another_order(self, layout):
        """Rank 1 sums the gradients of beta and gamma the other way round: a cluster would not hang, but go wrong."""
        from parallel.proof.replay.lockstep import Replay

        world, reference = layout
        main = world.programs[1].main
        first, second = (next(item for item in main.nodes if item.op == "AllReduce" and
                              item.marks.get("mirror_user_id") == f"layers.0.norm2.{name}")
                         for name in ("gamma", "beta"))
        nodes, late = [], {first.name}
        for item in main.nodes[:main.nodes.index(second)]:
            if late & {item.name, *item.inputs}:
                late.add(item.name)
            else:
                nodes.append(item)
        nodes += [second, *(item for item in main.nodes if item.name in late)]
        nodes += main.nodes[main.nodes.index(second) + 1:]
        graph = Graph(Function(main.name, main.inputs, nodes, main.result), {}, world.programs[1].graph.parameters)
        programs = [world.programs[0], prepare(graph), *world.programs[2:]]
        figures = Replay(dataclasses.replace(world, programs=programs), reference, 1).run()
        assert not figures["equal"] and figures["exit_code"] == 1
        message = figures["deadlock"]
        assert "another order" in message and "layers.0.norm2.gamma" in message and "layers.0.norm2.beta" in message

    def test_a_rank_that_skips_a_collective_is_a_deadlock(self, layout):
        def change(rank, item):
            if rank == 3 and item.op == "AllReduce" and "cross_entropy" in item.scope:
                return dataclasses.replace(item, op="TensorMove", attributes={})
            return None

        figures = replayed(layout, change)
        assert not figures["equal"] and ("rank 3" in figures["deadlock"] or "group" in figures["deadlock"])
