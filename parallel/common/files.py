"""Files read and written with care: atomic, bounded, confined, decompressed by suffix."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import errno
import glob
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from parallel.common.errors import UserError
from parallel.common.folders import sweep_once, temporary_name
from parallel.common.json_text import dump_json
from parallel.common.structured import MAX_JSON_BYTES, by_mark, is_file, read_json, seal

__all__ = ["MAX_JSON_BYTES", "DamagedFile", "as_utf8", "atomic_write", "by_mark", "cache_folder", "explain_os_error",
           "inside", "matching", "name_text", "open_binary", "open_text", "open_utf8", "read_json", "write_json"]

COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst", ".bz2")
_OUTPUT = 1 << 20


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Opens a temporary file beside `path` that replaces it only when the block ends without an error.

    Raises:
        UserError: no space on the disk, or the folder cannot be written; nothing is left behind.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_once(path.parent)
        temporary = temporary_name(path)
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        temporary = None
    except OSError as error:
        raise explain_os_error(error, path) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def explain_os_error(error: OSError, path: str | Path) -> Exception:
    """A `UserError` for a full disk or a folder that cannot be written; any other error unchanged."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # EFBIG: a limit on the size of files
        return UserError("no space left on the disk; nothing was written", where=path, hint="free some space")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError("cannot write here", where=path, hint="choose another output folder")
    if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        return UserError(f"cannot write here: {error.strerror}", where=path, hint="choose another output path")
    return error


class DamagedFile(UserError):
    """A compressed file that cannot be decompressed to its end."""


def open_binary(path: str | Path) -> io.BufferedReader:
    """Opens a file for reading bytes, decompressing `.xz`, `.gz`, `.zst` and `.bz2` (streaming).

    What is read before the damage is given; then `DamagedFile` is raised, whatever the compression.

    Raises:
        UserError: the file is missing or cannot be read, or `.zst` and the package zstandard is not installed.
    """
    path = Path(path)
    if not is_file(path):
        raise UserError("no such file", where=path, hint="check the path")
    opened: Any = {".xz": _xz, ".gz": gzip.open, ".zst": _zstd, ".bz2": _bz2}.get(path.suffix.lower())
    try:
        if opened is None:
            return path.open("rb")
        return io.BufferedReader(_Decompressed(opened(path), path), 1 << 17)
    except PermissionError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=path) from None


class _Converted(io.RawIOBase):
    """Another stream's bytes made into others; its damage is a `DamagedFile` that names `path`."""

    def __init__(self, stream: Any, path: str | Path) -> None:
        self._stream, self._path = stream, path

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


class _Decompressed(_Converted):
    """A decompressing stream."""

    def readinto(self, buffer: Any) -> int:
        try:
            # At most one read below: what comes before the damage is not lost with it.
            data = self._stream.read1(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile, _Damage) as error:
            raise DamagedFile(f"file is damaged: it cannot be read to its end ({error})", where=self._path,
                              hint="get it anew") from None
        buffer[:len(data)] = data
        return len(data)


class _Damage(Exception):
    """A frame that is no frame."""


class _Frames:
    """Frames (`.zst`) or streams (`.xz`, `.bz2`) of a file one after the other; unlike the libraries' own readers it
    notices a file that was cut off between or inside them, and what is no frame behind one.

    Args:
        path: the file.
        new: makes what decompresses one frame.
        error: what that raises at damage.
        padding: bytes that may be between frames.
        piece: bytes that are decompressed at once.
    """

    def __init__(self, path: Path, new: Callable[[], Any], error: type[Exception], padding: bytes, piece: int) -> None:
        self._new, self._error, self._padding, self._piece = new, error, padding, piece
        self._file, self._frame, self._ready = path.open("rb"), None, memoryview(b"")

    def close(self) -> None:
        self._file.close()

    def read1(self, size: int) -> memoryview:
        while not self._ready:
            data = self._next_piece()
            if self._frame is None:
                if not data:
                    return self._ready
                self._frame = self._new()
            elif not data and getattr(self._frame, "needs_input", True):
                raise EOFError("the file ends inside a frame")
            try:
                # A piece may stand for thousands of times its size: LZMA's output is bounded, zstd's input is.
                more = (_OUTPUT,) if hasattr(self._frame, "needs_input") else ()
                self._ready = memoryview(self._frame.decompress(data, *more))
            except self._error as error:
                raise _Damage(str(error)) from None
        piece, self._ready = self._ready[:size], self._ready[size:]
        return piece

    def _next_piece(self) -> bytes:
        """What comes next, without padding before a frame; `_frame` is None there, and b"" is the end of the file."""
        frame, rest = self._frame, b""
        if frame is not None and not frame.eof:
            return self._file.read(self._piece) if getattr(frame, "needs_input", True) else b""
        if frame is not None:
            rest, self._frame = frame.unused_data, None
        while True:
            data = rest or self._file.read(self._piece)
            kept, rest = data.lstrip(self._padding), b""
            if kept or not data:
                return kept


def _zstd(path: Path) -> _Frames:
    try:
        import zstandard
    except ImportError:
        raise UserError("reading .zst needs the package zstandard", where=path, hint="pip install zstandard") from None
    return _Frames(path, zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError, padding=b"", piece=4 << 10)


def _xz(path: Path) -> _Frames:
    return _Frames(path, lzma.LZMADecompressor, lzma.LZMAError, padding=b"\0", piece=128 << 10)


def _bz2(path: Path) -> _Frames:
    return _Frames(path, bz2.BZ2Decompressor, OSError, padding=b"\0", piece=128 << 10)


def as_utf8(stream: io.BufferedReader, path: str | Path, errors: str = "strict") -> io.BufferedReader:
    """`stream`, which stands at its beginning, as UTF-8 behind its byte order mark, also where that says UTF-16 or
    UTF-32.

    Args:
        stream: bytes of a text.
        path: the file, for messages.
        errors: what becomes of bytes that are not what the mark says: "strict" raises `DamagedFile` when they are read,
            "replace" gives U+FFFD.
    """
    mark = by_mark(stream.peek(4)[:4])
    if mark == "utf-8-sig":
        stream.read(len(codecs.BOM_UTF8))
    return stream if mark in (None, "utf-8-sig") else io.BufferedReader(_Recoded(stream, mark, path, errors), 1 << 17)


class _Recoded(_Converted):
    """A stream of another charset as UTF-8."""

    def __init__(self, stream: BinaryIO, charset: str, path: str | Path, errors: str) -> None:
        super().__init__(stream, path)
        self._ready, self._name = b"", charset.upper()
        self._decoder = codecs.getincrementaldecoder(charset)(errors)

    def readinto(self, buffer: Any) -> int:
        ended = False
        while not self._ready and not ended:
            data = self._stream.read(1 << 16)
            ended = not data
            try:
                self._ready = self._decoder.decode(data, ended).encode()
            except UnicodeError:
                raise DamagedFile(f"not the {self._name} that its byte order mark says", where=self._path,
                                  hint="convert the file to UTF-8") from None
        piece, self._ready = self._ready[:len(buffer)], self._ready[len(buffer):]
        buffer[:len(piece)] = piece
        return len(piece)


def open_utf8(path: str | Path) -> io.BufferedReader:
    """`open_binary` of a text: bytes of UTF-8 (see `as_utf8`), not checked to be that where no mark says anything."""
    return as_utf8(open_binary(path), path)


def open_text(path: str | Path, errors: str = "strict") -> IO[str]:
    """`open_utf8` as text lines (universal newlines off: a lone carriage return is text)."""
    return io.TextIOWrapper(open_utf8(path), encoding="utf-8", errors=errors, newline="\n")


def cache_folder() -> Path:
    """The project's folder under `$XDG_CACHE_HOME` or `~/.cache`, for what is compiled once and loaded as code.

    Raises:
        OSError: it cannot be made, or others could write into it.
        RuntimeError: there is no home folder.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pangu-rankers"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "belongs to or can be written by others", str(folder))
    return folder


def write_json(path: str | Path, value: Any, *, sealed: bool = True) -> None:
    """Writes `value` as indented JSON (see `json_text`), atomically.

    Args:
        path: the file.
        value: anything; an object gets its digest as one more key, which `read_json` compares and takes off.
        sealed: off for files in formats of others, which have no such key.
    """
    with atomic_write(path) as file:
        file.write(json_with_digest(value) if sealed else dump_json(value, indent=1) + "\n")


def json_with_digest(value: Any) -> str:
    """The text that `write_json` writes."""
    return dump_json(seal(value) if isinstance(value, dict) else value, indent=1) + "\n"


def matching(path: str | Path) -> list[Path]:
    """What a path means: itself if it exists, else what it matches as a pattern (`*`, `?`, `[...]`, `**`), sorted.

    Names that exist are taken as they are, also above the first wildcard: `logs [2024]/*.csv` looks into that folder.
    """
    path = Path(path)
    try:
        if path.exists():
            return [path]
    except (OSError, ValueError):  # a name that no file can have
        return []
    if not any(mark in str(path) for mark in "*?["):
        return []
    root = next((parent for parent in path.parents if parent.is_dir()), Path())
    pattern = str(path.relative_to(root)) if root in path.parents else str(path)
    return sorted(root / name for name in glob.glob(pattern, root_dir=root, recursive=True))


def name_text(path: str | Path) -> str:
    r"""A path as text that UTF-8 can hold, bytes that are none as `\xff`; different paths stay different."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def inside(root: str | Path, path: str | Path) -> Path:
    """`root / path`, refused when it would lead outside `root`.

    Raises:
        UserError: the path is absolute, or climbs out by `..` or a link.
    """
    root = Path(root).resolve()
    full = (root / path).resolve()
    if full != root and root not in full.parents:
        raise UserError("path leads outside its folder", where=root, value=str(path))
    return full
