"""Checkpoints of several ranks over gloo: replicas written once, killed in every phase of a save in the background,
machines without a shared disk."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest

from parallel.checkpoint.sharded import Slices
from parallel.launch.plan import free_port
from tests.parallel.torch_runtime.launches import ROOT, Launch, assert_same_tensors, launch

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None or importlib.util.find_spec("torch") is None,
    reason="exporting needs g++ on x86-64, running needs torch")

# Started with every Python of a launch: the rank of $FAULT ends by SIGKILL where $FAULT says.
FAULTS = '''
import os
if os.environ.get("FAULT") and "RANK" in os.environ:
    phase, step, rank = os.environ["FAULT"].split(":")
    if rank == os.environ["RANK"]:
        from parallel.checkpoint import writing

        def die():
            os.kill(os.getpid(), 9)

        def wrap(owner, name, before=False):
            call = getattr(owner, name)

            def wrapped(*given, **more):
                due = any(step in str(getattr(item, "target", item)) for item in given[:2])
                if due and before:
                    die()
                result = call(*given, **more)
                if due:
                    die()
                return result
            setattr(owner, name, wrapped)

        {"begin": lambda: wrap(writing.Save, "begin"),
         "half written": lambda: wrap(writing, "write_safetensors"),
         "written": lambda: wrap(writing.SlicedSave, "_write"),
         "index": lambda: wrap(writing.SlicedSave, "_write_index"),
         "rename": lambda: wrap(writing, "put_in_place", before=True),
         "in place": lambda: wrap(writing, "put_in_place"),
         "tidy": lambda: wrap(writing.Save, "tidy", before=True)}[phase]()
'''
PHASES = {"begin": (0, 4), "half written": (1, 4), "written": (1, 4), "index": (0, 4), "rename": (0, 4),
          "in place": (0, 8), "tidy": (0, 8)}
"""Who dies while step 8 is saved, and the newest checkpoint that is there afterwards."""


def faulty(place: Path, fault: str) -> dict[str, str]:
    place.mkdir(parents=True)
    (place / "sitecustomize.py").write_text(FAULTS)
    return {"PYTHONPATH": f"{place}:{ROOT}", "FAULT": fault}


def test_replicas_are_written_once_and_evenly(straight):
    path = Path(straight.figures["checkpoint"])
    slices = straight.checkpoint()
    whole = sum(tensor.nbytes for tensor in slices.tensors.values())
    written = Counter({file.name: file.stat().st_size for file in path.glob("*.safetensors")})
    assert whole <= sum(written.values()) < 1.1 * whole, "what both ranks hold lies there once"
    by_rank = [sum(size for name, size in written.items() if f"-0000{rank}-of" in name) for rank in (0, 1)]
    assert max(by_rank) < 0.6 * sum(by_rank)
    assert json.loads((path / "layout.json").read_text())["ranks"] == 2
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["step_00000008", "step_00000012"]


@pytest.mark.parametrize("phase", [pytest.param(phase, marks=() if phase == "rename" else pytest.mark.slow)
                                   for phase in PHASES])
def test_killed_in_any_phase_the_last_complete_one_loads(phase, straight, tmp_path):
    rank, newest = PHASES[phase]
    program, folder = straight.folder / "program", tmp_path / "run"
    killed = Launch(program, folder, 2, faulty(tmp_path / "faults", f"{phase}:step_00000008:{rank}")).end()
    assert killed.code == 128 + signal.SIGKILL, killed.errors[-3000:]
    found = sorted(entry.name for entry in (folder / "checkpoints").glob("step_*"))
    assert found[-1] == f"step_{newest:08d}"
    Slices(folder / "checkpoints" / found[-1]).check()
    resumed = launch(program, folder, 2)
    assert f"going on from {folder / 'checkpoints' / found[-1]}" in resumed.errors
    assert resumed.log() == straight.log()
    assert_same_tensors(resumed.checkpoint(), straight.checkpoint())
    assert not [entry.name for entry in (folder / "checkpoints").iterdir() if entry.name.startswith(".")]


def two_machines(straight, folder: Path, *words: str):
    """The program on two machines of a rank each, whose folders are their own."""
    master = f"127.0.0.1:{free_port()}"
    running = []
    for node in (0, 1):
        command = ["--nodes", "2", "--node-rank", str(node), "--master", master, "--nproc", "1",
                   "output.shared_disk=false", *words]
        running.append(Launch(straight.folder / "program", folder / f"machine{node}", 2, more=command))
    return [one.end() for one in running]


@pytest.mark.slow
def test_machines_without_a_shared_disk_save_and_go_on(straight, tmp_path):
    first = two_machines(straight, tmp_path)
    assert [one.code for one in first] == [0, 0], [one.errors[-2000:] for one in first]
    names = [sorted(file.name for file in (tmp_path / f"machine{node}" / "checkpoints" / "step_00000012").iterdir())
             for node in (0, 1)]
    assert "layout-00000-of-00002.json" in names[0] and "layout-00001-of-00002.json" in names[1]
    # What one machine has that the other lacks is no checkpoint to go on from.
    shutil.rmtree(tmp_path / "machine1" / "checkpoints" / "step_00000012")
    second = two_machines(straight, tmp_path)
    assert [one.code for one in second] == [0, 0], [one.errors[-2000:] for one in second]
    assert "step_00000008 (step 8)" in second[0].errors
    # Copied into one folder they are read as one.
    together = tmp_path / "together" / "step_00000012"
    for node in (0, 1):
        shutil.copytree(tmp_path / f"machine{node}" / "checkpoints" / "step_00000012", together, dirs_exist_ok=True)
    assert_same_tensors(Slices(together), straight.checkpoint())
