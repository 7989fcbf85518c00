"""Old names: refused with the new one when a user types them, read when they are in a file."""

from __future__ import annotations

import importlib

import pytest

from parallel.common.command import main
from parallel.common.errors import UserError
from parallel.common.renamed import FLAGS, TASKS, VERBS, current_keys


@pytest.mark.parametrize(("package", "verb"), VERBS)
def test_an_old_verb_is_an_error_that_names_the_new_one(package, verb, capsys):
    verbs = importlib.import_module(f"{package}.__main__").VERBS
    assert main(package, verbs, [verb]) == 2
    assert f"type {VERBS[package, verb]}" in capsys.readouterr().err
    new = VERBS[package, verb].split()[-1]
    owner = VERBS[package, verb].split()[2] if " " in VERBS[package, verb] else package
    assert new in {verb.name for verb in importlib.import_module(f"{owner}.__main__").VERBS}


@pytest.mark.parametrize(("package", "verb", "flag"), FLAGS)
def test_an_old_flag_is_an_error_that_names_a_flag_that_exists(package, verb, flag, capsys):
    verbs = importlib.import_module(f"{package}.__main__").VERBS
    assert main(package, verbs, [verb, f"{flag}=x"]) == 2
    assert f"type {FLAGS[package, verb, flag]}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(package, verbs, [verb, "--help"])
    assert FLAGS[package, verb, flag] in capsys.readouterr().out


def test_an_old_key_is_an_error_for_a_user_and_read_in_a_file(capsys):
    verbs = importlib.import_module("recsys.__main__").VERBS
    assert main("recsys", verbs, ["count", "--config", "configs/recsys/rankmixer.yaml", "model.op_cut=width"]) == 2
    assert "write model.op_sharding" in capsys.readouterr().err
    assert current_keys({"model": {"op_cut": "width"}, "list": [{"op_cut": 1}]}) == {
        "model": {"op_sharding": "width"}, "list": [{"op_sharding": 1}]}


@pytest.mark.parametrize("task", TASKS)
def test_an_old_task_is_an_error_that_names_the_new_one(task):
    from pangu.evaluation.task import load_task

    with pytest.raises(UserError, match=TASKS[task]):
        load_task(task)
    assert load_task(TASKS[task]).name == TASKS[task]
