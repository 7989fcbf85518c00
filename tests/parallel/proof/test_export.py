"""Exported programs: two runs whose graphs are the same share what was compiled, and nothing else."""

from __future__ import annotations

import gzip
import json
import platform
import shutil
from functools import partial
from pathlib import Path

import pytest

from parallel.proof import export as export_module
from parallel.torch_runtime.program import FILE, Program, Writer
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


@pytest.mark.parametrize("name", ["program.json.gz", "graph-0.json.gz", "constants-0.npz"])
def test_a_damaged_program_of_the_cache_is_made_anew(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def write(config, overrides, folder, *rest):
        writer = Writer(folder)
        writer._write("graph-0.json.gz", gzip.compress(b"{}", mtime=0))
        writer._write("constants-0.npz", b"values")
        writer.finish(digest="d", tensors=[], inputs=[], ranks=[])

    monkeypatch.setattr(export_module, "write_program", write)
    cached = partial(export_module._cached, "run.yaml", [], "d", ("step",), 1, object(), lambda: None)
    path = cached() / name
    whole = path.read_bytes()
    tree = json.loads(gzip.decompress(whole)) | {"world": 3} if name == FILE else None
    for damaged in (b"", whole[:-1], gzip.compress(json.dumps(tree).encode()) if tree else whole + b"x"):
        path.write_bytes(damaged)
        assert cached() / name == path and path.read_bytes() == whole


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
