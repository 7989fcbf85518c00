"""Builds C++ kernels with the machine's compiler, once, and finds them again later.

Kernels only make things faster; without a compiler everything works through MindSpore's own.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from parallel.common.files import cache_folder
from parallel.common.progress import info

HEADERS = Path(__file__).resolve().parents[1] / "kernels"
_FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility-inlines-hidden", "-pthread", f"-I{HEADERS}"]
_SECONDS = 120
_INCLUDE = re.compile(rb'^#include "([\w.]+)"', re.MULTILINE)


def build_library(source: Path, *, does: str, flags: tuple[str, ...] = ("-march=native", "-ffast-math")) -> Path | None:
    """The shared object of a C++ file, built now if need be; None where that cannot be done, and then it says so.

    Args:
        source: the file; it may include headers beside it and those of parallel/kernels.
        does: what goes on without it, as the subject and verb of a sentence: "decoding uses MindSpore's own kernels".
        flags: of the compiler, beside those that every library needs.
    """
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        info(f"no C++ compiler: {does} (install g++ for the faster ones)")
        return None
    try:
        return _build(compiler, source, [*_FLAGS, *flags])
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
        reason = getattr(error, "stderr", None) or str(error)
        info(f"{does}, since the faster ones cannot be built: {reason.strip()[:200]}")
        return None


def _build(compiler: str, source: Path, flags: list[str]) -> Path:
    folder = cache_folder()
    target = folder / f"{source.stem}-{_key(compiler, source, flags)}.so"
    if target.is_file():
        return target
    handle, part = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        subprocess.run([compiler, *flags, str(source), "-o", part], check=True, capture_output=True, text=True,
                       timeout=_SECONDS)
        os.replace(part, target)
    finally:
        Path(part).unlink(missing_ok=True)
    return target


def _key(compiler: str, source: Path, flags: list[str]) -> str:
    """Changes with the sources, the compiler and the processor that -march=native means."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=_SECONDS).stdout
    text = source.read_bytes()
    digest = hashlib.sha256(text + version + " ".join([*flags, platform.machine()]).encode())
    for header in _headers(source):
        digest.update(header.read_bytes())
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    digest.update("".join(next((line for line in lines if line.startswith(name)), "")
                          for name in ("model name", "flags", "Features")).encode())
    return digest.hexdigest()[:16]


def _headers(source: Path) -> list[Path]:
    """The project's headers that a file includes, and those that they include."""
    found: list[Path] = []
    pending = [source]
    while pending:
        file = pending.pop()
        for name in _INCLUDE.findall(file.read_bytes()):
            beside = file.parent / name.decode()
            header = beside if beside.is_file() else HEADERS / name.decode()
            if header not in found:
                found.append(header)
                pending.append(header)
    return found
