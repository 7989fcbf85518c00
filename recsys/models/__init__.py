"""Rankers, a module or a folder each. A model is a module here with `SETTINGS` (a `RankerSettings` whose `name` is
the module's name) and `MODEL` (a `Ranker` built as `MODEL(settings, spec, tasks, compute_dtype)`)."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import Any

from parallel.common.errors import UserError

NAMES = frozenset(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def module_of(name: str) -> Any:
    """The module of a model.

    Raises:
        UserError: no such model; the nearest is named.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(str(name), sorted(NAMES), n=1)
        raise UserError("no such model", where="model.name", value=name,
                        hint=f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(NAMES))}")
    return importlib.import_module(f"{__name__}.{name}")
