"""Link stubs for CANN, so that MindSpore's Ascend plugin loads on a machine without Ascend.

The x86-64 wheel of MindSpore carries the Ascend front end; it fails to load only because CANN's shared libraries
are missing. At simulation level 0 nothing of CANN is called to compute anything, so functions that return 0 are enough
to reach the real sharding passes. The names of those functions are read out of the wheel's own undefined symbols: the
stubs hold nothing of CANN. They are built once with g++, kept under `~/.cache/`, and not used where CANN is installed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from parallel.common.errors import UserError
from parallel.common.files import cache_folder

CANN_HOME = Path("/usr/local/Ascend")

_RECIPE = 1  # part of the cache key: raise it whenever what is built changes
_MAIN_LIBRARY = "libascendcl.so"
_EMPTY_LIBRARIES = (
    "libge_runner.so", "libgraph.so", "libmsprofiler.so", "libhccl.so", "libruntime.so", "libplatform.so",
    "libc_sec.so", "libnnopbase.so", "libascend_hal.so",
)
# What the front end opens to compile; the kernels further down are opened only to execute.
_PLUGINS = ("libmindspore_ascend.so.2", "libmindspore_ops_ascend.so", "ascend/*.so*", "ascend/*/shmem/*/lib/*.so")
_SYSTEM_LIBRARIES = (
    "libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libgomp.so.1", "libpthread.so.0", "libdl.so.2",
    "librt.so.1", "libz.so.1", "ld-linux-x86-64.so.2",
)
_PYTHON_PREFIXES = ("Py", "_Py")

# A static constructor of the plugin fills this map while it loads, so here returning 0 would crash.
_STATUS_SYMBOL = "_ZN2ge13StatusFactory8InstanceEv"
_STATUS_SOURCE = """\
#include <cstdint>
#include <map>
#include <string>
namespace ge {
class StatusFactory {
 public:
  static StatusFactory *Instance();
 private:
  std::map<uint32_t, std::string> descriptions_;
};
StatusFactory *StatusFactory::Instance() {
  static StatusFactory factory;
  return &factory;
}
}  // namespace ge
"""


def cann_present() -> bool:
    """Whether a real CANN is installed here (then it is used, and never the stubs)."""
    return bool(os.environ.get("ASCEND_HOME_PATH")) or CANN_HOME.is_dir()


def mindspore_folder() -> Path:
    """Folder of the installed MindSpore, found without importing it."""
    found = importlib.util.find_spec("mindspore")
    if found is None or not found.origin:
        raise UserError("MindSpore is not installed", where="dry run", hint="run scripts/quickstart.sh")
    return Path(found.origin).parent


def library_path() -> str:
    """`LD_LIBRARY_PATH` under which a fresh process can load the Ascend plugin; builds the stubs if they are needed.

    Raises:
        UserError: no g++, no Ascend plugin in the wheel, or a processor other than x86-64 (and no CANN).
    """
    inherited = [part for part in os.environ.get("LD_LIBRARY_PATH", "").split(":") if part]
    if cann_present():
        return ":".join(inherited)
    library = mindspore_folder() / "lib"
    folders = [link_stubs(), library, library / "plugin", library / "plugin" / "ascend"]
    return ":".join([*map(str, folders), *inherited])


def link_stubs(cache: Path | None = None) -> Path:
    """Folder with the stubs for the installed wheel, built on first use (seconds) and reused afterwards.

    Args:
        cache: where built stubs are kept; default `$XDG_CACHE_HOME` or `~/.cache`, then `pangu-rankers/`.

    Raises:
        UserError: CANN is installed, or the stubs cannot be built here; the message says what is missing.
    """
    if cann_present():
        raise UserError("CANN is installed here, its own libraries are to be used", where="link stubs")
    _check_machine()
    plugin = mindspore_folder() / "lib" / "plugin"
    main_plugin = plugin / _PLUGINS[0]
    if not main_plugin.is_file():
        raise UserError(
            "this MindSpore carries no Ascend plugin", where=main_plugin, hint="install mindspore 2.9.0 from PyPI"
        )
    folder = (cache or _default_cache()) / f"cann-stubs-{_cache_key(main_plugin)}"
    if not (folder / _MAIN_LIBRARY).is_file():
        _build_into(folder, plugin)
    return folder


def missing_symbols(plugin: Path) -> list[str]:
    """Functions that the Ascend plugin needs from CANN: its undefined symbols less everybody else's definitions."""
    users = [path for pattern in _PLUGINS for path in sorted(plugin.glob(pattern)) if _is_x86_64(path)]
    wanted = _symbols(users, "--undefined-only")
    givers = [path for path in mindspore_folder().rglob("*.so*") if path.is_file() and _is_x86_64(path)]
    defined = _symbols([*givers, *_system_libraries()], "--defined-only")
    return sorted(name for name in wanted - defined if not name.startswith(_PYTHON_PREFIXES))


def _check_machine() -> None:
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        raise UserError(
            "the dry run's link stubs exist for Linux on x86-64 only",
            where="dry run",
            value=f"{platform.system()} {platform.machine()}",
            hint="use an x86-64 Linux machine, or one with CANN installed",
        )
    for tool, package in (("g++", "g++"), ("nm", "binutils")):
        if shutil.which(tool) is None:
            raise UserError(f"{tool} is needed once, to build the link stubs", where="dry run",
                            hint=f"install it, for example with: apt-get install {package}")  # fmt: skip


def _default_cache() -> Path:
    try:
        return cache_folder()
    except (OSError, RuntimeError) as error:
        raise UserError(f"no place to keep the link stubs: {error}", where="dry run",
                        hint="set XDG_CACHE_HOME to a folder of your own") from None


def _cache_key(main_plugin: Path) -> str:
    status = main_plugin.stat()
    text = f"{_RECIPE} {main_plugin} {status.st_size} {status.st_mtime_ns}"
    return f"{importlib.metadata.version('mindspore')}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _is_x86_64(path: Path) -> bool:
    """The wheel also carries some aarch64 libraries; ELF's machine field (offset 18) decides: 62 is x86-64."""
    with open(path, "rb") as file:
        head = file.read(20)
    return head[:4] == b"\x7fELF" and head[18] == 62


def _system_libraries() -> list[Path]:
    found = (subprocess.check_output(["g++", f"-print-file-name={name}"], text=True) for name in _SYSTEM_LIBRARIES)
    return [Path(path.strip()) for path in found if Path(path.strip()).is_file()]


def _symbols(libraries: list[Path], which: str) -> set[str]:
    """Names of the dynamic symbols of libraries; of the undefined ones only those without which a load fails."""
    listing = subprocess.run(
        ["nm", "-D", which, *map(str, libraries)], capture_output=True, text=True, check=False
    ).stdout
    names = set()
    for line in listing.splitlines():
        kind, _, name = line[17:].partition(" ")  # 16 digits of address (or blanks), kind, name[@version]
        if name and (which == "--defined-only" or kind == "U"):
            names.add(name.partition("@")[0])
    return names


def _build_into(folder: Path, plugin: Path) -> None:
    """Build beside `folder` and move into place, so that two processes at once cannot disturb each other."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        work = Path(scratch)
        names = [name for name in missing_symbols(plugin) if name != _STATUS_SYMBOL]
        bodies = (f".globl {name}\n.type {name},@function\n{name}:\n" for name in names)
        assembly = ".text\n" + "".join(bodies) + '\txorl %eax,%eax\n\tret\n.section .note.GNU-stack,"",@progbits\n'
        (work / "stubs.s").write_text(assembly, encoding="ascii")
        (work / "status.cc").write_text(_STATUS_SOURCE, encoding="ascii")
        (work / "empty.s").write_text('.section .note.GNU-stack,"",@progbits\n', encoding="ascii")
        built = work / "built"
        built.mkdir()
        _link(built / _MAIN_LIBRARY, [work / "stubs.s", work / "status.cc"])
        for name in _EMPTY_LIBRARIES:
            _link(built / name, [work / "empty.s"])
        try:
            built.rename(folder)
        except OSError:  # another process was first, and its stubs are the same
            if not (folder / _MAIN_LIBRARY).is_file():
                raise


def _link(library: Path, sources: list[Path]) -> None:
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", f"-Wl,-soname,{library.name}", "-o", str(library)]
    done = subprocess.run([*command, *map(str, sources)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError("g++ could not build the link stubs", where=library.name, value=done.stderr.strip())
