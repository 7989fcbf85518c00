"""Building the C++ kernels: once, in a private folder, and never a reason to stop."""

from __future__ import annotations

import shutil

import pytest

from pangu import native


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """An empty cache folder and nothing remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PANGU_KERNELS", raising=False)
    native.kernel_library.cache_clear()
    yield
    native.kernel_library.cache_clear()


def test_switched_off(monkeypatch):
    monkeypatch.setenv("PANGU_KERNELS", "0")
    assert native.kernel_library() is None


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert native.kernel_library() is None
    assert "no C++ compiler" in capsys.readouterr().err


def test_a_compiler_that_fails_is_no_error(tmp_path, monkeypatch, capsys):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(broken))
    assert native.kernel_library() is None
    assert "cannot be built" in capsys.readouterr().err
    assert not list(tmp_path.glob("pangu-rankers/*.so"))


def test_a_folder_that_others_can_write_is_not_trusted(tmp_path, capsys):
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    folder = tmp_path / "pangu-rankers"
    folder.mkdir()
    folder.chmod(0o777)
    assert native.kernel_library() is None
    assert "written by others" in capsys.readouterr().err


def test_built_once(tmp_path):
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    library = native.kernel_library()
    assert library.parent == tmp_path / "pangu-rankers"
    built = library.stat().st_mtime_ns
    native.kernel_library.cache_clear()
    assert native.kernel_library() == library
    assert library.stat().st_mtime_ns == built
    assert [path.name for path in library.parent.iterdir()] == [library.name]
