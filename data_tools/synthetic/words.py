"""The words of the generated world, and how they are drawn at random."""

from __future__ import annotations

import functools
import random
import zlib
from pathlib import Path
from typing import Any

from parallel.common.structured import read_yaml

_TABLE = Path(__file__).with_name("words.yaml")
_RESERVED_OF_TEN = 1
_CIRCLE = (8, 12)  # surnames and given names, from the front of the lists, that the skills combine
_COMMON_VALUES = 12


@functools.lru_cache(maxsize=1)
def load_words() -> dict[str, Any]:
    """The table beside this module; a string with spaces in it is a list of words."""
    return _split_lists(read_yaml(_TABLE))


def _split_lists(tree: dict) -> dict:
    split = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            value = _split_lists(value)
        elif isinstance(value, str) and " " in value:
            value = value.split()
        split[str(key)] = value
    return split


def reserved(text: str) -> bool:
    """True for the tenth of all facts and reviews that training never shows and questions are made of.

    A fixed hash decides, so that every seed of the corpus keeps clear of every seed of the questions.
    """
    return zlib.crc32(text.encode()) % 10 < _RESERVED_OF_TEN


class Draw:
    """Random draws out of the world, from one `random.Random`.

    Args:
        rng: the source of chance; the draws are a function of its state.
        held_out: False draws only facts that training may show, True only those kept for questions.
    """

    def __init__(self, rng: random.Random, held_out: bool = False) -> None:
        self.rng, self.held_out, self.words = rng, held_out, load_words()

    def one(self, *path: str) -> Any:
        """One entry of the list found under `path` in the table."""
        node: Any = self.words
        for key in path:
            node = node[key]
        return self.rng.choice(node)

    def some(self, low: int, high: int, *path: str) -> list:
        """Between `low` and `high` different entries of the list under `path`, in random order."""
        node: Any = self.words
        for key in path:
            node = node[key]
        return self.rng.sample(node, self.rng.randint(low, min(high, len(node))))

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.rng.random() < probability

    def names(self, count: int) -> list[str]:
        """`count` different people of the generated world."""
        return self._people(count, None, None)

    def neighbours(self, count: int) -> list[str]:
        """`count` different people of the small circle that the skills are about."""
        return self._people(count, *_CIRCLE)

    def _people(self, count: int, surnames: int | None, given_names: int | None) -> list[str]:
        drawn: dict[str, None] = {}
        while len(drawn) < count:
            surname = self.rng.choice(self.words["surnames"][:surnames])
            drawn[surname + self.rng.choice(self.words["given_names"][:given_names])] = None
        return list(drawn)

    def values(self, relation: str) -> list[str]:
        """All values that a relation can take."""
        entry = self.words["relations"][relation]
        return entry["values"] if "values" in entry else self.words[entry["values_from"]]

    def common_values(self, relation: str) -> list[str]:
        """The values that the skills use: few, so that a tiny model knows each word after a few minutes."""
        return self.values(relation)[:_COMMON_VALUES]

    def value_for(self, name: str, relation: str, taken: tuple[str, ...] = (), common: bool = False) -> str | None:
        """A value that `name` may have in `relation` on this side of the held-out border, none of `taken`.

        None when there is none: a tenth is held out, and of few values that can be nothing.
        """
        verb = self.words["relations"][relation]["verb"]
        values = self.common_values(relation) if common else self.values(relation)
        allowed = [value for value in values
                   if value not in taken and reserved(name + verb + value) == self.held_out]
        return self.rng.choice(allowed) if allowed else None

    def filling(self) -> dict[str, Any]:
        """Words for the blanks of a prose pattern; about one main person."""
        name, other, third = self.names(3)
        facts = {"place": "lives", "food": "likes_food", "job": "works", "animal": "raises", "thing": "bought",
                 "skill": "learns", "city": "goes", "month": "born"}
        return {
            "name": name, "other": other, "name2": third, "pronoun": self.rng.choice("他她"),
            "kin": self.one("kin"), "time": self.one("times"), "weather": self.one("weather"),
            "age": self.rng.randint(18, 90), "count": self.rng.randint(2, 90),
            "direction": self.one("place", "directions"), "season": self.one("place", "seasons"),
            "scene": self.one("place", "scenes"), "plant": self.one("portrait", "plants"),
            **{key: self.value_for(name, relation) for key, relation in facts.items()},
        }
