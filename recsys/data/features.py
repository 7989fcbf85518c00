"""What the columns of a click log mean: typed features, and which columns of a model's input each one has.

Every feature with an embedding table keeps the first two rows: row 0 is *missing* (an empty cell, and the padding of
lists, which pooling leaves out), row 1 is *unseen* (a value that the vocabulary does not hold). Known values follow.
All features of one embedding width share one table, each with its own stretch of rows, so that a batch is one lookup.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from parallel.common.errors import UserError
from parallel.common.settings import Settings

MISSING, UNSEEN, FIRST_KNOWN = 0, 1, 2
# Rows of a table are rounded up to this, so that every usual op axis divides them.
ROW_MULTIPLE = 64

Side = Literal["user", "item", "context", "cross"]


class Feature(Settings):
    """One feature: a column of the log, its meaning and its embedding."""

    name: str
    """Name, unique in the file."""
    column: str | None = None
    """Column of the log; null = the name."""
    type: Literal["id", "numeric", "multi", "sequence"] = "id"
    """id: one value; numeric: a number; multi: a set of values, pooled; sequence: values in order of time, the
    newest last."""
    side: Side
    """Whom it describes. Only `user` features may be computed once for all candidates of a request."""
    group: str | None = None
    """Semantic group; features of a group are together in the tokens. Null = the side."""
    values: Literal["vocabulary", "hash", "integer", "dynamic"] = "vocabulary"
    """vocabulary: values seen in training, listed by the statistics pass; hash: row = hash mod rows; integer: the
    value itself is the number, 0 to rows - 1; dynamic: any ids, each with a row of its own from when it is admitted to
    when it expires, without collisions (needs data.tables.place: host)."""
    rows: int | None = Field(None, ge=1, le=2**31 - 1)
    """Known values at most (vocabulary: the most frequent are kept; null = all), buckets (hash), ids (integer) or rows
    at most (dynamic: newcomers stay unseen while the table is full; null = no bound)."""
    minimum_count: int = Field(1, ge=1)
    """Admission: a value seen less often in training stays unseen, and so trains the row for unseen values."""
    admission_share: float = Field(1.0, gt=0.0, le=1.0)
    """dynamic: probability that a step which meets an unknown id (seen minimum_count times) gives it a row."""
    expire_after: int | None = Field(None, ge=1)
    """dynamic: an id that was not met for so long loses its row at the next sweep (see data.tables.sweep_every); null =
    never."""
    expire_unit: Literal["steps", "seconds"] = "steps"
    """dynamic: what expire_after counts: training steps, or seconds by the machine's clock."""
    expire_below: float = Field(0.0, ge=0.0)
    """dynamic: an id whose (decayed) count is below this at a sweep loses its row."""
    count_decay: float = Field(1.0, gt=0.0, le=1.0)
    """dynamic: factor of all counts after each sweep."""
    unseen_rate: float = Field(0.0, ge=0.0, lt=1.0)
    """id: share of training samples whose value is shown as unseen, so that the model learns to do without it (new
    users, new items)."""
    width: int | None = Field(None, ge=1)
    """Embedding width; null = the model's embedding_size."""
    transform: Literal["value", "log", "bucket"] = "bucket"
    """numeric: value and log (sign(x) log(1 + |x|)) are standardised and scale a learned vector, a missing one counts
    as the mean; bucket: divided at `boundaries` and looked up like an id."""
    boundaries: list[float] | None = None
    """numeric bucket: upper edges, rising; null = quantiles found by the statistics pass."""
    buckets: int = Field(16, ge=2, le=4096)
    """numeric bucket without boundaries: number of quantiles."""
    length: int = Field(16, ge=1, le=100_000)
    """multi, sequence: values kept (multi: the first, sequence: the newest)."""
    separator: str = " "
    """multi, sequence in text files: what separates values."""
    pooling: Literal["mean", "sum", "max", "attention", "none"] = "mean"
    """multi, sequence: how the values become one vector; attention: weighed by the `target` feature (DIN); none: kept
    whole, for models with a module for long sequences."""
    target: str | None = None
    """sequence: the item feature whose table (and vocabulary) the values share, and the query of attention."""
    attention_size: int = Field(36, ge=1)
    """attention: hidden width of the unit that weighs values."""
    repeat: int = Field(1, ge=1, le=10_000)
    """Stands for this many features alike, named name_0, name_1, ...: for presets without data."""

    @property
    def source(self) -> str:
        """The column's name."""
        return self.column or self.name

    @property
    def semantic_group(self) -> str:
        """The group, the default filled in."""
        return self.group or self.side

    @property
    def is_list(self) -> bool:
        """Whether a cell holds several values."""
        return self.type in ("multi", "sequence")

    @property
    def is_dynamic(self) -> bool:
        """Whether its ids are 64-bit keys of a table on the host instead of rows."""
        return self.values == "dynamic" and self.type != "numeric"

    @property
    def is_value(self) -> bool:
        """Whether the feature is a number that scales a vector (and has no table)."""
        return self.type == "numeric" and self.transform != "bucket"

    @model_validator(mode="after")
    def _check(self) -> Feature:
        where = f"features.{self.name}"
        if self.values in ("hash", "integer") and self.rows is None and self.type != "numeric" and self.target is None:
            raise UserError(f"values: {self.values} needs rows", where=where)
        if self.pooling == "attention" and (self.type != "sequence" or self.target is None):
            raise UserError("pooling: attention is for a sequence with a target", where=where)
        if self.unseen_rate and self.type != "id":
            raise UserError("unseen_rate is for an id", where=where, value=self.type)
        limits = (self.admission_share < 1.0, self.expire_after, self.expire_below, self.count_decay < 1.0)
        if any(limits) and not self.is_dynamic:
            raise UserError("admission_share, expire_after, expire_below and count_decay are for values: dynamic",
                            where=where, value=self.values)
        if self.target is not None and self.type != "sequence":
            raise UserError("target is for a sequence", where=where, value=self.type)
        rising = self.boundaries or []
        if any(a >= b for a, b in zip(rising, rising[1:], strict=False)):
            raise UserError("boundaries must rise", where=where, value=self.boundaries)
        if self.side == "user" and self.pooling == "attention":
            raise UserError("attention to a candidate is not a user feature any more", where=where,
                            hint="set side: cross")
        return self


def expand(features: list[Feature]) -> list[Feature]:
    """The list with `repeat` written out, checked: names unique, targets exist; a sequence reads its values as its
    target does.

    Raises:
        UserError: a name twice, or a target that is no feature with a table.
    """
    result = []
    for feature in features:
        if feature.repeat == 1:
            result.append(feature)
        else:
            result += [feature.model_copy(update={"name": f"{feature.name}_{index}", "repeat": 1, "column": None})
                       for index in range(feature.repeat)]
    if not result:
        raise UserError("there is no feature", where="data.features", hint="list at least one")
    by_name: dict[str, Feature] = {}
    for feature in result:
        if feature.name in by_name:
            raise UserError("two features have this name", where="data.features", value=feature.name)
        by_name[feature.name] = feature
    for index, feature in enumerate(result):
        if feature.target is not None:
            _check_target(feature, by_name)
            target = by_name[feature.target]
            result[index] = feature.model_copy(update={"values": target.values, "rows": target.rows})
    return result


def _check_target(feature: Feature, by_name: dict[str, Feature]) -> None:
    target = by_name.get(feature.target)
    if target is None:
        near = difflib.get_close_matches(feature.target, by_name, n=1)
        raise UserError("target is not a feature", where=f"features.{feature.name}.target", value=feature.target,
                        hint=f"did you mean '{near[0]}'?" if near else None)
    if target.type != "id" or target.side == "user":
        raise UserError("target must be an id feature of an item", where=f"features.{feature.name}.target",
                        value=feature.target)


@dataclass(frozen=True)
class Slot:
    """A feature with a table: columns `start .. start + length` of the ids, rows from `offset` in the table
    of its width."""

    feature: Feature
    start: int
    length: int
    offset: int
    rows: int
    width: int


@dataclass(frozen=True)
class NumericSlot:
    """A feature without a table: one column of the numbers."""

    feature: Feature
    column: int
    width: int


@dataclass(frozen=True)
class FeatureSpec:
    """All features of a model with their columns, groups in order: user side first, then context, item and cross.

    Args:
        slots: features with tables, in the order of `ordered`.
        numeric: features that scale a vector.
        tables: rows of the table of each embedding width (rounded up to ROW_MULTIPLE).
        ordered: all features, group by group.
    """

    slots: dict[str, Slot]
    numeric: dict[str, NumericSlot]
    tables: dict[int, int]
    ordered: list[Feature]

    @property
    def id_columns(self) -> int:
        """M: columns of the ids input."""
        return sum(slot.length for slot in self.slots.values())

    @property
    def is_dynamic(self) -> bool:
        """Whether some ids are 64-bit keys."""
        return any(slot.feature.is_dynamic for slot in self.slots.values())

    @property
    def numeric_columns(self) -> int:
        """Columns of the numbers input (at least 1: an input cannot be empty)."""
        return max(1, len(self.numeric))

    def width(self, name: str) -> int:
        """Embedding width of a feature."""
        return (self.slots.get(name) or self.numeric[name]).width

    @property
    def groups(self) -> dict[str, list[Feature]]:
        """Features by semantic group, in order."""
        groups: dict[str, list[Feature]] = {}
        for feature in self.ordered:
            groups.setdefault(feature.semantic_group, []).append(feature)
        return groups

    def sides(self) -> dict[str, str]:
        """Side of each group: `user` only if all its features are the user's, else the first other one."""
        return {name: next((f.side for f in features if f.side != "user"), "user")
                for name, features in self.groups.items()}


_SIDE_ORDER = {"user": 0, "context": 1, "item": 2, "cross": 3}


def assign_columns(features: list[Feature], embedding_size: int, known: dict[str, int] | None = None) -> FeatureSpec:
    """Assigns columns and rows of tables to features.

    Args:
        features: as `expand` gives them.
        embedding_size: width of features that name none.
        known: values in the vocabulary of each feature that has one, taken where a feature gives no `rows`.

    Raises:
        UserError: the size of a vocabulary is neither known nor given; numbers of several widths.
    """
    groups: dict[str, list[Feature]] = {}
    for feature in features:
        groups.setdefault(feature.semantic_group, []).append(feature)

    def side_of(members: list[Feature]) -> int:
        return max(_SIDE_ORDER[member.side] for member in members)

    ordered = [feature for members in sorted(groups.values(), key=side_of) for feature in members]
    slots: dict[str, Slot] = {}
    numeric: dict[str, NumericSlot] = {}
    tables: dict[int, int] = {}
    start = 0
    # A target comes before the sequences that share its rows.
    for feature in sorted(ordered, key=lambda item: item.target is not None):
        width = feature.width or embedding_size
        if feature.is_value:
            numeric[feature.name] = NumericSlot(feature, len(numeric), width)
            continue
        length = feature.length if feature.is_list else 1
        if feature.target is not None:
            shared = slots[feature.target]
            slots[feature.name] = Slot(feature, start, length, shared.offset, shared.rows, shared.width)
        else:
            rows = _rows_of(feature, known)
            slots[feature.name] = Slot(feature, start, length, tables.get(width, 0), rows, width)
            tables[width] = tables.get(width, 0) + rows
        start += length
    if len(widths := {slot.width for slot in numeric.values()}) > 1:
        raise UserError("numeric features that scale a vector share one width", where="data.features",
                        value=sorted(widths), hint="use transform: bucket, or one width")
    tables = {width: -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE for width, rows in tables.items()}
    return FeatureSpec(slots, numeric, tables, ordered)


def _rows_of(feature: Feature, known: dict[str, int] | None) -> int:
    if feature.type == "numeric":
        buckets = len(feature.boundaries) + 1 if feature.boundaries is not None else feature.buckets
        return FIRST_KNOWN + buckets
    if feature.is_dynamic:
        return FIRST_KNOWN  # the rest is on the host
    if feature.rows is None and known is not None and feature.name in known:
        return FIRST_KNOWN + known[feature.name]
    if feature.rows is None:
        raise UserError("the size of the vocabulary is not known yet", where=f"features.{feature.name}.rows",
                        hint="give rows, or run the statistics pass (train does)")
    return FIRST_KNOWN + feature.rows
