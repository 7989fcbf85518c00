"""One owner of a run's folder, workers that end with their parent, folders that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from parallel.common import folders
from parallel.common.digests import BLOCK_BYTES, CheckedRows, block_crc32
from parallel.common.errors import UserError
from parallel.common.files import atomic_write
from parallel.common.folders import put_in_place, remove_folder, sweep, temporary_name
from parallel.common.ownership import Identity, alive, owned, owner_environment

ROOT = Path(__file__).resolve().parents[3]


def start(code: str, **more: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT,
                            env={**os.environ, "PYTHONPATH": str(ROOT), **more})


def ends(pid: int, seconds: float = 10.0) -> bool:
    found = Identity.of(pid)
    deadline = time.monotonic() + seconds
    while found is not None and alive(found) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found is None or not alive(found)


def test_a_folder_has_one_owner_and_says_who(tmp_path):
    with owned(tmp_path, "launch"):
        with pytest.raises(UserError, match=f"launch, process {os.getpid()} on .*, since 20"), owned(tmp_path):
            pass
        with owned(tmp_path, chief=False):  # a further rank of somebody's run
            pass
    with owned(tmp_path):
        pass


def test_what_an_owner_starts_joins_it_and_a_killed_owner_is_no_owner(tmp_path, monkeypatch):
    code = ("import sys, time; from parallel.common.ownership import owned\n"
            f"with owned({str(tmp_path)!r}): print('mine', flush=True); time.sleep(60)")
    with owned(tmp_path):
        child = start(code, **owner_environment(tmp_path))
        assert child.stdout.readline() == "mine\n"
        child.kill()
        child.wait()
    child = start(code)
    assert child.stdout.readline() == "mine\n"
    with pytest.raises(UserError, match=f"process {child.pid}"), owned(tmp_path):
        pass
    child.kill()
    child.wait()
    with owned(tmp_path):
        pass


def test_a_worker_ends_with_its_parent(tmp_path):
    worker = ("from parallel.common.ownership import end_with_parent; import os, time\n"
              "end_with_parent(); print(os.getpid(), flush=True); time.sleep(60)")
    parent = start(f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {worker!r}]); p.wait()")
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert ends(pid)


def test_a_guard_ends_what_it_guards(tmp_path):
    code = ("import subprocess, sys, time; from parallel.common.ownership import start_guard\n"
            "p = subprocess.Popen(['sleep', '60'], start_new_session=True); start_guard([p.pid])\n"
            "print(p.pid, flush=True); time.sleep(60)")
    parent = start(code)
    pid = int(parent.stdout.readline())
    time.sleep(1.0)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert ends(pid)


def test_a_pid_that_is_used_again_is_another_process():
    mine = Identity.mine()
    assert alive(mine) and not alive(Identity(mine.host, mine.pid, mine.start - 1, mine.boot))
    assert alive(Identity("elsewhere", 1, 1)) is None


def dead_name(target: Path, kind: str = "tmp") -> Path:
    mine = Identity.mine()
    dead = Identity(mine.host, mine.pid, mine.start - 1)
    return target.with_name(f".{target.name}.{dead.text()}.{os.urandom(6).hex()}.{kind}")


def test_leftovers_of_the_dead_are_swept_and_of_the_living_kept(tmp_path):
    (tmp_path / ".hidden").write_text("a user's")
    living, dead = temporary_name(tmp_path / "loss.png"), dead_name(tmp_path / "loss.png")
    living.write_text("x")
    dead.write_text("x")
    folder = dead_name(tmp_path / "step_00000003")
    folder.mkdir()
    (folder / "a").write_text("x")
    assert len(sweep(tmp_path)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".hidden", living.name])


def test_a_folder_that_a_kill_left_aside_comes_back(tmp_path):
    aside = dead_name(tmp_path / "step_00000003", "old")
    aside.mkdir()
    (aside / "state.json").write_text("{}")
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_a_folder(tmp_path, monkeypatch, exchange):
    if not exchange:
        def refuse(*_):
            raise OSError(errno.EINVAL, "not here")
        monkeypatch.setattr(folders, "_exchange", refuse)
    target = tmp_path / "a"
    for text in ("one", "two"):
        made = temporary_name(target)
        made.mkdir()
        (made / "x").write_text(text)
        put_in_place(made, target)
        assert (target / "x").read_text() == text and len(list(tmp_path.iterdir())) == 1
    remove_folder(target)
    assert not list(tmp_path.iterdir())


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as one, atomic_write(path) as other:
        one.write("one")
        other.write("other")
    assert path.read_text() in ("one", "other") and len(list(tmp_path.iterdir())) == 1


def test_mapped_rows_are_compared_where_they_are_read(tmp_path):
    path, shape = tmp_path / "rows", (5000, 100)
    np.arange(500_000, dtype=np.int64).reshape(shape).tofile(path)
    sums = block_crc32(path)
    assert len(sums) == -(-4_000_000 // BLOCK_BYTES)
    with path.open("r+b") as file:
        file.seek(3_900_000)
        file.write(b"\xff")
    rows = CheckedRows(np.memmap(path, np.int64, "r", shape=shape), sums, path)
    assert rows[np.array([0, 17])][1, 3] == 1703 and rows[-4900:-4800].shape == (100, 100)
    with pytest.raises(UserError, match="block 3 has changed"):
        rows[np.array([1, 4990])]
    with pytest.raises(UserError, match="block 3"):
        np.asarray(rows)
    with pytest.raises(UserError, match="number of blocks"):
        CheckedRows(np.memmap(path, np.int64, "r", shape=(100, 100)), sums, path)
