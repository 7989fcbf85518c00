"""Servers by the project's commands, each a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading


def says_where(*words: str) -> tuple[subprocess.Popen, str]:
    """(process, address) of `python -m` and words that begin a server, once it says where it serves."""
    process = subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env={**os.environ, "COLUMNS": "400", "PYTHONUNBUFFERED": "1", "GLOG_v": "3"})
    said = []
    for line in process.stderr:
        said.append(line)
        if "http://" in line:
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, line[line.index("http://"):].strip()
    raise AssertionError("".join(said))
