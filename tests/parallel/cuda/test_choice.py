"""MindSpore's CUDA backend: who gets it, and what it refuses."""

import os
import subprocess
import sys

import pytest

from parallel.common.errors import UserError
from parallel.launch import choose as module
from parallel.launch.choose import choose
from parallel.sharding.config import ParallelConfig
from parallel.training.device import Processes, check_precision
from parallel.training.sharded.run import needs_sharding


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(module, "installed", lambda name: True)
    monkeypatch.setattr(module, "has_ascend", lambda: False)
    monkeypatch.setattr(module, "gpus", lambda: 2)


def gpu(**block):
    mindspore = {"device": "GPU", **block.pop("mindspore", {})}
    return ParallelConfig(**{"backend": "mindspore", **block, "mindspore": mindspore}).resolve()


def test_it_is_taken_where_both_keys_say_so():
    for block in ({}, {"data": 2}, {"op": 2}, {"pipeline": {"stages": 2}}, {"data": 2, "optimizer": {"shard": -1}}):
        choice = choose(gpu(**block), "fp16")
        assert (choice.backend, choice.device) == ("mindspore", "GPU")


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_it_is_never_taken_by_itself(backend):
    with pytest.raises(UserError, match="parallel.mindspore.device: .* never chosen by itself .*parallel.backend"):
        gpu(backend=backend)
    assert choose(ParallelConfig(backend="mindspore").resolve()).device == "CPU"


def test_what_its_kernels_lack_is_refused_in_a_line():
    with pytest.raises(UserError, match="train.precision: MindSpore's CUDA kernels lack bfloat16"):
        choose(gpu(), "bf16")
    for precision in ("fp32", "fp16"):
        check_precision(precision, "GPU")
    for target in ("CPU", "Ascend"):
        check_precision("bf16", target)
    with pytest.raises(UserError, match="parallel.mindspore.hccl_exec_seconds: .*Ascend"):
        choose(gpu(mindspore={"hccl_exec_seconds": 60}))


def test_layouts_are_sharded_as_on_ascend():
    for block in ({"data": 2}, {"op": 2}, {"data": 2, "optimizer": {"shard": -1}}, {"pipeline": {"stages": 2}},
                  {"data": 2, "recompute": {"policy": "full"}}):
        config = gpu(**block)
        here, there = (needs_sharding(config, Processes(0, 2, "all", target)) for target in ("GPU", "Ascend"))
        assert here == there
    with pytest.raises(UserError, match="one GPU device runs an unsharded network"):
        needs_sharding(gpu(optimizer={"shard": 1}, micro_batch_interleave=2), Processes(0, 1, None, "GPU"))


def started(text: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env={**os.environ, **variables})


def test_without_its_libraries_it_says_where_they_are_told(tmp_path):
    done = started("from parallel.training.device import start_device\n"
                   "from parallel.sharding.config import MindSporeConfig\n"
                   "start_device(MindSporeConfig(device='GPU'))", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0 and "docs/mindspore_cuda.md" in done.stderr, done.stderr[-500:]


@pytest.mark.parametrize("target", ["Ascend", "CPU"])
def test_graphs_of_other_devices_get_nothing_of_it(target, monkeypatch):
    import mindspore as ms

    from parallel.layers.activation import GELU
    from parallel.layers.attention import AttentionCore
    from parallel.layers.norm import RMSNorm
    from parallel.training.one_stream import last_reduction, on_gpu
    from recsys.layers.embedding import Join

    real = ms.get_context
    for device in (target, "GPU"):
        monkeypatch.setattr(ms, "get_context",
                            lambda key, device=device: device if key == "device_target" else real(key))
        there = device == "GPU"
        layers = GELU("erf"), AttentionCore(16, dropout=0.0), Join(2)
        assert [layer.casts for layer in layers] == [there] * 3 and on_gpu() == there
        assert RMSNorm(16).written_out == (device != "Ascend") and last_reduction() is None, "one process"
