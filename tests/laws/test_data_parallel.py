"""Two real processes on two "nodes" (loopback addresses), half of the rows each, equal one process with all rows."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.laws import data_parallel_run

ROOT = Path(__file__).parents[2]
NODE = """
import sys
from pathlib import Path
from parallel.launch.launcher import MindSporeLauncher
from parallel.launch.plan import Plan
plan = Plan(nodes={nodes}, node_rank={node_rank}, host="127.0.0.2", port={port}, local={local}, timeout=120)
report = MindSporeLauncher(plan, {command!r}, Path({logs!r})).run()
import json; print(json.dumps(report)); sys.exit(report["exit_code"])
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        return probe.getsockname()[1]


def start_node(**numbers):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOG_v": "3"}
    return subprocess.Popen([sys.executable, "-c", NODE.format(**numbers)], cwd=ROOT, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    command = ["-m", "tests.laws.data_parallel_run", str(folder)]
    port = free_port()
    nodes = [start_node(nodes=2, node_rank=rank, port=port, local=1, command=command, logs=str(folder / "logs"))
             for rank in (0, 1)]
    ends = [node.communicate(timeout=240) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], ends
    assert json.loads(ends[0][0].splitlines()[-1])["ranks"] == 2
    return [dict(np.load(folder / f"rank_{rank}.npz")) for rank in (0, 1)], folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    data_parallel_run.main(folder)
    return dict(np.load(folder / "rank_0.npz"))


def test_two_processes_equal_one_with_the_doubled_batch(two_nodes, one):
    ranks, _ = two_nodes
    for rank in ranks:
        np.testing.assert_allclose(rank["seen"], one["seen"], rtol=2e-5)
        np.testing.assert_allclose(rank["validation"], one["validation"], rtol=1e-5)
        for name, value in one.items():
            if name.startswith("value.") and "dropout" not in name:
                np.testing.assert_allclose(rank[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert not one["seen"][data_parallel_run.BROKEN_STEP][2], "the batch with the NaN is skipped"


def test_the_ranks_hold_the_same_bits_and_only_rank_0_writes(two_nodes):
    (first, second), folder = two_nodes
    for name, value in first.items():
        if "dropout" not in name:
            assert np.array_equal(second[name], value, equal_nan=True), name
    assert (folder / "run" / "checkpoints" / "step_00000006" / "state.json").is_file()
    assert sorted(path.name for path in (folder / "logs").iterdir()) == ["rank_0.log", "rank_1.log", "scheduler.log"]


def test_a_dying_rank_ends_all_and_gives_its_exit_code(tmp_path):
    # No MindSpore in the ranks: this is about the launcher. Rank 1 dies, rank 0 and the scheduler would wait for ever.
    script = ("import os, sys, time;"
              "open(sys.argv[1] + '/pid' + os.environ['RANK_ID'] + os.environ['MS_ROLE'], 'w')"
              ".write(str(os.getpid())); time.sleep(1.5 if os.environ['MS_ROLE'] + os.environ['RANK_ID'] == "
              "'MS_WORKER1' else 600); print('out of luck'); print('[INFO] chatter\\n' * 30); sys.exit(7)")
    node = start_node(nodes=1, node_rank=0, port=free_port(), local=2, command=["-c", script, str(tmp_path)],
                      logs=str(tmp_path / "logs"))
    output, errors = node.communicate(timeout=60)
    assert node.returncode == 7 and json.loads(output.splitlines()[-1])["failed_rank"] == 1
    assert "rank 1 failed with exit code 7" in errors and "out of luck" in errors
    assert "[INFO] chatter\n" not in errors
    pids = [int(path.read_text()) for path in tmp_path.glob("pid*")]
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_signal_reaches_all_ranks(tmp_path):
    script = ("import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(0)));"
              "open(sys.argv[1] + '/ready' + os.environ['RANK_ID'] + os.environ['MS_ROLE'], 'w'); time.sleep(600)")
    node = start_node(nodes=1, node_rank=0, port=free_port(), local=2, command=["-c", script, str(tmp_path)],
                      logs=str(tmp_path / "logs"))
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("ready*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    node.send_signal(signal.SIGTERM)
    _, errors = node.communicate(timeout=60)
    assert node.returncode == 0, errors
    assert all("saved" in (tmp_path / "logs" / f"rank_{rank}.log").read_text() for rank in (0, 1))


def test_what_is_started_after_a_launch_is_no_worker(tmp_path):
    from parallel.launch.launcher import MindSporeLauncher
    from parallel.launch.plan import Plan

    before = dict(os.environ)
    script = "import os, sys; print(os.environ['MS_ROLE'], os.environ['RANK_SIZE'])"
    figures = MindSporeLauncher(Plan(1, 0, "127.0.0.1", free_port(), 2, 60), ["-c", script], tmp_path / "logs").run()
    assert figures["exit_code"] == 0 and dict(os.environ) == before
    assert all("MS_WORKER 2" in (tmp_path / "logs" / f"rank_{rank}.log").read_text() for rank in (0, 1))


def test_a_port_in_use(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.2", 0))
        taken.listen()
        node = start_node(nodes=1, node_rank=0, port=taken.getsockname()[1], local=1, command=["-c", ""],
                          logs=str(tmp_path))
        assert "UserError: --master: cannot listen here" in node.communicate(timeout=60)[1]
