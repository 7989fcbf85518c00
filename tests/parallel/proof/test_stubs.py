"""Link stubs: built once, never beside a real CANN, and told in one line where they cannot be built."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys

import pytest

from parallel.common.errors import UserError
from parallel.proof.compile import cann_stubs as stubs

x86_only = pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None, reason="x86-64 with g++")


@x86_only
def test_stubs_are_built_once_and_make_the_plugin_load(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = stubs.link_stubs()
    assert folder.is_relative_to(tmp_path)
    built = (folder / "libascendcl.so").stat().st_mtime_ns
    assert stubs.link_stubs() == folder
    assert (folder / "libascendcl.so").stat().st_mtime_ns == built
    code = "import mindspore; mindspore.set_device('Ascend'); print(mindspore.get_context('device_target'))"
    environment = {"PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": stubs.library_path(), "MS_SIMULATION_LEVEL": "0",
                   "RANK_SIZE": "2", "RANK_ID": "1", "GLOG_v": "4"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "Ascend"


@x86_only
def test_stubs_hold_functions_of_cann_only():
    names = stubs.missing_symbols(stubs.mindspore_folder() / "lib" / "plugin")
    assert any(name.startswith("acl") for name in names)
    assert any("2ge" in name for name in names)
    assert not [name for name in names if name.startswith(("Py", "_ZTV", "_ZTI", "_ZN9mindspore"))]


@pytest.mark.parametrize("found_by", ["environment", "folder"])
def test_stubs_are_refused_beside_a_real_cann(tmp_path, monkeypatch, found_by):
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    monkeypatch.setattr(stubs, "CANN_HOME", tmp_path / "absent")
    assert not stubs.cann_present()
    if found_by == "environment":
        monkeypatch.setenv("ASCEND_HOME_PATH", "/opt/ascend")
    else:
        monkeypatch.setattr(stubs, "CANN_HOME", tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/ascend/lib64")
    assert stubs.cann_present()
    assert stubs.library_path() == "/opt/ascend/lib64"
    with pytest.raises(UserError, match="CANN is installed"):
        stubs.link_stubs(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("tool", "package"), [("g++", "g++"), ("nm", "binutils")])
def test_a_missing_tool_is_named(monkeypatch, tool, package):
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    monkeypatch.setattr(stubs.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(stubs.shutil, "which", lambda name: None if name == tool else f"/usr/bin/{name}")
    with pytest.raises(UserError) as error:
        stubs.link_stubs()
    assert tool in str(error.value)
    assert package in error.value.hint


def test_another_processor_is_refused(monkeypatch):
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    monkeypatch.setattr(stubs.platform, "machine", lambda: "aarch64")
    with pytest.raises(UserError, match="aarch64"):
        stubs.link_stubs()


def test_a_wheel_without_the_plugin_is_refused(monkeypatch, tmp_path):
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    monkeypatch.setattr(stubs, "_check_machine", lambda: None)
    monkeypatch.setattr(stubs, "mindspore_folder", lambda: tmp_path)
    with pytest.raises(UserError, match="no Ascend plugin"):
        stubs.link_stubs(tmp_path / "cache")
