"""Names that config keys, verbs and flags had in released files: one table of old and new.

A user who types an old name gets an error that gives the new one. In files written under the old name (a checkpoint's
`state.json`, a quantized folder) the old name is read as the new one: `current_keys`.
"""

from __future__ import annotations

from typing import Any

KEYS = {
    "op_cut": "op_sharding",
    "tower": "head_hidden",
}
"""Last part of a config key: old name -> new name. An old name is not used for anything else."""

VALUES: dict[tuple[str, Any], Any] = {
    ("global_token", "group"): "candidate",
}
"""(config key, old value) -> new value."""

VERBS: dict[tuple[str, str], str] = {
    ("parallel", "split"): "reshard",
    ("pangu", "params"): "count",
    ("pangu", "vocabulary"): "train-vocabulary",
    ("recsys", "params"): "count",
    ("data_tools", "world"): "generate-corpus",
    ("data_tools", "paragraphs"): "dedup-paragraphs",
    ("data_tools", "quality-loop"): "compare-versions",
    ("data_tools", "vocabulary"): "python -m pangu train-vocabulary",
    ("data_tools", "pack"): "python -m pangu pack",
}
"""(package, old verb) -> what to type."""

FLAGS: dict[tuple[str, str, str], str] = {
    ("parallel", "launch", "--dry-run"): "--compile-only",
    ("recsys", "quantize", "--config"): "--run-config",
    ("recsys", "quantize", "--out"): "--output",
    ("recsys", "refresh", "--out"): "--output",
    ("recsys", "sweep", "--out"): "--output",
    ("recsys", "bench", "--out"): "--output",
}
"""(package, verb, old flag) -> new flag."""


TASKS = {f"world_{skill}": f"synthetic_{skill}" for skill in ("arithmetic", "context", "sentiment")}
"""Evaluation tasks: old name -> new name."""


def current_keys(tree: Any) -> Any:
    """A plain tree of settings out of a file, with every old key and value replaced by its present name."""
    if isinstance(tree, dict):
        found = {}
        for key, value in tree.items():
            key = KEYS.get(key, key)
            plain = isinstance(value, (str, int, float, bool, type(None)))
            found[key] = VALUES.get((key, value), value) if plain else current_keys(value)
        return found
    if isinstance(tree, list):
        return [current_keys(item) for item in tree]
    return tree
