"""Compiling ranks of the networks of `proof_networks`, with one process for all tests that do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def compilers():
    """A compiling process that lives as long as the tests."""
    from parallel.proof.compile.rank_compiler import Compilers

    with Compilers() as made:
        yield made


@pytest.fixture(scope="session")
def compiled(compilers) -> Callable:
    """`compiled(builder, rank, **parallel)`: one rank of a network under a parallel block; `train`, `model`, `wrong`,
    `reuse` and `own_stage` are passed on."""
    from parallel.proof.compile.rank_compiler import Request
    from parallel.proof.dryrun.dryrun import read_rank
    from parallel.sharding.config import ParallelConfig

    def compiled(builder: str, rank: int = 0, **parallel):
        others = {key: parallel.pop(key) for key in ("train", "model", "wrong") if key in parallel}
        how = {key: parallel.pop(key) for key in ("reuse", "own_stage") if key in parallel}
        config = ParallelConfig.model_validate(parallel).resolve()
        request = Request(config.world, rank, builder=f"proof_networks:{builder}",
                          arguments={"parallel": parallel, **others}, paths=[str(Path(__file__).parent)], **how)
        return read_rank(compilers.compile([request])[0])

    return compiled
