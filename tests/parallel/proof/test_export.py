"""Exported programs: two runs whose graphs are the same share what was compiled, and nothing else."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

from parallel.torch_runtime.program import Program
from tests.parallel.torch_runtime.launches import ROOT, run_command

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None,
                                reason="exporting needs g++ on x86-64")


def export(folder: Path, *keys: str) -> Program:
    code, figures, errors = run_command("parallel", ["export", "--config", str(ROOT / "configs/pangu/tiny.yaml"),
                                                     "--output", str(folder), "--graphs", "step", "model.layers=2",
                                                     *keys])
    assert code == 0, errors
    assert figures["program"] == str(folder)
    return Program(folder)


def test_a_program_keeps_the_settings_of_the_run_that_asked_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = export(tmp_path / "first", "data.directory=/data/first", "parallel.execution=exact")
    second = export(tmp_path / "second", "data.directory=/data/second", "output.directory=/runs/second",
                    "parallel.execution=eager")
    assert first.digest == second.digest and len(list((tmp_path / "cache/pangu-rankers/programs").iterdir())) == 1
    assert [program.settings["data"]["directory"] for program in (first, second)] == ["/data/first", "/data/second"]
    assert second.settings["output"]["directory"] == "/runs/second"
    assert [program.parallel["execution"] for program in (first, second)] == ["exact", "eager"]
    assert second.tree["overrides"][-1] == "parallel.execution=eager"
    assert second.graph(0).nodes
