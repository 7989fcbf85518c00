"""Writes docs/configuration.md: every key of every kind of config file, from the docstrings of the settings classes.

    python scripts/make_reference.py            (tests/test_docs.py says when it is due)
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from parallel.common.files import atomic_write  # noqa: E402
from parallel.common.settings import reference  # noqa: E402

CLASSES = [
    ("PanGu-alpha (`configs/pangu/`)", "pangu.settings:Run"),
    ("Rankers (`configs/recsys/`)", "recsys.settings:Run"),
    ("Serving rankers (`python -m recsys serve`)", "recsys.serving.settings:ServeSettings"),
    ("Text before tokens (`configs/data/`, `python -m data_tools`)", "data_tools.settings:DataSettings"),
    ("Clusters (`configs/cluster/`, `--cluster`)", "parallel.planning.cluster:ClusterSettings"),
    ("Recipes (`pangu/prompts/`, `--prompts`)", "pangu.generation.prompts:Recipe"),
    ("Evaluation tasks (`pangu/tasks/`)", "pangu.evaluation.task:TaskSettings"),
]
HEAD = """# Configuration

Every key with its meaning and default, made from the docstrings of the settings classes by `scripts/make_reference.py`.
Any key is overridden on the command line by `key.sub=value`. A file may name another under `base:` and then holds only
what differs from it. An unknown key is an error that names the nearest known one.
"""


def page() -> str:
    """The text of the page."""
    parts = [HEAD]
    for title, target in CLASSES:
        module, _, name = target.partition(":")
        parts.append(f"\n## {title}\n\n```yaml\n{reference(getattr(importlib.import_module(module), name))}\n```\n")
    return "".join(parts)


if __name__ == "__main__":
    with atomic_write(ROOT / "docs" / "configuration.md") as file:
        file.write(page())
