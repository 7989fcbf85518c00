"""Checkpoints of other codes are read part by part under our names, as if they had been converted."""

from __future__ import annotations

import numpy as np
import pytest

from pangu.checkpoints.foreign import ForeignCheckpoint
from pangu.checkpoints.mindspore_file import write_mindspore
from pangu.checkpoints.names import keys
from pangu.checkpoints.slices import release_layouts, write_slices
from pangu.config import ModelConfig
from pangu.generation.sharded.model import open_checkpoint
from parallel.checkpoint.safetensors_file import write_safetensors
from parallel.common.errors import UserError
from tests.pangu.kernel_model import parameters

CONFIG = ModelConfig(layers=3, hidden_size=16, heads=2, vocabulary_size=40, sequence_length=8)
VALUES = parameters(CONFIG)


def plan_of(naming):
    """The parameters as another code names, turns and types them."""
    return [(key.foreign, "F32", key.their_shape, lambda key=key: np.ascontiguousarray(
        VALUES[key.name].T if key.transposed else VALUES[key.name])) for key in keys(CONFIG, naming)]


@pytest.fixture(params=["huggingface", "mindformers", "mindspore", "slices"])
def written(request, tmp_path):
    """A checkpoint of another code."""
    kind = request.param
    if kind == "slices":
        write_slices(tmp_path / "theirs", release_layouts(CONFIG, 2, 2), plan_of("mindspore"))
        return tmp_path / "theirs"
    if kind == "huggingface":
        (tmp_path / "theirs").mkdir()
        write_safetensors(tmp_path / "theirs" / "model.safetensors", plan_of(kind), {"format": "pt"})
        return tmp_path / "theirs"
    write_mindspore(tmp_path / "theirs.ckpt", plan_of(kind))
    return tmp_path / "theirs.ckpt"


def test_parts_are_those_of_our_own_checkpoint(written):
    opened = open_checkpoint(written, CONFIG)
    assert isinstance(opened, ForeignCheckpoint) and opened.identity()
    for name, value in VALUES.items():
        np.testing.assert_array_equal(opened.read(name), value)
        rows = value.shape[0] // 2
        extent = ((rows, 2 * rows), *((0, size) for size in value.shape[1:]))
        np.testing.assert_array_equal(opened.read(name, extent), value[rows:2 * rows])


def test_what_is_no_checkpoint_of_the_model_is_one_line(written, tmp_path):
    with pytest.raises(UserError):
        open_checkpoint(written, CONFIG.model_copy(update={"layers": 4}))
    (tmp_path / "other").mkdir()
    write_safetensors(tmp_path / "other" / "x.safetensors", [("x", "F32", (2,), lambda: np.zeros(2, np.float32))])
    with pytest.raises(UserError, match="no parameter of this model"):
        open_checkpoint(tmp_path / "other", CONFIG)
    with pytest.raises(UserError, match="no checkpoint here"):
        open_checkpoint(tmp_path / "nothing", CONFIG)
