"""Files: atomic, bounded, confined, decompressed."""

from __future__ import annotations

import gzip
import lzma

import pytest

from parallel.common.errors import UserError
from parallel.common.files import atomic_write, inside, open_text, read_json, write_json


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
