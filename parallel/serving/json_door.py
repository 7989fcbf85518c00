"""JSON from strangers: UTF-8 only, bounded depth and digits, finite numbers, text that can be written as UTF-8."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DIGITS = 400  # float64 has at most 309 before the point
_LONG_NUMBER = re.compile(rb"[0-9]{19}|[eE][+-]?[0-9]{3}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_LONE = re.compile("[\ud800-\udfff]")


class NotJson(ValueError):
    """What is wrong with a text that should be JSON."""


def parse_json(raw: bytes, max_depth: int = 32) -> Any:
    """The value that `raw` holds.

    A lone surrogate, which no UTF-8 text can hold, becomes U+FFFD; a byte order mark is skipped. NaN, Infinity and
    numbers that float64 cannot hold are refused, as are integers of more than `MAX_DIGITS` digits.

    Raises:
        NotJson: in one line.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotJson(f"not UTF-8 at byte {error.start}") from None
    # Hooks cost time for every number, so they are set only where a number could need them.
    hooks = {"parse_int": _whole, "parse_float": _real} if _LONG_NUMBER.search(raw) else {}
    try:
        value = json.loads(text, parse_constant=_constant, **hooks)
    except RecursionError:
        raise NotJson(f"nested deeper than {max_depth}") from None
    except NotJson:
        raise
    except ValueError as error:
        raise NotJson(f"not JSON: {_brief(error)}") from None
    if raw.count(b"[") + raw.count(b"{") > max_depth and not _within(value, max_depth):
        raise NotJson(f"nested deeper than {max_depth}")
    return _mended(value) if _SURROGATE.search(raw) else value


def _brief(error: ValueError) -> str:
    return f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else "a bad value"


def _constant(name: str) -> None:
    raise NotJson(f"{name} is not JSON")


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise NotJson(f"a number of {len(digits)} digits")
    return int(digits)


def _real(text: str) -> float:
    value = float(text) if len(text) <= 4 * MAX_DIGITS else float("inf")
    if value in (float("inf"), float("-inf")):
        raise NotJson("a number that float64 cannot hold")
    return value


def _within(value: Any, most: int) -> bool:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(most):
        level = [item for node in level for item in (node.values() if isinstance(node, dict) else node)
                 if isinstance(item, (dict, list))]
        if not level:
            return True
    return False


def _mended(value: Any) -> Any:
    """`value` with U+FFFD for every lone surrogate; its depth is bounded already."""
    if isinstance(value, str):
        return _LONE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_mended(item) for item in value]
    if isinstance(value, dict):
        return {_LONE.sub("\ufffd", key): _mended(item) for key, item in value.items()}
    return value
