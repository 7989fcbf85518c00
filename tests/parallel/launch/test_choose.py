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


def message(precision="fp32", **block):
    choice = choose(ParallelConfig(**block).resolve(), precision)
    return choice.backend, choice.device


def test_a_machine_with_cpus_only(machine):
    machine()
    assert message() == message(data=4) == ("mindspore", "CPU")
    for block in ({"op": 2}, {"pipeline": {"stages": 2}}, {"data": 2, "optimizer": {"shard": -1}},
                  {"data": 2, "expert": 2}):
        assert message(**block) == ("torch", "CPU")
    assert message("fp16") == message("bf16") == ("torch", "CPU")
    assert message(data=2, backend="torch") == ("torch", "CPU")
    assert message(op=2, backend="mindspore") == ("mindspore", "CPU"), "which refuses it with its own words"
    assert "op 2, precision fp16" in choose(ParallelConfig(op=2).resolve(), "fp16").text()


def test_gpus_are_never_left_to_mindspore(machine):
    machine(gpus=2)
    assert message() == message(data=2) == message(op=2) == ("torch", "GPU")
    machine(gpus=2, cuda=False)
    assert message(data=2) == ("mindspore", "CPU") and message(op=2) == ("torch", "CPU")
    machine(gpus=1, packages=("torch",))
    assert message() == ("torch", "GPU")


def test_execution_is_refused_where_mindspore_runs(machine):
    machine()
    assert message(op=2, execution="eager") == ("torch", "CPU")
    for block in ({}, {"data": 2}, {"op": 2, "backend": "mindspore"}):
        with pytest.raises(UserError, match="parallel.execution: .* MindSpore runs this one .*set it to auto"):
            message(execution="inductor", **block)


def test_ascend_runs_everything(machine):
    machine(ascend=True)
    assert message(op=2) == message("fp16", data=2) == ("mindspore", "Ascend")


def test_what_is_missing_is_reported(machine):
    machine(packages=("mindspore",))
    assert message(data=2) == ("mindspore", "CPU")
    with pytest.raises(UserError, match="op 2: PyTorch is needed and not installed"):
        message(op=2)
    with pytest.raises(UserError, match="PyTorch is needed"):
        message(backend="torch")
    machine(packages=("torch",))
    assert message() == ("torch", "CPU")
    with pytest.raises(UserError, match="MindSpore is needed"):
        message(backend="mindspore")


def test_layouts_in_words():
    assert ParallelConfig().resolve().layout() == "one device"
    full = ParallelConfig(data=2, op=2, sequence=True, pipeline={"stages": 2}, optimizer={"shard": -1},
                          recompute={"policy": "full"})
    assert full.resolve().layout() == ("data 2 x op 2 x stages 2, optimizer shard 2, micro-batches 2, sequence "
                                       "parallel, recompute full")
