"""A run of a sharded network: every rank's real step compiled in a simulated cluster, with the trainer's own loop,
rows, start values, sliced checkpoints and resume; only the execution of the step is a stand-in (compiled, not run)."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from parallel.checkpoint.sharded import Slices
from parallel.layers.parameter import start_value
from parallel.task import build_task
from tests.parallel.torch_runtime.records import LENGTH, VOCABULARY, packed

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="the dry run needs g++ on x86-64")

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "configs" / "pangu" / "tiny.yaml"
MODEL = ["model.layers=2", "model.hidden_size=16", "model.heads=2", "model.sequence_length=8",
         "model.vocabulary_size=32", "train.global_batch_size=8", "train.steps=2", "output.tensorboard=false",
         "output.loss_curve=false", "output.checkpoint_every=null", "train.log_every=1", "model.dropout=0.1"]
SHARDED = ["parallel.data=2", "parallel.op=2", "parallel.optimizer.shard=-1"]
STAGED = ["parallel.op=2", "parallel.pipeline.stages=2", "parallel.pipeline.micro_batches=2"]


def simulate(folder: Path, layout: list[str], *more: str, world: int = 4, validated: bool = False,
             config: Path = CONFIG, model: list[str] = MODEL, records: bool = False) -> list[dict]:
    """What every rank of the run told."""
    from parallel.proof.compile.cann_stubs import library_path
    from parallel.proof.compile.rank_compiler import child_environment

    folder.mkdir(parents=True, exist_ok=True)
    order = {"world": world, "config": str(config), "folder": str(folder), "validated": validated,
             "records": records,
             "overrides": [*model, *layout, f"output.directory={folder / 'run'}", *more]}
    (folder / "order.json").write_text(json.dumps(order))
    environment = child_environment(library_path())
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment["PYTHONPATH"]])
    done = subprocess.run([sys.executable, "-m", "tests.parallel.sharded_run_child", str(folder / "order.json")],
                          env=environment, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    return simulate(folder, SHARDED), folder


def full_start(config: Path = CONFIG, model: list[str] = MODEL) -> dict[str, np.ndarray]:
    """What one device starts from."""
    task, settings, _ = build_task(config, [*model, "parallel.devices=1"])
    return {p.name: start_value(p.name, tuple(p.shape), p.start, settings.train.seed)
            for p in task.network.get_parameters()}


def test_the_ranks_start_from_the_slices_of_one_device(sharded):
    _, folder = sharded
    saved = Slices(folder / "run" / "checkpoints" / "step_00000002")
    for name, value in full_start().items():
        np.testing.assert_array_equal(saved.read(name), value, err_msg=name)
        assert not saved.read(f"adam_m.{name}").any()


def test_each_rank_holds_its_slices_and_reads_its_rows(sharded):
    message, _ = sharded
    for rank, own in enumerate(message):
        for name, extent in own["extents"].items():
            assert own["shapes"][name] == [stop - start for start, stop in extent], name
        data = rank // 2
        numbers = list(range(4 * data, 4 * data + 4))
        assert own["rows"] == [numbers] * 4, "three columns and the samples' numbers"
        assert own["figures"]["steps"] == 2 and own["figures"]["loss"] == 4.0


@pytest.mark.slow
def test_a_ranker_starts_from_the_slices_of_one_device(tmp_path):
    config = ROOT / "configs" / "recsys" / "rankmixer.yaml"
    model = ["train.global_batch_size=8", "train.steps=2", "train.validate_every=null", "train.keep_best=null",
             "output.tensorboard=false", "output.loss_curve=false", "output.checkpoint_every=null",
             f"data.cache={tmp_path / 'cache'}"]
    message = simulate(tmp_path, SHARDED, config=config, model=model)
    saved = Slices(tmp_path / "run" / "checkpoints" / "step_00000002")
    start = full_start(config, model)
    for name, value in start.items():
        np.testing.assert_array_equal(saved.read(name), value, err_msg=name)
    sharded = {name for name,
               extent in message[0]["extents"].items() if [stop for _, stop in extent] != list(start[name].shape)}
    assert {f"layers.{i}.network.{part}.weight" for i in range(2) for part in ("mapping", "projection")} <= sharded


def test_a_second_batch_of_real_records_makes_no_second_graph(tmp_path):
    """On every rank of a layout of all kinds, whose parameters are slices by then."""
    records = packed(tmp_path / "records")
    model = [*MODEL, f"model.vocabulary_size={VOCABULARY}", f"model.sequence_length={LENGTH}"]
    layout = ["parallel.data=2", "parallel.optimizer.shard=-1", *STAGED[1:]]
    message = simulate(tmp_path, layout, f"data.directory={records}", model=model, records=True)
    assert [own["graphs"] for own in message] == [1] * 4
    assert [own["figures"]["steps"] for own in message] == [2] * 4
    assert message[0]["rows"] != message[1]["rows"] and all(own["rows"][0] for own in message)


def test_a_stage_between_others_reads_nothing(tmp_path):
    """Of a ranker; a language model's stages all look at the documents."""
    config = ROOT / "configs" / "recsys" / "rankmixer.yaml"
    model = ["model.layers=4", "train.global_batch_size=8", "train.steps=2", "train.validate_every=null",
             "train.keep_best=null", "output.tensorboard=false", "output.loss_curve=false",
             "output.checkpoint_every=null", f"data.cache={tmp_path / 'cache'}"]
    layout = ["parallel.pipeline.stages=4", "parallel.pipeline.micro_batches=4"]
    told = simulate(tmp_path, layout, config=config, model=model)
    assert [own["read"] > 0 for own in told] == [True, False, False, True]
    assert [any(map(any, own["rows"])) for own in told] == [True, False, False, True]
    assert [own["graphs"] for own in told] == [1] * 4


@pytest.mark.slow
def test_a_run_goes_on_under_another_layout(sharded, tmp_path):
    """From data 2 x op 2 with sharded states to op 2 x 2 stages: the same values, the step where it stood."""
    _, folder = sharded
    source = folder / "run" / "checkpoints" / "step_00000002"
    message = simulate(tmp_path / "staged", STAGED, f"output.resume={source}", "train.steps=3", validated=True)
    before = Slices(source)
    after = Slices(tmp_path / "staged" / "run" / "checkpoints" / "step_00000003")
    assert set(after.tensors) == set(before.tensors)
    for name in before.tensors:
        np.testing.assert_array_equal(after.read(name), before.read(name), err_msg=name)
    assert after.state["iteration"] == 3
    assert message[0]["rows"][0] == [2000 + i for i in range(8)], "batch 2 comes next"
    held = [set(own["extents"]) for own in message]
    assert held[0] == held[1] != held[2] == held[3]
    assert held[0] & held[2] == {"embedding.word.table"}, "the word table lies on the first and the last stage"


def test_the_cpu_refuses_what_it_cannot_shard():
    from parallel.common.errors import UserError
    from parallel.sharding.config import ParallelConfig
    from parallel.training.device import Processes
    from parallel.training.sharded.run import needs_sharding

    cpu, ascend = Processes(0, 4, "group", "CPU"), Processes(0, 4, "group", "Ascend")
    with pytest.raises(UserError, match="on the CPU MindSpore runs data parallelism only"):
        needs_sharding(ParallelConfig(op=2, data=2).resolve(), cpu)
    assert not needs_sharding(ParallelConfig(data=4).resolve(), ascend)
    with pytest.raises(UserError, match="optimizer.shard 4"):
        needs_sharding(ParallelConfig(data=4, optimizer={"shard": -1}).resolve(), cpu)
    assert needs_sharding(ParallelConfig(data=4, optimizer={"shard": -1}).resolve(), ascend)
