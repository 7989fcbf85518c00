"""Values as JSON text, whatever they hold: what JSON has not becomes what it has, so that every line can be read.

| value | written as |
|---|---|
| NaN, infinity | null |
| date, time, duration | ISO 8601 text |
| Decimal, UUID, path | its text, all digits kept |
| bytes | their UTF-8 text, else base64 |
| NumPy scalar, tuple, set | number, list, sorted list |
| a lone surrogate (in a value or a key) | U+FFFD |
"""

from __future__ import annotations

import base64
import datetime
import json
import math
from typing import Any

_DEEPEST = 400
_MOST_BITS = 10_000  # Python writes no decimal number of more than 4,300 digits
REPLACEMENT = "\ufffd"


def dump_json(value: Any, *, indent: int | None = None, ascii_only: bool = False) -> str:
    """`value` as JSON text that any strict reader takes and UTF-8 can hold; see the table of the module."""
    try:
        text = json.dumps(value, ensure_ascii=ascii_only, allow_nan=False, indent=indent)
        if not ascii_only:
            text.encode()
    except (TypeError, ValueError, RecursionError):  # UnicodeEncodeError is a ValueError
        return json.dumps(plain(value), ensure_ascii=ascii_only, allow_nan=False, indent=indent)
    # With ensure_ascii a lone surrogate is written as an escape that strict readers refuse.
    return text if not ascii_only or "\\ud" not in text else json.dumps(plain(value), allow_nan=False, indent=indent)


def plain(value: Any, depth: int = 0) -> Any:
    """`value` as dict, list, str, int, float, bool and None only; see the table of the module."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, int):
        return int(value) if value.bit_length() < _MOST_BITS else hex(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if depth >= _DEEPEST:
        return "..."
    if isinstance(value, dict):
        return {key if type(key) is str and key.isascii() else _key(key): plain(item, depth + 1)
                for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item, depth + 1) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [plain(item, depth + 1) for item in value]
    return _scalar(value, depth)


def _scalar(value: Any, depth: int) -> Any:
    if isinstance(value, (datetime.date, datetime.time)):  # datetime is a date
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return f"PT{value.total_seconds():g}S"
    if isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return base64.b64encode(data).decode()
    if hasattr(value, "tolist"):  # NumPy's arrays and scalars
        return plain(value.tolist(), depth + 1)
    return without_surrogates(str(value))


def _key(key: Any) -> str:
    # As `json` itself writes them.
    if isinstance(key, bool) or key is None:
        return {True: "true", False: "false", None: "null"}[key]
    made = plain(key)
    return made if isinstance(made, str) else str(made)


def without_surrogates(text: str) -> str:
    """`text` with pairs of surrogates joined and lone ones as U+FFFD, so that UTF-8 can hold it."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def has_surrogates(value: Any) -> bool:
    """Whether a string or a key anywhere in a tree of dicts and lists holds a lone surrogate."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            if item != without_surrogates(item):
                return True
        elif isinstance(item, dict):
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, (list, tuple)):
            waiting += item
    return False
