"""What is done to texts, bytes and trees: the forms that public bug reports are full of."""

from __future__ import annotations

import random
from typing import Any

NASTY_TEXT = [
    "010", "0100", "1:30", "yes", "No", "on", "2024-13-45", "2024-01-01", "!!int x", "? [1]: 2", "9" * 5000,
    "[" * 1000, "{" * 70, "{name: [x]}", "[1, [2]]", "null", "~", "", "1e25", "-1e25", ".inf", "-.inf", ".nan",
    "1e999", "1.5", "-1", "0", "true", "'", '"', "&a [*a]", "*a", "<<: *x",
    "!!python/object/apply:os.system ['true']", "#1", "out #1", "a: b", "- 1", "\t", "\x00", "\ufeff", "\u2028",
    "\x85", "\x0c", '"\\ud83d"', "100000000000000000000", "0x_1", "1_000", "%", "@a", "`x`", "{a: {b: {c: {}}}}",
    "[[[[]]]]", "\U0001f600", "x" * 100_000, "2147483648", "-2147483649", "1e-400", "../../etc/passwd", "/",
    "日志 [2024]", "*", "a\nb", "=", "{}", "[]", "[null]", "{null: 1}", "{1: 2}", "[1e400, NaN]", "NaN", "Infinity",
    "-Infinity", "9223372036854775808", "18446744073709551616", "0.1.2", "１２",
]
NASTY_VALUES: list[Any] = [
    None, [], {}, [[]], [None], {"a": 1}, -1, 0, 1, 2**31, 2**63, 2**64, 10**25, 10**400, 1.5, -0.0, 1e25, 1e39, 1e300,
    float("inf"), float("-inf"), float("nan"), "", "x", "1", "１", "1e999", "\ud83d", "\u2028", "\x00", "x" * 10_000,
    True, False, [1] * 1000, {"b": {"c": {"d": {}}}}, [{"a": 1}], "9223372036854775811", b"x",
]


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """`data` with one thing wrong: bits, a part gone, doubled, moved, zeroed or replaced, an end missing."""
    if not data:
        return bytes([rng.randrange(256)])
    at, length = rng.randrange(len(data)), rng.choice((1, 1, 2, 8, 64, 512))
    how = rng.randrange(8)
    if how <= 2:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]
    if how == 3:
        return data[:at]
    if how == 4:
        return data[:at] + data[at + length:]
    if how == 5:
        return data[:at] + bytes(len(data[at:at + length])) + data[at + length:]
    if how == 6:
        return data[:at] + bytes(rng.randrange(256) for _ in range(length)) + data[at + length:]
    return data[:at] + data[at:at + length] + data[at:]


def flipped(data: bytes, rng: random.Random) -> bytes:
    """`data` with one bit turned."""
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]


def mutated_text(text: str, rng: random.Random) -> str:
    """`text` with one to three things wrong, mostly whole values and lines."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        how, at = rng.randrange(6), rng.randrange(len(text) + 1)
        if how == 0:
            text = text[:at] + rng.choice(NASTY_TEXT) + text[at:]
        elif how == 1:
            start, stop = _token(text, at, rng)
            text = text[:start] + rng.choice(NASTY_TEXT) + text[stop:]
        elif how == 2:
            start, stop = _token(text, at, rng)
            text = text[:start] + text[stop:]
        elif how == 3:
            lines = text.split("\n")
            rng.shuffle(lines) if rng.random() < 0.2 else lines.insert(rng.randrange(len(lines) + 1),
                                                                       rng.choice(lines))
            text = "\n".join(lines)
        elif how == 4:
            text = text[:at]
        else:
            text = text[:at] + chr(rng.choice((rng.randrange(32), rng.randrange(0x3000), 0xFEFF, 0x2028))) + text[at:]
    return text


def _token(text: str, at: int, rng: random.Random) -> tuple[int, int]:
    """A word, or what stands behind a colon or equals sign, near `at`."""
    breaks = " \n,:[]{}\"'=" if rng.random() < 0.7 else "\n"
    start = at
    while start > 0 and text[start - 1] not in breaks:
        start -= 1
    stop = at
    while stop < len(text) and text[stop] not in breaks:
        stop += 1
    return start, stop


def mutated_tree(tree: Any, rng: random.Random) -> Any:
    """A copy of a tree of JSON values with one value replaced, left out, doubled or wrapped."""
    places = list(_places(tree))
    path = rng.choice(places)
    return _changed(tree, path, rng)


def _places(tree: Any, path: tuple = ()) -> Any:
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _places(value, (*path, key))


def _changed(tree: Any, path: tuple, rng: random.Random) -> Any:
    if not path:
        return rng.choice((rng.choice(NASTY_VALUES), [tree], {"x": tree}, rng.choice(NASTY_VALUES)))
    if isinstance(tree, dict):
        made = dict(tree)
        if len(path) == 1 and rng.random() < 0.25:
            value = made.pop(path[0])
            if rng.random() < 0.5:
                made[rng.choice(("", "x", str(path[0]) + "s", "\ud800", "日"))] = value
            return made
        made[path[0]] = _changed(tree[path[0]], path[1:], rng)
        return made
    made = list(tree)
    if len(path) == 1 and rng.random() < 0.25:
        del made[path[0]]
        return made
    made[path[0]] = _changed(tree[path[0]], path[1:], rng)
    return made
