"""One shape of command: JSON last on stdout, one line and exit code 2 for what a user did wrong."""

from __future__ import annotations

import json
import math

import pytest

from parallel.common.command import Verb, main
from parallel.common.errors import UserError
from parallel.common.settings import Settings, load_settings


class Job(Settings):
    steps: int = 3
    """How many."""


def work(settings, arguments):
    print("chatter on stdout")
    return {"steps": settings.steps, "loss": math.nan, "flag": arguments.loud}


def fail(settings, arguments):
    raise UserError("is wrong", where="a.b", value=1, hint="mend it")


VERBS = [
    Verb("work", work, "does it", settings=Job, arguments=lambda p: p.add_argument("--loud", action="store_true")),
    Verb("fail", fail, "fails"),
    Verb("lazy", "tests.parallel.no_such_module:run", "never imported unless run"),
    Verb("judge", lambda settings, arguments: {"equal": False, "exit_code": 1}, "says no"),
]


def test_last_line_of_stdout_is_json(capsys):
    assert main("demo", VERBS, ["work", "steps=5", "--loud"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert json.loads(lines[-1]) == {"steps": 5, "loss": None, "flag": True}


def test_user_error_is_one_line_and_exit_code_2(capsys):
    assert main("demo", VERBS, ["fail"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: a.b: is wrong (got 1); mend it\n"
    assert captured.out == ""


@pytest.mark.parametrize(("words", "part"), [
    (["work", "step=5"], "did you mean 'steps'?"),
    (["work", "--loudd"], "did you mean --loud?"),
    (["fail", "a=1"], "unknown argument 'a=1'"),
    (["work", "--config", "/nowhere/x.yaml"], "no such config file"),
])
def test_mistyped_words(capsys, words, part):
    assert main("demo", VERBS, words) == 2
    assert part in capsys.readouterr().err


def test_a_verdict_sets_the_exit_code(capsys):
    assert main("demo", VERBS, ["judge"]) == 1
    assert json.loads(capsys.readouterr().out) == {"equal": False}


def test_print_config_reads_back(capsys, tmp_path):
    assert main("demo", VERBS, ["work", "steps=8", "--print-config"]) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_settings(Job, path).steps == 8


def test_help_of_every_verb_explains_every_flag(capsys):
    for verb in VERBS:
        with pytest.raises(SystemExit) as stop:
            main("demo", VERBS, [verb.name, "--help"])
        assert stop.value.code == 0
    assert "last line of stdout" in capsys.readouterr().out.replace("\n", " ")


def test_a_full_disk_is_one_line(capsys):
    def full(settings, arguments):
        raise OSError(28, "No space left on device", "/out")

    assert main("demo", [Verb("full", full, "x")], ["full"]) == 2
    assert "/out: No space left on device" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback():
    def broken(settings, arguments):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main("demo", [Verb("broken", broken, "x")], ["broken"])
