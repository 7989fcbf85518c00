"""Replay: rules, collectives and deadlocks by hand; planted mistakes in a real layout are found and located."""

from __future__ import annotations

import dataclasses
import platform
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from parallel.common.errors import UserError
from parallel.proof.compile.graph import Function, Graph, Node, TensorType
from parallel.proof.replay.collective_order import wrong_order
from parallel.proof.replay.collectives import Call, Deadlock, Meeting
from parallel.proof.replay.executor import Program, Rank, prepare, run_step
from parallel.proof.replay.inline import flat
from parallel.proof.replay.numpy_ops import RULES, UPDATES
from parallel.proof.replay.representatives import moved_group, representatives, same_but_for_groups
from parallel.sharding.config import ParallelConfig

TINY = ["model.layers=2", "model.hidden_size=32", "model.sequence_length=16", "model.vocabulary_size=64",
        "train.global_batch_size=8"]
CONFIG = "configs/pangu/tiny.yaml"
needs_compiler = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="the dry run needs g++ on x86-64")
generator = np.random.default_rng(3)


def node(op: str, name: str = "out", inputs: tuple = (), shape: tuple | None = None, **attributes) -> Node:
    """A node of a hand-made graph."""
    outputs = [TensorType(shape, "float32")] if shape is not None else []
    return Node(name, op, list(inputs), outputs, attributes, scope=f"Default/cell/{op}-op0")


def numeric_gradient(function, x: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """d sum(function(x) * gradient) / dx by central differences in float64."""
    out, step = np.zeros_like(x), 1e-6
    for index in np.ndindex(x.shape):
        moved = [x.copy(), x.copy()]
        moved[0][index] += step
        moved[1][index] -= step
        out[index] = ((function(moved[0]) - function(moved[1])) * gradient).sum() / (2 * step)
    return out


class TestRules:
    def test_layer_norm_gradient(self):
        x, gradient, gamma, beta = (generator.standard_normal(shape) for shape in ((4, 6), (4, 6), (6,), (6,)))
        forward = lambda x: RULES["LayerNorm"](node("LayerNorm"), x, gamma, beta, -1, -1, 1e-5)  # noqa: E731
        _, mean, variance = forward(x)
        dx, dgamma, dbeta = RULES["LayerNormGrad"](node("LayerNormGrad"), x, gradient, variance, mean, gamma, -1, -1,
                                                   1e-5)
        np.testing.assert_allclose(dx, numeric_gradient(lambda x: forward(x)[0], x, gradient), atol=1e-6)
        np.testing.assert_allclose(dbeta, gradient.sum(0))
        by_gamma = lambda g: RULES["LayerNorm"](node("LayerNorm"), x, g, beta, -1, -1, 1e-5)[0]  # noqa: E731
        wanted = (gradient * (x - mean) / np.sqrt(variance + 1e-5)).sum(0)
        np.testing.assert_allclose(by_gamma(gamma + 1.0) - by_gamma(gamma), (x - mean) / np.sqrt(variance + 1e-5))
        np.testing.assert_allclose(dgamma, wanted, atol=1e-6)

    def test_rms_norm_gradient(self):
        x, gradient, gamma = (generator.standard_normal(shape) for shape in ((3, 5), (3, 5), (5,)))
        forward = lambda x: RULES["RmsNorm"](node("RmsNorm"), x, gamma, 1e-6)  # noqa: E731
        dx, _ = RULES["RmsNormGrad"](node("RmsNormGrad"), gradient, x, forward(x)[1], gamma)
        np.testing.assert_allclose(dx, numeric_gradient(lambda x: forward(x)[0], x, gradient), atol=1e-6)

    @pytest.mark.parametrize("op, inner", [("GeLU", None), ("SiLU", None), ("Softmax", None)])
    def test_gradients_of_activations(self, op, inner):
        x, gradient = generator.standard_normal((3, 4)), generator.standard_normal((3, 4))
        y = RULES[op](node(op), x)
        got = {"GeLU": lambda: RULES["GeLUGrad"](node("GeLUGrad"), gradient, x, y),
               "SiLU": lambda: RULES["SiLUGrad"](node("SiLUGrad"), gradient, x),
               "Softmax": lambda: RULES["SoftmaxBackward"](node("SoftmaxBackward"), gradient, y, -1)}[op]()
        np.testing.assert_allclose(got, numeric_gradient(lambda x: RULES[op](node(op), x), x, gradient), atol=1e-6)

    def test_lookup_and_its_gradient(self):
        table, ids = generator.standard_normal((5, 2)), np.array([[0, 4], [4, 1]])
        np.testing.assert_array_equal(RULES["Gather"](node("Gather"), table, ids, 0, 0), table[ids])
        rows = generator.standard_normal((2, 2, 2))
        got = RULES["UnsortedSegmentSum"](node("UnsortedSegmentSum"), rows, np.array([[0, 4], [4, -1]]), 5)
        np.testing.assert_allclose(got[4], rows[0, 1] + rows[1, 0])
        np.testing.assert_allclose(got.sum(0), rows.reshape(4, 2)[:3].sum(0))

    def test_slice_with_masks_and_its_gradient(self):
        x = generator.standard_normal((4, 6, 3))
        numbers = ((0, -3), (0, 0), (1, 1), 1, 3)  # all of dim 0, the last three of dim 1
        part = RULES["StridedSlice"](node("StridedSlice"), x, *numbers)
        np.testing.assert_array_equal(part, x[:, -3:])
        masks = {"begin_mask": 1, "end_mask": 3}
        back = RULES["StridedSliceGrad"](node("StridedSliceGrad", **masks), part, x.shape, *numbers[:3])
        np.testing.assert_array_equal(back[:, -3:], part)
        assert not back[:, :-3].any()
        # ellipsis, one column of the last dim (shrunk), a new dim behind it
        one = RULES["StridedSlice"](node("StridedSlice"), x, (0, 1, 0), (0, 2, 0), (1, 1, 1), 0, 0, 1, 4, 2)
        np.testing.assert_array_equal(one, x[..., 1][..., None])

    def test_gather_with_batch_dims(self):
        table, ids = generator.standard_normal((2, 3, 5, 4)), generator.integers(0, 5, (2, 3, 6))
        got = RULES["Gather"](node("Gather"), table, ids, 2, 2)
        assert got.shape == (2, 3, 6, 4)
        np.testing.assert_array_equal(got[1, 2], table[1, 2][ids[1, 2]])

    def test_cumulative_sum_from_either_end(self):
        x = np.array([[1.0, 2.0, 4.0]])
        for attributes, wanted in (({}, [1, 3, 7]), ({"exclusive": 1}, [0, 1, 3]), ({"reverse": 1}, [7, 6, 4]),
                                   ({"exclusive": 1, "reverse": 1}, [6, 4, 0])):
            assert list(RULES["CumSum"](node("CumSum", **attributes), x, 1)[0]) == wanted

    def test_one_hot_of_a_slice_ignores_foreign_classes(self):
        got = RULES["OneHot"](node("OneHot"), np.array([1, -3, 7]), 4, 1.0, 0.0, -1)
        np.testing.assert_array_equal(got, [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])

    def test_adamw(self):
        p, m, v, g = (generator.random(4).astype(np.float32) for _ in range(4))
        new = UPDATES["AdamWeightDecay"](node("AdamWeightDecay"), p, m, v, 0.1, 0.9, 0.99, 1e-8, 0.01, g)
        m2, v2 = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        np.testing.assert_allclose(new[0], p - 0.1 * (m2 / (np.sqrt(v2) + 1e-8) + 0.01 * p), rtol=1e-5)


def graph_of(*nodes: Node, parameters: dict | None = None, inputs: tuple = ("x",)) -> Graph:
    """A flat graph whose result is its last node."""
    parameters = parameters or {}
    return Graph(Function("main", [*inputs, *parameters], list(nodes), nodes[-1].name), {}, parameters)


def ranks_of(*graphs: Graph) -> list[Rank]:
    """Ranks without parameters."""
    return [Rank(number, prepare(graph), {}) for number, graph in enumerate(graphs)]


def collective(op: str, ranks: tuple, name: str = "c", source: str = "x", **attributes) -> Node:
    """A collective of a hand-made graph on vectors of two."""
    return node(op, name, (source,), (2,), group_rank_ids=[[rank] for rank in ranks], **attributes)


class TestCollectives:
    values = [np.array([1.0, 2.0], np.float32), np.array([10.0, 20.0], np.float32)]

    def run(self, kind: str, shape: tuple, **attributes) -> list:
        item = node(kind, "c", ("x",), shape)
        item.attributes = {"group_rank_ids": [[0], [1]], **attributes}
        made = [graph_of(item) for _ in range(2)]
        return run_step(ranks_of(*made), [[value] for value in self.values])

    def test_sum_and_maximum(self):
        assert [list(item) for item in self.run("AllReduce", (2,), op="sum")] == [[11, 22], [11, 22]]
        assert [list(item) for item in self.run("AllReduce", (2,), op="max")] == [[10, 20], [10, 20]]

    def test_gather_and_scatter(self):
        assert [list(item) for item in self.run("AllGather", (4,))] == [[1, 2, 10, 20]] * 2
        assert [list(item) for item in self.run("ReduceScatter", (1,), op="sum")] == [[11], [22]]

    def test_exchange(self):
        assert [list(item) for item in self.run("AlltoAll", (2,), split_dim=0, concat_dim=0)] == [[1, 10], [2, 20]]

    def test_send_and_receive(self):
        send = graph_of(node("Send", "c", ("x",), (2,), group_rank_ids=[[0], [1]], dest_rank=1, sr_tag=4))
        receive = graph_of(node("Receive", "c", ("x",), (2,), group_rank_ids=[[0], [1]], src_rank=0, sr_tag=4))
        got = run_step(ranks_of(send, receive), [[value] for value in self.values])
        assert list(got[1]) == [1, 2]


class TestDeadlocks:
    inputs = [[np.zeros(2, np.float32)]] * 2

    def test_other_order_on_two_ranks(self):
        first, second = collective("AllReduce", (0, 1), "a"), collective("AllGather", (0, 1), "b")
        with pytest.raises(Deadlock, match=r"collective 0 of group \[0, 1\] is not the same.*AllReduce.*AllGather"):
            run_step(ranks_of(graph_of(first, second), graph_of(second, first)), self.inputs)

    def test_missing_member(self):
        with pytest.raises(Deadlock, match=r"rank 0 at AllReduce.*waits for rank 1 \(at its end\)"):
            run_step(ranks_of(graph_of(collective("AllReduce", (0, 1))), graph_of(node("Neg", "n", ("x",), (2,)))),
                     self.inputs)

    def test_receive_without_send(self):
        receive = node("Receive", "c", ("x",), (2,), group_rank_ids=[[0], [1]], src_rank=0, sr_tag=4)
        with pytest.raises(Deadlock, match=r"rank 1 at Receive from 0.*tag 4.*nobody sends"):
            run_step(ranks_of(graph_of(node("Neg", "n", ("x",), (2,))), graph_of(receive)), self.inputs)

    def test_send_without_receive(self):
        send = node("Send", "c", ("x",), (2,), group_rank_ids=[[0], [1]], dest_rank=1, sr_tag=4)
        with pytest.raises(Deadlock, match="a Send without Receive: rank 0 at Send to 1"):
            run_step(ranks_of(graph_of(send), graph_of(node("Neg", "n", ("x",), (2,)))), self.inputs)

    def test_two_ranks_receive_first(self):
        def both(peer: int) -> Graph:
            pair = {"group_rank_ids": [[0], [1]], "src_rank": peer, "dest_rank": peer, "sr_tag": 0}
            return graph_of(node("Receive", "r", ("x",), (2,), **pair), node("Send", "s", ("x",), (2,), **pair))

        with pytest.raises(Deadlock, match="no rank can go on"):
            run_step(ranks_of(both(1), both(0)), self.inputs)

    def test_rank_outside_its_group(self):
        call = Call(0, collective("AllReduce", (1, 2)), np.zeros(2))

        def coroutine():
            yield call

        with pytest.raises(Deadlock, match="the rank is not in the group"):
            Meeting([coroutine()]).run()


class TestOrders:
    def ranks(self, *orders: str) -> list[Program]:
        """Two ranks whose graphs reduce -x and exp x, of one shape, in the given orders ("ab" or "ba")."""
        made = []
        for order in orders:
            calls = [collective("AllReduce", (0, 1), f"{name}2", name) for name in order]
            made.append(graph_of(node("Neg", "a", ("x",), (2,)), node("Exp", "b", ("x",), (2,)), *calls,
                                 node("Sub", "out", ("a2", "b2"), (2,))))
        return [prepare(graph) for graph in made]

    def test_other_order_of_equal_kinds(self):
        programs = self.ranks("ab", "ba")
        assert wrong_order(programs).startswith("collective 0 of group [0, 1] is not the same on all ranks: rank 0 at")
        inputs = [[np.ones(2, np.float32)]] * 2
        run_step([Rank(number, program, {}) for number, program in enumerate(programs)], inputs)  # it would not hang

    def test_a_collective_that_cannot_meet(self):
        """A cluster, and gloo, would wait for ever."""
        one = graph_of(node("Neg", "a", ("x",), (2,)), collective("AllReduce", (0, 1), "out", "a"))
        other = graph_of(node("Reshape", "a", ("x",), (1,)), node("AllReduce", "out", ("a",), (1,),
                                                                  group_rank_ids=[[0], [1]]))
        told = wrong_order([prepare(one), prepare(other)])
        assert told.startswith("collective 0 of group [0, 1] is not of one shape: rank 0 has [((2,), 'float32')]")

    def test_same_order(self):
        assert wrong_order(self.ranks("ab", "ab")) is None and wrong_order(self.ranks("ba", "ba")) is None

    def test_letters_in_another_order(self):
        def rank(op: str, peer: str, number: int, *tags: int) -> Program:
            nodes = [node(op, f"{op}{tag}", ("x",), (2,), group_rank_ids=[[0], [1]], sr_tag=tag, **{peer: number})
                     for tag in tags]
            return prepare(graph_of(*nodes))

        sends = rank("Send", "dest_rank", 1, 4, 5)
        assert wrong_order([sends, rank("Receive", "src_rank", 0, 4, 5)]) is None
        told = wrong_order([sends, rank("Receive", "src_rank", 0, 5, 4)])
        assert "rank 0 sends rank 1 comes in another order" in told and "tag 4" in told and "tag 5" in told

    def test_other_collectives_on_another_stage_are_no_order(self):
        assert wrong_order(self.ranks("ab", "aa")) is None and wrong_order(self.ranks("ab", "a")) is None


class TestDistinct:
    config = ParallelConfig(data=4, op=2, pipeline={"stages": 2}).resolve()

    def test_the_first_data_coordinate_and_one_rank_of_the_last_are_compiled(self):
        assert representatives(self.config) == [0, 1, 6, 8, 9, 14]
        two = ParallelConfig(data=2, op=2).resolve()
        assert representatives(two) == [0, 1, 2] and representatives(two, trust=True) == [0, 1]
        assert representatives(ParallelConfig(op=4).resolve()) == [0, 1, 2, 3]

    @pytest.mark.parametrize("ranks, data, moved", [
        ([0, 1], 2, [4, 5]),  # op
        ([0, 2, 4, 6], 3, [0, 2, 4, 6]),  # data
        ([1, 3], 3, [5, 7]),  # pairs of neighbours on the data axis
        ([0, 4], 3, [2, 6]),  # every other one
        ([8, 10, 12, 14], 1, [8, 10, 12, 14]),  # on the second stage
    ])
    def test_groups_of_other_data_coordinates(self, ranks, data, moved):
        assert moved_group(ranks, data, self.config) == moved

    def test_another_constant_is_another_graph(self):
        def graph(group: tuple, shape: tuple = (2,)) -> Graph:
            return graph_of(collective("AllReduce", group, "c"), node("Neg", "out", ("c",), shape))

        config, layouts = ParallelConfig(data=4).resolve(), dict.fromkeys(range(4), {})
        everyone, pair, other = (0, 1, 2, 3), (0, 1), (2, 3)
        assert same_but_for_groups({0: graph(everyone), 3: graph(everyone)}, layouts, config)
        assert same_but_for_groups({0: graph(pair), 3: graph(other)}, layouts, config)
        assert not same_but_for_groups({0: graph(pair), 3: graph(pair)}, layouts, config)
        assert not same_but_for_groups({0: graph(pair), 3: graph(other, (1,))}, layouts, config)


class TestExecutor:
    def test_unknown_primitive_is_named(self):
        with pytest.raises(UserError, match="no rule for the primitive Frobnicate.*numpy_ops.py"):
            prepare(graph_of(node("Frobnicate", "a", ("x",), (2,))))

    def test_what_was_loaded_before_an_update_stays(self):
        kind = {"w": TensorType((2,), "float32")}
        made = graph_of(node("Load", "old", ("w",), (2,)), node("Assign", "new", ("w", "x"), (2,)),
                        node("Sub", "out", ("x", "old"), (2,)), parameters=kind)
        rank = Rank(0, prepare(made), {"w": np.ones(2, np.float32)})
        got = run_step([rank], [[np.full(2, 5, np.float32)]])
        assert list(got[0]) == [4, 4] and list(rank.state["w"]) == [5, 5]

    def test_wrong_shape_stops(self):
        with pytest.raises(ValueError, match="gave shape"):
            run_step(ranks_of(graph_of(node("Neg", "n", ("x",), (3,)))), [[np.zeros(2)]])

    def test_values_are_freed_after_their_last_use(self):
        program = prepare(graph_of(node("Neg", "a", ("x",), (2,)), node("Neg", "b", ("a",), (2,)),
                                   node("Neg", "c", ("b",), (2,))))
        assert program.dead_after == {"a": ["x"], "b": ["a"], "c": ["b"]}


class TestFlat:
    def graph(self) -> Graph:
        """out = backward(forward(x)), twice: forward(x) = (-x, backward with x kept), backward(x, y) = x - y."""
        from mindspore.train.mind_ir_pb2 import AttributeProto

        index = [Node(name, "Constant", [], [], value=AttributeProto(name="value", type=AttributeProto.INT64, i=i))
                 for i, name in enumerate(("zero", "one"))]
        back = Function("back", ["kept", "y"], [node("Sub", "out", ("kept", "y"), (2,))], "out")
        fore = Function("fore", ["x"], [node("Neg", "y", ("x",), (2,)), node("Partial", "b", ("back", "x")),
                                        node("MakeTuple", "pair", ("y", "b"))], "pair")
        nodes = index
        for i, source in enumerate(("x", "g0")):
            forward, backward = node("call", f"c{i}", (source,)), node("call", f"g{i}", (f"y{i}",), (2,))
            forward.callee, backward.callee = "fore", f"b{i}"
            nodes += [forward, node("TupleGetItem", f"y{i}", (f"c{i}", "zero"), (2,)),
                      node("TupleGetItem", f"b{i}", (f"c{i}", "one")), backward]
        return Graph(Function("main", ["x"], nodes, "g1"), {"fore": fore, "back": back}, {})

    def test_calls_and_kept_values_become_nodes(self):
        made = flat(self.graph())
        assert not made.functions and [item.op for item in made.main.nodes if item.op != "Constant"] == [
            "Neg", "Sub", "Neg", "Sub"]
        got = run_step([Rank(0, prepare(made), {})], [[np.array([1.0, 3.0], np.float32)]])
        assert list(got[0]) == [4, 12]

    def test_unknown_callee_is_named(self):
        made = self.graph()
        made.main.nodes[2].callee = "x"
        with pytest.raises(UserError, match="decides at run time what it calls"):
            flat(made)


class TestComparison:
    def test_a_moment_is_measured_against_what_it_has_been(self):
        from parallel.proof.replay.lockstep import Replay

        network = SimpleNamespace(trainable_params=list)
        world = SimpleNamespace(extents=[{}], count=1)
        replay = Replay(world, SimpleNamespace(task=SimpleNamespace(network=network)), 3)
        rank = Rank(0, prepare(graph_of(node("Neg", "out", ("x",), (1,)))), {})
        found = []
        for ours, full in ((1.0, 1.0), (2e-7, 1e-7), (0.5, 1.0), (1.0, np.nan)):
            rank.state = {"adam_m.bias": np.array([ours])}
            found.append(replay._differences([rank], {"adam_m.bias": np.array([full])})[0].relative)
        np.testing.assert_allclose(found, [0.0, 1e-7, 0.5, np.inf])

    def test_both_optimizers_take_the_larger_epsilon(self, root):
        from parallel.proof.replay.settings import with_defaults

        config = str(root / "configs/recsys/dlrm_mlp.yaml")
        own = ["train.sparse_optimizer.name=adagrad"]
        assert not any("sparse" in item for item in with_defaults(config, []))
        made = with_defaults(config, own)
        assert made[-1:] == own and {"train.optimizer.epsilon=1e-3", "train.sparse_optimizer.epsilon=1e-3"} < set(made)

    def test_experts_leave_no_row_out_unless_the_user_says_so(self, root):
        from parallel.proof.replay.settings import with_defaults
        from parallel.task import load_run

        config = str(root / "configs/recsys/tokenmixer_large_moe.yaml")
        for own, factor in (["model.moe.experts=9"], 9.0), (["model.moe.capacity_factor=2"], 2.0):
            settings = load_run(config, with_defaults(config, own))[1]
            assert (settings.model.moe.capacity_factor, settings.train.optimizer.epsilon) == (factor, 1e-2)
        plain, separated = (with_defaults(str(root / f"configs/recsys/{name}.yaml"), [])
                            for name in ("rankmixer", "rankmixer_ug_sep"))
        assert not any("moe" in item for item in plain) and plain + ["train.optimizer.epsilon=1e-2"] == separated

    def test_micro_batches_of_one_rank_are_refused(self, root):
        from parallel.proof.replay.settings import check_size

        with pytest.raises(UserError, match="gathers no gradients of micro-batches in a world of one rank"):
            check_size(str(root / CONFIG), ["train.accumulation=2"])
        check_size(str(root / CONFIG), ["train.accumulation=2", "parallel.data=2"])


@pytest.fixture(scope="module")
def layout(root):
    """(world, one-device run, steps) of data 2 x op 2 with optimizer sharding and sequence parallelism."""
    from parallel.proof.compile.rank_compiler import Compilers
    from parallel.proof.replay.ranks import compile_ranks
    from parallel.proof.replay.reference import OneDevice
    from parallel.proof.replay.settings import with_defaults

    config = str(root / CONFIG)
    overrides = with_defaults(config, [*TINY, "parallel.data=2", "parallel.op=2", "parallel.optimizer.shard=-1",
                                       "parallel.sequence=true"])
    with Compilers(2) as compilers:
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
        told = figures["deadlock"]
        assert "another order" in told and "layers.0.norm2.gamma" in told and "layers.0.norm2.beta" in told

    def test_a_rank_that_skips_a_collective_is_a_deadlock(self, layout):
        def change(rank, item):
            if rank == 3 and item.op == "AllReduce" and "cross_entropy" in item.scope:
                return dataclasses.replace(item, op="TensorMove", attributes={})
            return None

        figures = replayed(layout, change)
        assert not figures["equal"] and ("rank 3" in figures["deadlock"] or "group" in figures["deadlock"])
