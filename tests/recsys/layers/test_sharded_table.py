"""A table over all devices is the plain table: in as many parts on one device, and (replayed) on four."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor, ops

from parallel.common.errors import UserError
from parallel.layers.parameter import initialize
from parallel.proof.compile.graph import read_graph
from parallel.proof.compile.rank_compiler import Request, compile_rank
from parallel.task import load_run
from recsys.build import build
from recsys.layers.embedding import Table
from recsys.layers.sharded_table import ShardedTable


def made(parts: int, **sizes) -> ShardedTable:
    table = ShardedTable(64, 3, 0.1, **sizes)
    initialize(table, 1)
    table.parts = parts
    return table


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("parts", [1, 2, 8])
def test_rows_and_gradients_are_those_of_the_plain_table(parts):
    table, plain = made(parts, factor=1.0, rounds=8), Table(64, 3, 0.1)
    plain.table.set_data(table.table.value())
    generator = np.random.default_rng(parts)
    # Few ids, many times; all ids; ids of one device alone.
    for ids in (generator.integers(0, 5, (8, 6)), generator.permutation(64)[:48].reshape(8, 6),
                generator.integers(60, 64, (8, 6))):
        ids = Tensor(ids.astype(np.int32))
        np.testing.assert_array_equal(table(ids).asnumpy(), plain(ids).asnumpy())
        gradients = [ops.grad(lambda x, cell=cell: (cell(x) ** 3).sum(), None, cell.table)(ids).asnumpy()
                     for cell in (table, plain)]
        np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-9)


@pytest.mark.usefixtures("pynative")
def test_what_finds_no_slot_is_not_dropped_in_silence():
    """All ids on device 0: one round of the even share is too small, further rounds serve the rest."""
    ids = Tensor(np.arange(16, dtype=np.int32).reshape(4, 4))
    lost = np.isnan(made(4, factor=1.0, rounds=1)(ids).asnumpy()).any(-1)
    assert lost.sum() == 12
    whole = made(4, factor=1.0, rounds=4)
    np.testing.assert_array_equal(whole(ids).asnumpy(), whole.table.asnumpy()[np.arange(16)].reshape(4, 4, 3))


@pytest.mark.parametrize(("words", "what"), [
    (["parallel.data=3"], "does not divide"), (["train.global_batch_size=1"], "does not divide"),
    (["data.tables.place=host"], "one lookup of tables"),
    (["train.accumulation=2", "train.sparse_optimizer.name=lazy_adam"], "only the rows of a step"),
    (["model.lookup.by=op", "train.sparse_optimizer.name=rowwise_adagrad"], "only the rows of a step")])
def test_layouts_that_do_not_fit_are_one_line(words, what):
    _, settings = load_run("configs/recsys/dlrm_mlp.yaml", ["model.lookup.by=alltoall", "parallel.data=2", *words])
    with pytest.raises(UserError, match=what):
        build(settings, settings.parallel.resolve())


LOOKUP = ["parallel.data=2", "parallel.op=2", "model.lookup.by=alltoall", "model.lookup.rounds=4",
          "model.embedding_std=0.1", "train.global_batch_size=32"]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["adam", "adagrad", "rowwise_adagrad", "lazy_adam"])
def test_four_devices_equal_one(rule):
    """MindSpore's own graphs of four Ascend ranks, executed in NumPy: AlltoAll there and back, two steps of the tables'
    optimizer, over whole shards (adam) or the rows of the step, under a norm that clips."""
    command = [sys.executable, "-m", "parallel", "replay", "--config", "configs/recsys/dlrm_mlp.yaml", "--steps", "2",
               *LOOKUP, f"train.sparse_optimizer.name={rule}", "train.clip_norm=0.05"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["equal"] and figures["max_parameter_difference"] < 1e-9 and figures["max_norm_difference"] < 1e-9
    assert figures["max_state_difference"] < 1e-9


def elements(rows: int, rule: str) -> int:
    """What all nodes of rank 0's graph of a step write; a ScatterUpdate and a ScatterSub what they are given."""
    words = [*LOOKUP, f"train.sparse_optimizer.name={rule}", f"data.synthetic.users={rows}"]
    request = Request(4, 0, str(Path("configs/recsys/dlrm_mlp.yaml").resolve()), words)
    graph = read_graph(compile_rank(request).graph)
    nodes = {node.name: node for node in graph.main.nodes}
    total = 0
    for node in graph.main.nodes:
        if node.op in ("ScatterUpdate", "ScatterSub"):
            total += math.prod(nodes[node.inputs[2]].outputs[0].shape)
        elif node.op not in ("Constant", "Load", "Depend", "UpdateState", "Reshape", "MakeTuple", "TupleGetItem"):
            total += sum(math.prod(kind.shape) for kind in node.outputs)
    return total


@pytest.mark.slow
def test_the_work_of_a_step_does_not_grow_with_the_rows():
    """Counted in the compiled graph: a table of eight times the rows, not an element more; with Adam, which goes over
    all of them, many more."""
    few, many = 1000, 8000
    assert elements(few, "lazy_adam") == elements(many, "lazy_adam")
    assert elements(many, "adam") > elements(few, "adam") + 5 * (many - few)


@pytest.mark.slow
def test_four_processes_on_torch_equal_one_of_mindspore(tmp_path):
    """The command over gloo: rows on four processes, the rows of a step moved where they are."""
    pytest.importorskip("torch")
    figures = {}
    words = ["data.synthetic.samples=1500", "data.synthetic.users=60", "data.synthetic.items=40", "train.steps=10",
             "train.validate_every=10", "output.tensorboard=false", "output.loss_curve=false",
             "train.sparse_optimizer.learning_rate=0.05", "train.sparse_optimizer.name=rowwise_adagrad",
             f"data.cache={tmp_path / 'data'}"]
    for count, layout in ((1, ["parallel.data=1", "parallel.op=1"]), (4, [])):
        command = [sys.executable, "-m", "parallel", "launch", "--config", "configs/recsys/dlrm_mlp.yaml", "--nproc",
                   str(count), *LOOKUP, *layout, *words, f"output.directory={tmp_path / str(count)}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        figures[count] = json.loads(done.stdout.splitlines()[-1])
    for name in ("loss", "auc", "logloss", "validation_auc"):
        assert figures[4][name] == pytest.approx(figures[1][name], abs=1e-5), name
