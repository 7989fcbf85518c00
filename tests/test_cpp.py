"""C++ files are formatted as .clang-format says (Google's style, 120 columns)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_every_file_is_formatted():
    pytest.importorskip("clang_format")
    tracked = subprocess.run(["git", "ls-files", "*.cpp", "*.h", "*.inc"], cwd=ROOT, capture_output=True, text=True,
                             check=True)
    files = [name for name in tracked.stdout.split() if (ROOT / name).is_file()]
    done = subprocess.run([Path(sys.executable).parent / "clang-format", "--dry-run", "-Werror", *files], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert files and done.returncode == 0, f"run clang-format -i on them\n{done.stderr[-2000:]}"
