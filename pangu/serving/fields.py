"""Reading the fields of a request's JSON object: null is absent, unknown ones are let be, wrong ones named."""

from __future__ import annotations

import math
from typing import Any

from parallel.serving.errors import Refusal

_SHOWN = 60


class Fields:
    """The object of a request.

    Args:
        body: parsed JSON.

    Raises:
        Refusal: 400, it is no object.
    """

    def __init__(self, body: Any) -> None:
        if not isinstance(body, dict):
            raise Refusal(400, "the body must be a JSON object", code="invalid_type")
        self.body = body

    def get(self, name: str) -> Any:
        """The value; None where it is absent or null."""
        return self.body.get(name)

    def number(self, name: str, low: float, high: float, default: float) -> float:
        """A number in [low, high]."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise bad(name, "must be a number", value, "invalid_type")
        if not low <= value <= high or not math.isfinite(value):
            raise bad(name, f"must be from {low:g} to {high:g}", value)
        return float(value)

    def integer(self, name: str, low: int, high: int, default: Any = None) -> Any:
        """A whole number in [low, high]; 16.0 is one."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise bad(name, "must be a whole number", value, "invalid_type")
        if not low <= value <= high:
            raise bad(name, f"must be from {low} to {high}", value)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise bad(name, "must be true or false", value, "invalid_type")
        return value

    def text(self, name: str) -> str | None:
        """Text."""
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise bad(name, "must be text", value, "invalid_type")
        return value

    def neutral(self, name: str, *values: Any) -> None:
        """Refuses a field that is known but not supported, unless its value changes nothing."""
        value = self.get(name)
        if value is not None and value not in values:
            raise bad(name, "is not supported by this server", value, "unsupported_parameter")


def bad(name: str, what: str, value: Any = None, code: str = "invalid_value") -> Refusal:
    """400 about a field."""
    shown = "" if value is None else f" (got {_brief(value)})"
    return Refusal(400, f"{name}: {what}{shown}", param=name.split("[")[0], code=code)


def _brief(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN - 3] + "..."
