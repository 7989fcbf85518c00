"""A click log that is generated: planted user-item interactions, so the best AUC that any model can reach is known.

Every user, category, author and item has a hidden vector. The log-odds of a click are a weighted sum of

    affinity     <taste of the user, character of the item>, each the sum of what its features and its own id say
    habit        a table over (age, category) and one over (hour, category)
    price        how far the item's price is from what the user pays
    interest     whether the item's category is among the user's interests
    recency      the share of the recent history that is of the item's category
    popularity   a number of each item

and the label is drawn from them. Block b of 8192 rows depends on (seed, b) alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from recsys.data.features import Feature
from recsys.data.readers import Reader

if TYPE_CHECKING:
    from recsys.settings import DataSettings

BLOCK = 8192
AGES, GENDERS, CITIES, CATEGORIES, AUTHORS, HOURS = 8, 2, 12, 16, 48, 24
HIDDEN, INTERESTS, TAGS, HISTORY = 4, 3, 3, 12


class Truth:
    """Users, items and the truth about them, drawn from a seed.

    Args:
        users, items: how many of each.
        seed: seed of the world; `sample` takes blocks of rows from it.
        strength: multiplies the log-odds; 0 makes clicks a coin toss.
    """

    def __init__(self, users: int, items: int, seed: int, strength: float) -> None:
        generator = np.random.default_rng((seed, 0))
        self.users, self.items, self.seed, self.strength = users, items, seed, strength

        def vectors(count: int, scale: float = 1.0) -> np.ndarray:
            return generator.standard_normal((count, HIDDEN)).astype(np.float32) * scale

        self.age, self.gender, self.city = (generator.integers(0, n, users) for n in (AGES, GENDERS, CITIES))
        self.interests = np.argsort(generator.random((users, CATEGORIES)), axis=1)[:, :INTERESTS]
        self.budget = generator.normal(0.0, 1.0, users) + 0.3 * (self.age - AGES / 2)
        self.author_category = generator.integers(0, CATEGORIES, AUTHORS)
        self.author = generator.integers(0, AUTHORS, items)
        self.category = self.author_category[self.author]
        self.price = generator.normal(0.0, 1.0, items) + np.linspace(-1, 1, CATEGORIES)[self.category]
        self.tags = generator.integers(0, 40, (items, TAGS))
        self.popularity = generator.normal(0.0, 1.0, items)
        self.taste_UK = (vectors(AGES, 0.7)[self.age] + vectors(CITIES, 0.7)[self.city]
                         + vectors(CATEGORIES, 0.5)[self.interests].sum(1) + vectors(users, 0.3))
        self.character_IK = (vectors(CATEGORIES, 0.9)[self.category] + vectors(AUTHORS, 0.7)[self.author]
                             + vectors(40, 0.4)[self.tags].sum(1) + vectors(items, 0.3))
        self.age_category = generator.normal(0.0, 1.0, (AGES, CATEGORIES))
        self.hour_category = generator.normal(0.0, 1.0, (HOURS, CATEGORIES))
        self.history_UH = self._histories(generator)
        # Popular items are shown more often, as in any log.
        exposure = np.exp(0.6 * self.popularity)
        self.exposure = np.cumsum(exposure / exposure.sum())

    def _histories(self, generator: np.random.Generator) -> np.ndarray:
        """What each user looked at before: items that fit the taste, of 64 drawn at random."""
        drawn = generator.integers(0, self.items, (self.users, 64))
        fit = np.einsum("uk,uik->ui", self.taste_UK, self.character_IK[drawn]) + generator.normal(0, 2, drawn.shape)
        best = np.argsort(-fit, axis=1)[:, :HISTORY]
        return np.take_along_axis(drawn, best, 1)

    def log_odds(self, user: np.ndarray, item: np.ndarray, hour: np.ndarray) -> np.ndarray:
        """float64 log-odds of a click for each (user, item, hour)."""
        category = self.category[item]
        affinity = np.einsum("nk,nk->n", self.taste_UK[user], self.character_IK[item]) / np.sqrt(HIDDEN)
        recency = (self.category[self.history_UH[user]] == category[:, None]).mean(1)
        interest = (self.interests[user] == category[:, None]).any(1)
        odds = (0.75 * affinity + 0.5 * self.age_category[self.age[user], category]
                + 0.5 * self.hour_category[hour, category] - 0.5 * np.abs(self.budget[user] - self.price[item])
                + 1.2 * interest + 2.0 * recency + 0.3 * self.popularity[item])
        return self.strength * odds - 0.6

    def sample(self, block: int) -> dict[str, np.ndarray]:
        """Rows of a block: user, item, hour, probability and click, BLOCK each."""
        generator = np.random.default_rng((self.seed, 1, block))
        user = np.minimum((self.users * generator.random(BLOCK) ** 1.5).astype(np.int64), self.users - 1)
        item = np.minimum(np.searchsorted(self.exposure, generator.random(BLOCK)), self.items - 1)
        hour = generator.integers(0, HOURS, BLOCK)
        probability = 1.0 / (1.0 + np.exp(-self.log_odds(user, item, hour)))
        like = 1.0 / (1.0 + np.exp(-(1.5 * self.log_odds(user, item, hour) - 1.5)))
        click = generator.random(BLOCK) < probability
        return {"user": user, "item": item, "hour": hour, "probability": probability, "click": click.astype(np.int8),
                "like": (click & (generator.random(BLOCK) < like)).astype(np.int8)}

    def table(self, rows: dict[str, np.ndarray]) -> pa.Table:
        """The log as a platform would write it: features in columns, the truth left out."""
        user, item = rows["user"], rows["item"]
        return pa.table({
            "user_id": user, "age": self.age[user], "gender": self.gender[user], "city": self.city[user],
            "interests": _lists(self.interests[user]), "budget": self.budget[user],
            "history": _lists(self.history_UH[user]),
            "item_id": item, "category": self.category[item], "author": self.author[item],
            "price": self.price[item], "tags": _lists(self.tags[item]), "hour": rows["hour"],
            "click": rows["click"], "like": rows["like"],
        })


def _lists(values: np.ndarray) -> pa.Array:
    rows, length = values.shape
    return pa.ListArray.from_arrays(np.arange(0, rows * length + 1, length, dtype=np.int32),
                                    pa.array(values.reshape(-1)))


@lru_cache(maxsize=4)
def truth(users: int, items: int, seed: int, strength: float) -> Truth:
    """The world of a seed; kept, since drawing histories takes a moment."""
    return Truth(users, items, seed, strength)


def truth_of(data: DataSettings) -> Truth:
    """The world of a `data` block."""
    made = data.synthetic
    return truth(made.users, made.items, made.seed, made.strength)


def features(data: DataSettings) -> list[Feature]:
    """Seven semantic groups, from user to cross; the sizes are known, so no statistics pass is needed."""
    made = data.synthetic
    steps = [-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5]

    def number(name: str, rows: int, side: str, group: str) -> Feature:
        return Feature(name=name, values="integer", rows=rows, side=side, group=group)

    def bucket(name: str, side: str, group: str) -> Feature:
        return Feature(name=name, type="numeric", boundaries=steps, side=side, group=group)

    return [
        number("user_id", made.users, "user", "user"),
        number("age", AGES, "user", "profile"), number("gender", GENDERS, "user", "profile"),
        number("city", CITIES, "user", "profile"), bucket("budget", "user", "profile"),
        Feature(name="interests", type="multi", values="integer", rows=CATEGORIES, length=INTERESTS, side="user",
                group="interest"),
        number("hour", HOURS, "context", "context"),
        number("item_id", made.items, "item", "item"), number("author", AUTHORS, "item", "item"),
        number("category", CATEGORIES, "item", "content"), bucket("price", "item", "content"),
        Feature(name="tags", type="multi", values="integer", rows=40, length=TAGS, side="item", group="content"),
        Feature(name="history", type="sequence", values="integer", rows=made.items, length=HISTORY, side="cross",
                group="history", pooling="attention", target="item_id"),
    ]


def read(data: DataSettings, path: Path | None) -> Iterator[tuple[pa.Table, str]]:
    """`data.synthetic.samples` rows."""
    made, truth = data.synthetic, truth_of(data)
    for block, begin in enumerate(range(0, made.samples, BLOCK)):
        rows = truth.sample(block)
        yield truth.table(rows).slice(0, made.samples - begin), "synthetic"


def probabilities(data: DataSettings) -> np.ndarray:
    """True click probability of every row, in order: what `recsys.evaluation.metrics.bayes_auc` takes."""
    made, truth = data.synthetic, truth_of(data)
    blocks = range(-(-made.samples // BLOCK))
    return np.concatenate([truth.sample(block)["probability"] for block in blocks])[: made.samples]


READER = Reader(read, features, labels=["click"], user="user_id", needs_path=False)
