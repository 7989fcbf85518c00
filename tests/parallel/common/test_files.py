"""Files: atomic, bounded, confined, decompressed."""

from __future__ import annotations

import gzip
import lzma

import numpy as np
import pytest

from parallel.common.digests import load_array, save_array
from parallel.common.errors import UserError
from parallel.common.files import DamagedFile, atomic_write, inside, open_binary, open_text, read_json, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write("new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="no space left"), atomic_write(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_compressed_text_is_read_by_suffix(tmp_path):
    import zstandard

    text = "一行\n二行\r\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    (tmp_path / "a.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(text.encode()))
    for path in tmp_path.iterdir():
        with open_text(path) as file:
            assert file.read() == text


def test_json(tmp_path):
    write_json(tmp_path / "a.json", {"键": [1, 2.5]})
    assert read_json(tmp_path / "a.json") == {"键": [1, 2.5]}
    with pytest.raises(UserError, match="larger"):
        read_json(tmp_path / "a.json", max_bytes=3)
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "link/x"])
def test_paths_stay_inside(tmp_path, path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="outside"):
        inside(root, path)
    assert inside(root, "a/b") == root.resolve() / "a/b"


def test_an_array_carries_its_checksum(tmp_path):
    path, array = tmp_path / "a.npy", np.arange(300).reshape(100, 3)
    save_array(path, array)
    np.testing.assert_array_equal(load_array(path), array)
    whole = path.read_bytes()
    for place in (*range(0, len(whole), 97), len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1:])
        with pytest.raises(UserError, match="damaged"):
            load_array(path)
    for length in (0, 5, 8, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged"):
            load_array(path)


def test_every_stream_of_an_archive_is_read_and_what_is_none_is_told(tmp_path):
    path = tmp_path / "a.xz"
    path.write_bytes(lzma.compress(b"a") + bytes(8) + lzma.compress(b"b" * 3_000_000) + bytes(4))
    with open_binary(path) as file:
        assert file.read() == b"a" + b"b" * 3_000_000
    path.write_bytes(lzma.compress(b"a") + b"no stream")
    with open_binary(path) as file, pytest.raises(DamagedFile):
        file.read()
