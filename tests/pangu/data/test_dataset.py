"""Batches of packed records: masks against a loop, resume at any step, ranks against one process, damage told."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pangu.data.dataset import PackedDataset, document_positions, plain_positions, shuffled
from pangu.data.flatten import flatten
from pangu.data.packing import INDEX_FILE, PackOptions, pack, read_index
from parallel.common.errors import UserError

LENGTH, VOCABULARY = 15, 5000


class CharacterTokenizer:
    """One id a character."""

    eot_id, pad_id, vocabulary_size, fingerprint = 9, 6, VOCABULARY, "characters"

    def encode(self, text: str) -> list[int]:
        return [10 + ord(char) % 4990 for char in text]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """101 training records and some of validation in three files."""
    import pangu.data.packing as packing

    path = tmp_path_factory.mktemp("packed") / "out"
    texts = [f"{number}号" + chr(0x4E00 + number) * (number % 9) for number in range(220)]
    block, packing._BLOCK_CHARACTERS = packing._BLOCK_CHARACTERS, 100
    try:
        pack(texts, CharacterTokenizer, PackOptions(shards=3, workers=1, validation_fraction=0.1), output=path,
             sequence_length=LENGTH)
    finally:
        packing._BLOCK_CHARACTERS = block
    return path


def open_set(folder, **options) -> PackedDataset:
    default = {"batch_size": 4, "seed": 5, "sequence_length": LENGTH, "vocabulary_size": VOCABULARY}
    return PackedDataset(folder, **{**default, **options})


def take(dataset: PackedDataset, start: int, count: int) -> list[tuple[np.ndarray, ...]]:
    return list(itertools.islice(dataset.batches(start), count))


def assert_same(first, second) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        for array, twin in zip(one, other, strict=True):
            assert array.dtype == twin.dtype and np.array_equal(array, twin)


@pytest.fixture(scope="module")
def all_records(folder) -> np.ndarray:
    """The training records in file order, read without PackedDataset."""
    import mindspore.dataset as ds

    rows = ds.MindDataset([str(path) for path in sorted(folder.glob("train-*.mindrecord"))], columns_list=["input_ids"],
                          shuffle=False)
    return np.stack([row[0] for row in rows.create_tuple_iterator(num_epochs=1, output_numpy=True)])


# ---------------------------------------------------------------- positions and documents

def reset_by_loop(ids_BS: np.ndarray, eod_id: int) -> tuple[np.ndarray, np.ndarray]:
    """The words of the release's reset, followed one end at a time."""
    batch, length = ids_BS.shape
    positions = np.tile(np.arange(length), (batch, 1))
    masks = np.tile(np.tril(np.ones((length, length))), (batch, 1, 1))
    for row in range(batch):
        for end in range(length):
            if ids_BS[row, end] == eod_id:
                masks[row, end + 1 :, : end + 1] = 0
                for place in range(end + 1, length):
                    positions[row, place] = place - (end + 1)
    return positions, masks


def mask_of(documents_BS: np.ndarray) -> np.ndarray:
    """The mask that the model makes of the documents."""
    from mindspore import Tensor

    from parallel.layers.attention import AttentionBias

    return AttentionBias().mask(Tensor(documents_BS)).asnumpy()


@settings(max_examples=150, deadline=None)
@given(hnp.arrays(np.int32, st.tuples(st.integers(1, 4), st.integers(1, 24)), elements=st.integers(6, 12)))
def test_reset_equals_the_loop(ids_BS):
    positions, documents = document_positions(ids_BS, 9)
    loop_positions, loop_masks = reset_by_loop(ids_BS, 9)
    assert np.array_equal(positions, loop_positions) and np.array_equal(mask_of(documents), loop_masks)
    assert positions.dtype == np.int32 and documents.dtype == np.int32


def test_reset_by_hand():
    positions, documents = document_positions(np.array([[20, 9, 30, 31, 9]]), 9)
    assert positions.tolist() == [[0, 1, 0, 1, 2]]
    assert mask_of(documents)[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_plain_positions_by_hand():
    positions, documents = plain_positions(np.array([[20, 9, 6]]), 6)
    assert positions.tolist() == [[0, 1, 2]]
    assert mask_of(documents)[0].astype(int).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_a_record_with_more_documents_than_attention_is_told_of_is_refused(folder, all_records):
    ends = (all_records[:, :-1] == 9).sum(1)
    documents = int(document_positions(all_records[:, :-1], 9)[1].max()) + 1
    assert 2 < documents <= ends.max() + 1
    steps = open_set(folder).steps_per_epoch
    assert_same(take(open_set(folder, most_documents=documents), 0, steps), take(open_set(folder), 0, steps))
    with pytest.raises(UserError, match=f"a record holds .* and attention is told where {documents - 1} end"):
        take(open_set(folder, most_documents=documents - 1), 0, steps)


# ---------------------------------------------------------------- order

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**63))
def test_shuffled_is_a_permutation_and_pointwise(count, key):
    full = shuffled(np.arange(count), count, key)
    assert np.array_equal(np.sort(full), np.arange(count))
    some = np.arange(0, count, 3)
    assert np.array_equal(shuffled(some, count, key), full[some])


def test_shuffled_looks_shuffled():
    first, second = (shuffled(np.arange(5000), 5000, key) for key in (1, 2))
    for order in (first, second):
        assert abs(np.corrcoef(np.arange(5000), order)[0, 1]) < 0.05
        assert (np.abs(np.diff(order)) == 1).mean() < 0.01
    assert (first == second).mean() < 0.01
    assert shuffled(np.array([10**12 - 1]), 10**12, 3) < 10**12


def test_every_record_once_an_epoch_and_another_order_each(folder, all_records):
    dataset = open_set(folder, batch_size=1)
    count = dataset.records
    assert count == len(all_records) == dataset.steps_per_epoch
    epochs = [np.concatenate([batch[0] for batch in take(dataset, epoch * count, count)]) for epoch in (0, 1)]
    wanted = sorted(map(bytes, all_records))
    assert [sorted(map(bytes, epoch)) for epoch in epochs] == [wanted, wanted]
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], np.concatenate([each[0] for each in take(open_set(
        folder, batch_size=1, seed=6), 0, count)]))


def test_without_shuffle_records_come_in_the_order_of_the_files(folder, all_records):
    batches = take(open_set(folder, shuffle=False), 0, 40)
    wrapped = np.concatenate([all_records, all_records])[:160]
    assert np.array_equal(np.concatenate([batch[0] for batch in batches]), wrapped)


# ---------------------------------------------------------------- resume, ranks, pipelines

def test_start_anywhere_equals_the_tail(folder, monkeypatch):
    monkeypatch.setattr("pangu.data.dataset._RECORDS_PER_WINDOW", 28)
    full = take(open_set(folder), 0, 70)  # more than two epochs, ten windows
    for start in (0, 1, 6, 7, 25, 26, 52, 69):
        assert_same(take(open_set(folder), start, 70 - start), full[start:])


@pytest.mark.parametrize("options", [{}, {"repeat": False, "shuffle": False}, {"eod_reset": False}])
def test_ranks_together_are_one_process(folder, options):
    full = take(open_set(folder, batch_size=8, **options), 0, 15)
    ranks = [take(open_set(folder, batch_size=8, shard=(rank, 4), **options), 0, 15) for rank in range(4)]
    joined = [tuple(np.concatenate(parts) for parts in zip(*batches, strict=True))
              for batches in zip(*ranks, strict=True)]
    assert_same(joined, full)


def test_mindspore_pipeline_gives_the_same_batches(folder):
    dataset = open_set(folder)
    pipeline = dataset.mindspore_dataset(20, 12)
    assert pipeline.get_dataset_size() == 12 and tuple(pipeline.get_col_names()) == dataset.columns
    assert_same([tuple(row) for row in pipeline.create_tuple_iterator(num_epochs=1, output_numpy=True)],
                take(dataset, 20, 12))


def test_shapes_and_masks_of_a_batch(folder):
    ids, positions, documents = take(open_set(folder), 3, 1)[0]
    assert ids.shape == (4, LENGTH + 1) and positions.shape == (4, LENGTH) and documents.shape == (4, LENGTH)
    for array, wanted in zip((positions, mask_of(documents)), reset_by_loop(ids[:, :-1], 9), strict=True):
        assert np.array_equal(array, wanted)


def test_one_pass_ends_with_padding(folder):
    dataset = open_set(folder, split="validation", repeat=False, shuffle=False, batch_size=4)
    batches = list(dataset.batches())
    ids = np.concatenate([batch[0] for batch in batches])
    assert len(batches) == dataset.steps_per_epoch and dataset.records % 4 != 0
    assert (ids[dataset.records :] == 6).all() and (ids[: dataset.records] != 6).any(axis=1).all()


def test_batch_larger_than_the_set(folder, all_records):
    ids = take(open_set(folder, batch_size=250, shuffle=False), 0, 1)[0][0]
    assert np.array_equal(ids, np.concatenate([all_records] * 3)[:250])
    (only,) = open_set(folder, batch_size=250, shuffle=False, repeat=False).batches()
    assert np.array_equal(only[0][: len(all_records)], all_records) and (only[0][len(all_records) :] == 6).all()


def test_an_abandoned_iterator_does_no_harm(folder):
    dataset = open_set(folder)
    for _ in range(20):
        next(dataset.batches(2))
    assert_same(take(dataset, 0, 2), take(open_set(folder), 0, 2))


# ---------------------------------------------------------------- flat files

@pytest.mark.parametrize("options", [
    {}, {"shuffle": False, "batch_size": 6, "shard": (1, 2)},
    {"split": "validation", "repeat": False, "shuffle": False},
    {"eod_reset": False, "batch_size": 150},
], ids=["shuffled", "a rank's rows", "validation", "a batch larger than the set"])
def test_flat_files_give_the_batches_of_mindrecord(folder, options):
    assert_same(take(open_set(folder, reader="flat", **options), 3 if not options else 0, 30),
                take(open_set(folder, reader="mindrecord", **options), 3 if not options else 0, 30))


def test_document_ends(folder, all_records):
    flat = open_set(folder, reader="flat")._records
    assert np.array_equal(flat.document_ends(), np.flatnonzero(all_records.reshape(-1) == 9))
    (folder / "train-00002-of-00003.ends").rename(folder / "away")
    try:
        with pytest.raises(UserError, match="missing"):
            flat.document_ends()
    finally:
        (folder / "away").rename(folder / "train-00002-of-00003.ends")


def test_flatten_adds_what_pack_left_out(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    index = read_index(copy)
    for entry in [*index.train.files, *index.validation.files]:
        (copy / entry.flat.ids).unlink()
        (copy / entry.flat.ends).unlink()
        entry.flat = None
    (copy / INDEX_FILE).write_text(index.model_dump_json())
    with pytest.raises(UserError, match="flatten"):
        open_set(copy, reader="flat")
    assert flatten(copy)["records"] == index.train.records + index.validation.records
    assert read_index(copy) == read_index(folder)
    assert_same(take(open_set(copy, reader="flat"), 0, 9), take(open_set(folder), 0, 9))


def test_flat_files_need_no_mindspore(folder):
    program = f"""
import sys
sys.modules["mindspore"] = None
from pangu.data.dataset import PackedDataset
data = PackedDataset({str(folder)!r}, batch_size=4, seed=5, sequence_length={LENGTH}, vocabulary_size={VOCABULARY})
print(next(data.batches(7))[0].tolist())
"""
    message = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert json.loads(message) == take(open_set(folder, reader="mindrecord"), 7, 1)[0][0].tolist()


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize(("options", "message"), [
    ({"sequence_length": 16}, "packed with sequence_length 15"),
    ({"vocabulary_size": 40000}, "packed with vocabulary_size 5000"),
    ({"tokenizer_fingerprint": "other"}, "packed with tokenizer"),
    ({"batch_size": 5, "shard": (0, 2)}, "cannot be shared equally"),
    ({"split": "test"}, "no such split"),
])
def test_what_does_not_fit_is_refused(folder, options, message):
    with pytest.raises(UserError, match=message):
        open_set(folder, **options)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def _scramble(path):
    content = bytearray(path.read_bytes())
    content[: 1 << 16] = b"\xa5" * (1 << 16)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(("damage", "target"), [
    (_truncate, "train-00001-of-00003.mindrecord"), (_scramble, "train-00001-of-00003.mindrecord"),
    (lambda path: path.unlink(), "train-00001-of-00003.mindrecord"),
    (lambda path: path.unlink(), "train-00001-of-00003.mindrecord.db"),
    (lambda path: path.write_bytes(b"not a database"), "train-00001-of-00003.mindrecord.db"),
    (_truncate, "train-00001-of-00003.ids"), (_scramble, "train-00001-of-00003.ids"),
    (lambda path: path.unlink(), "train-00001-of-00003.ids"),
    (lambda path: path.write_text("{"), INDEX_FILE), (lambda path: path.unlink(), INDEX_FILE),
])
def test_damaged_records_are_reported_in_one_line(folder, tmp_path, damage, target):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy / target)
    with pytest.raises(UserError) as error:
        take(open_set(copy, reader="mindrecord" if ".mindrecord" in target else "auto"), 0, 40)
    assert "\n" not in str(error.value)


def test_ids_beyond_the_vocabulary_are_noticed(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for path in copy.glob("train-*.mindrecord"):
        content = bytearray(path.read_bytes())
        content[1 << 20 :] = bytes(byte | 0x40 for byte in content[1 << 20 :])
        path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="damaged|cannot read"):
        take(open_set(copy, reader="mindrecord"), 0, 40)


# ---------------------------------------------------------------- rows from files of their own

def count_openings(monkeypatch) -> list:
    """Grows by one whenever MindRecord files are opened."""
    import mindspore.dataset as ds

    opened, real = [], ds.MindDataset
    monkeypatch.setattr(ds, "MindDataset", lambda *words, **options: opened.append(1) or real(*words, **options))
    return opened


def test_mindrecord_files_that_fit_in_memory_are_opened_once(folder, monkeypatch):
    expected = take(open_set(folder, reader="flat"), 0, 80)
    opened = count_openings(monkeypatch)
    dataset = open_set(folder, reader="mindrecord")
    built = len(opened)
    assert_same(take(dataset, 0, 80), expected)  # three epochs
    assert_same(take(dataset, 40, 40), expected[40:])
    assert built == 1 and len(opened) == 2


def test_larger_mindrecord_files_are_opened_once_for_as_many_records_as_they_hold(tmp_path, monkeypatch):
    from pangu.data import mind_records

    pack([f"{number}号，一二三四五六" for number in range(12000)], CharacterTokenizer,
         PackOptions(shards=2, workers=1, validation_fraction=0.0), output=tmp_path / "many", sequence_length=LENGTH)
    records = read_index(tmp_path / "many").train.records
    assert records > 8192
    expected = take(open_set(tmp_path / "many", reader="flat", batch_size=64), 0, records // 64)
    monkeypatch.setattr(mind_records, "_KEPT_BYTES", 0)
    opened = count_openings(monkeypatch)
    dataset = open_set(tmp_path / "many", reader="mindrecord", batch_size=64)
    built = len(opened)
    assert_same(take(dataset, 0, records // 64), expected)
    assert built == 1 and len(opened) == 2


@pytest.mark.parametrize("reader", ["flat", "mindrecord"])
def test_by_file_the_order_is_the_same_for_any_number_of_ranks(folder, reader):
    """Rows 2k, 2k + 1 of a batch of 6 come from file k; 1 and 3 ranks make the same batches, and resume in them."""
    whole = open_set(folder, batch_size=6, by_file=True, reader=reader)
    parts = [open_set(folder, batch_size=6, by_file=True, reader=reader, shard=(rank, 3)) for rank in range(3)]
    alone = take(whole, 0, 30)
    together = [tuple(map(np.concatenate, zip(*columns, strict=True)))
                for columns in zip(*(take(part, 0, 30) for part in parts), strict=True)]
    assert_same(alone, together)
    assert_same(take(parts[1], 17, 5), take(parts[1], 0, 22)[17:])
    counts = [entry.records for entry in read_index(folder).train.files]
    numbers = whole.record_numbers(0, whole.steps_per_epoch)
    for lane, (count, start) in enumerate(zip(counts, np.cumsum([0, *counts]), strict=False)):
        own = numbers[:, 2 * lane:2 * lane + 2].reshape(-1)
        assert ((own >= start) & (own < start + count)).all()
        assert sorted(own[:count]) == list(range(start, start + count)), "each record once before any comes again"
        assert not np.array_equal(own[:count], np.sort(own[:count]))


def test_by_file_a_rank_needs_its_own_files_only(folder, tmp_path):
    copy = tmp_path / "own"
    shutil.copytree(folder, copy)
    for path in copy.glob("train-0000[02]*"):
        path.unlink()
    own = open_set(copy, batch_size=6, by_file=True, shard=(1, 3))
    assert_same(take(own, 3, 4), take(open_set(folder, batch_size=6, by_file=True, shard=(1, 3)), 3, 4))
    with pytest.raises(UserError, match="missing"):
        open_set(copy, batch_size=6, shard=(1, 3))


def test_by_file_refuses_files_that_do_not_divide(folder):
    with pytest.raises(UserError, match="data.by_file: 3 files and a batch of 4 do not divide among 2"):
        open_set(folder, by_file=True, shard=(0, 2))
