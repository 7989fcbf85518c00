"""Files and folders that appear complete or not at all, also when a process is killed at any moment.

- `temporary_name(target)`: a hidden name beside `target` that no other process and no other call uses, and that says
  whose it is (host, pid, start time), so that `sweep` can remove what no living process owns.
- `put_in_place(made, target)`: exchanges two folders in one step of the file system, so that either the old or the new
  one is there; where the system cannot, the old one steps aside and `sweep` puts it back after a kill in between.
- `remove_folder(path)`: out of sight in one step, then deleted.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import time
from pathlib import Path

from parallel.common.ownership import Identity, alive

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_FOREIGN_SECONDS = 7 * 24 * 3600.0
# .<target>.<host>.<pid>.<start>.<random>.<kind>
_NAME = re.compile(
    r"^\.(?P<target>.+)\.(?P<host>[^.]+)\.(?P<pid>\d+)\.(?P<start>\d+)\.[0-9a-f]{12}\.(?P<kind>tmp|old)$")
_swept: set[str] = set()


def temporary_name(target: str | Path, kind: str = "tmp") -> Path:
    """A hidden name beside `target` that was never used before. `kind` old: the folder that was at `target`."""
    target = Path(target)
    # A file name has at most 255 bytes.
    stem = target.name if len(target.name.encode()) <= 120 else target.name.encode()[:120].decode("utf-8", "ignore")
    return target.with_name(f".{stem}.{Identity.mine().text()}.{os.urandom(6).hex()}.{kind}")


def sweep(directory: str | Path) -> list[str]:
    """Removes what dead processes left half-made in `directory`, and puts back a folder that one had moved aside.

    Returns the names of what was removed or put back. Leftovers of other hosts, whose processes cannot be seen from
    here, go when they are a week old.
    """
    directory, done = Path(directory), []
    if not directory.is_dir():
        return done
    for path in sorted(directory.iterdir()):
        match = _NAME.match(path.name)
        if match is None or not _is_dead(match, path):
            continue
        target = directory / match["target"]
        with contextlib.suppress(OSError):
            if match["kind"] == "old" and not target.exists():
                path.rename(target)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            done.append(path.name)
    return done


def sweep_once(directory: str | Path) -> None:
    """`sweep` at the first call of this process for `directory`; what it leaves later has a living owner."""
    name = os.path.abspath(directory)
    if name not in _swept:
        _swept.add(name)
        with contextlib.suppress(OSError):
            sweep(directory)


def _is_dead(match: re.Match, path: Path) -> bool:
    host, pid, start = match["host"], int(match["pid"]), int(match["start"])
    mine = Identity.mine()
    if host != mine.host.replace(".", "_"):
        with contextlib.suppress(OSError):
            return time.time() - path.lstat().st_mtime > _FOREIGN_SECONDS
        return False
    return not alive(Identity(mine.host, pid, start))


def put_in_place(made: Path, target: Path) -> None:
    """Makes the folder `made` (beside `target`, all in it written and synced) the one at `target`; what was there goes.

    Raises:
        OSError: it cannot; `target` is what it was.
    """
    if not os.path.lexists(target):
        made.rename(target)
        sync_folder(target.parent)
        return
    try:
        _exchange(made, target)
        old = made
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        old = temporary_name(target, "old")
        target.rename(old)
        try:
            made.rename(target)
        except OSError:
            old.rename(target)
            raise
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> None:
    """renameat2 with RENAME_EXCHANGE (Linux 3.15; not on every file system)."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        raise OSError(errno.ENOSYS, "no renameat2") from None
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(other))


def remove_folder(path: Path) -> None:
    """Deletes a folder that must never be seen half-deleted: it takes a hidden name first."""
    hidden = temporary_name(path)
    with contextlib.suppress(OSError):
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
