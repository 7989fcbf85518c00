"""Who owns a folder, and who ends with whom. A process is a host, a pid and a start time: a pid used again is another.

- `owned(directory)`: one owner of a run's folder at a time; a second is refused with a line that says who has it. A
  launcher owns the folder for its ranks: what it starts with `owner_environment()` joins it, and a next owner waits
  until the last of them is gone.
- `end_with_parent()`: in a worker: it ends when the process that started it does, whatever killed that.
- `alive(identity)`: whether the process that made a temporary file still runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from parallel.common.errors import UserError

LOCK_NAME = ".owner.json"
_MEMBERS_NAME = ".members"
_OWNER, _CHILD, _ELSEWHERE = "PARALLEL_OWNER", "PARALLEL_CHILD", "elsewhere"
_PR_SET_PDEATHSIG = 1
_WAIT_SECONDS = 15.0
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Identity:
    """A process: host, pid, and when it started (clock ticks since the host's boot, and the boot's own id)."""

    host: str
    pid: int
    start: int
    boot: str = ""

    @staticmethod
    def of(pid: int) -> Identity | None:
        """The process of this pid on this host; None if there is none (or a dead one that nobody has waited for)."""
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        fields = text.rpartition(")")[2].split()  # the name of a program may hold anything
        return None if fields[0] in "ZX" else Identity(socket.gethostname(), pid, int(fields[19]), _boot())

    @staticmethod
    def mine() -> Identity:
        """This process."""
        return Identity.of(os.getpid()) or Identity(socket.gethostname(), os.getpid(), 0, _boot())

    def text(self) -> str:
        """One word, for the name of a file."""
        return f"{self.host.replace('.', '_')}.{self.pid}.{self.start}"


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def alive(identity: Identity) -> bool | None:
    """Whether the process runs; None where that cannot be known, because it is another host's."""
    if identity.host != socket.gethostname():
        return None
    found = Identity.of(identity.pid)
    return found is not None and found.start == identity.start and identity.boot in ("", found.boot)


@contextlib.contextmanager
def owned(directory: str | Path, what: str = "train", chief: bool = True) -> Iterator[None]:
    """Owns `directory` until the block ends, or joins the launcher that owns it for this process.

    Args:
        directory: made if missing.
        what: shown to whoever is refused.
        chief: False for the further processes of a run, which own nothing: they join their launcher or do nothing.

    Raises:
        UserError: another run has the folder, and who; or it cannot be written.
    """
    directory = Path(directory)
    if os.environ.get(_OWNER) == _ELSEWHERE or not (chief or os.environ.get(_OWNER)):
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        members = os.open(directory / _MEMBERS_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"cannot write here: {error.strerror}", where=directory,
                        hint="choose another output folder") from None
    try:
        if os.environ.get(_OWNER) == _token(directory):
            _lock(members, fcntl.LOCK_SH, _WAIT_SECONDS)
            yield
        elif not chief:
            yield
        else:
            with _owner(directory, members, what):
                yield
    finally:
        os.close(members)


def owner_environment(directory: str | Path | None) -> dict[str, str]:
    """Variables for the processes that the owner of `directory` starts, so that they join it and end with it; None: the
    owner is on another machine."""
    return {_OWNER: _token(Path(directory)) if directory is not None else _ELSEWHERE, _CHILD: "1"}


def end_with_launcher() -> None:
    """`end_with_parent` where a launcher started this process (`owner_environment`)."""
    if os.environ.pop(_CHILD, ""):
        end_with_parent()


def start_guard(pids: list[int]) -> subprocess.Popen:
    """A process that kills the groups of `pids` when this one is gone, whatever killed it. End it when they have ended.

    For processes of others, which cannot be made to watch for themselves.
    """
    me = Identity.mine()
    return subprocess.Popen([sys.executable, "-m", __name__, str(me.pid), str(me.start), *map(str, pids)],
                            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            start_new_session=True, cwd=Path(__file__).resolve().parents[2])


def _guard(pid: int, start: int, *pids: int) -> None:
    watched = Identity(socket.gethostname(), pid, start)
    guarded = [found for one in pids if (found := Identity.of(one)) is not None]
    while alive(watched):
        if not any(map(alive, guarded)):
            return
        time.sleep(_POLL_SECONDS)
    for one in guarded:
        if alive(one):
            with contextlib.suppress(OSError):
                group = os.getpgid(one.pid)
                os.killpg(group, signal.SIGKILL) if group == one.pid else os.kill(one.pid, signal.SIGKILL)


def _token(directory: Path) -> str:
    """Of the folder's owner, whoever that is; "" without one."""
    with contextlib.suppress(OSError, ValueError):
        return str(json.loads((directory / LOCK_NAME).read_text(encoding="utf-8"))["token"])
    return ""


@contextlib.contextmanager
def _owner(directory: Path, members: int, what: str) -> Iterator[None]:
    path = directory / LOCK_NAME
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not _lock(handle, fcntl.LOCK_EX, 0.0):
            raise UserError(f"another run has this folder: {_who(path)}", where=directory,
                            hint="wait for it, end it, or choose another output folder")
        # The last ranks of an owner that was killed may live for a moment.
        if not _lock(members, fcntl.LOCK_EX, _WAIT_SECONDS):
            raise UserError("processes of an earlier run still work in this folder", where=directory,
                            hint="end them, or choose another output folder")
        me = Identity.mine()
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({**asdict(me), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "what": what,
                                      "token": f"{me.text()}.{os.urandom(6).hex()}"}).encode(), 0)
        fcntl.flock(members, fcntl.LOCK_UN)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.ftruncate(handle, 0)
        os.close(handle)


def _lock(handle: int, kind: int, seconds: float) -> bool:
    """Whether the lock was had within `seconds`. The kernel gives it back when its holder ends, however it ends."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
        except OSError:  # a file system without locks: nothing to be known
            return True


def _who(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"{owner['what']}, process {owner['pid']} on {owner['host']}, since {owner['since']}"
    return "a process that has just begun"


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """From here on this process ends when its parent does. Call it first thing in a worker.

    The kernel sends `number` at once (prctl); a thread watches too, for a parent that had ended before the call or was
    a thread that is gone.
    """
    parent = Identity.of(os.getppid())
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if parent is None or os.getppid() != parent.pid:
        os.kill(os.getpid(), number)
    threading.Thread(target=_watch, args=(parent, number), daemon=True, name="end_with_parent").start()


def _watch(parent: Identity, number: int) -> None:
    while alive(parent):
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), number)
    time.sleep(_POLL_SECONDS * 4)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    _guard(*map(int, sys.argv[1:]))
