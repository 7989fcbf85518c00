"""The examples of docs/extending.md work: each file is put where it says, and its command is run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("parallel", "pangu", "recsys", "data_tools")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.M | re.S)
SECTIONS = re.split(r"^## ", (ROOT / "docs" / "extending.md").read_text(encoding="utf-8"), flags=re.M)[1:]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The packages without their tests, with every example in its place."""
    place = tmp_path_factory.mktemp("extending")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, place / package, ignore=shutil.ignore_patterns("__pycache__"))
    for section in SECTIONS:
        for kind, text in BLOCK.findall(section):
            if kind != "bash":
                where = place / re.match(r"(?:#|//) file: (\S+)\n", text).group(1)
                assert not where.exists(), "an example must not replace a file"
                where.write_text(text.split("\n", 1)[1], encoding="utf-8")
    return place


@pytest.mark.parametrize("section", SECTIONS, ids=lambda text: text.splitlines()[0].replace(" ", "_"))
def test_the_example_works(section, copy):
    commands = [text for kind, text in BLOCK.findall(section) if kind == "bash"]
    assert len(commands) == 1, "every section has one command"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(copy), "GLOG_v": "3"}
    done = subprocess.run(["bash", "-c", commands[0]], cwd=copy, env=environment, capture_output=True, text=True,
                          timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    if "print-reference" in commands[0]:
        assert "shouting:" in done.stdout
