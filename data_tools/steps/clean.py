"""The cleaning step: every rule over every document (PanGu-alpha paper, section 3.1.1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_tools.parts import Drop, PartFigures, Step, digest_of
from data_tools.records import Document, Split
from data_tools.rules import Removal, discover
from data_tools.rules._aho_corasick import read_word_list
from parallel.common.settings import Settings


class CleanStep(Step):
    """Runs the enabled rules in their order; the first that removes the document ends it.

    Args:
        rules: the settings block with one rule a field.
    """

    name = "clean"

    def __init__(self, rules: Settings) -> None:
        # The block's class is made at run time and cannot be sent to workers; its rules can.
        self._active = [(name, getattr(rules, name)) for name in discover() if getattr(rules, name).enabled]

    def digest_source(self, split: Split) -> Any:
        files = [path for _, rule in self._active for path in rule.word_lists()]
        settings = [[name, rule.model_dump(mode="json")] for name, rule in self._active]
        return [settings, [digest_of(read_word_list(path)) for path in files]]

    def process(self, document: Document, row: int, figures: PartFigures) -> Iterator[Document]:
        text = document.text
        for name, rule in self._active:
            try:
                changed = rule.apply(text, document.title)
            except Removal as removal:
                raise Drop(name, str(removal)) from None
            if changed is not text and changed != text:
                figures.changed_by_rule[name] += 1
                text = changed
        document.text = text.strip("\n")
        yield document
