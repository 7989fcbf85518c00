"""The scripts, typed in any folder: relative paths mean the folder in which they are typed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pangu.generation.prompts import find_recipe

ROOT = Path(__file__).resolve().parents[1]
_PYTHON = '#!/bin/bash\npwd\nprintf "%s\\n" "$@"\n'


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of the scripts whose environment is made, with a Python that says where it is and what it is told."""
    copy = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "scripts", copy / "scripts", ignore=shutil.ignore_patterns("bench", "campaigns"))
    shutil.copy(ROOT / "setup.py", copy)
    (copy / ".venv" / "bin").mkdir(parents=True)
    python = copy / ".venv" / "bin" / "python"
    python.write_text(_PYTHON)
    python.chmod(0o755)
    found = subprocess.run("cat setup.py scripts/constraints.txt | cksum | tr ' ' '-'", shell=True, cwd=copy,
                           capture_output=True, text=True, check=True).stdout.strip()
    (copy / ".venv" / ".installed").write_text("".join(f"{found} {extra}\n" for extra in ("core", "serve", "evaluate")))
    return copy


@pytest.mark.parametrize(("script", "words"), [
    ("run_distribute.sh", ["--config", "my.yaml", "output.directory=out #1"]),
    ("run_standalone.sh", ["--config", "my.yaml"]), ("quickstart.sh", ["--corpus", "text.txt"]),
    ("run_few_shot.sh", ["--config", "my.yaml", "--data", "DIR"]), ("serve.sh", ["--config", "my.yaml"]),
    ("serve.sh", ["--config=my.yaml"]), ("serve.sh", ["--checkpoint", "step", "chat_template=mine.jinja"])])
def test_relative_paths_mean_the_callers_folder(repository, tmp_path, script, words):
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    (tmp_path / "runs/quickstart/run.yaml").touch()
    done = subprocess.run(["bash", repository / "scripts" / script, *words], cwd=tmp_path, capture_output=True,
                          text=True, check=True)
    folder, _, package, *given = done.stdout.strip().split("\n")
    assert Path(folder) == tmp_path and package in ("pangu", "parallel") and given[-len(words):] == words
    assert ("runs/quickstart/run.yaml" in given) == (words[0] == "--checkpoint")


def test_without_a_model_serving_says_where_it_looked(repository, tmp_path):
    done = subprocess.run(["bash", repository / "scripts/serve.sh"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "no model in this folder" in done.stderr and done.stdout == ""


def test_commands_typed_elsewhere_find_their_files_and_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("pangu/prompts/quickstart.yaml").is_file()  # as the quickstart names it
    (tmp_path / "my.yaml").write_text("model: {layers: 3}\n")
    words = [sys.executable, "-m", "pangu", "train", "--config", "my.yaml", "--print-config"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "layers: 3" in done.stdout
