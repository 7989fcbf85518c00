"""YAML as version 1.2's core schema reads it (https://yaml.org/spec/1.2.2/#103-core-schema), bounded.

A plain scalar that YAML 1.1 and 1.2 read as different values (`010`, `1_000`, `yes`, `2024-01-31`) is refused with a
hint to quote it: whoever wrote it meant one of the two, and nobody can know which. `1:30` is text. The parser is
PyYAML's; no object of Python's is ever built. Nesting, length of numbers and what aliases add up to are bounded before
any value is made.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from parallel.common.json_text import has_surrogates

MAX_DEPTH = 64
MAX_NODES = 200_000
"""Values in a document, every alias counted as all that it stands for."""
MAX_DIGITS = 400

_PREFIX = "tag:yaml.org,2002:"
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# What YAML 1.1 (https://yaml.org/type/) reads as something else than 1.2's core schema does.
_AMBIGUOUS = (
    (re.compile(r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF"), "true or false to some readers of YAML"),
    (re.compile(r"[-+]?0[0-9]+"), "octal to some readers of YAML"),
    (re.compile(r"[-+]?0b[01_]+"), "a binary number to some readers of YAML"),
    (re.compile(r"[-+]?[0-9]+_[0-9_]*|[-+]?0x[0-9a-fA-F]*_[0-9a-fA-F_]*"), "a number to some readers of YAML"),
    (re.compile(r"[-+]?([0-9]+_[0-9_]*\.[0-9_]*|[0-9]+\.[0-9]*_[0-9_]*)([eE][-+]?[0-9]+)?"),
     "a number to some readers of YAML"),
    (re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(([Tt]|[ \t]+)[0-9].*)?"), "a date to some readers of YAML"),
)


SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
"""A number of base 60 to readers of YAML 1.1 (`1:30` is 90), text here: ratios are written so, and no setting that
holds a number takes text of this form."""


class BadYaml(ValueError):
    """What is wrong with a YAML text and on which line (from 1)."""

    def __init__(self, what: str, line: int = 1, value: Any = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what, self.line, self.value, self.hint = what, line, value, hint


def load_yaml(text: str) -> Any:
    """The value of a YAML document; None if it is empty.

    Raises:
        BadYaml: anything wrong.
    """
    return _load(text)[0]


def load_yaml_value(text: str) -> Any:
    """The value of one line on a command line: all of the text, also where YAML would see a comment (`out #1`).

    Raises:
        BadYaml: anything wrong, or a `#` behind a value that is no plain text.
    """
    stripped = text.strip()
    if not stripped:
        return ""
    # What no value of one line can begin with (a comment, a block of lines, an alias, signs that are reserved) is text:
    # `*.jsonl`, `|`, `@home`.
    if stripped[0] in "#|>*%@`":
        return stripped
    value, node = _load(stripped)
    if node is not None and (rest := stripped[node.end_mark.index:].strip()):
        if not (isinstance(node, yaml.ScalarNode) and node.style is None) or not rest.startswith("#"):
            raise BadYaml("there is more after the value", value=rest, hint="quote the whole value")
        return stripped
    return value


def _load(text: str) -> tuple[Any, yaml.Node | None]:
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        value = loader.construct_document(node)
        return _unshared(value) if loader.aliases else value, node
    except BadYaml:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).split("\n")[0]
        raise BadYaml(f"not valid YAML: {what}", mark.line + 1 if mark is not None else 1,
                      hint="check indentation, colons and quotes") from None
    except (ValueError, OverflowError, RecursionError, KeyError, TypeError, AttributeError, IndexError) as error:
        # PyYAML's scanner itself: `%YAML 9999...`, an escape beyond Unicode.
        raise BadYaml(f"not valid YAML: {str(error)[:100]}", hint="check indentation, colons and quotes") from None
    finally:
        if loader is not None:
            loader.dispose()


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the core schema's scalars, bounds, unique keys, and keys that are text or numbers."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth, self._nodes, self.aliases = 0, 0, 0
        self._weights: dict[int, int] = {}

    def fetch_flow_collection_start(self, kind: type) -> None:
        # The scanner looks ahead, in time that grows with the square of the brackets that are open.
        if self.flow_level >= MAX_DEPTH:
            raise BadYaml(f"nested deeper than {MAX_DEPTH}", self.line + 1)
        super().fetch_flow_collection_start(kind)

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.anchors and id(self.anchors[event.anchor]) not in self._weights:
                raise BadYaml(f"alias '{event.anchor}' is inside what it names", line)
            node = super().compose_node(parent, index)
            self._count(self._weights[id(node)], line)
            self.aliases += 1
            return node
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise BadYaml(f"nested deeper than {MAX_DEPTH}", line)
        before = self._nodes
        self._count(1, line)
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._weights[id(node)] = self._nodes - before
        return node

    def _count(self, more: int, line: int) -> None:
        self._nodes += more
        if self._nodes > MAX_NODES:
            raise BadYaml(f"more than {MAX_NODES} values, counting what aliases stand for", line)

    def resolve(self, kind: type, value: Any, implicit: Any) -> str:
        return _resolve(kind, value, implicit)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read as the text that it is."""

    def resolve(self, kind: type, value: Any, implicit: Any) -> str:
        tag = _resolve(kind, value, implicit)
        return _AMBIGUOUS_TAG if kind is yaml.ScalarNode and implicit[0] and SEXAGESIMAL.fullmatch(value) else tag

    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump_yaml(value: Any, *, flow: bool = False) -> str:
    """`value` as YAML that `load_yaml` reads back: a block, or with `flow` one line."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=flow,
                     width=1_000_000 if flow else 80)
    return text.removesuffix("...\n").strip() if flow else text


_AMBIGUOUS_TAG = "!ambiguous scalar"


def _resolve(kind: type, value: Any, implicit: Any) -> str:
    if kind is not yaml.ScalarNode:
        return f"{_PREFIX}{'seq' if kind is yaml.SequenceNode else 'map'}"
    if not implicit[0]:
        return f"{_PREFIX}str"
    if value == "<<":
        return f"{_PREFIX}merge"
    if any(pattern.fullmatch(value) for pattern, _ in _AMBIGUOUS):
        return _AMBIGUOUS_TAG
    for name, form in (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT)):
        if form.fullmatch(value):
            return f"{_PREFIX}{name}"
    return f"{_PREFIX}str"


def _unshared(value: Any) -> Any:
    """A copy in which what an alias stands for is there once for each use, so that changing one changes no other."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _text(loader: _Loader, node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise BadYaml("a scalar is wanted here", _line(node))
    if has_surrogates(node.value):
        raise BadYaml("holds half of a surrogate pair", _line(node), hint="write the character itself")
    return node.value


def _null(loader: _Loader, node: yaml.Node) -> None:
    if not _NULL.fullmatch(_text(loader, node)):
        raise BadYaml("not null", _line(node), node.value)


def _bool(loader: _Loader, node: yaml.Node) -> bool:
    if not _BOOL.fullmatch(_text(loader, node)):
        raise BadYaml("neither true nor false", _line(node), node.value)
    return node.value.lower() == "true"


def _int(loader: _Loader, node: yaml.Node) -> int:
    text = _text(loader, node)
    if len(text) > MAX_DIGITS:
        raise BadYaml(f"a number of more than {MAX_DIGITS} digits", _line(node), text)
    if not _INT.fullmatch(text):
        raise BadYaml("not an integer", _line(node), text)
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _float(loader: _Loader, node: yaml.Node) -> float:
    text = _text(loader, node)
    if len(text) > MAX_DIGITS:
        raise BadYaml(f"a number of more than {MAX_DIGITS} digits", _line(node), text)
    if not _FLOAT.fullmatch(text):
        raise BadYaml("not a number", _line(node), text)
    number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if math.isinf(number) and "inf" not in text.lower():
        raise BadYaml("larger than any number", _line(node), text)
    return number


def _ambiguous(loader: _Loader, node: yaml.Node) -> None:
    why = next(why for pattern, why in _AMBIGUOUS if pattern.fullmatch(node.value))
    decimal = re.fullmatch(r"([-+]?)0+([0-9]+)", node.value)
    number = f"write {decimal[1]}{decimal[2]} for the number, or " if decimal else (
        "write true or false, or " if "true or false" in why else "write a number in decimal digits, or "
        if "number" in why else "")
    raise BadYaml(f"'{node.value[:40]}' is {why}", _line(node), node.value,
                  hint=f'{number}quote it for the text: "{node.value[:40]}"')


def _mapping(loader: _Loader, node: yaml.Node) -> Any:
    """In two steps, as PyYAML does it, so that the mapping is there before what is inside it."""
    if not isinstance(node, yaml.MappingNode):
        raise BadYaml("a mapping is wanted here", _line(node))
    made: dict = {}
    yield made
    seen = set()
    for key_node, _ in node.value:
        if key_node.tag == f"{_PREFIX}merge":
            continue
        key = loader.construct_object(key_node, deep=True) if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, (str, int)) or isinstance(key, bool):
            raise BadYaml("a key is a text or a whole number", _line(key_node), hint="quote it")
        if key in seen:
            raise BadYaml(f"key '{str(key)[:80]}' is written twice", _line(key_node), hint="keep one of them")
        seen.add(key)
    made.update(_merged(loader, node))


def _merged(loader: _Loader, node: yaml.MappingNode) -> dict:
    loader.flatten_mapping(node)
    return {loader.construct_object(key, deep=True): loader.construct_object(value, deep=True)
            for key, value in node.value}


def _sequence(loader: _Loader, node: yaml.Node) -> list:
    if not isinstance(node, yaml.SequenceNode):
        raise BadYaml("a list is wanted here", _line(node))
    return [loader.construct_object(item, deep=True) for item in node.value]


def _foreign(loader: _Loader, suffix: str | None, node: yaml.Node) -> None:
    raise BadYaml(f"not valid YAML here: the tag '{str(node.tag)[:60]}' is not known", _line(node), hint="leave it out")


_Loader.yaml_constructors = {
    f"{_PREFIX}null": _null, f"{_PREFIX}bool": _bool, f"{_PREFIX}int": _int, f"{_PREFIX}float": _float,
    f"{_PREFIX}str": _text, f"{_PREFIX}seq": _sequence, f"{_PREFIX}map": _mapping, _AMBIGUOUS_TAG: _ambiguous}
_Loader.yaml_multi_constructors = {"": _foreign}
