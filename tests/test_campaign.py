"""The short campaign: a few trials of every part that needs no training; no traceback, no silent damage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_short_campaign_finds_nothing(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "campaign.py"), "--short", "--seed", "7", "--folder",
                           str(tmp_path), "--only", "inputs,damage,saves"], capture_output=True, text=True,
                          timeout=300)
    figures = json.loads(done.stdout.strip().split("\n")[-1])
    assert done.returncode == 0 and figures["failures"] == 0, done.stderr[-3000:]
    assert figures["counts"]["input config"] >= 3 and figures["counts"]["kill save"] == 3
    assert any(name.startswith("damage checkpoint") for name in figures["counts"])
    assert json.loads((tmp_path / "counts.json").read_text())["runs"][0]["seed"] == 7


@pytest.mark.slow
def test_ranks_of_a_sharded_layout_are_killed_and_go_on(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "campaign.py"), "--short", "--seed", "7", "--folder",
                           str(tmp_path), "--only", "layouts"], capture_output=True, text=True, timeout=1200)
    figures = json.loads(done.stdout.strip().split("\n")[-1])
    assert done.returncode == 0 and figures["failures"] == 0, done.stderr[-3000:]
    assert figures["counts"]["kill pangu data 2, sharded optimizer"] >= 1
    assert figures["counts"]["resumed pangu data 2, sharded optimizer"] == 1


@pytest.mark.slow
def test_files_that_say_something_else_are_taken_or_refused(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "campaign.py"), "--short", "--seed", "1", "--folder",
                           str(tmp_path), "--only", "resealed"], capture_output=True, text=True, timeout=600)
    figures = json.loads(done.stdout.strip().split("\n")[-1])
    assert done.returncode == 0 and figures["failures"] == 0, done.stderr[-3000:]
    assert figures["counts"]["resealed ranker state.json"] == figures["counts"]["resealed pangu resume"] == 1


def test_a_failure_is_made_small():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from campaigns.base import shrunk
    finally:
        sys.path.pop(0)
    text = "some long text with a #bad# word in it, and more of it" * 5
    assert shrunk(text, lambda part: "#bad#" in part) == "#bad#"
