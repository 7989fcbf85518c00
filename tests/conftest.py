"""What all tests share: real data where it is beside the checkout, quiet logs, a note of what was skipped and why."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("GLOG_v", "3")
# Processes that tests start (commands, workers of Spark) find the packages and the tests' own modules.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
SHARED = ROOT.parent / "shared"


# The longest files in turn: run last, they would keep one process busy while the others have nothing left to do.
LONGEST = ("tests/test_readme.py", "tests/recsys/ug_sep/test_separation.py", "tests/pangu/evaluation/test_evaluate.py",
           "tests/parallel/torch_runtime/test_training.py", "tests/parallel/torch_runtime/test_saving_ranks.py",
           "tests/data_tools/test_dedup.py", "tests/recsys/tables/test_host.py", "tests/recsys/serving/test_serving.py",
           "tests/parallel/torch_runtime/test_layouts.py", "tests/recsys/passes/test_export.py",
           "tests/recsys/passes/test_sharded.py", "tests/parallel/proof/replay/test_planted_mistakes.py",
           "tests/recsys/test_training.py", "tests/recsys/test_models.py", "tests/recsys/test_verbs.py",
           "tests/laws/test_layouts.py", "tests/parallel/planning/test_planning_grid.py")
# One process runs these: each would start a Java machine of its own, which costs more than the tests do.
ON_SPARK = tuple(f"tests/data_tools/test_{name}.py" for name in ("dedup", "filter", "pipeline", "shared_corpus"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives every file to one process, as `--dist loadfile` does, and files that share what is costly to the same."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return ON_SPARK[0] if file in ON_SPARK else file

    return Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first. Skips tests marked `shared_data` where there is no ../shared, saying so."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(LONGEST)))
    if SHARED.is_dir():
        return
    skip = pytest.mark.skip(reason=f"no shared data: {SHARED} is absent")
    for item in items:
        if item.get_closest_marker("shared_data"):
            item.add_marker(skip)


def pytest_report_header() -> str:
    """Says whether the tests on real data will run."""
    return f"shared data: {SHARED if SHARED.is_dir() else 'absent, tests marked shared_data are skipped'}"


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data; ask for it only in tests marked `shared_data`."""
    return SHARED
