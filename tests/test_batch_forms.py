"""Batches of every preset have the shapes and types that its graph is compiled for, so no second graph is ever made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from parallel.task import build_task
from parallel.training.data_source import BatchForm, NumberedSource
from parallel.training.sharded.step import input_shapes

ROOT = Path(__file__).resolve().parents[1]
PANGU = sorted((ROOT / "configs" / "pangu").glob("*.yaml"))
RANKERS = sorted((ROOT / "configs" / "recsys").glob("*.yaml"))


def form_of(path: Path) -> tuple:
    """(settings, resolved block, form of a rank's batch) of a preset as it is compiled."""
    task, settings, config = build_task(path)
    shapes = input_shapes(task, settings.train, config)
    return task, settings, config, BatchForm([(item.name, shape, item.dtype)
                                              for item, shape in zip(task.inputs, shapes, strict=True)])


class Words:
    """A tokenizer of a preset's size."""

    eot_id, pad_id, fingerprint = 9, 6, "words"

    def __init__(self, size: int) -> None:
        self.vocabulary_size = size

    def encode(self, text: str) -> list[int]:
        return [10 + number % (self.vocabulary_size - 10) for number in range(len(text))]


@pytest.mark.parametrize("path", PANGU, ids=lambda path: path.stem)
def test_packed_records_have_the_form_of_the_compiled_graph(path, tmp_path):
    from pangu.data.dataset import PackedDataset
    from pangu.data.packing import PackOptions, pack

    task, settings, config, form = form_of(path)
    length, size = settings.model.sequence_length, settings.model.vocabulary_size
    pack(["字" * (length // 2 + number) for number in range(6)], lambda: Words(size),
         PackOptions(shards=1, workers=1, validation_fraction=0.0), output=tmp_path / "r", sequence_length=length)
    for part in sorted({0, config.data - 1}):
        source = PackedDataset(tmp_path / "r", batch_size=settings.train.global_batch_size, seed=1, shard=(
            part, config.data), sequence_length=length, vocabulary_size=size, eod_reset=settings.data.eod_reset)
        if task.inputs[-1].name == "sample_numbers":
            source = NumberedSource(source, part, config.data)
        batches = source.batches(0)
        for _ in range(2):
            form.check(next(batches))


@pytest.mark.parametrize("path", RANKERS, ids=lambda path: path.stem)
def test_encoded_rows_have_the_form_of_the_compiled_graph(path):
    from recsys.data.batches import Batches
    from recsys.data.columns import spec_without_data
    from recsys.data.encode import Encoded
    from recsys.training.any_backend import compares

    task, settings, config, form = form_of(path)
    spec = spec_without_data(settings.data, settings.model.embedding_size)
    if spec is None:
        pytest.skip("its places are known once the log is read")
    batch = settings.train.global_batch_size
    by_name = {item.name: item for item in task.inputs}
    labels = by_name["labels"].shape[1] - int(compares(settings))
    if any(slot.feature.is_dynamic for slot in spec.slots.values()):
        pytest.skip("keys become places in a window on the host, before the graph")
    rows = Encoded(np.zeros((batch, spec.id_columns), np.int32), np.zeros((batch, spec.numeric_columns), np.float32),
                   np.zeros((batch, labels), np.float32), np.zeros(batch, np.int64))
    source = Batches(rows, batch, 1, 0, config.data, spec, settings.data.together, compares(settings))
    if task.inputs[-1].name == "sample_numbers":
        source = NumberedSource(source, 0, config.data)
    form.check(next(source.batches(0)))


def test_real_batches_compile_one_graph(tmp_path):
    """An unsharded network on the CPU, over records."""
    from mindspore import Tensor

    from pangu.data.dataset import PackedDataset
    from pangu.train import training_step
    from parallel.task import load_run
    from parallel.training.device import start_device
    from tests.parallel.torch_runtime.records import LENGTH, VOCABULARY, packed

    _, settings = load_run(ROOT / "configs/pangu/tiny.yaml", [
        "model.layers=2", "model.hidden_size=16", "model.heads=2", f"model.sequence_length={LENGTH}",
        f"model.vocabulary_size={VOCABULARY}", "train.global_batch_size=4"])
    records = packed(tmp_path / "records", documents=60)
    source = PackedDataset(records, batch_size=4, seed=1, sequence_length=LENGTH, vocabulary_size=VOCABULARY)
    step = training_step(settings, start_device())
    batches, graphs = source.batches(0), set()
    for _ in range(3):
        step(*map(Tensor, next(batches)))
        graphs.add(frozenset(step.compile_cache))
    assert len(graphs) == 1 and len(next(iter(graphs))) == 1


def test_another_form_is_a_defect_and_says_which():
    form = BatchForm([("ids", (2, 3), "int32"), ("labels", (2, 1), "float32")])
    good = np.zeros((2, 3), np.int32), np.zeros((2, 1), np.float32)
    form.check(good)
    with pytest.raises(ValueError, match=r"labels of a batch is float16 \[2, 1\].*float32 \[2, 1\]"):
        form.check((good[0], good[1].astype(np.float16)))
    with pytest.raises(ValueError, match="1 arrays where the graph takes 2"):
        form.check(good[:1])
    first = BatchForm()
    first.check(good)
    with pytest.raises(ValueError, match=r"input 0 of a batch is int32 \[1, 3\]"):
        first.check((good[0][:1], good[1]))
