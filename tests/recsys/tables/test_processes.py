"""Tables on four processes of data x op by the user's commands, and what becomes of their checkpoint afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from parallel.checkpoint.folder import list_checkpoints
from recsys.data.log import prepare
from recsys.saved_model import load
from tests.recsys.runs import body_of
from tests.recsys.tables.test_host import HOST, TINY, same_files
from tests.servers import says_where

pytestmark = pytest.mark.slow
CONFIG = "configs/recsys/dlrm_mlp.yaml"


def figures_of(*words: str) -> dict:
    """The last line of a command that ends well."""
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple:
    """(folder, words, figures by processes) of a run of one process and of one of data 2 x op 2, stopped in between."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("processes")
    words = [*TINY, *HOST, "train.validate_every=6", "train.keep_best=auc", "data.tables.exchange_kb=16",
             "output.checkpoint_every=6", f"data.cache={folder / 'data'}"]
    figures = {}
    for count, layout, stops in ((1, ["parallel.data=1"], [12]), (4, ["parallel.data=2", "parallel.op=2"], [6, 12])):
        for steps in stops:
            figures[count] = figures_of("parallel", "launch", "--config", CONFIG, "--nproc", str(count), *words,
                                        *layout, f"train.steps={steps}", f"output.directory={folder / str(count)}")
    return folder, words, figures


def test_data_and_op_over_four_real_processes_equal_one(runs):
    """MindSpore's graphs on torch, rows on all four processes, a stop and a resume; against one of MindSpore."""
    _, _, figures = runs
    for name in ("loss", "auc", "logloss", "validation_auc", "validation_logloss"):
        assert figures[4][name] == pytest.approx(figures[1][name], abs=1e-5), name
    assert figures[4]["table_rows"] < 0.35 * figures[1]["table_rows"]


def test_one_process_evaluates_what_four_wrote(runs):
    folder, words, figures = runs
    told = figures_of("recsys", "evaluate", "--config", CONFIG, "--checkpoint", str(folder / "4" / "best"), *words)
    for name in ("auc", "gauc", "uauc", "logloss"):
        assert told[name] == pytest.approx(figures[4][name], abs=1e-6), name


def test_one_process_serves_what_four_wrote(runs, graph_mode):
    """`recsys serve` of both runs' last checkpoints: the scores of one request."""
    folder, *_ = runs
    trained = load(folder / "4", rows=16)
    log = prepare(trained.settings.data, trained.settings.model.embedding_size)
    bodies = [body_of(trained, log, seed, 5) for seed in range(4)]
    one, four = (served(folder / count, bodies) for count in ("1", "4"))
    for first, second in zip(one, four, strict=True):
        # The better of equal candidates may be either.
        assert [row["score"] for row in second] == pytest.approx([row["score"] for row in first], abs=1e-5)
    assert len({row["score"] for row in one[0]}) > 1


def served(folder, bodies: list[dict]) -> list[list[dict]]:
    """Rankings by a server of its own."""
    process, address = says_where("recsys", "serve", "--checkpoint", str(folder), "port=0", "engine.candidates=[8]")
    try:
        found = []
        for body in bodies:
            request = urllib.request.Request(f"{address}/rank", data=json.dumps(body).encode())
            with urllib.request.urlopen(request, timeout=60) as answer:
                found.append(json.loads(answer.read())["ranking"])
        return found
    finally:
        process.kill()
        process.wait()


def test_other_numbers_of_processes_go_on_from_what_four_wrote(runs):
    """One and two processes of MindSpore, as the run of one that goes on."""
    folder, words, _ = runs
    wanted = figures_of("recsys", "train", "--config", CONFIG, *words, "train.steps=18",
                        f"output.directory={folder / 'straight'}")
    for count in (1, 2):
        copied = folder / f"4 to {count}"
        shutil.copytree(folder / "4", copied)
        found = figures_of("parallel", "launch", "--config", CONFIG, "--nproc", str(count), *words, "train.steps=18",
                           f"parallel.data={count}", f"output.directory={copied}")
        for name in ("loss", "auc", "logloss", "validation_auc"):
            assert found[name] == pytest.approx(wanted[name], abs=1e-5), (count, name)


def test_four_processes_start_from_what_four_wrote(runs):
    """`train.start_from`: dense weights and rows are the old run's, as where one process starts from it."""
    folder, words, _ = runs
    more = [f"train.start_from={folder / '4'}", "train.steps=3", "train.log_every=1", "train.validate_every=3"]
    found = {}
    for count, layout in ((1, ["parallel.data=1"]), (4, ["parallel.data=2", "parallel.op=2"])):
        found[count] = figures_of("parallel", "launch", "--config", CONFIG, "--nproc", str(count), *words, *layout,
                                  *more, f"output.directory={folder / f'from 4 to {count}'}")
    for name in ("loss", "auc", "logloss", "validation_auc"):
        assert found[4][name] == pytest.approx(found[1][name], abs=1e-5), name
    assert found[4]["table_rows"] < 0.35 * found[1]["table_rows"]


def test_four_processes_that_are_killed_go_on_bit_for_bit(runs):
    """SIGKILL to all after a checkpoint; what the resumed run ends with is what the other one did."""
    folder, words, _ = runs
    killed = folder / "killed"
    command = ["parallel", "launch", "--config", CONFIG, "--nproc", "4", *words, "parallel.data=2", "parallel.op=2",
               "train.steps=12", "output.checkpoint_every=2", f"output.directory={killed}"]
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list_checkpoints(killed / "checkpoints"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    for pid in (process.pid, *map(int, children.split())):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert list_checkpoints(killed / "checkpoints")[-1].name < "step_00000012"
    figures_of(*command)
    same_files(folder / "4" / "checkpoints" / "step_00000012", killed / "checkpoints" / "step_00000012")
