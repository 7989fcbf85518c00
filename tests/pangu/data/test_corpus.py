"""Reading the user's corpus: kinds of file, order, bounds, held-out split, bad input in one line."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu.data import corpus
from parallel.common.errors import UserError

TEXTS = ["春眠不觉晓，\n处处闻啼鸟。", "夜来风雨声", "花落知多少 flowers 😀"]


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, key: text}, ensure_ascii=False) + "\n" for text in texts).encode()


def write(path: Path, content: bytes) -> Path:
    compress = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compress.get(path.suffix, bytes)(content))
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_jsonl_and_text_plain_and_compressed(tmp_path, suffix):
    assert list(corpus.documents(write(tmp_path / f"a.jsonl{suffix}", jsonl(TEXTS)))) == TEXTS
    text = "\n\n\n".join(TEXTS).encode()
    assert list(corpus.documents(write(tmp_path / f"a.txt{suffix}", text))) == TEXTS


def test_text_line_ends_mark_and_whole_file(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbf" + "一\r\n二\r\n \r\n三\r\n".encode())
    assert list(corpus.documents(path)) == ["一\n二", "三"]
    assert list(corpus.documents(path, whole_file=True)) == ["一\n二\n \n三"]


def test_json_key_empty_texts_and_blank_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl(["一", "", "二"], key="content") + b"\n  \n")
    assert list(corpus.documents(path, text_key="content")) == ["一", "二"]


def test_folder_in_order_of_paths(tmp_path):
    write(tmp_path / "b" / "1.jsonl.xz", jsonl(["三"]))
    write(tmp_path / "a" / "2.txt", "二".encode())
    write(tmp_path / "a" / "1.txt.gz", "一".encode())
    write(tmp_path / "c.txt", "四".encode())
    write(tmp_path / ".hidden.txt", b"no")
    write(tmp_path / "notes.md", b"no")
    assert list(corpus.documents(tmp_path)) == ["一", "二", "三", "四"]
    assert corpus.corpus_bytes(tmp_path) == sum(file.stat().st_size for file in corpus.corpus_files(tmp_path))


def test_long_text_document_is_split_at_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MAX_TEXT_DOCUMENT_BYTES", 10)
    path = write(tmp_path / "a.txt", b"12345678\n12345\n123\n\n1234")
    assert list(corpus.documents(path)) == ["12345678\n12345", "123", "1234"]


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for number in range(40):
            file.write(jsonl([f"{number} " + "长" * 3000] * 50))
    tracemalloc.start()
    count = sum(1 for _ in corpus.documents(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2000 and peak < 2_000_000  # the text itself is 18 MB


BAD = {
    "missing": (None, "a.txt", "no such"),
    "unknown kind": (b"x", "a.docx", "unknown kind"),
    "empty": (b"", "a.txt", "empty"),
    "only blank lines": (b"\n \n", "a.txt", "empty"),
    "empty json": (b'{"text": ""}\n', "a.jsonl", "empty"),
    "not UTF-8": ("好\n中文".encode("gb18030"), "a.txt", "line 1: not UTF-8"),
    "not UTF-8 later": ("好\n".encode() + "中文".encode("gb18030"), "a.txt", "line 2: not UTF-8"),
    "cut UTF-16": ("中文".encode("utf-16")[:-1], "a.txt", "UTF-16"),
    "binary": (b"abc\n\x00\x01\x02", "a.txt", "line 2: binary"),
    "a zip": (b"PK\x03\x04\x00", "a.txt", "zip"),
    "gzip without its suffix": (gzip.compress(b"x"), "a.txt", "gzip"),
    "not JSON": (b'{"text": "a"}\nhello\n', "a.jsonl", "line 2: not a JSON object"),
    "a JSON list": (b"[1]\n", "a.jsonl", "line 1: not a JSON object"),
    "deep JSON": (b"[" * 100_000, "a.jsonl", "line 1: not a JSON object"),
    "no text key": (b'{"text": "a"}\n{"body": "b"}\n', "a.jsonl", "line 2: no key 'text'"),
    "text not a string": (b'{"text": 3}\n', "a.jsonl", "line 1: 'text' is not a string"),
    "half a surrogate": (b'{"text": "\\ud800"}\n', "a.jsonl", "line 1: half a surrogate"),
    "damaged gz": (b"\x1f\x8b nonsense", "a.txt.gz", "damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_corpus_is_reported_in_one_line(tmp_path, name):
    content, file, message = BAD[name]
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(corpus.documents(path))
    assert message in str(error.value) and file in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_truncated_compressed_file(tmp_path, suffix):
    path = write(tmp_path / f"a.jsonl{suffix}", jsonl([str(number) * 50 for number in range(5000)]))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="damaged"):
        list(corpus.documents(path))


def test_frames_of_zst_in_a_row(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    compress = zstandard.ZstdCompressor().compress
    path.write_bytes(b"".join(compress(jsonl([text])) for text in TEXTS))
    assert list(corpus.documents(path)) == TEXTS


def test_line_longer_than_allowed(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl(["short", "x" * 200]))
    with pytest.raises(UserError, match="line 2: line is longer than the 100 bytes"):
        list(corpus.documents(path, max_line_bytes=100))


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match="no corpus file"):
        list(corpus.documents(tmp_path))


def test_documents_before_a_fault_are_delivered(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl(["一", "二"]) + b"oops\n")
    assert list(itertools.islice(corpus.documents(path), 2)) == ["一", "二"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1, max_size=8))
def test_any_text_survives_jsonl(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    path.write_bytes("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    assert list(corpus.documents(path)) == texts


def test_validation_share_is_fixed_and_nested():
    texts = [f"文{number}" for number in range(4000)]
    small = {text for text in texts if corpus.in_validation(text, 0.05)}
    large = {text for text in texts if corpus.in_validation(text, 0.2)}
    assert small < large
    assert 0.03 < len(small) / len(texts) < 0.07 and 0.17 < len(large) / len(texts) < 0.23
    assert not any(corpus.in_validation(text, 0.0) for text in texts)


@pytest.mark.shared_data
def test_shared_corpus(shared):
    texts = list(itertools.islice(corpus.documents(shared / "data" / "corpus" / "classics_modern_zh.jsonl.xz"), 500))
    assert len(texts) == 500 and all(text.strip() for text in texts)
