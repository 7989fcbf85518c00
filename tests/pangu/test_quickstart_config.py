"""The config file that the quickstart writes for all other commands, and when a command has not finished."""

from __future__ import annotations

import argparse
import json
import subprocess

import pytest

from pangu.generation.prompts import read_prompts
from pangu.quickstart import Job, run_command
from pangu.settings import Run
from parallel.common.settings import load_settings


def test_a_recipe_keeps_what_the_quickstart_was_not_told(tmp_path, root):
    arguments = argparse.Namespace(corpus=None, output=str(tmp_path), fresh=False, bytes="1MB", steps=None)
    given = load_settings(Run, root / "configs/pangu/tiny.yaml", ["generate.top_p=0.9"])
    Job(given, arguments).write_config()
    written = load_settings(Run, tmp_path / "run.yaml")
    assert written.model_dump(exclude={"data", "output"}) == given.model_dump(exclude={"data", "output"})
    _, settings = read_prompts("couplet", ["春风"], written.generate)
    assert settings.stop == ["\n", "上联"]
    assert settings.top_p == 0.9 and settings.max_new_tokens == given.generate.max_new_tokens


@pytest.mark.parametrize(("stopped", "finished"), [(None, True), ("early stop", True), ("SIGTERM", False)])
def test_a_run_that_was_told_to_stop_has_not_finished(stopped, finished):
    def runner(command, **_):
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps({"steps": 3, "stopped": stopped}))

    if finished:
        assert run_command(["pangu", "train"], runner)["steps"] == 3
    else:
        with pytest.raises(KeyboardInterrupt):
            run_command(["pangu", "train"], runner)
