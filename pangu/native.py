"""The C++ kernels of the decoding step; without a compiler decoding goes through MindSpore's own."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from parallel.common.native import build_library

SOURCE = Path(__file__).parent / "kernels" / "decode.cpp"


@functools.lru_cache(maxsize=1)
def kernel_library() -> Path | None:
    """The shared object with the kernels, built now if need be; None (said once) where that cannot be done.

    The environment variable PANGU_KERNELS=0 switches them off.
    """
    if os.environ.get("PANGU_KERNELS", "1") == "0":
        return None
    return build_library(SOURCE, does="decoding uses MindSpore's own kernels")
