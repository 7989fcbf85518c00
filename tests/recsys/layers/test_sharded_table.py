"""A table over all devices is the plain table: in as many parts on one device, and (replayed) on four."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from mindspore import Tensor, ops

from parallel.common.errors import UserError
from parallel.layers.parameter import initialize
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
    (["data.tables.place=host"], "one lookup of tables")])
def test_layouts_that_do_not_fit_are_one_line(words, what):
    _, settings = load_run("configs/recsys/dlrm_mlp.yaml", ["model.lookup.by=alltoall", "parallel.data=2", *words])
    with pytest.raises(UserError, match=what):
        build(settings, settings.parallel.resolve())


@pytest.mark.slow
def test_four_devices_equal_one():
    """MindSpore's own graphs of four Ascend ranks, executed in NumPy: AlltoAll there and back, two steps of Adagrad."""
    command = [sys.executable, "-m", "parallel", "replay", "--config", "configs/recsys/dlrm_mlp.yaml", "--steps", "2",
               "parallel.data=2", "parallel.op=2", "model.lookup.by=alltoall", "model.lookup.rounds=4",
               "model.embedding_std=0.1", "train.sparse_optimizer.name=adagrad", "train.global_batch_size=32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["equal"] and figures["max_parameter_difference"] < 1e-9
