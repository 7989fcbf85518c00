"""Which backend takes which layout on which machine."""

import pytest

from parallel.common.errors import UserError
from parallel.launch import choose as module
from parallel.launch.choose import choose
from parallel.sharding.config import ParallelConfig


@pytest.fixture
def machine(monkeypatch):
    """A machine made of what the test says."""
    def make(packages=("mindspore", "torch"), ascend=False, gpus=0, cuda=True):
        monkeypatch.setattr(module, "installed", lambda name: name in packages)
        monkeypatch.setattr(module, "has_ascend", lambda: ascend)
        monkeypatch.setattr(module, "gpus", lambda: gpus)
        monkeypatch.setattr(module, "torch_has_cuda", lambda: cuda and "torch" in packages)
    return make


def told(precision="fp32", **block):
    choice = choose(ParallelConfig(**block).resolve(), precision)
    return choice.backend, choice.device


def test_a_machine_with_cpus_only(machine):
    machine()
    assert told() == told(data=4) == ("mindspore", "CPU")
    for block in ({"op": 2}, {"pipeline": {"stages": 2}}, {"data": 2, "optimizer": {"shard": -1}},
                  {"data": 2, "expert": 2}):
        assert told(**block) == ("torch", "CPU")
    assert told("fp16") == told("bf16") == ("torch", "CPU")
    assert told(data=2, backend="torch") == ("torch", "CPU")
    assert told(op=2, backend="mindspore") == ("mindspore", "CPU"), "which refuses it with its own words"
    assert "op 2, precision fp16" in choose(ParallelConfig(op=2).resolve(), "fp16").text()


def test_gpus_are_never_left_to_mindspore(machine):
    machine(gpus=2)
    assert told() == told(data=2) == told(op=2) == ("torch", "GPU")
    machine(gpus=2, cuda=False)
    assert told(data=2) == ("mindspore", "CPU") and told(op=2) == ("torch", "CPU")
    machine(gpus=1, packages=("torch",))
    assert told() == ("torch", "GPU")


def test_execution_is_refused_where_mindspore_runs(machine):
    machine()
    assert told(op=2, execution="eager") == ("torch", "CPU")
    for block in ({}, {"data": 2}, {"op": 2, "backend": "mindspore"}):
        with pytest.raises(UserError, match="parallel.execution: .* MindSpore runs this one .*set it to auto"):
            told(execution="inductor", **block)


def test_ascend_runs_everything(machine):
    machine(ascend=True)
    assert told(op=2) == told("fp16", data=2) == ("mindspore", "Ascend")


def test_what_is_missing_is_told(machine):
    machine(packages=("mindspore",))
    assert told(data=2) == ("mindspore", "CPU")
    with pytest.raises(UserError, match="op 2: PyTorch is needed and not installed"):
        told(op=2)
    with pytest.raises(UserError, match="PyTorch is needed"):
        told(backend="torch")
    machine(packages=("torch",))
    assert told() == ("torch", "CPU")
    with pytest.raises(UserError, match="MindSpore is needed"):
        told(backend="mindspore")


def test_layouts_in_words():
    assert ParallelConfig().resolve().layout() == "one device"
    full = ParallelConfig(data=2, op=2, sequence=True, pipeline={"stages": 2}, optimizer={"shard": -1},
                          recompute={"policy": "full"})
    assert full.resolve().layout() == ("data 2 x op 2 x stages 2, optimizer shard 2, micro-batches 2, sequence "
                                       "parallel, recompute full")
