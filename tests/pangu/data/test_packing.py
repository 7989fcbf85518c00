"""Packing: no id lost, doubled or out of order, any number of shards and processes, atomic, bad input in one line."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pangu.data import corpus, packing
from pangu.data.packing import INDEX_FILE, PackOptions, PackSettings, pack, read_index
from parallel.common.errors import UserError


class CharacterTokenizer:
    """One id a character: enough to see where every id went."""

    eot_id, pad_id, vocabulary_size, fingerprint = 9, 6, 5000, "characters"

    def encode(self, text: str) -> list[int]:
        return [10 + ord(char) % 4990 for char in text]


class FailingTokenizer(CharacterTokenizer):
    """Fails on a certain text, as a user's error or as a fault of the program."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def encode(self, text: str) -> list[int]:
        if text.startswith("文17，"):
            raise self.error("cannot encode 17")
        return super().encode(text)


TEXTS = [f"文{number}，" + chr(0x4E00 + number) * (number * 7 % 50) for number in range(400)]


def pack_texts(folder: Path, texts: list[str], length: int, factory=CharacterTokenizer, **options) -> dict:
    return pack(texts, factory, PackOptions(**options), output=folder, sequence_length=length)


def read_records(folder: Path, split: str = "train") -> list[np.ndarray]:
    """Ids of every file of a split, in order."""
    from mindspore.mindrecord import FileReader

    files = []
    for entry in getattr(read_index(folder), split).files:
        reader = FileReader(str(folder / entry.file))
        files.append(np.stack([row["input_ids"] for row in reader.get_next()]))
        reader.close()
        assert len(files[-1]) == entry.records
    return files


def expected_stream(texts: list[str]) -> list[int]:
    return [number for text in texts for number in [*CharacterTokenizer().encode(text), 9]]


def documents_of(stream: np.ndarray) -> list[tuple[int, ...]]:
    ends = np.flatnonzero(stream == 9)
    return [tuple(part[part != 9].tolist()) for part in np.split(stream, ends + 1) if (part == 9).any()]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text("春夏秋冬，。", min_size=1, max_size=30), min_size=1, max_size=25),
       length=st.integers(1, 40))
def test_one_shard_is_the_stream_of_all_documents(tmp_path_factory, texts, length):
    folder = tmp_path_factory.mktemp("pack") / "out"
    figures = pack_texts(folder, texts, length, validation_fraction=0.0)
    (records,) = read_records(folder)
    stream = expected_stream(texts)
    assert records.shape == (-(-len(stream) // (length + 1)), length + 1) and records.dtype == np.int32
    assert records.reshape(-1)[: len(stream)].tolist() == stream
    assert (records.reshape(-1)[len(stream) :] == 6).all()
    assert (figures["documents"], figures["tokens"], figures["records"]) == (len(texts), len(stream), len(records))


def test_last_chunk_dropped(tmp_path):
    pack_texts(tmp_path / "out", TEXTS, 63, validation_fraction=0.0, last_chunk="drop")
    (records,) = read_records(tmp_path / "out")
    stream = expected_stream(TEXTS)
    assert len(records) == len(stream) // 64 and records.reshape(-1).tolist() == stream[: len(records) * 64]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that every shard gets some."""
    monkeypatch.setattr(packing, "_BLOCK_CHARACTERS", 200)


def test_every_document_in_exactly_one_shard_in_order(tmp_path, small_blocks):
    figures = pack_texts(tmp_path / "out", TEXTS, 31, shards=3, workers=1, validation_fraction=0.1)
    assert figures["shards"] == 3
    found = [documents_of(records.reshape(-1)) for records in read_records(tmp_path / "out")]
    order = {tuple(CharacterTokenizer().encode(text)): place for place, text in enumerate(TEXTS)}
    places = [[order[document] for document in documents] for documents in found]
    assert all(shard == sorted(shard) and shard for shard in places)
    held_out = [order[document] for records in read_records(tmp_path / "out", "validation")
                for document in documents_of(records.reshape(-1))]
    assert held_out == [place for place, text in enumerate(TEXTS) if corpus.in_validation(text, 0.1)]
    assert sorted(sum(places, held_out)) == list(range(len(TEXTS)))


def test_worker_processes_change_no_record(tmp_path, small_blocks):
    pack_texts(tmp_path / "one", TEXTS, 31, shards=3, workers=1, validation_fraction=0.1)
    figures = pack_texts(tmp_path / "two", TEXTS, 31, shards=3, workers=2, validation_fraction=0.1)
    assert figures["workers"] == 2
    for split in packing.SPLITS:
        alone, shared = (read_records(tmp_path / name, split) for name in ("one", "two"))
        assert len(alone) == len(shared) and all(map(np.array_equal, alone, shared))
    assert (tmp_path / "one" / INDEX_FILE).read_text() == (tmp_path / "two" / INDEX_FILE).read_text()


@pytest.mark.parametrize(("workers", "error"), [
    (1, UserError), (1, ValueError), (2, UserError), pytest.param(2, ValueError, marks=pytest.mark.slow),
])
def test_failure_leaves_nothing_behind(tmp_path, small_blocks, workers, error):
    expected = UserError if error is UserError else (ValueError if workers == 1 else RuntimeError)
    with pytest.raises(expected, match="cannot encode 17"):
        pack_texts(tmp_path / "out", TEXTS, 31, functools.partial(FailingTokenizer, error), shards=2, workers=workers)
    assert not list(tmp_path.iterdir())


def test_corpus_fault_in_the_middle_leaves_nothing_behind(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "好"}\n{"text": "好"}\nno\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 3"):
        pack(corpus.documents(tmp_path / "in.jsonl"), CharacterTokenizer, PackOptions(), output=tmp_path / "out",
             sequence_length=3)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_full_disk_is_reported_in_one_line(tmp_path, monkeypatch):
    class FullWriter:
        def __init__(self, *_: object, **__: object) -> None: ...
        def __getattr__(self, name: str):
            return lambda *_: None
        def write_raw_data(self, _: list) -> None:
            raise RuntimeError("dataset pipeline\n[ERROR] No free disk to be used while writing mindrecord files")

    monkeypatch.setattr("mindspore.mindrecord.FileWriter", FullWriter)
    with pytest.raises(UserError, match="no space left") as error:
        pack_texts(tmp_path / "out", TEXTS, 31)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_output_that_exists(tmp_path):
    folder = tmp_path / "out"
    pack_texts(folder, TEXTS, 31)
    with pytest.raises(UserError, match="there already"):
        pack_texts(folder, TEXTS, 31)
    pack_texts(folder, TEXTS[:50], 15, overwrite=True)
    assert read_index(folder).sequence_length == 15
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("x")
    with pytest.raises(UserError, match="something else"):
        pack_texts(tmp_path / "mine", TEXTS, 31, overwrite=True)


def test_moved_folder_still_reads(tmp_path):
    pack_texts(tmp_path / "out", TEXTS, 31, validation_fraction=0.0)
    before = read_records(tmp_path / "out")
    shutil.move(tmp_path / "out", tmp_path / "moved")
    assert np.array_equal(read_records(tmp_path / "moved")[0], before[0])


def test_too_small_a_corpus(tmp_path):
    with pytest.raises(UserError, match="does not fill a single training record"):
        pack_texts(tmp_path / "out", ["好"], 100, last_chunk="drop")


def test_tokenizer_with_ids_beyond_its_vocabulary(tmp_path):
    class Wrong(CharacterTokenizer):
        vocabulary_size = 100

    with pytest.raises(UserError, match="outside its vocabulary"):
        pack_texts(tmp_path / "out", TEXTS, 31, Wrong)


def test_index_says_what_is_there(tmp_path):
    figures = pack_texts(tmp_path / "out", TEXTS, 31, validation_fraction=0.1)
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    assert index["version"] == 1 and index["vocabulary_size"] == 5000 and index["tokenizer_sha256"] == "characters"
    assert index["train"]["tokens"] + index["validation"]["tokens"] == figures["tokens"] == len(expected_stream(TEXTS))
    for split in packing.SPLITS:
        for entry in index[split]["files"]:
            assert (tmp_path / "out" / entry["file"]).stat().st_size == entry["bytes"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"version": 2}'])
def test_damaged_index(tmp_path, content):
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(UserError):
        read_index(tmp_path)


def test_default_shards_depend_on_the_corpus_alone():
    assert [packing.default_shards(size) for size in (0, 2 << 20, 20 << 20, 1 << 30, 100 << 30, 1 << 50)] == [
        1, 1, 3, 16, 100, 1000]


def test_run_pack_on_a_real_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_load_tokenizer", lambda path: CharacterTokenizer())
    (tmp_path / "in.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    figures = packing.run_pack(PackSettings(corpus=str(tmp_path / "in.txt"), output=str(tmp_path / "out"),
                                            sequence_length=31))
    assert figures["documents"] == 400 and figures["mb_per_second"] > 0 and figures["validation_records"] > 0


@pytest.mark.shared_data
def test_published_tokenizer(tmp_path, shared):
    from pangu.data.tokenizer import Tokenizer

    model = shared / "data" / "tokenizer" / "pangu_alpha_vocab.model"
    (tmp_path / "in.txt").write_text("\n\n".join(TEXTS[:20]), encoding="utf-8")
    packing.run_pack(PackSettings(corpus=str(tmp_path / "in.txt"), output=str(tmp_path / "out"), tokenizer=str(model),
                                  sequence_length=31, validation_fraction=0.0))
    tokenizer = Tokenizer(model)
    stream = [number for text in TEXTS[:20] for number in [*tokenizer.encode(text), 9]]
    assert read_records(tmp_path / "out")[0].reshape(-1)[: len(stream)].tolist() == stream
