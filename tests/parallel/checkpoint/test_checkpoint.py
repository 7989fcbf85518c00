"""Checkpoints: exact, complete or absent, readable by the safetensors package, and clear about what is wrong."""

import errno
import json
import os

import numpy as np
import pytest
import safetensors.numpy
from mindspore import Parameter, Tensor

from parallel.checkpoint import writing as module
from parallel.checkpoint.folder import damage as damage_of
from parallel.checkpoint.folder import list_checkpoints
from parallel.checkpoint.full import Checkpoint, load_checkpoint, load_parameters, save_checkpoint
from parallel.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from parallel.common.errors import UserError
from parallel.common.files import json_with_digest, read_json

SHAPES = {"table": (7, 4), "layer.weight": (3, 5), "layer.bias": (5,), "empty": (0, 4), "count": ()}


def make(seed=0, types=(), prefix="", shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return [Parameter(Tensor(rng.standard_normal(shape).astype(dict(types).get(name, np.float32))), name=prefix + name)
            for name, shape in shapes.items()]


@pytest.fixture
def saved(tmp_path):
    save_checkpoint(tmp_path, 10, make(1, {"layer.weight": np.float16}), make(2, prefix="adam_m."), {"iteration": 10})
    return tmp_path


def test_there_and_back_is_exact(saved):
    parameters, states = make(5, {"layer.weight": np.float16}), make(6, prefix="adam_m.")
    state = load_checkpoint(saved, parameters, states)
    assert state["iteration"] == state["step"] == 10
    for got, expected in zip(parameters + states, make(1, {"layer.weight": np.float16}) + make(2), strict=True):
        assert got.dtype == expected.dtype and np.array_equal(got.asnumpy(), expected.asnumpy())


def test_parameters_alone_and_the_safetensors_package(saved):
    parameters = make(5, {"layer.weight": np.float16})
    load_parameters(saved / "step_00000010", parameters)
    theirs = safetensors.numpy.load_file(saved / "step_00000010" / "parameters.safetensors")
    for parameter in parameters:
        assert np.array_equal(theirs[parameter.name], parameter.asnumpy())
    safetensors.numpy.save_file(theirs, saved / "theirs.safetensors")
    ours = SafetensorsFile(saved / "theirs.safetensors")
    assert all(np.array_equal(ours.read(name), theirs[name]) for name in theirs)


def test_a_part_is_read(tmp_path):
    array = np.arange(60, dtype=np.float32).reshape(5, 4, 3)
    write_safetensors(tmp_path / "f", [("a", "F32", array.shape, lambda: array)])
    part = np.array(SafetensorsFile(tmp_path / "f").map("a")[1:3, :, 2:3])
    assert np.array_equal(part, array[1:3, :, 2:3])


@pytest.mark.parametrize(("change", "message"), [
    (lambda shapes: {**shapes, "table": (8, 4)}, r"'table' has shape \[8, 4\] in the model and \[7, 4\]"),
    (lambda shapes: {**shapes, "new": (2,)}, "lacks parameter new"),
    (lambda shapes: {k: v for k, v in shapes.items() if k != "layer.bias"}, "unknown parameter layer.bias"),
])
def test_another_model_is_named(tmp_path, change, message):
    save_checkpoint(tmp_path, 1, make(1))
    parameters = make(2, shapes=change(SHAPES))
    before = [parameter.asnumpy().copy() for parameter in parameters]
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(tmp_path, parameters)
    assert "\n" not in str(caught.value)
    assert all(np.array_equal(a, p.asnumpy()) for a, p in zip(before, parameters, strict=True))


def test_another_type_is_named(tmp_path):
    save_checkpoint(tmp_path, 1, make(1))
    with pytest.raises(UserError, match="'table' is F16 in the model and F32"):
        load_checkpoint(tmp_path, make(1, {"table": np.float16}))


def test_without_moments_training_cannot_go_on(tmp_path):
    save_checkpoint(tmp_path, 1, make(1))
    with pytest.raises(UserError, match="no optimizer state"):
        load_checkpoint(tmp_path, make(1), make(1, prefix="adam_m."))


@pytest.mark.parametrize("damage", ["flip", "cut", "cut header", "empty", "length", "not json", "outside"])
def test_damage_is_found(saved, damage):
    path = saved / "step_00000010" / "parameters.safetensors"
    data = bytearray(path.read_bytes())
    expected = "damaged"
    if damage == "flip":
        data[-3] ^= 1
        expected = "the data of .* have changed"
    elif damage == "cut":
        data = data[:-10]
        expected = "ends within 'count'|ends within"
    elif damage == "cut header":
        data = data[:20]
    elif damage == "empty":
        data = bytearray()
    elif damage == "length":
        data[:8] = (1 << 62).to_bytes(8, "little")
    elif damage == "not json":
        data[8] = 0xFF
    else:
        layout = json.loads((path.parent / "layout.json").read_text())
        layout["tensors"]["table"]["file"] = "../../../etc/passwd"
        (path.parent / "layout.json").write_text(json.dumps(layout))
        expected = "unknown|lacks|outside"
    path.write_bytes(data)
    with pytest.raises(UserError, match=expected):
        parameters = make(1, {"layer.weight": np.float16})
        load_checkpoint(saved, parameters)
        Checkpoint(saved).read("table")


@pytest.mark.parametrize(("name", "value"), [
    ("run", [1]), ("quantization", "int8"), ("step", 1.5), ("iteration", -1), ("iteration", 1 << 80), ("metrics", []),
    ("companions", 3), ("window", {})])
def test_a_state_of_another_form_with_the_right_digest_is_one_line(saved, name, value):
    path = list_checkpoints(saved)[-1]
    file = path / "state.json"
    file.write_text(json_with_digest({**read_json(file), name: value}))
    with pytest.raises(UserError, match=f"'{name}' is no") as error:
        Checkpoint(path)
    assert error.value.where == file and "is no" in str(damage_of(path))


def test_keep_and_replace(tmp_path):
    for step in (1, 2, 3, 3):
        save_checkpoint(tmp_path, step, make(step), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_disk_that_fills_up_leaves_nothing_and_keeps_the_old(saved, monkeypatch):
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for step in (10, 11):
        calls.clear()
        with pytest.raises(UserError, match="no space left"):
            save_checkpoint(saved, step, make(3), make(4, prefix="adam_m."))
    assert [path.name for path in saved.iterdir()] == ["step_00000010"]
    load_parameters(saved, make(1, {"layer.weight": np.float16}))


def test_too_little_space_is_seen_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(UserError, match="needs .* MB and the disk has"):
        save_checkpoint(tmp_path, 1, make(1))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_save_is_not_a_checkpoint(saved):
    (saved / ".step_00000011.999").mkdir()
    (saved / "step_00000012").mkdir()
    assert [path.name for path in list_checkpoints(saved)] == ["step_00000010"]


def test_two_parameters_of_one_name(tmp_path):
    with pytest.raises(UserError, match="same name"):
        save_checkpoint(tmp_path, 1, make(1) + make(2))
