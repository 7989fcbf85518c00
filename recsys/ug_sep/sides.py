"""Which features, columns and tokens belong to the user (U) and which to the candidate (G). No MindSpore.

Shapes: B batch, M id columns, N numeric columns; m and n those of one side.

Source: UG-Sep (arXiv 2602.10455). Only semantic groups that are the user's alone are U; whatever cannot be separated
cleanly (cross features, attention to a candidate, mixed groups, context) is G.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from parallel.common.errors import UserError
from parallel.common.settings import Settings
from recsys.data.features import FeatureSpec


class UGSepSettings(Settings):
    """Separation of user (U) and candidate (G) tokens. The formulas of the paper could not be read: what follows was
    chosen here, and every choice that others may make differently is a key."""

    ratio: str | None = "1:1"
    """U tokens : G tokens, of model.tokens in all (a global token counted on its side); null = what the groups make
    (with tokenization by groups)."""
    form: Literal["slices", "masks"] = "slices"
    """slices: work under a mask is not done; masks: full tensors times masks, the same function (a reference)."""
    mixing_mask: bool = True
    """Hides G heads from U mixed tokens. False only to ablate or test: user information is then not reusable."""
    reverting_mask: bool = True
    """TokenMixer-Large: hides G mixed tokens from U tokens on the way back. False only to ablate or test."""
    residual_mask: bool = True
    """Separated residual: U tokens look at U tokens only. False only to ablate or test."""
    user_heads: int | None = Field(None, ge=1)
    """TokenMixer-Large: mixing heads that are U, layers that keep their tokens only; null = about the share that U has
    of the tokens. Fewer let G tokens mix more of every token, for more work a candidate (not in the paper)."""
    global_token: Literal["candidate", "per_side"] = "candidate"
    """TokenMixer-Large: candidate: one global token of all groups, a G token; per_side: U has one of its own besides,
    made of user groups. model.global_token: false = none."""
    compensation: Literal["none", "token_mixing", "low_rank", "mean"] = "none"
    """What brings U mixed tokens to the G tokens in place of the heads that the mask drops; starts at zero.
    token_mixing: weights over U tokens for each G token, after one projection; low_rank: one linear map from all U
    mixed tokens to each G token, of rank compensation_rank; mean: one projection of their mean for all G tokens."""
    compensation_rank: int | None = Field(None, ge=1)
    """low_rank: the rank; null = the model's width."""
    layers: list[str] = Field(default_factory=list)
    """Pyramid: tokens "U:G" that each layer makes, as counts; empty = all layers keep theirs."""
    residual: Literal["auto", "attention"] = "auto"
    """auto: plain residuals where a layer keeps its tokens, attention where it changes them; attention: everywhere."""
    attention_size: int = Field(32, ge=1)
    """Separated residual: width of queries and keys."""

    @field_validator("ratio", mode="before")
    @classmethod
    def _ratio(cls, value: str | int | None) -> str | None:
        return None if value is None else "{}:{}".format(*pair(value, "model.ug_sep.ratio"))

    @field_validator("layers", mode="before")
    @classmethod
    def _layers(cls, value: list[str | int]) -> list[str]:
        if not isinstance(value, list):
            raise UserError("must be a list of U:G", where="model.ug_sep.layers", value=value)
        return ["{}:{}".format(*pair(item, "model.ug_sep.layers")) for item in value]

    @property
    def separated(self) -> bool:
        """Whether every mask is on: only then is what U tokens hold the same for all candidates."""
        return self.mixing_mask and self.reverting_mask and self.residual_mask


def pair(text: str | int, where: str) -> tuple[int, int]:
    """Two whole numbers above 0 out of "U:G".

    Raises:
        UserError: it is not that.
    """
    found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(text))
    if not found or "0" in found.groups():
        raise UserError("is not two whole numbers above 0 with a colon between", where=where, value=text,
                        hint='write "1:1", in quotes')
    return int(found[1]), int(found[2])


def tokens_of_ratio(ratio: str, tokens: int) -> tuple[int, int]:
    """(U tokens, G tokens) of `tokens` in all.

    Raises:
        UserError: they do not divide so.
    """
    user, candidate = pair(ratio, "model.ug_sep.ratio")
    total = user + candidate
    if tokens % total:
        raise UserError(f"{tokens} tokens do not divide {ratio}", where="model.tokens", value=tokens,
                        hint=f"take a multiple of {total}, {-(-tokens // total) * total} say")
    return tokens * user // total, tokens * candidate // total


def heads_of(user_tokens: int, tokens: int, heads: int) -> int:
    """Of H mixing heads (= mixed tokens) those that are U: about the share that U has of the tokens, at least 1."""
    return min(heads - 1, max(1, round(heads * user_tokens / tokens)))


def allot(groups: list[str], tokens: int, named: dict[str, int]) -> list[tuple[tuple[str, ...], int]]:
    """[(groups, tokens that they make together), ...]: `tokens` given out over semantic groups.

    As `named` says where that fits; else evenly, the first groups one more; with fewer tokens than groups, neighbours
    are joined. The papers do not say how; chosen here.

    Raises:
        UserError: there is no token to give.
    """
    if tokens < 1 or not groups:
        raise UserError("a side has no tokens or no features", where="model.ug_sep.ratio", value=tokens,
                        hint="each side needs at least one (and G another for the global token)")
    if sum(named.get(name, 1) for name in groups) == tokens:
        return [((name,), named.get(name, 1)) for name in groups]
    if tokens >= len(groups):
        each, more = divmod(tokens, len(groups))
        return [((name,), each + (index < more)) for index, name in enumerate(groups)]
    return [(tuple(groups[int(i)] for i in part), 1) for part in np.array_split(np.arange(len(groups)), tokens)]


@dataclass(frozen=True)
class Side:
    """One side's features: `spec` gives them an input of their own, made of the columns `ids` and `numbers`."""

    spec: FeatureSpec
    ids: tuple[int, ...]
    numbers: tuple[int, ...]

    def take(self, ids_BM: np.ndarray, numbers_BN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The side's columns of encoded rows."""
        return (np.ascontiguousarray(ids_BM[:, list(self.ids)]),
                np.ascontiguousarray(numbers_BN[:, list(self.numbers)]))


@dataclass(frozen=True)
class UserCandidateSplit:
    """Both sides of a spec."""

    user: Side
    candidate: Side

    @classmethod
    def of(cls, spec: FeatureSpec) -> UserCandidateSplit:
        """Divides a spec by `FeatureSpec.sides()`.

        Raises:
            UserError: one side has no features.
        """
        sides = spec.sides()
        if len({side == "user" for side in sides.values()}) < 2:
            raise UserError("separation needs features of the user and others", where="data.features",
                            value=sorted(set(sides.values())),
                            hint="give user features side: user, and groups of their own")
        return cls(*(_side(spec, {name for name, side in sides.items() if (side == "user") is mine})
                     for mine in (True, False)))

    def split(self, ids_BM: np.ndarray, numbers_BN: np.ndarray) -> tuple[tuple, tuple]:
        """((ids, numbers) of the user, (ids, numbers) of the candidate) out of encoded rows of both sides."""
        return self.user.take(ids_BM, numbers_BN), self.candidate.take(ids_BM, numbers_BN)


def _side(spec: FeatureSpec, groups: set[str]) -> Side:
    """The part of a spec that some semantic groups make up; tables and their rows stay those of the full spec."""
    ordered = [feature for feature in spec.ordered if feature.semantic_group in groups]
    names = {feature.name for feature in ordered}
    slots, ids, start = {}, [], 0
    for slot in sorted(spec.slots.values(), key=lambda slot: slot.start):
        if slot.feature.name in names:
            slots[slot.feature.name] = replace(slot, start=start)
            ids += range(slot.start, slot.start + slot.length)
            start += slot.length
    numeric, numbers = {}, []
    for slot in sorted(spec.numeric.values(), key=lambda slot: slot.column):
        if slot.feature.name in names:
            numeric[slot.feature.name] = replace(slot, column=len(numbers))
            numbers.append(slot.column)
    if not slots:
        raise UserError("a side has no feature with a table", where="data.features", value=sorted(groups),
                        hint="separation needs an id on each side")
    widths = {slot.width for slot in slots.values()}
    tables = {width: rows for width, rows in spec.tables.items() if width in widths}
    # An input cannot be empty: a side without numbers takes the first column and does not read it.
    return Side(FeatureSpec(slots, numeric, tables, ordered), tuple(ids), tuple(numbers or [0]))
