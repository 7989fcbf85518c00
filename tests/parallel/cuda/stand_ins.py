"""Stand-ins of the CUDA libraries, with which MindSpore's CUDA backend compiles and goes through the motions on a
machine without a GPU: device memory is host memory, kernels and products do nothing, collectives really exchange
(`collectives.c`). So graphs, choice of kernels, order of communication, checkpoints and launches are tried, numbers
are not.

The names of the functions are read out of the wheel's own undefined symbols.
"""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

SONAMES = {"libcublas.so.11": "cublas", "libcudnn.so.8": "cudnn", "libcurand.so.10": "curand",
           "libcusolver.so.11": "cusolver", "libcusparse.so.11": "cusparse", "libcufft.so.10": "cufft",
           "libnvrtc.so.11.2": "nvrtc", "libcudart.so.11.0": "cuda"}
HEAD = "#include <stddef.h>\n#include <stdlib.h>\n#include <string.h>\n"
# Offsets of cudaDeviceProp in CUDA 11: memory, shared memory, registers, warp, block and grid limits, clock, capability
# 9.0, multiprocessors.
SPECIAL = {
    "cudaGetDeviceCount": "int NAME(int *n) { *n = 8; return 0; }",
    "cudaGetDeviceProperties": """int NAME(char *p, int device) {
  int limits[] = {1024, 1024, 64, 2147483647, 65535, 65535, 1980000};
  memset(p, 0, 728); strcpy(p, "stand-in"); *(size_t *)(p + 288) = 150000000000ull; *(size_t *)(p + 296) = 49152;
  *(int *)(p + 304) = 65536; *(int *)(p + 308) = 32; *(int *)(p + 320) = 1024; memcpy(p + 324, limits, sizeof limits);
  *(int *)(p + 360) = 9; *(int *)(p + 388) = 132; return 0; }""",
    "cudaMalloc": "int NAME(void **p, size_t n) { *p = calloc(n, 1); return *p ? 0 : 2; }",
    "cudaHostAlloc": "int NAME(void **p, size_t n, unsigned flags) { *p = calloc(n, 1); return *p ? 0 : 2; }",
    "cudaFree": "int NAME(void *p) { free(p); return 0; }",
    "cudaFreeHost": "int NAME(void *p) { free(p); return 0; }",
    "cudaMemGetInfo": "int NAME(size_t *free, size_t *total) { *free = *total = 2000000000ull; return 0; }",
    "cudaMemcpy": "int NAME(void *to, void *from, size_t n, int kind) { memmove(to, from, n); return 0; }",
    "cudaMemcpyAsync": "int NAME(void *to, void *from, size_t n, int k, void *s) { memmove(to, from, n); return 0; }",
    "cudaMemset": "int NAME(void *to, int value, size_t n) { memset(to, value, n); return 0; }",
    "cudaMemsetAsync": "int NAME(void *to, int value, size_t n, void *s) { memset(to, value, n); return 0; }",
    "cudaEventElapsedTime": "int NAME(float *milliseconds) { *milliseconds = 1; return 0; }",
    **dict.fromkeys(("cudaGetErrorName", "cudaGetErrorString", "cudnnGetErrorString"),
                    'const char *NAME(int error) { return "stand-in"; }'),
}
# A step's branch reads what the first writes, and what happened to lie there before may be no truth value; metrics read
# probabilities, float32, which the second writes.
WRITERS = """int stand_finite(size_t n, void *x, char *y) { memset(y, 1, n); return 0; }
int stand_zero(size_t n, void *x, char *y) { memset(y, 0, 4 * n); return 0; }
"""


def mindspore_folder() -> Path:
    """Folder of the installed MindSpore."""
    return Path(importlib.util.find_spec("mindspore").origin).parent


def has_cuda_backend() -> bool:
    """Whether the installed wheel carries the CUDA backend."""
    return (mindspore_folder() / "lib/plugin/libmindspore_gpu.so.11.6").is_file()


def build(folder: Path) -> dict[str, str]:
    """Builds the libraries and a `bin/nvcc` into a folder; the variables under which MindSpore takes them."""
    plugin = mindspore_folder() / "lib" / "plugin"
    kernels = plugin / "gpu" / "libcuda_ops.so.11"
    wanted = _symbols("--undefined-only", plugin / "libmindspore_gpu.so.11.6",
                      plugin / "gpu11.6" / "libnvidia_collective.so", kernels)
    for soname, prefix in SONAMES.items():
        (folder / "names.map").write_text(f"{soname} {{global: *;}};\n")
        _library(folder, soname, _functions(n for n in wanted if n.startswith(prefix)),
                 f"-Wl,--version-script,{folder / 'names.map'}")
    _library(folder, "libcuda.so.1", _functions(n for n in wanted if n.startswith("cu") and n[2].isupper()))
    names = sorted(wanted & _symbols("--defined-only", kernels) - {"_init", "_fini"})
    (folder / "kernels.s").write_text(".text\n" + "".join(
        f".globl {name}\n.type {name},@function\n{name}:\n"
        + _body(name) for name in names) + '.section .note.GNU-stack,"",@progbits\n')
    _library(folder, "libcuda_ops.so.11", HEAD + WRITERS, str(folder / "kernels.s"))
    _library(folder, "libnccl.so.2", (Path(__file__).parent / "collectives.c").read_text())
    compiler = folder / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text('#!/bin/sh\necho "Cuda compilation tools, release 11.6, V11.6.124"\n')
    compiler.chmod(0o755)
    library = mindspore_folder() / "lib"
    # The wheel looks for these two beside itself before it looks elsewhere.
    first = ":".join(str(folder / name) for name in ("libcuda_ops.so.11", "libnccl.so.2"))
    return {"CUDA_HOME": str(folder), "LD_PRELOAD": first,
            "LD_LIBRARY_PATH": f"{folder}:{library}:{library / 'plugin'}"}


def _body(kernel: str) -> str:
    if "CalIsFinite" in kernel:
        return "\tjmp stand_finite@PLT\n"
    if "UnaryOpsCudaFunc" in kernel and "EffE" in kernel:
        return "\tjmp stand_zero@PLT\n"
    return "\txorl %eax,%eax\n\tret\n"


def _symbols(which: str, *files: Path) -> set[str]:
    lines = subprocess.run(["nm", "-D", which, *map(str, files)], capture_output=True, text=True).stdout.splitlines()
    split = (line.split() for line in lines if not line.endswith(":"))
    return {words[-1].partition("@")[0] for words in split if len(words) >= 2
            and (which == "--undefined-only" or words[-2] in "TW")}


def _functions(names) -> str:
    text = HEAD
    for name in sorted(names):
        if name in SPECIAL:
            text += SPECIAL[name].replace("NAME", name) + "\n"
        elif "Create" in name:
            text += f"int {name}(void **p) {{ if (p) *p = malloc(64); return 0; }}\n"
        else:
            text += f"int {name}(void) {{ return 0; }}\n"
    return text


def _library(folder: Path, soname: str, source: str, *more: str) -> None:
    (folder / "source.c").write_text(source)
    subprocess.check_call(["gcc", "-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{soname}", "-o", str(folder / soname),
                           str(folder / "source.c"), *more])
