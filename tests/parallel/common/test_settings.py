"""Strict YAML: every mistake is one line that names the key, the value and a hint."""

from __future__ import annotations

import pytest
from pydantic import Field

from parallel.common.errors import UserError
from parallel.common.settings import Settings, load_settings, reference, to_yaml


class Inner(Settings):
    width: int = Field(4, ge=1)
    """How wide."""
    rate: float = 0.5
    """How fast."""


class Outer(Settings):
    name: str = "x"
    """What it is called."""
    inner: Inner = Inner()
    """The inside."""
    several: list[Inner] = []
    """More of them."""


def write(tmp_path, text, name="a.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_file_and_overrides(tmp_path):
    path = write(tmp_path, "name: file\ninner: {width: 7}\n")
    settings = load_settings(Outer, path, ["inner.rate=1e-4", "inner.width=9"])
    assert (settings.name, settings.inner.width, settings.inner.rate) == ("file", 9, 1e-4)
    assert load_settings(Outer, None).inner.width == 4


def test_base_file_is_merged_under(tmp_path):
    write(tmp_path, "name: base\ninner: {width: 2, rate: 3.0}\n", "base.yaml")
    settings = load_settings(Outer, write(tmp_path, "base: base.yaml\ninner: {width: 5}\n"))
    assert (settings.name, settings.inner.width, settings.inner.rate) == ("base", 5, 3.0)


def test_round_trip_through_yaml(tmp_path):
    settings = Outer(name="名", inner=Inner(width=3), several=[Inner()])
    assert load_settings(Outer, write(tmp_path, to_yaml(settings))) == settings


def test_reference_is_yaml_of_the_defaults_with_every_docstring(tmp_path):
    text = reference(Outer)
    assert load_settings(Outer, write(tmp_path, text)) == Outer()
    for words in ("How wide.", "The inside.", "What it is called."):
        assert f"# {words}" in text


@pytest.mark.parametrize(("text", "overrides", "parts"), [
    ("inner: {widht: 3}", [], ["inner.widht", "did you mean 'width'?", "(got 3)"]),
    ("inner: {width: 0}", [], ["inner.width", "greater than or equal to 1", "(got 0)"]),
    ("inner: {width: many}", [], ["inner.width", "integer", "'many'"]),
    ("several: [{rat: 1}]", [], ["several.0.rat", "'rate'"]),
    ("name: a\nname: b", [], ["'name' is written twice", "line 2"]),
    ("name: [", [], ["not valid YAML"]),
    ("- 1", [], ["holds a mapping"]),
    ("", ["inner.wide=3"], ["inner.wide", "'width'"]),
    ("", ["inner"], ["key.sub=value"]),
    ("name: a", ["name.b=1"], ["'name' is a value"]),
    ("base: none.yaml", [], ["no such config file"]), (f"base: {'x' * 5000}/a.yaml", [], ["no such config file"]),
])
def test_mistakes_are_one_clear_line(tmp_path, text, overrides, parts):
    with pytest.raises(UserError) as caught:
        load_settings(Outer, write(tmp_path, text), overrides)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_no_object_is_built_from_yaml(tmp_path):
    with pytest.raises(UserError, match="not valid YAML"):
        load_settings(Outer, write(tmp_path, "name: !!python/object/apply:os.system ['true']"))


def test_a_circle_of_bases_is_refused(tmp_path):
    write(tmp_path, "base: a.yaml", "b.yaml")
    with pytest.raises(UserError, match="circle"):
        load_settings(Outer, write(tmp_path, "base: b.yaml"))


def test_a_file_that_is_too_large_is_refused(tmp_path):
    with pytest.raises(UserError, match="too large"):
        load_settings(Outer, write(tmp_path, "#" * (2 << 20)))


def test_settings_without_some_keys():
    from parallel.common.settings import without

    tree = {"output": {"directory": "a"}, "train": {"steps": 3, "log_every": 1}, "adapt": None}
    left = without(tree, {"output": True, "train": {"log_every"}, "adapt": {"pairs"}, "absent": True})
    assert left == {"train": {"steps": 3}, "adapt": None} and tree["train"] == {"steps": 3, "log_every": 1}
