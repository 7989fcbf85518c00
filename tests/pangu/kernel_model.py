"""Random weights for the C++ kernels, without MindSpore."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from pangu.config import ModelConfig
from pangu.generation.kernel_runner import KernelRunner, WeightSource, pack_float, pack_int8, pack_weights
from pangu.generation.weights import parameter_shapes
from pangu.native import kernel_library
from parallel.layers.int8_numbers import dequantize, quantize

CONFIG = ModelConfig(layers=3, hidden_size=40, heads=2, ffn_size=72, vocabulary_size=97, sequence_length=100,
                     embedding_std=1.0)


def parameters(config=CONFIG, seed=0):
    """Float32 arrays by name, large enough that texts differ."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in parameter_shapes(config).items():
        std, mean = (0.1, 1.0) if name.endswith("gamma") else (1.0 if name.endswith("table") else 0.3, 0.0)
        made[name] = rng.normal(mean, std, shape).astype(np.float32)
    return made


@functools.lru_cache(maxsize=4)
def weights(int8=False, group=None, config=CONFIG):
    """Packed."""
    arrays = parameters(config)

    def matrix(name, bias):
        values = None if bias is None else arrays[bias]
        return pack_int8(*quantize(arrays[name].T, group), values) if int8 else pack_float(arrays[name], values)

    return pack_weights(config, WeightSource(arrays.__getitem__, matrix))


def widened(group=None):
    """Float32 arrays that int8 weights stand for."""
    return {name: dequantize(*quantize(array.T, group)).T if array.ndim == 2 and "position" not in name
            and "query_embedding" not in name else array for name, array in parameters().items()}


def runner(blocks=40, int8=False, group=None):
    """A runner, or the test is skipped."""
    library = kernel_library()
    if library is None:
        pytest.skip("no C++ compiler here")
    return KernelRunner(weights(int8, group), blocks, library)
