"""One process of a machine makes what all of them need; the others wait and then use it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from parallel.common.files import explain_os_error
from parallel.common.progress import info


@contextlib.contextmanager
def one_at_a_time(target: Path) -> Iterator[None]:
    """Holds the turn for `target`; a process that dies gives its turn back. Look anew whether `target` is there.

    Raises:
        UserError: the folder cannot be written.
    """
    lock = target.parent / f".{target.name}.lock"
    file = _turn(lock, target)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is held: who waits for this file tries again
        file.close()


def _turn(lock: Path, target: Path) -> IO:
    reported = False
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("a")
        except OSError as error:
            raise explain_os_error(error, lock) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not reported:
                info(f"another process makes {target}; waiting for it")
            reported = True
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == lock.stat().st_ino:
                return file
        file.close()
