"""The one door for structured text: every JSON and YAML file, line and request body comes in here.

What comes in is bounded (bytes, nesting, digits of a number, size of what aliases stand for), then plain values, then
typed (`typed`), and whatever is wrong is one `UserError`. JSON is strict: NaN, Infinity and numbers that no float64
holds are refused, a byte order mark is not. YAML is read by `yaml_core`.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, Literal

import pydantic

from parallel.common.errors import UserError
from parallel.common.json_text import has_surrogates, plain, without_surrogates
from parallel.common.yaml_core import BadYaml, load_yaml

MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
"""Byte order marks and what they say; the longer ones first."""
MAX_JSON_BYTES = 256 << 20
MAX_YAML_BYTES = 1 << 20
DIGEST_KEY = "digest_of_file"
MAX_DEPTH = 64
MAX_DIGITS = 400
"""Longest number in characters; a float64 written out in full has at most 309 before its point."""

Surrogates = Literal["refuse", "replace", "keep"]
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class BadText(ValueError):
    """What is wrong with a text, without the file, which the caller knows; in words for people."""


def parse_json(text: str | bytes, *, surrogates: Surrogates = "replace", strict: bool = True,
               foreign_numbers: Literal["refuse", "null", "keep"] = "refuse", max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value of a JSON text.

    Args:
        text: UTF-8, with or without a byte order mark.
        surrogates: an escape that is half of a pair: refuse it, read it as U+FFFD, or keep it as it is.
        strict: refuse control characters inside strings, as the standard does.
        foreign_numbers: NaN, Infinity and numbers that no float64 holds: refuse them, read them as null, or keep
            them as Python writes them (files that this project writes).
        max_bytes: longest text.

    Raises:
        BadText: anything wrong.
    """
    if len(text) > max_bytes:
        raise BadText(f"longer than the {max_bytes} bytes allowed")
    text = _decoded(text)
    try:
        value = _decoder(strict, foreign_numbers).decode(text)
    except RecursionError:
        raise BadText(f"nested deeper than {MAX_DEPTH}") from None
    except BadText:
        raise
    except json.JSONDecodeError as error:
        raise BadText(f"not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except ValueError:
        raise BadText(f"not JSON: a number of more than {MAX_DIGITS} digits") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    if surrogates != "keep" and (_SURROGATE_ESCAPE.search(text) or has_surrogates(text)) and has_surrogates(value):
        if surrogates == "refuse":
            raise BadText("holds half of a surrogate pair")
        value = _repaired(value)
    return value


def by_mark(data: bytes) -> str | None:
    """The charset that a byte order mark at the beginning says, None without one."""
    return next((name for mark, name in MARKS if data.startswith(mark)), None)


def _decoded(text: str | bytes) -> str:
    if isinstance(text, str):
        return text[1:] if text.startswith("\ufeff") else text
    try:
        return text.decode(by_mark(text) or "utf-8")
    except UnicodeDecodeError as error:
        raise BadText(f"not UTF-8 (byte {error.start})") from None


@functools.lru_cache(maxsize=6)
def _decoder(strict: bool, foreign_numbers: str) -> json.JSONDecoder:
    if foreign_numbers == "keep":
        return json.JSONDecoder(strict=strict)
    if foreign_numbers == "null":
        return json.JSONDecoder(parse_constant=lambda name: None, parse_float=_finite_or_none,
                                parse_int=lambda text: int(text) if len(text) <= MAX_DIGITS else None, strict=strict)
    return json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, parse_int=_integer, strict=strict)


def _refuse_constant(name: str) -> None:
    raise BadText(f"not JSON: {name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text) if len(text) <= MAX_DIGITS else math.inf
    if math.isinf(number):
        raise BadText(f"a number that is too large or too long: {text[:20]}...")
    return number


def _finite_or_none(text: str) -> float | None:
    number = float(text) if len(text) <= MAX_DIGITS else math.inf
    return None if math.isinf(number) else number


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise BadText(f"a number of more than {MAX_DIGITS} digits")
    return int(text)


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        level = [item for outer in level for item in (outer.values() if type(outer) is dict else outer)
                 if type(item) is dict or type(item) is list]
        if not level:
            return
    raise BadText(f"nested deeper than {MAX_DEPTH}")


def _repaired(value: Any) -> Any:
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, dict):
        return {without_surrogates(key): _repaired(item) for key, item in value.items()}
    return [_repaired(item) for item in value] if isinstance(value, list) else value


def parse_object(text: str | bytes, **options: Any) -> dict:
    """`parse_json` of a text that must be an object; same arguments.

    Raises:
        BadText: anything wrong, or another kind of value.
    """
    value = parse_json(text, **options)
    if not isinstance(value, dict):
        raise BadText(f"not an object but {kind_of(value)}")
    return value


def kind_of(value: Any) -> str:
    """What a value is, in JSON's words: "an array", "a number", "null"."""
    words = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return words.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """`value` as JSON has it, with the digest of all else under `DIGEST_KEY`."""
    value = plain({key: item for key, item in value.items() if key != DIGEST_KEY})
    return {**value, DIGEST_KEY: _digest(value)}


def unseal(value: Any, where: Any, *, required: bool = True, hint: str = "make it anew") -> Any:
    """`value` without its digest, which is compared.

    Args:
        value: what was read.
        where: the file.
        required: whether an object without a digest is damaged; False for files that a user or an older version wrote.

    Raises:
        UserError: the digest is missing or another.
    """
    if not isinstance(value, dict) or DIGEST_KEY not in value:
        if required:
            raise UserError("file is damaged: it has no digest", where=where, hint=hint)
        return value
    rest = {key: item for key, item in value.items() if key != DIGEST_KEY}
    if value[DIGEST_KEY] != _digest(rest):
        raise UserError("file is damaged: what is in it has changed since it was written", where=where, hint=hint)
    return rest


def _digest(value: dict) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def is_file(path: Path) -> bool:
    """Whether there is a file of this name; False too for a name that no file can have (too long, a null character)."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_json(path: str | Path, shape: Any = None, *, sealed: bool = False, max_bytes: int = MAX_JSON_BYTES,
              hint: str = "make it anew") -> Any:
    """Reads a JSON file; where it carries its digest (`files.write_json`), that is compared and taken off.

    Args:
        path: the file.
        shape: what it must hold: any type that pydantic knows (`dict`, `list[str]`, a settings class); None = anything.
        sealed: whether it must carry its digest.
        max_bytes: largest file.
        hint: what to do when it is damaged.

    Raises:
        UserError: missing, too large, damaged, changed since it was written, or of another shape.
    """
    path = Path(path)
    if not is_file(path):
        raise UserError("no such file", where=path, hint="check the path")
    data = _read_bytes(path, max_bytes)
    try:
        value = parse_json(data, max_bytes=max_bytes)
    except BadText as error:
        raise UserError(f"file is damaged: {error}", where=path, hint=hint) from None
    value = unseal(value, path, required=sealed, hint=hint)
    return value if shape is None else typed(value, shape, where=path)


def read_yaml(path: str | Path, *, max_bytes: int = MAX_YAML_BYTES, what: str = "file") -> Any:
    """The value in a YAML file (core schema of YAML 1.2; see `yaml_core`).

    Raises:
        UserError: missing, too large, not YAML, or with a value that YAML 1.1 and 1.2 read differently; names the line.
    """
    path = Path(path)
    if not is_file(path):
        raise UserError(f"no such {what}", where=path, hint="check the path")
    data = _read_bytes(path, max_bytes, what)
    try:
        return load_yaml(_decoded(data))
    except BadText as error:
        raise UserError(f"not valid YAML: {error}", where=path, hint="save it as UTF-8") from None
    except BadYaml as error:
        raise UserError(error.what, where=f"{path}, line {error.line}", value=error.value, hint=error.hint) from None


def _read_bytes(path: Path, max_bytes: int, what: str = "file") -> bytes:
    try:
        pieces, size = [], 0
        with path.open("rb") as file:
            # In parts: a file may grow after a look at its size, and one read would reserve all that is allowed.
            while size <= max_bytes and (piece := file.read(1 << 20)):
                pieces.append(piece)
                size += len(piece)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=path) from None
    if size > max_bytes:
        raise UserError(f"{what} is too large: larger than the {max_bytes} bytes allowed", where=path,
                        value=path.stat().st_size)
    return b"".join(pieces)


def typed(value: Any, shape: Any, *, where: Any, hint: str | None = None) -> Any:
    """`value` as `shape` (any type that pydantic knows), or one `UserError` that names the first key that differs."""
    try:
        return _adapter(shape).validate_python(value)
    except pydantic.ValidationError as error:
        details = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in details["loc"])
        cause = details.get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(f"{place}: {details['msg']}" if place else details["msg"], where=where,
                        value=details["input"], hint=hint) from None


def _adapter(shape: Any) -> pydantic.TypeAdapter:
    try:
        return _kept_adapter(shape)
    except TypeError:  # a shape that cannot be hashed
        return pydantic.TypeAdapter(shape)


@functools.lru_cache(maxsize=128)
def _kept_adapter(shape: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(shape)
