"""One process of a machine makes what all of them need; the others wait and then use it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel.common.files import explain_os_error
from parallel.common.progress import info


@contextmanager
def one_at_a_time(target: Path) -> Iterator[None]:
    """Holds the turn for `target`; a process that dies gives its turn back. Look anew whether `target` is there.

    Raises:
        UserError: the folder cannot be written.
    """
    lock = target.parent / f".{target.name}.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a")
    except OSError as error:
        raise explain_os_error(error, lock) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            info(f"another process makes {target}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
