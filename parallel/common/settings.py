"""Strict YAML into typed settings: an unknown key is an error that names the nearest known one.

A settings class is a pydantic model whose fields carry a docstring below them; that docstring is the manual
(`reference` prints it). Values come from, in rising precedence: the defaults, the file named by `base:`, the file
itself, and `key.sub=value` overrides of the command line.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pydantic

from parallel.common.errors import UserError
from parallel.common.renamed import KEYS
from parallel.common.structured import MAX_DEPTH, MAX_YAML_BYTES, is_file, read_yaml
from parallel.common.yaml_core import SEXAGESIMAL, BadYaml, dump_yaml, load_yaml_value

_MAX_BASES = 8
_UNION_TAG = re.compile(r"^[a-z_-]+\[.*\]$")
LARGEST_INTEGER = 10**12
"""No count, size or seed of a run is larger; a setting that needs more says so itself."""


class Settings(pydantic.BaseModel):
    """Base of every settings class: no unknown keys, defaults validated, docstrings below fields kept as manual."""

    model_config = pydantic.ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_default=True, validate_assignment=True,
        protected_namespaces=(), allow_inf_nan=False,
    )

    largest_integer: ClassVar[int] = LARGEST_INTEGER
    """Bound of the integer fields that state none of their own; sizes of a model have a closer one."""

    @pydantic.model_validator(mode="after")
    def _bounded(self) -> Settings:
        """No integer is absurd: sizes are multiplied and looped over, and 1e25 layers are no network."""
        largest = type(self).largest_integer
        for name in self.model_fields_set:
            value = getattr(self, name, None)
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(item, int) and abs(item) > largest and not self._unbounded(name):
                    raise ValueError(f"{name}: an integer beyond {largest:.0e}")
        return self

    @classmethod
    def _unbounded(cls, name: str) -> bool:
        """Whether a field states an upper bound of its own."""
        return any(getattr(rule, "le", getattr(rule, "lt", None)) is not None
                   for rule in cls.model_fields[name].metadata)


AnySettings = TypeVar("AnySettings", bound=Settings)


def load_settings(cls: type[AnySettings], path: str | Path | None, overrides: list[str] | None = None) -> AnySettings:
    """Reads `path`, applies `overrides` and validates.

    Args:
        cls: the settings class to fill.
        path: a YAML file, or None for the defaults.
        overrides: strings `key.sub=value`, the value read as YAML.

    Raises:
        UserError: file missing or not YAML, key unknown (nearest named) or written twice, value of a wrong type.
    """
    tree = read_yaml_tree(path) if path is not None else {}
    for override in overrides or []:
        apply_override(tree, override)
    return validate(cls, tree, where=str(path) if path is not None else "settings")


def validate(cls: type[AnySettings], tree: dict, where: str = "settings") -> AnySettings:
    """Turns a plain tree into settings; the first thing wrong becomes a one-line `UserError`."""
    try:
        return cls.model_validate(tree)
    except pydantic.ValidationError as error:
        raise _first_error(cls, error, where) from None


def read_yaml_tree(path: str | Path) -> dict:
    """The mapping in a YAML file, merged over the file that its `base:` key names (relative to the file)."""
    path, trees = Path(path), []
    for _ in range(_MAX_BASES):
        tree = _read_one_yaml(path)
        base = tree.pop("base", None)
        trees.append(tree)
        if base is None:
            break
        if not isinstance(base, str):
            raise UserError("base must name a YAML file", where=path, value=base)
        path = path.parent / base
    else:
        raise UserError("the chain of base: files is too long or a circle", where=path, value=_MAX_BASES)
    merged: dict = {}
    for tree in reversed(trees):
        _merge(merged, tree)
    return merged


def _read_one_yaml(path: Path) -> dict:
    if not is_file(path):
        try:
            beside = [file.name for file in path.parent.glob("*.yaml")]
        except (OSError, ValueError):  # a name that no folder can have
            beside = []
        near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "check the path"
        raise UserError("no such config file", where=path, hint=hint)
    tree = read_yaml(path, what="config file")
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError("a config file holds a mapping of keys", where=path, value=type(tree).__name__)
    return tree


def _merge(into: dict, other: dict) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def apply_override(tree: dict, override: str) -> None:
    """Sets one value of a plain tree; `override` is "key.sub=value" with the value read as YAML.

    Raises:
        UserError: another form, a value that is not YAML, or a key below something that is no block.
    """
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        raise UserError("an override has the form key.sub=value", where="command line", value=override)
    if len(text) > MAX_YAML_BYTES:
        raise UserError("the value is too large", where=key, value=text)
    try:
        value = load_yaml_value(text)
    except BadYaml as error:
        raise UserError(error.what, where=key, value=text, hint=error.hint or "quote it") from None
    *parents, last = parts
    for part in parents:
        if tree.get(part) is None:
            tree[part] = {}
        tree = tree[part]
        if not isinstance(tree, dict):
            raise UserError(f"'{part}' is a value, not a block of keys", where=key, value=tree)
    tree[last] = value


def _first_error(cls: type[Settings], error: pydantic.ValidationError, where: str) -> UserError:
    details = sorted(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")[0]
    # pydantic adds the tag of a union to the path; keep what a user wrote.
    location = [part for part in details["loc"] if not (isinstance(part, str) and _UNION_TAG.search(part))]
    location = location or list(details["loc"])
    key = ".".join(str(part) for part in location)
    if details["type"] == "extra_forbidden":
        known = _known_keys(cls, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        new = KEYS.get(str(location[-1]))
        if new in known:
            path = ".".join(str(part) for part in [*location[:-1], new])
            return UserError(f"the key '{key}' is called '{path}'", where=where, hint=f"write {path}")
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        return UserError(f"unknown key '{key}'", where=where, value=details["input"], hint=hint)
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return cause
    message = str(cause) if cause is not None else details["msg"]
    value = None if details["type"] == "missing" or isinstance(details["input"], dict) else details["input"]
    hint = None
    if isinstance(value, str) and SEXAGESIMAL.fullmatch(value):
        hint = "write a number in decimal digits; this is text"
    elif details["type"] == "string_type":
        hint = "quote it for the text"
    return UserError(f"{key}: {message}" if key else message, where=where, value=value, hint=hint)


def _known_keys(cls: type[Settings], path: list) -> list[str]:
    """Names of the fields of the settings class found by walking `path` down from `cls`."""
    candidates: list[type[Settings]] = [cls]
    for part in path:
        following = []
        for candidate in candidates:
            field = candidate.model_fields.get(part) if isinstance(part, str) else None
            if field is not None:
                following += _settings_classes(field.annotation)
        candidates = following or candidates
    return sorted({name for candidate in candidates for name in candidate.model_fields})


def _settings_classes(annotation: Any) -> list[type[Settings]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, Settings) else []
    return [cls for argument in typing.get_args(annotation) for cls in _settings_classes(argument)]


def without(settings: dict[str, Any], left_out: dict[str, Any]) -> dict[str, Any]:
    """A run's settings (as JSON) without some keys: of a block those that are named, or all of it for True."""
    tree = dict(settings)
    for block, keys in left_out.items():
        if keys is True:
            tree.pop(block, None)
        elif isinstance(tree.get(block), dict):
            tree[block] = {name: value for name, value in tree[block].items() if name not in keys}
    return tree


def to_yaml(settings: Settings) -> str:
    """All values, defaults included, as YAML that `load_settings` reads back."""
    return dump_yaml(settings.model_dump(mode="json"))


def reference(cls: type[Settings], indent: int = 0) -> str:
    """The commented reference of all keys of `cls`: docstring above, default beside, YAML that can be pasted."""
    lines, margin = [], "  " * indent
    for name, field in cls.model_fields.items():
        for line in _wrap(field.description or "(undocumented)", 116 - len(margin)):
            lines.append(f"{margin}# {line}")
        nested = _settings_classes(field.annotation)
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if isinstance(default, Settings) or (field.is_required() and len(nested) == 1):
            lines += [f"{margin}{name}:", reference(nested[0], indent + 1)]
        else:
            shown = "..." if field.is_required() else _flow(default)
            lines.append(f"{margin}{name}: {shown}".rstrip())
    return "\n".join(lines)


def _wrap(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(" ".join(text.split()), width)


def _flow(value: Any) -> str:
    if isinstance(value, list):
        value = [item.model_dump(mode="json") if isinstance(item, Settings) else item for item in value]
    elif isinstance(value, Path):
        value = str(value)
    return dump_yaml(value, flow=True)
