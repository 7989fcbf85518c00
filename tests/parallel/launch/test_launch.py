"""The launcher's command line: flags against each other and the parallel block. Real processes: tests/laws."""

from pathlib import Path

import pytest

from parallel.__main__ import VERBS
from parallel.common.command import main
from parallel.common.errors import UserError
from parallel.launch import inference, launch
from parallel.launch.machines import Machines

CONFIG = str(Path(__file__).parents[3] / "configs" / "pangu" / "tiny.yaml")


@pytest.fixture
def started(monkeypatch):
    """What would be started: (plan, command, logs)."""
    calls = []

    class Recorder:
        def __init__(self, *what, trains=False, environment=None):
            calls.append((*what, environment) if environment else what)

        def run(self):
            return {"exit_code": 3, "ranks": 2}

    monkeypatch.setattr(launch, "MindSporeLauncher", Recorder)
    monkeypatch.setattr(launch, "TorchLauncher", Recorder)
    monkeypatch.setattr(launch, "exported", lambda settings, ranks, node_rank: (Path("P"), Path("S")))
    monkeypatch.setattr(launch, "machines_of", lambda plan, facts: Machines(plan, facts))
    monkeypatch.setattr(inference, "TorchLauncher", Recorder)
    monkeypatch.setattr(inference, "exported", lambda settings, ranks, node_rank, **more: (Path("P"), Path("S")))
    monkeypatch.setattr(launch.os, "execv", lambda *what: calls.append(what))
    return calls


def test_flags_become_a_plan_and_a_command(started, capsys):
    code = main("parallel", VERBS, ["launch", "--config", CONFIG, "--nodes", "2", "--node-rank", "1", "--nproc", "4",
                                    "--master", "10.0.0.7:9000", "--resume", "parallel.data=8", "output.directory=o"])
    plan, command, logs, _ = started[0]
    assert (plan.ranks, plan.local, plan.node_rank, plan.host, plan.port) == (8, 4, 1, "10.0.0.7", 9000)
    assert command == ["-m", "pangu", "train", "--config", CONFIG, "parallel.data=8", "output.directory=o",
                       "output.resume=auto"]
    assert logs == Path("o/logs") and code == 3
    assert capsys.readouterr().out == '{"ranks": 2}\n'


def test_the_number_of_processes_comes_from_the_block(started):
    main("parallel", VERBS, ["launch", "--config", CONFIG, "parallel.data=2", "parallel.op=2", "--run", "evaluate"])
    assert started[0][0].ranks == 4 and started[0][1][2] == "evaluate"


def test_a_sharded_model_runs_an_exported_program_in_as_many_groups_as_there_are_processes(started):
    words = ["--run", "generate", "--nproc", "4", "parallel.data=64", "parallel.op=2", "--", "--prompt", "a=b"]
    main("parallel", VERBS, ["launch", "--config", CONFIG, *words])
    plan, command, logs, _, environment = started[0]
    assert plan.ranks == 4 and command[-3:] == ["parallel.op=2", "--prompt", "a=b"]
    assert environment["PARALLEL_PROGRAM"].endswith("/P") and logs.name == "generate"


def test_one_process_needs_no_launcher(started):
    main("parallel", VERBS, ["launch", "--config", CONFIG, "--nproc", "1"])
    assert started[0][1][1:5] == ["-m", "pangu", "train", "--config"]


def test_a_dry_run_becomes_the_verb_dryrun(started):
    main("parallel", VERBS, ["launch", "--config", CONFIG, "--compile-only", "parallel.data=2"])
    assert started[0][1][1:] == ["-m", "parallel", "dryrun", "--config", CONFIG, "--ranks", "all-distinct",
                                 "parallel.data=2"]


@pytest.mark.parametrize(("flags", "message"), [
    (["--nproc", "3", "parallel.data=2"], "there are 3 devices"),
    (["--nodes", "2", "--node-rank", "2"], r"--node-rank: must be in \[0, 2\)"),
    (["--nodes", "2", "--node-rank", "1", "--master", "localhost:8118"], "must name machine 0"),
    (["--master", "here"], "--master: must be HOST:PORT"),
    (["--master", "10.0.0.7:80"], "--master: must be HOST:PORT"),
    (["parallel.data=-1"], "--nproc"),
    (["--nodes", "3", "parallel.data=2"], "2 devices do not divide"),
    (["train.stepps=3"], "did you mean 'steps'"),
    (["--run", "generate", "--nproc", "3", "parallel.op=2"], "takes groups of 2 processes"),
    (["--run", "serve", "parallel.op=3"], "parallel.op"),
    (["--program", "P"], "only verbs that generate or score"),
])
def test_contradictions_are_one_line(started, capsys, flags, message):
    assert main("parallel", VERBS, ["launch", "--config", CONFIG, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    with pytest.raises(UserError, match=message):
        raise UserError(error)
    assert not started
