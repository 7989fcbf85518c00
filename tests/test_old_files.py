"""Files that the code wrote at commit 0587bfa, before modules moved and words changed, are read as they were.

`old_files.tar.xz` holds, of one small run of each family: vocabulary, packed records, checkpoint with optimizer states;
encoded click log, checkpoint of a separated ranker (its settings use the keys `op_cut`, `tower` and the value
`global_token: group`), and its int8 form. Made by the verbs of that commit.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from parallel.common.renamed import current_keys

ARCHIVE = Path(__file__).parent / "old_files.tar.xz"


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    place = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(place, filter="data")
    return place


def test_the_archive_is_small():
    assert ARCHIVE.stat().st_size < 200_000


def test_a_vocabulary(old):
    from pangu.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(old / "vocabulary.model")
    assert tokenizer.decode(tokenizer.encode("今天天气很好。")) == "今天天气很好。"


def test_packed_records(old):
    from pangu.data.packing import read_index

    index = read_index(old / "records")
    assert index.sequence_length == 16 and index.vocabulary_size == 950 and index.train.records > 400


def test_a_checkpoint_of_the_language_model(old):
    from pangu.settings import Run
    from parallel.checkpoint.full import Checkpoint, load_checkpoint
    from parallel.common.settings import validate

    path = old / "pangu" / "checkpoints" / "step_00000001"
    kept = Checkpoint(path).state
    settings = validate(Run, {key: kept["run"][key] for key in ("model",)})
    from mindspore import Parameter, Tensor

    from pangu.build import build

    network = build(settings, settings.parallel.resolve()).network
    parameters = [Parameter(Tensor(np.zeros(item.shape, np.float32)), name=item.name)
                  for item in network.get_parameters()]
    state = load_checkpoint(path, parameters)
    assert state["step"] == 1 and all(np.isfinite(item.asnumpy()).all() for item in parameters)
    assert any(np.abs(item.asnumpy()).max() > 0 for item in parameters)


def test_a_ranker_with_old_keys_and_its_int8_form(old):
    from recsys.saved_model import load

    found = {}
    for name in ("ranker", "int8"):
        trained = load(old / name)
        sizes = trained.settings.model
        assert (sizes.op_sharding, sizes.head_hidden, sizes.ug_sep.global_token) == ("width", [4], "candidate")
        from mindspore import Tensor

        columns = trained.spec.id_columns, trained.spec.numeric_columns
        ids, numbers = np.zeros((2, columns[0]), np.int32), np.ones((2, columns[1]), np.float32)
        for slot in trained.spec.slots.values():
            ids[:, slot.start:slot.start + slot.length] = slot.offset
        found[name] = trained.model(Tensor(ids), Tensor(numbers)).asnumpy()
    assert np.isfinite(found["ranker"]).all() and np.abs(found["ranker"] - found["int8"]).max() < 0.05


def test_an_encoded_click_log_of_an_older_format_is_made_again_beside_it(old):
    """Its name holds the format, which has changed since; nothing of it is read by mistake."""
    from recsys.data.log import prepare
    from recsys.settings import run_class

    kept = json.loads((old / "ranker" / "checkpoints" / "step_00000001" / "state.json").read_text())["run"]
    settings = run_class("tokenmixer_large").model_validate(current_keys(kept))
    settings.data.cache = str(old / "cache")
    before = {path.name for path in (old / "cache").iterdir()}
    log = prepare(settings.data, settings.model.embedding_size)
    assert len({path.name for path in (old / "cache").iterdir()} - before) == 1 and len(log.parts["train"]) == 80
    name = next(iter(before))
    for part in ("ids", "labels"):
        fresh = (log.directory / f"train.{part}").read_bytes()
        assert fresh == (old / "cache" / name / f"train.{part}").read_bytes(), "the encoded values are the same"
