"""From the JSON of a ranking request to rows of numbers, by the features and vocabulary that the model was trained on.

    {"user": {"user_id": 7, "history": [3, 5]}, "candidates": [{"item_id": 11}, {"item_id": 12}], "top_k": 10}

A feature stands in `user` (it holds for all candidates: anything about the user, the context, the user's lists) or in
every candidate; null is a missing value. Needs no MindSpore.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from parallel.runtime.errors import UserError
from recsys.encode import Encoder, RowErrors
from recsys.features import Feature
from recsys.trained import Trained

_KEYS = ("user", "candidates", "top_k")


@dataclass(frozen=True)
class Ask:
    """A request in numbers: ids_CM int32, numbers_CN float32, how many candidates are wanted back."""

    ids: np.ndarray
    numbers: np.ndarray
    top_k: int


class _RowEncoder(Encoder):
    """An `Encoder` of rows that have no labels yet."""

    def _labels(self, table: pa.Table, where: str, errors: RowErrors) -> np.ndarray:
        return np.zeros((len(table), 1), np.float32)

    def _users(self, table: pa.Table, where: str) -> np.ndarray:
        return np.zeros(len(table), np.int64)


def read_request(body: Any, trained: Trained, most: int) -> Ask:
    """Checks and encodes a request.

    Args:
        body: parsed JSON.
        trained: the model's features, vocabulary and places.
        most: candidates at most.

    Raises:
        UserError: what is wrong with it, in one line.
    """
    user, candidates, top_k = _checked(body, most)
    given = [feature for feature in trained.features if feature.source in user]
    asked = [feature for feature in trained.features if feature.source not in user]
    count = len(candidates)
    ids, numbers = _encode(trained, given, [user], "user")
    if asked:
        own_ids, own_numbers = _encode(trained, asked, candidates, "candidates")
        ids, numbers = ids + own_ids, numbers + own_numbers
    return Ask(np.ascontiguousarray(np.broadcast_to(ids, (count, ids.shape[1]))),
               np.ascontiguousarray(np.broadcast_to(numbers, (count, numbers.shape[1]))), min(top_k or count, count))


def _checked(body: Any, most: int) -> tuple[dict, list[dict], int | None]:
    if not isinstance(body, dict):
        raise UserError("a request is an object with user and candidates")
    for key in body:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            raise UserError("unknown key", value=key, mend=f"did you mean '{near[0]}'?" if near else
                            f"known: {', '.join(_KEYS)}")
    user, candidates, top_k = body.get("user"), body.get("candidates"), body.get("top_k")
    if not isinstance(user, dict):
        raise UserError("must be an object of features", where="user")
    if not isinstance(candidates, list) or not all(isinstance(item, dict) for item in candidates):
        raise UserError("must be a list of objects of features", where="candidates")
    if not 1 <= len(candidates) <= most:
        raise UserError(f"there must be 1 to {most}", where="candidates", value=len(candidates))
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
        raise UserError("must be a whole number above 0", where="top_k", value=top_k)
    return user, candidates, top_k


def _encode(trained: Trained, features: list[Feature], rows: list[dict], where: str) -> tuple[np.ndarray, np.ndarray]:
    """ids and numbers of some features; the columns of the others are 0."""
    columns = {feature.source: _column(feature, rows, where) for feature in features}
    if not columns:
        spec = trained.spec
        return np.zeros((1, spec.id_columns), np.int32), np.zeros((1, spec.numeric_columns), np.float32)
    try:
        encoded, _ = _RowEncoder(features, trained.columns, "error").encode(
            pa.table(columns), trained.spec, trained.vocabulary, where, 0)
    except UserError as error:  # what mends a log does not mend a request
        raise UserError(error.what, where=error.where, value=error.value) from None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise UserError(f"cannot be read: {str(error).splitlines()[0]}", where=where) from None
    return encoded.ids, encoded.numbers


def _column(feature: Feature, rows: Iterable[dict], where: str) -> pa.Array:
    name, values = feature.source, []
    for index, row in enumerate(rows):
        if name not in row:
            raise UserError(f"feature '{name}' is missing", where=where if where == "user" else f"{where}[{index}]",
                            mend="give it there or in user; null stands for a missing value")
        values.append(row[name])
    if feature.is_list and not any(isinstance(value, str) for value in values):
        for index, value in enumerate(values):
            if value is not None and not isinstance(value, list):
                raise UserError(f"feature '{name}' must be a list", where=f"{where}[{index}]", value=value)
        values = [None if value is None else [None if item is None else str(item) for item in value]
                  for value in values]
        return _array(values, name, where, pa.list_(pa.string()))
    if any(isinstance(value, (list, dict)) for value in values):
        raise UserError(f"feature '{name}' must be a single value", where=where)
    kinds = {type(value) for value in values if value is not None}
    if str in kinds and len(kinds) > 1:
        values = [None if value is None else str(value) for value in values]
    made = _array(values, name, where)
    return made.cast(pa.string()) if pa.types.is_null(made.type) else made


def _array(values: list, name: str, where: str, kind: pa.DataType | None = None) -> pa.Array:
    try:
        return pa.array(values, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeError) as error:
        raise UserError(f"feature '{name}' cannot be read: {str(error).splitlines()[0]}", where=where) from None
