"""Cleaning rules: one module a rule, found automatically; each has its thresholds in YAML under `rules.<name>`.

The eight rules are those of the PanGu-alpha paper, section 3.1.1; the paper prints two thresholds (60 %, 150
characters) and names the other rules only, so their thresholds, and the order, were chosen here. A rule module defines
one subclass of `Rule` with the name of the module; `order` ranks it among the others.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from typing import ClassVar

import pydantic

from parallel.common.settings import Settings


class Removal(Exception):
    """Raised by a rule: the document is to go, and this is the evidence."""


class Rule(Settings):
    """One cleaning rule. `apply` returns the text, changed or not, or raises `Removal`."""

    order: ClassVar[int]
    """Rules run in rising order: those that repair a text before those that measure it."""

    enabled: bool = True
    """Whether the rule runs."""

    def word_lists(self) -> list[str]:
        """Files that the rule reads; a change of one is a change of the rule."""
        return []

    def apply(self, text: str, title: str) -> str:
        """The text that stays.

        Args:
            text: the document, lines divided by newlines.
            title: title of its page, or "".

        Raises:
            Removal: the document is to be removed.
        """
        raise NotImplementedError


@functools.lru_cache(maxsize=1)
def discover() -> dict[str, type[Rule]]:
    """Rule classes by the name of their module, in the order in which they run."""
    found = {}
    for module_info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        for _, member in inspect.getmembers(module, inspect.isclass):
            if issubclass(member, Rule) and member.__module__ == module.__name__:
                found[module_info.name] = member
    return dict(sorted(found.items(), key=lambda entry: entry[1].order))


def settings_class() -> type[Settings]:
    """A settings class with one block a rule, so that YAML is checked as strictly as anywhere."""
    fields = {name: (rule, pydantic.Field(default_factory=rule, description=inspect.getdoc(rule).splitlines()[0]))
              for name, rule in discover().items()}
    return pydantic.create_model("RulesSettings", __base__=Settings, **fields)
