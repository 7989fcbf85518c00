"""PyTorch files of tensors (.pt, .bin), read without running anything in them and without loading all of them.

Reading uses PyTorch's restricted reader (`weights_only`), which builds tensors and plain containers only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pangu.checkpoints.mindspore_file import Entry
from parallel.common.errors import UserError
from parallel.common.files import atomic_write


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise UserError("PyTorch's files need the package torch", hint="pip install torch") from None
    return torch


class TorchFile:
    """Tensors of a file by name; nested containers are joined with dots, wrappers of Megatron left out.

    Raises:
        UserError: missing, damaged, or holding more than tensors and plain values.
    """

    _WRAPPERS = ("model.", "language_model.", "module.")

    def __init__(self, path: str | Path) -> None:
        self.path, torch = Path(path), _torch()
        if not self.path.is_file():
            raise UserError("no such file", where=path, hint="check the path of the checkpoint")
        try:
            tree = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # noqa: BLE001 - PyTorch raises many kinds for a damaged file
            raise UserError(f"PyTorch cannot read it safely: {str(error).splitlines()[0]}", where=path,
                            hint="save its tensors alone") from None
        self._tensors: dict[str, Any] = {}
        self._collect("", tree.get("model", tree) if isinstance(tree, dict) else {}, torch)
        if not self._tensors:
            raise UserError("the file holds no tensor", where=path)
        types = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
                 torch.uint8: "U8", torch.bool: "BOOL", torch.int32: "I32", torch.float64: "F64"}
        self.entries = {name: Entry(types.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
                        for name, tensor in self._tensors.items()}

    def _collect(self, prefix: str, tree: dict, torch: Any) -> None:
        for key, value in tree.items():
            name = f"{prefix}{key}"
            for wrapper in self._WRAPPERS:
                name = name.removeprefix(wrapper)
            if isinstance(value, dict):
                self._collect(f"{name}.", value, torch)
            elif isinstance(value, torch.Tensor):
                self._tensors[name] = value

    def read(self, name: str) -> np.ndarray:
        """One tensor; bfloat16 comes as float32."""
        if name not in self._tensors:
            raise UserError(f"the checkpoint has no parameter '{name}'", where=self.path)
        tensor = self._tensors[name]
        return np.array((tensor.float() if self.entries[name].dtype == "BF16" else tensor).numpy())


def write_megatron(path: str | Path, tensors: Iterable[tuple[str, str, tuple[int, ...], Callable[[], np.ndarray]]],
                   iteration: int = 0) -> None:
    """`model_optim_rng.pt` as Megatron nests it. `read` should map a file, since PyTorch writes all at the end."""
    torch = _torch()
    model: dict[str, Any] = {}
    for name, _, _, read in tensors:
        first, _, rest = name.partition(".")
        part = model.setdefault(first, {})
        if first in ("embedding", "topQueryEmbedding"):  # these have a dictionary for each table
            second, _, rest = rest.partition(".")
            part = part.setdefault(second, {})
        part[rest] = torch.from_numpy(np.require(read(), requirements=["W"]))
    with atomic_write(path, "wb") as file:
        torch.save({"model": {"language_model": model}, "iteration": iteration}, file)
