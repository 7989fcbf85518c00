"""What a checkpoint asks of a tensor, whatever holds it: a name, a type, a shape, reading and assigning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from parallel.checkpoint.safetensors_file import dtype_name


@runtime_checkable
class NamedTensor(Protocol):
    """A parameter, a moment or a counter of a run, as this process holds it (its slice, where it is sharded).

    Attributes:
        name: as in the network, without prefixes of wrappers; moments are `<kind>.<parameter>`.
        dtype: name of the safetensors format: F32, F16, BF16, I32, ...
        shape: what this process holds.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """A copy of the values, of NumPy type `DTYPES[dtype]` (BF16 as its 16 bits)."""
        ...

    def assign(self, value: np.ndarray) -> None:
        """Puts values of the same type and shape in place, so that a compiled step sees them."""
        ...


class ParameterTensor:
    """A `mindspore.Parameter` as a `NamedTensor`.

    Args:
        parameter: full, or with the shape of its slice.
        sliced: the Python object may still have the full shape while its data are a slice of shape `shape`.
        shape: None = that of `parameter`.
    """

    def __init__(self, parameter: Any, *, sliced: bool = False, shape: tuple[int, ...] | None = None) -> None:
        import mindspore as ms

        self.parameter, self.sliced = parameter, sliced
        self.name, self.shape = parameter.name, tuple(parameter.shape) if shape is None else shape
        self.dtype = dtype_name(ms.dtype_to_nptype(parameter.dtype))

    def read(self) -> np.ndarray:
        """See `NamedTensor`."""
        return self.parameter.asnumpy()

    def assign(self, value: np.ndarray) -> None:
        """See `NamedTensor`."""
        import mindspore as ms

        self.parameter.set_data(ms.Tensor(np.asarray(value, order="C"), self.parameter.dtype), slice_shape=self.sliced)


def named(tensors: Iterable[Any]) -> list[NamedTensor]:
    """`tensors` with the MindSpore parameters among them wrapped."""
    return [tensor if isinstance(tensor, NamedTensor) else ParameterTensor(tensor) for tensor in tensors]
