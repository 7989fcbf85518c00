"""Tables on the host: the network trains as with tables in the graph, over any number of processes, and goes on bit for
bit after a stop."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from parallel.common.errors import UserError
from parallel.task import load_run
from recsys.data.features import Feature, assign_columns, expand
from recsys.tables.exchange import Threads
from recsys.tables.host import HostTables

TINY = ["data.synthetic.samples=1500", "data.synthetic.users=60", "data.synthetic.items=40",
        "train.global_batch_size=64", "output.tensorboard=false", "output.loss_curve=false", "train.log_every=1000",
        "train.validation_batches=2", "train.peak_tflops=1.0"]


def features() -> list[Feature]:
    return expand([Feature(name="user", side="user", values="dynamic", minimum_count=2),
                   Feature(name="item", side="item", values="dynamic"),
                   Feature(name="past", side="user", type="sequence", length=4, target="item", width=None),
                   Feature(name="kind", side="item", values="integer", rows=30, width=8)])


def settings_of(**tables) -> SimpleNamespace:
    _, settings = load_run("configs/recsys/tokenmixer_large.yaml", [
        "data.tables.place=host", "train.sparse_optimizer.name=rowwise_adagrad", "model.embedding_std=0.1",
        "train.sparse_optimizer.learning_rate=0.1", *(f"data.tables.{key}={value}" for key, value in tables.items())])
    return settings


def batch_of(spec, step: int, rows: int, spread: int = 50) -> np.ndarray:
    """Ids as the encoder gives them."""
    generator = np.random.default_rng(step)
    ids = np.zeros((rows, spec.id_columns), np.int64)
    for slot in spec.slots.values():
        own = generator.integers(-spread, spread, (rows, slot.length))
        ids[:, slot.start:slot.start + slot.length] = own if slot.feature.is_dynamic else own % 30 + slot.offset
    return ids


def gradients_of(tables: HostTables, ids: np.ndarray, step: int, part: slice, rows: int) -> list[np.ndarray]:
    """A made-up gradient of every sample's columns, added over the samples of `part`."""
    sizes = [np.zeros_like(window) for window in tables.windows]
    generator = np.random.default_rng((step, 7))
    for plan in tables.plans.values():
        for column in plan.columns:
            own = generator.standard_normal((rows, plan.slot.width)).astype(np.float32)[part]
            np.add.at(sizes[plan.width], ids[:, column], own)
    return sizes


def run_steps(tables: HostTables, spec, steps: int, part: slice, rows: int, sums: list) -> None:
    for step in range(steps):
        ids = tables.fetch(tables.columns.keys(batch_of(spec, step, rows)[part]), train=True)
        used = [window[ids[:, plan.columns[0]]] for plan in tables.plans.values()
                for window in [tables.windows[plan.width]]]
        sums.append([rows_.copy() for rows_ in used])
        tables.update(gradients_of(tables, ids, step, part, rows))
        tables.end_step()


@pytest.mark.parametrize(("capacity", "copies"), [(64, 1), (1 << 16, 1), (1 << 16, 2)])
def test_four_processes_hold_what_one_holds(capacity, copies, tmp_path):
    """Data 4, and data 2 x op 2, where two processes have the same samples and the same gradients."""
    spec, rows, steps = assign_columns(features(), 16), 32, 6
    alone, seen = HostTables(settings_of(), spec, rows), []
    run_steps(alone, spec, steps, slice(0, rows), rows, seen)
    world, parts, failures = Threads(4, capacity), [[] for _ in range(4)], []
    own = rows * copies // 4
    ranks = [HostTables(settings_of(), spec, own, world.of(rank), (rank % copies, copies)) for rank in range(4)]

    def work(rank: int) -> None:
        try:
            first = rank // copies * own
            run_steps(ranks[rank], spec, steps, slice(first, first + own), rows, parts[rank])
            ranks[rank].before_checkpoint(tmp_path, steps)
        except Exception as error:
            failures.append(error)
            world.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures, failures
    if capacity == 64:
        assert ranks[0].exchange.most_rounds > 1, "the capacity was meant to be too small for one round"
    for step in range(steps):
        for number, whole in enumerate(seen[step]):
            for copy in range(copies):
                met = np.concatenate([part[step][number] for part in parts[copy::copies]])
                np.testing.assert_allclose(met, whole, atol=2e-6)
    for name, table in alone.tables.items():
        whole = table.entries()
        held = [one.tables[name].entries() for one in ranks]
        keys = np.concatenate([entries.keys for entries in held])
        order, own = np.argsort(keys), np.argsort(whole.keys)
        np.testing.assert_array_equal(keys[order], whole.keys[own])
        for what in ("values", "states", "counts", "seen"):
            np.testing.assert_allclose(np.concatenate([getattr(entries, what) for entries in held])[order],
                                       getattr(whole, what)[own], atol=2e-6)
        assert max(map(len, held)) < len(whole), "one process holds everything"
    # What four wrote, one reads, and three.
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    ranks[0].add_files(folder)
    again = HostTables(settings_of(), spec, rows)
    again.restore_files(folder)
    np.testing.assert_allclose(again.tables["item"].gather(again.tables["item"].find(np.arange(-50, 50))),
                               alone.tables["item"].gather(alone.tables["item"].find(np.arange(-50, 50))), atol=2e-6)
    three = [HostTables(settings_of(), spec, rows, Threads(3).of(rank)) for rank in range(3)]
    [one.restore_files(folder) for one in three]
    assert sum(len(one.tables["item"]) for one in three) == len(alone.tables["item"])


def test_ids_of_one_owner_are_never_dropped():
    """All ids on one of three processes, whose share of a round they overflow many times."""
    from recsys.tables.keys import owners

    keys = np.arange(-20_000, 20_000)
    mine = keys[owners(keys, 3) == 1][:600]
    spec = assign_columns(expand([Feature(name="item", side="item", values="dynamic")]), 4)
    world, found, failures = Threads(3, 64), {}, []

    def work(rank: int) -> None:
        try:
            tables = HostTables(settings_of(), spec, 200, world.of(rank))
            ids = tables.fetch(mine[rank * 200:(rank + 1) * 200, None], train=True)
            found[rank] = tables.windows[0][ids[:, 0]], len(tables.tables["item"]), tables.exchange.rounds
        except Exception as error:
            failures.append(error)
            world.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures, failures
    alone = HostTables(settings_of(), spec, 600)
    ids = alone.fetch(mine[:, None], train=True)
    np.testing.assert_array_equal(np.concatenate([found[rank][0] for rank in range(3)]), alone.windows[0][ids[:, 0]])
    assert found[1][1] >= 600 and found[0][1] <= 2 and found[1][2] > 10


def test_unknown_ids_have_the_row_for_unseen_ones():
    spec = assign_columns(features(), 16)
    tables = HostTables(settings_of(), spec, 16)
    ids = batch_of(spec, 1, 16)
    seen = tables.fetch(tables.columns.keys(ids), train=True)
    column = tables.plans["user"].columns[0]
    once = np.bincount(ids[:, column] + 50)[ids[:, column] + 50] == 1
    assert (seen[once, column] == tables.plans["user"].first + 1).all(), "an id seen once is not admitted"
    assert (seen[~once, column] != tables.plans["user"].first + 1).all()
    before = {name: len(table) for name, table in tables.tables.items()}
    tables.fetch(tables.columns.keys(batch_of(spec, 2, 16)))
    assert before == {name: len(table) for name, table in tables.tables.items()}


def test_a_window_that_is_too_small_is_one_line():
    spec = assign_columns(features(), 16)
    tables = HostTables(settings_of(window=64), spec, 64)
    with pytest.raises(UserError, match="more than .* rows of width 16"):
        tables.fetch(tables.columns.keys(batch_of(spec, 1, 64, 10_000)), train=True)


def train(folder, *words, config="dlrm_mlp"):
    from recsys.train import run

    _, settings = load_run(f"configs/recsys/{config}.yaml", [
        *TINY, f"output.directory={folder}", f"data.cache={folder.parent / 'data'}", *words])
    return run(settings), settings


HOST = ("data.tables.place=host", "train.sparse_optimizer.name=adagrad", "train.sparse_optimizer.learning_rate=0.05")


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, graph_mode):
    words = (*HOST, "train.validate_every=4", "train.keep_best=auc", "output.checkpoint_every=4")
    uninterrupted, _ = train(tmp_path / "straight", *words, "train.steps=8")
    train(tmp_path / "stopped", *words, "train.steps=4")
    resumed, settings = train(tmp_path / "stopped", *words, "train.steps=8")
    for path in sorted((tmp_path / "straight" / "checkpoints" / "step_00000008").rglob("*.safetensors")):
        other = tmp_path / "stopped" / path.relative_to(tmp_path / "straight")
        assert other.read_bytes() == path.read_bytes(), path.name
    assert {key: resumed[key] for key in ("auc", "logloss", "loss")} == {
        key: uninterrupted[key] for key in ("auc", "logloss", "loss")}
    assert uninterrupted["table_rows"] > 100
    _evaluate_tells_the_same(settings, tmp_path, resumed)


def _evaluate_tells_the_same(settings, folder, figures) -> None:
    from recsys.evaluation.evaluate import run

    arguments = SimpleNamespace(checkpoint=str(folder / "stopped" / "best"), part="test", requests=None,
                                segments="gender")
    found = run(settings, arguments)
    assert found["auc"] == pytest.approx(figures["auc"], abs=1e-9)
    assert set(found["segments"]) <= {"0", "1"} and found["segments"]


def test_host_and_graph_train_alike(tmp_path, graph_mode):
    """The same start values in both places, then six steps of Adagrad."""
    from mindspore import Tensor

    from parallel.layers.parameter import initialize
    from parallel.training.optimizers.run import Optimizer, run_optimizer
    from parallel.training.step import TrainStep
    from recsys.build import loss_network
    from recsys.data.batches import Batches
    from recsys.data.log import prepare
    from recsys.tables.names import is_sparse
    from recsys.tables.step import HostedStep, TableStep

    _, settings = load_run("configs/recsys/dlrm_mlp.yaml", [
        *TINY, *HOST, f"data.cache={tmp_path / 'data'}", "model.embedding_std=0.1"])
    log = prepare(settings.data, settings.model.embedding_size)
    tables = HostTables(settings, log.spec, 64)
    hosted = loss_network(settings, tables.window, len(log.labels))
    whole = loss_network(settings, log.spec, len(log.labels))
    initialize(hosted.model, 1)
    initialize(whole.model, 1)
    _copy_starts(whole, log.spec, settings)
    options = settings.train
    dense = [p for p in hosted.trainable_params() if not is_sparse(p.name)]
    one = HostedStep(TableStep(hosted, Optimizer(dense, options.optimizer, options.steps), options), tables)
    other = TrainStep(whole, run_optimizer(whole.trainable_params(), options, is_sparse), options)
    for batch, _ in zip(Batches(log.parts["train"], 64, 1, spec=log.spec).batches(0), range(6), strict=False):
        losses = [step(*map(Tensor, batch))[0].asnumpy() for step in (one, other)]
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    trained = {p.name: p.asnumpy() for p in whole.get_parameters()}
    for p in dense:
        np.testing.assert_allclose(p.asnumpy(), trained[p.name], atol=2e-5)
    moved = 0
    for name, plan in tables.plans.items():
        entries = tables.tables[name].entries()
        table = next(value for key, value in trained.items() if key.endswith(f"embedding.tables.{plan.width}.table"))
        known = entries.keys >= 0
        np.testing.assert_allclose(entries.values[known], table[plan.slot.offset + 2 + entries.keys[known]], atol=2e-5)
        moved += int(known.sum())
    assert moved > 100


def _copy_starts(network, spec, settings) -> None:
    from mindspore import Tensor

    from recsys.tables.keys import MISSING_KEY, UNSEEN_KEY

    fresh = HostTables(settings, spec, 8)
    tables = [item.table.asnumpy().copy() for item in network.model.embedding.tables]
    for name, plan in fresh.plans.items():
        keys = np.concatenate([[MISSING_KEY, UNSEEN_KEY], np.arange(plan.slot.rows - 2)])
        rows = fresh.tables[name].meet(keys, np.ones(len(keys), np.float32), 1)
        tables[plan.width][plan.slot.offset:plan.slot.offset + plan.slot.rows] = fresh.tables[name].gather(rows)
    for item, values in zip(network.model.embedding.tables, tables, strict=True):
        item.table.set_data(Tensor(values))


def test_dynamic_ids_from_the_log_to_the_score(tmp_path, graph_mode, capsys):
    """The synthetic log with users and items as dynamic ids, a strict admission and sweeps; then a table of the newest
    checkpoint is damaged, and the run goes on from the one before."""
    words = (*HOST, "train.validate_every=6", "data.tables.sweep_every=2", "train.keep_best=null",
             "output.checkpoint_every=3", *_dynamic(settings_of()))
    figures, settings = train(tmp_path / "run", *words, "train.steps=6")
    assert figures["table_waiting"] > 0 and figures["table_rows"] > 20 and 0.0 < figures["logloss"] < 2.0
    newest = tmp_path / "run" / "checkpoints" / "step_00000006"
    good = {path.name: path.read_bytes() for path in newest.rglob("*.safetensors")}
    table = next(newest.rglob("user_id-*.safetensors"))
    table.write_bytes(good[table.name][:-9] + bytes([good[table.name][-9] ^ 1]) + good[table.name][-8:])
    capsys.readouterr()
    train(tmp_path / "run", *words, "train.steps=6")
    said = capsys.readouterr().err
    assert "step_00000006 is damaged and passed over" in said and "step 3)" in said, said
    assert {path.name: path.read_bytes() for path in newest.rglob("*.safetensors")} == good


def _dynamic(settings) -> list[str]:
    import json

    from recsys.data.columns import features_of

    tree = [feature.model_dump(mode="json") for feature in features_of(settings.data)]
    for feature in tree:
        if feature["name"] in ("user_id", "item_id"):
            feature.update(values="dynamic", rows=None, minimum_count=3, expire_after=4)
    assert any(feature["values"] == "dynamic" for feature in tree)
    return [f"data.features={json.dumps(tree)}"]


def same_files(one, other) -> None:
    """Checkpoints with the same tensors, to the bit."""
    paths = sorted(one.rglob("*.safetensors"))
    assert len(paths) > 2
    for path in paths:
        assert (other / path.relative_to(one)).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("rule", ["rowwise_adagrad", *(pytest.param(rule, marks=pytest.mark.slow) for rule in (
    "adagrad", "lazy_adam", "sgd"))])
def test_rows_that_stay_on_the_device_change_no_bit(tmp_path, graph_mode, rule):
    """Dynamic ids with admission and sweeps, a validation and a checkpoint between; then the run goes on from that
    checkpoint. A sweep ends every third step, and rows are chosen after steps 1, 4 and 16 only: they stay hot."""
    words = ("data.tables.place=host", f"train.sparse_optimizer.name={rule}", "data.tables.sweep_every=3",
             "train.sparse_optimizer.learning_rate=0.05", "train.validate_every=6", "output.checkpoint_every=6",
             "train.keep_best=auc", *_dynamic(settings_of()))
    hot = ("data.tables.hot_rows=100",)
    plain, _ = train(tmp_path / "plain", *words, "train.steps=24")
    train(tmp_path / "hot", *words, *hot, "train.steps=12")
    found, _ = train(tmp_path / "hot", *words, *hot, "train.steps=24")
    assert 0.1 < found.pop("hot_share") < 0.9
    for name in ("auc", "logloss", "validation_auc", "loss", "table_rows", "table_waiting"):
        assert found[name] == plain[name], name
    for step in (18, 24):
        same_files(*(tmp_path / name / "checkpoints" / f"step_{step:08d}" for name in ("plain", "hot")))


def test_hot_rows_over_processes_are_one_line():
    from recsys.tables.run import hosted_backend

    with pytest.raises(UserError, match="one process"):
        hosted_backend(settings_of(hot_rows=8), None, 1, SimpleNamespace(ranks=2))


@pytest.mark.parametrize(("words", "what"), [(["parallel.data=2", "parallel.op=2"], "op 2"),
                                             (["parallel.data=4", "parallel.optimizer.shard=2"], "shard 2")])
def test_more_than_data_parallelism_on_mindspore_is_one_line(words, what):
    """Whatever the device; as data parallelism it would be another run than the one that was asked for."""
    from recsys.tables.run import hosted_backend

    _, settings = load_run("configs/recsys/dlrm_mlp.yaml", [*HOST, *words])
    with pytest.raises(UserError, match=f"data parallelism only.*{what}"):
        hosted_backend(settings, None, 1, SimpleNamespace(ranks=4))


def test_dynamic_ids_need_the_host(tmp_path):
    from recsys.build import build

    _, settings = load_run("configs/recsys/tokenmixer_large.yaml", _dynamic(settings_of()))
    with pytest.raises(UserError, match=r"data.tables.place: host"):
        build(settings, settings.parallel.resolve(1))


def test_an_optimizer_that_touches_all_rows_is_refused():
    settings = settings_of()
    settings.train.sparse_optimizer = settings.train.sparse_optimizer.model_copy(update={"name": "lamb"})
    with pytest.raises(UserError, match="only the rows of a step"):
        HostTables(settings, assign_columns(features(), 16), 8)


@pytest.mark.slow
def test_two_real_processes_equal_one(tmp_path):
    """`python -m parallel launch --nproc 2 ... data.tables.place=host` over MindSpore's own process group, each process
    reading its half of the log."""
    import json
    import subprocess
    import sys

    words = [*TINY, *HOST, "train.steps=12", "train.validate_every=6", "train.keep_best=auc",
             "data.tables.exchange_kb=16", "data.shards=2", f"data.cache={tmp_path / 'data'}"]
    figures = []
    for count in (1, 2):
        command = [sys.executable, "-m", "parallel", "launch", "--config", "configs/recsys/dlrm_mlp.yaml",
                   "--nproc", str(count), *words, f"parallel.data={count}", f"output.directory={tmp_path / str(count)}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
        figures.append(json.loads(done.stdout.splitlines()[-1]))
    for name in ("auc", "logloss", "validation_auc", "validation_logloss"):
        assert figures[0][name] == pytest.approx(figures[1][name], abs=1e-5)
    assert figures[1]["table_rows"] < 0.7 * figures[0]["table_rows"]
