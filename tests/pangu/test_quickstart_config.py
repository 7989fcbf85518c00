"""The config file that the quickstart writes for all other commands."""

from __future__ import annotations

import argparse

from pangu.generation.prompts import read_prompts
from pangu.quickstart import Job
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
