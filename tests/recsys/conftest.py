"""The mode in which MindSpore runs a module's tests, named by `pytest.mark.usefixtures`; a run to serve."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import mindspore as ms
import pytest


@contextlib.contextmanager
def _mode(mode: int) -> Iterator[None]:
    before = ms.get_context("mode")
    ms.set_context(mode=mode)
    yield
    ms.set_context(mode=before)


@pytest.fixture(scope="module")
def graph_mode() -> Iterator[None]:
    """Compiled graphs, as commands run."""
    with _mode(ms.GRAPH_MODE):
        yield


@pytest.fixture
def pynative() -> Iterator[None]:
    """Op by op, nothing compiled; anew for every test, since commands set graph mode."""
    with _mode(ms.PYNATIVE_MODE):
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """(folder, settings, log) of a separated run with one checkpoint."""
    from tests.recsys.runs import make_run

    folder = tmp_path_factory.mktemp("serve") / "run"
    return folder, *make_run(folder, "tokenmixer_large_ug_sep")
