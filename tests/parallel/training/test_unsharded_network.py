"""What of the `parallel:` block an unsharded network takes is in its graph; what it does not is refused or goes to
torch, on one device and under data parallelism alike. Estimate, dry run and the program that torch runs are held
together."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from parallel.common.errors import UserError
from parallel.launch.choose import choose
from parallel.sharding.config import ParallelConfig
from parallel.training.device import Processes
from parallel.training.sharded.run import needs_sharding

ROOT = Path(__file__).parents[3]
CONFIG = str(ROOT / "configs" / "pangu" / "tiny.yaml")
SIZES = ["model.layers=2", "model.hidden_size=32", "model.heads=4", "model.sequence_length=16",
         "model.vocabulary_size=64", "train.global_batch_size=8"]

# Compiles and runs two steps on the CPU; prints losses and how often each operation is in the graph.
RUN = """
import json, os, re, sys
from collections import Counter
from pathlib import Path
os.environ |= {"MS_DEV_SAVE_GRAPHS": "2", "MS_DEV_SAVE_GRAPHS_PATH": sys.argv[1]}
from mindspore import Tensor
from pangu.build import build
from pangu.train import training_step
from parallel.task import load_run
from parallel.training.device import start_device
_, settings = load_run(sys.argv[2], sys.argv[3:])
step = training_step(settings, start_device())
batch = build(settings, settings.parallel.resolve(1), "float32").sample(0)
told = [[float(x.asnumpy()) for x in step(*map(Tensor, batch))] for _ in range(2)]
text = sorted(Path(sys.argv[1]).rglob("*_validate_*.ir"))[-1].read_text()
print(json.dumps([told, Counter(re.findall(r"= (?:PrimFunc_)?(\\w+)\\(", text))]))
"""


def whole(folder: Path, *keys: str) -> tuple[list, Counter]:
    done = subprocess.run([sys.executable, "-c", RUN, str(folder), CONFIG, *SIZES, *keys], cwd=ROOT, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "GLOG_v": "3"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told, counts = json.loads(done.stdout.splitlines()[-1])
    return told, Counter(counts)


@pytest.mark.slow
def test_an_unsharded_network_recomputes_and_takes_micro_batches(tmp_path):
    """Products of two layers are made again, with the same result bit for bit; micro-batches repeat the whole pass."""
    plain, products = whole(tmp_path / "plain")
    again, more = whole(tmp_path / "full", "parallel.recompute.policy=full")
    assert again == plain
    # Scores and mixing, and the four products of a layer but the last, whose result nothing behind it needs.
    assert more["BatchMatMul"] - products["BatchMatMul"] == 2 * 2
    assert more["MatMul"] > products["MatMul"]
    _, micro = whole(tmp_path / "micro", "parallel.pipeline.micro_batches=2")
    assert micro["BatchMatMul"] == 2 * products["BatchMatMul"]


def test_recomputation_with_dropout_goes_to_torch_or_is_refused(capsys):
    from pangu.__main__ import VERBS
    from parallel.common.command import main
    from parallel.launch.choose import choice_of
    from parallel.task import load_run

    keys = [*SIZES, "model.dropout=0.1", "parallel.recompute.policy=full"]
    assert choice_of(load_run(CONFIG, keys)[1], 1).backend == "torch"
    assert main("pangu", VERBS, ["train", "--config", CONFIG, *keys, "parallel.backend=mindspore"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "parallel.recompute.policy: MindSpore 2.9 does not compile" in error


REFUSED = {"micro_batch_interleave": {"micro_batch_interleave": 2}, "optimizer.shard": {"optimizer": {"shard": 2}},
           "expert": {"expert": 2}}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_unsharded_network_does_not_take_goes_to_torch_or_is_refused(name, monkeypatch):
    from parallel.launch import choose as module

    monkeypatch.setattr(module, "installed", lambda package: True)
    monkeypatch.setattr(module, "has_ascend", lambda: False)
    monkeypatch.setattr(module, "gpus", lambda: 0)
    block = {"data": 1 if name == "micro_batch_interleave" else 2, **REFUSED[name]}
    assert choose(ParallelConfig(**block).resolve()).backend == "torch"
    config = ParallelConfig(**block, backend="mindspore").resolve()
    with pytest.raises(UserError, match=f"{name} 2"):
        needs_sharding(config, Processes(0, config.world, None, "CPU"))
    ascend = Processes(0, config.world, None, "Ascend")
    if config.world == 1:
        with pytest.raises(UserError, match="one Ascend device runs an unsharded network"):
            needs_sharding(config, ascend)
    else:
        assert needs_sharding(config, ascend)


def test_fused_groups_are_of_ascend(monkeypatch):
    from parallel.launch import choose as module

    monkeypatch.setattr(module, "installed", lambda package: True)
    monkeypatch.setattr(module, "has_ascend", lambda: False)
    monkeypatch.setattr(module, "gpus", lambda: 0)
    for block in ({"data": 2}, {"op": 2}):
        with pytest.raises(UserError, match="gradient_fusion_groups: gradients are fused into groups on Ascend"):
            choose(ParallelConfig(**block, gradient_fusion_groups=2).resolve())
    assert choose(ParallelConfig(gradient_fusion_groups=2).resolve()).backend == "mindspore", "nothing to fuse"
    monkeypatch.setattr(module, "has_ascend", lambda: True)
    config = ParallelConfig(data=2, gradient_fusion_groups=2).resolve()
    assert choose(config).device == "Ascend" and needs_sharding(config, Processes(0, 2, None, "Ascend"))


def test_a_level_without_shards_is_refused():
    with pytest.raises(UserError, match="parallel.optimizer.level: nothing is sharded"):
        ParallelConfig(data=2, optimizer={"level": 2}).resolve()
    assert ParallelConfig(data=1, optimizer={"shard": -1, "level": 2}).resolve().optimizer_shard == 1


BLOCKS = {
    "data 2, recomputed": ["parallel.data=2", "parallel.recompute.policy=full"],
    "data 2, level 2, micro-batches": ["parallel.data=2", "parallel.optimizer.shard=-1", "parallel.optimizer.level=2",
                                       "train.accumulation=2"],
    "op 2, interleaved parts": ["parallel.op=2", "parallel.micro_batch_interleave=2"],
}


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None, reason="compiling needs g++")
@pytest.mark.parametrize("name", BLOCKS)
def test_estimate_dry_run_and_run_are_one_program(name, tmp_path):
    """The graph that torch runs has the collectives that the dry run reports and the estimate counts."""
    from parallel.torch_runtime.graph import COLLECTIVES
    from parallel.torch_runtime.program import Program

    words = ["--config", CONFIG, *SIZES, "train.precision=fp16", *BLOCKS[name]]
    told = {}
    for verb, more in (("dryrun", ["--rank", "0"]), ("estimate", []), ("export", ["--output", str(tmp_path / "p")])):
        done = subprocess.run([sys.executable, "-m", "parallel", verb, *words, *more], cwd=ROOT, check=False,
                              env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        told[verb] = json.loads(done.stdout.splitlines()[-1])
    graph = Program(tmp_path / "p").graph(0)
    run = Counter(node.op for node in graph.nodes if node.op in COLLECTIVES)
    assert run == {kind: one["count"] for kind, one in told["dryrun"]["collectives"].items()}
    counted = {kind: size for kind, size in told["estimate"]["communication_bytes"].items() if size}
    dry = {kind: size for kind, size in told["dryrun"]["by_dimension"].items() if size}
    assert counted == dry
    assert re.search(r"\d", str(dry))
