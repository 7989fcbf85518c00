"""From the JSON of a ranking request to rows of numbers, by the features and vocabulary that the model was trained on.

    {"user": {"user_id": 7, "history": [3, 5]}, "candidates": [{"item_id": 11}, {"item_id": 12}], "top_k": 10}

A feature is in `user` (it holds for all candidates: anything about the user, the context, the user's lists) or in
every candidate; null is a missing value. Needs no MindSpore.
"""

from __future__ import annotations

import difflib
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from parallel.common.errors import UserError
from recsys.data.encode import Encoded, Encoder, RowErrors, id_type
from recsys.data.features import FIRST_KNOWN, UNSEEN, Feature
from recsys.data.vocabulary import hash_rows, transformed
from recsys.saved_model import Trained

_KEYS = ("user", "candidates", "top_k")


@dataclass(frozen=True)
class Ask:
    """A request in numbers: ids_CM int32 (int64 with dynamic features), numbers_CN float32, how many candidates are
    wanted back; the request as JSON where it was not that, or was filled up."""

    ids: np.ndarray
    numbers: np.ndarray
    top_k: int
    body: dict | None = None


class _PlacesInRequest(RowErrors):
    """Says `candidates[2]` of the third candidate, and `user` of the user."""

    def place(self, row: int) -> str:
        """See `RowErrors`."""
        return _place(self.where, row)


def _place(where: str, row: int) -> str:
    return where if where == "user" else f"{where}[{row}]"


class _RowEncoder(Encoder):
    """An `Encoder` of rows that have no labels yet."""

    row_errors = _PlacesInRequest

    def _labels(self, table: pa.Table, where: str, errors: RowErrors) -> np.ndarray:
        return np.zeros((len(table), 1), np.float32)

    def _users(self, table: pa.Table, where: str) -> np.ndarray:
        return np.zeros(len(table), np.int64)


def read_request(body: Any, trained: Trained, most: int) -> Ask:
    """Checks and encodes a request.

    Args:
        body: parsed JSON.
        trained: the model's features, vocabulary and columns.
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


def encode_tables(trained: Trained, user: pa.Table, candidates: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """ids_CM and numbers_CN of a request in columns: one row of user features, a row for each candidate.

    Raises:
        UserError: a feature is missing or cannot be read.
    """
    parts, of_user, of_candidates = [], _arrays(user), _arrays(candidates)
    given = [feature for feature in trained.features if feature.source in of_user]
    asked = [feature for feature in trained.features if feature.source not in of_user]
    for features, columns, where in ((given, of_user, "user"), (asked, of_candidates, "candidates")):
        missing = next((f.source for f in features if f.source not in columns), None)
        if missing is not None:
            raise UserError(f"feature '{missing}' is missing", where=where,
                            hint="give it there or in user; null means a missing value")
        if features:
            parts.append(_encode(trained, features, columns, where))
    count = len(candidates)
    return tuple(np.ascontiguousarray(sum(np.broadcast_to(array, (count, array.shape[1])) for array in arrays))
                 for arrays in zip(*parts, strict=True))


def _arrays(table: pa.Table) -> dict[str, pa.Array]:
    return {name: column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
            for name, column in zip(table.column_names, table.columns, strict=True)}


def _checked(body: Any, most: int) -> tuple[dict, list[dict], int | None]:
    if not isinstance(body, dict):
        raise UserError("a request is an object with user and candidates")
    for key in body:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            raise UserError("unknown key", value=key, hint=f"did you mean '{near[0]}'?" if near else
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


def _encode(trained: Trained, features: list[Feature], rows: list[dict] | dict[str, pa.Array],
            where: str) -> tuple[np.ndarray, np.ndarray]:
    """ids and numbers of some features, of rows or of columns; the columns of the others are 0."""
    spec, closer, in_columns = trained.spec, [], isinstance(rows, dict)
    count = 1 if not features else len(rows[features[0].source]) if in_columns else len(rows)
    ids = np.zeros((count, spec.id_columns), id_type(spec))
    numbers = np.zeros((len(ids), spec.numeric_columns), np.float32)
    for feature in features:
        if in_columns:
            column = rows[feature.source]
            found = None if feature.is_dynamic else quick_array(feature, column, trained)
        else:
            values = _values(feature, rows, where)
            found = None if feature.is_dynamic else quick_column(feature, values, trained)
        if found is None:
            closer.append((feature, column if in_columns else _column(feature, values, where)))
        elif feature.is_value:
            numbers[:, spec.numeric[feature.name].column] = found
        else:
            slot = spec.slots[feature.name]
            ids[:, slot.start:slot.start + slot.length] = found + slot.offset
    if closer:
        more = _encode_closely(trained, closer, where)
        ids, numbers = ids + more.ids, numbers + more.numbers
    return ids, numbers


def _encode_closely(trained: Trained, columns: list[tuple[Feature, pa.Array]], where: str) -> Encoded:
    """By the `Encoder` of the log, which looks at every value."""
    table = pa.table({feature.source: values for feature, values in columns})
    try:
        return _RowEncoder([feature for feature, _ in columns], trained.columns, "error").encode(
            table, trained.spec, trained.vocabulary, where, 0)[0]
    except UserError as error:  # what helps with a log does not help with a request
        raise UserError(error.what, where=error.where, value=error.value) from None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise UserError(f"cannot be read: {str(error).splitlines()[0]}", where=where) from None


def _values(feature: Feature, rows: list[dict], where: str) -> list:
    name = feature.source
    try:
        return [row[name] for row in rows]
    except KeyError:
        index = next(index for index, row in enumerate(rows) if name not in row)
    raise UserError(f"feature '{name}' is missing", where=_place(where, index),
                    hint="give it there or in user; null means a missing value")


# ---------------------------------------------------------------- columns whose values are what is expected


def quick_column(feature: Feature, values: list, trained: Trained) -> np.ndarray | None:
    """What `Encoder` makes of a feature's values, [n, length] rows (without the slot's offset) or n numbers: a tenth of
    its time, for values of the expected types; None for any other, at which it must look."""
    if feature.type == "numeric":
        return _quick_numbers(feature, values, trained)
    if not feature.is_list:
        found = _quick_rows(feature, values, trained)
        return None if found is None or _outside(feature, found) else found[:, None]
    if set(map(type, values)) != {list}:
        return None
    kept = [value[-feature.length:] if feature.type == "sequence" else value[:feature.length] for value in values]
    lengths_n1 = np.fromiter(map(len, kept), np.int64, len(kept))[:, None]
    place = np.arange(feature.length)
    inside = place >= feature.length - lengths_n1 if feature.type == "sequence" else place < lengths_n1
    result = np.zeros(inside.shape, np.int64)
    if lengths_n1.any():
        found = _quick_rows(feature, list(itertools.chain.from_iterable(kept)), trained)
        if found is None:
            return None
        result[inside] = found
    return result


def quick_array(feature: Feature, column: pa.Array, trained: Trained) -> np.ndarray | None:
    """As `quick_column`, of a column that is in Arrow's memory already: numbers are never made objects of Python."""
    if isinstance(column, pa.ChunkedArray) or column.null_count:
        return None
    kind = column.type
    if feature.is_list:
        if not pa.types.is_list(kind) or not _is_whole(kind.value_type) or column.values.null_count:
            return None
        return _quick_lists(feature, column, trained)
    if feature.type == "numeric":
        if not (_is_whole(kind) or pa.types.is_floating(kind)):
            return None
        values = column.to_numpy()
        return None if np.isnan(values).any() else _numbers(feature, values, trained)  # NaN is a missing value
    if pa.types.is_string(kind):
        return quick_column(feature, column.to_pylist(), trained)
    found = _quick_rows(feature, column.to_numpy(), trained) if _is_whole(kind) else None
    return None if found is None or _outside(feature, found) else found[:, None]


def _is_whole(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) and not pa.types.is_uint64(kind)


def _quick_lists(feature: Feature, column: pa.ListArray, trained: Trained) -> np.ndarray | None:
    offsets = column.offsets.to_numpy().astype(np.int64)
    begin_n1, kept_n1 = offsets[:-1, None], np.minimum(np.diff(offsets), feature.length)[:, None]
    place = np.arange(feature.length)
    if feature.type == "sequence":  # its end, at the end of the slot
        inside, source = place >= feature.length - kept_n1, offsets[1:, None] - feature.length + place
    else:
        inside, source = place < kept_n1, begin_n1 + place
    result = np.zeros(inside.shape, np.int64)
    if inside.any():
        found = _quick_rows(feature, column.values.to_numpy()[source[inside]], trained)
        if found is None:
            return None
        result[inside] = found
    return result


def _outside(feature: Feature, rows: np.ndarray) -> bool:
    return feature.values == "integer" and bool((rows == UNSEEN).any())


def _quick_rows(feature: Feature, values: list | np.ndarray, trained: Trained) -> np.ndarray | None:
    if isinstance(values, np.ndarray):
        numbers, kinds = values.astype(np.int64), {int}
    else:
        kinds = set(map(type, values))
        numbers = np.array(values) if kinds == {int} else None
    if numbers is not None and numbers.dtype != np.int64:
        return None
    if feature.values == "integer":
        if numbers is None:
            return None
        return np.where((numbers < 0) | (numbers >= feature.rows), UNSEEN, numbers + FIRST_KNOWN)
    if numbers is not None:
        values = list(map(str, numbers.tolist()))
    elif kinds != {str}:
        return None
    if feature.values == "hash":
        return _hashed(feature, values)
    known = _known(trained, feature.target or feature.name)
    rows = [known.get(value, UNSEEN) for value in values]
    return np.array(rows, np.int64) if UNSEEN not in rows or _is_text(values) else None


def _hashed(feature: Feature, values: list[str]) -> np.ndarray | None:
    return hash_rows(feature, pa.array([value or None for value in values], pa.string())) if _is_text(values) else None


def _is_text(values: list[str]) -> bool:
    """Whether all of it can be written: JSON may hold halves of characters."""
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return False
    return True


def _known(trained: Trained, name: str) -> dict[str, int]:
    """Row of each value of a vocabulary, made once: Arrow would hash the whole vocabulary anew for every request."""
    kept = trained.__dict__.setdefault("_known_rows", {})
    if name not in kept:
        kept[name] = {value: FIRST_KNOWN + row for row, value in enumerate(trained.vocabulary.values[name])} | {"": 0}
    return kept[name]


def _quick_numbers(feature: Feature, values: list, trained: Trained) -> np.ndarray | None:
    kinds, found = set(map(type, values)), None
    if kinds <= {int, float}:
        found = np.array(values)
    if found is None or found.dtype not in (np.int64, np.float64) or (int in kinds and np.abs(found).max() > 2**53):
        return None
    return _numbers(feature, found, trained)


def _numbers(feature: Feature, found: np.ndarray, trained: Trained) -> np.ndarray | None:
    if found.dtype.kind in "iu" and np.abs(found.astype(np.float64)).max() > 2**53:
        return None
    found, vocabulary = found.astype(np.float64), trained.vocabulary
    if (np.isfinite(found) & (np.abs(found) > np.finfo(np.float32).max)).any():
        return None
    if feature.is_value:
        mean, deviation = vocabulary.moments.get(feature.name, (0.0, 1.0))
        found = np.where(np.isfinite(found), found, np.nan)
        return np.nan_to_num((transformed(feature, found) - mean) / deviation)
    edges = vocabulary.boundaries.get(feature.name, feature.boundaries or [])
    return (np.searchsorted(np.asarray(edges, np.float64), found, side="left") + FIRST_KNOWN)[:, None]


_FAR = 10**300  # what is beyond is refused like it, and no float holds it


# ---------------------------------------------------------------- columns for Arrow


def _column(feature: Feature, values: list, where: str) -> pa.Array:
    name = feature.source
    if feature.is_list and not any(isinstance(value, str) for value in values):
        for index, value in enumerate(values):
            if value is not None and not isinstance(value, list):
                raise UserError(f"feature '{name}' must be a list", where=_place(where, index), value=value)
        for index, value in enumerate(values):
            wrong = next((item for item in value or () if isinstance(item, (list, dict))), None)
            if wrong is not None:
                raise UserError(f"feature '{name}' must be a list of single values", where=_place(where, index),
                                value=wrong)
        values = [None if value is None else [None if item is None else str(item) for item in value]
                  for value in values]
        return _array(values, name, where, pa.list_(pa.string()))
    for index, value in enumerate(values):
        if isinstance(value, (list, dict)):
            raise UserError(f"feature '{name}' must be a single value", where=_place(where, index), value=value)
    kinds = {type(value) for value in values if value is not None}
    large = feature.type != "numeric" and any(type(value) is int and not -2**63 <= value < 2**63 for value in values)
    if int in kinds and feature.type == "numeric":
        values = [float(min(max(value, -_FAR), _FAR)) if type(value) is int and abs(value) > 2**53 else value
                  for value in values]
    if (str in kinds and len(kinds) > 1) or large:
        values = [None if value is None else str(value) for value in values]
    made = _array(values, name, where)
    return made.cast(pa.string()) if pa.types.is_null(made.type) else made


def _array(values: list, name: str, where: str, kind: pa.DataType | None = None) -> pa.Array:
    try:
        return pa.array(values, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeError) as error:
        raise UserError(f"feature '{name}' cannot be read: {str(error).splitlines()[0]}", where=where) from None
