"""The one door for structured text: bounded, strict, YAML 1.2, and one line for whatever is wrong."""

from __future__ import annotations

import time

import pytest
from pydantic import BaseModel

from parallel.common.errors import UserError, shown
from parallel.common.files import read_json, write_json
from parallel.common.json_text import dump_json
from parallel.common.lines import json_lines, split_lines, text_lines
from parallel.common.settings import Settings, load_settings
from parallel.common.structured import BadText, parse_json, typed
from parallel.common.yaml_core import BadYaml, dump_yaml, load_yaml, load_yaml_value

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8))


class Sizes(Settings):
    layers: int = 1
    """How many."""
    rate: float = 0.5
    """How fast."""
    names: list[str] = []
    """What they are called."""


@pytest.mark.parametrize(("text", "value"), [
    ("2e-5", 2e-5), ("1e3", 1000.0), ("0x1F", 31), ("0o10", 8), ("+1", 1), ("1.", 1.0), (".5", 0.5), ("null", None),
    ("~", None), ("true", True), ("TRUE", True), ("y", "y"), ("2_6b", "2_6b"), ("1:99", "1:99"),
    ("1:30", "1:30"), ("[3:1]", ["3:1"]), ("a: b", {"a": "b"}),
    ("日志 [2024]", "日志 [2024]"), ("'010'", "010"), ('"yes"', "yes"), ("[1, two]", [1, "two"]), ("0", 0), ("=", "=")])
def test_scalars_of_the_core_schema(text, value):
    assert load_yaml(text) == value and load_yaml_value(text) == value


@pytest.mark.parametrize("text", ["010", "0100", "089", "yes", "Off", "2024-01-31", "2024-13-45",
                                  "2024-01-31 05:00", "1_000", "0b11", "0x_1", "1_0.5", "[010, 020]", "{a: no}"])
def test_what_two_versions_of_yaml_read_differently_is_refused_with_a_hint(text):
    for read in (load_yaml, load_yaml_value):
        with pytest.raises(BadYaml) as caught:
            read(text)
        assert "quote it" in caught.value.hint


@pytest.mark.parametrize("text", [
    "!!int x", "? [1]: 2", "9" * 5000, "[" * 1000, "- " * 500 + "x", "&a [*a]", "{a: *b}", "!!python/name:os.system x",
    "a: 1\na: 2", '"\\ud83d"', "1e999", "{<<: 3}", "%YAML 999999999999999999999.1\n---\na", "a\x00b", "!x y",
    "{true: 1}", "[" * 500_000, "\t- a", '"\\U00110000"', "--- a\n--- b", BOMB])
def test_what_is_no_yaml_is_one_line_soon(text):
    started = time.perf_counter()
    with pytest.raises(BadYaml) as caught:
        load_yaml(text)
    assert "\n" not in caught.value.what and time.perf_counter() - started < 1.0


def test_a_hash_in_an_override_is_part_of_its_value():
    assert load_yaml_value("out #1") == "out #1" and load_yaml_value("#1") == "#1"
    for text in ("*.jsonl", "|", "||", "> 3", "@home", "%d", "`a`"):  # nothing of one line begins so in YAML
        assert load_yaml_value(text) == text
    assert load_settings(Sizes, None, ["names=[语料, 'b #2']"]).names == ["语料", "b #2"]
    for text in ("'a' #b", "[a] # b"):
        with pytest.raises(BadYaml):
            load_yaml_value(text)


def test_what_an_alias_names_is_there_for_each_use():
    tree = load_yaml("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}")
    tree["a"]["b"] = 3
    assert tree == {"a": {"b": 3}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}


@pytest.mark.parametrize("value", ["1e3", "010", "yes", "a #b", "1:30", "x: y", "2024-01-01", "", None, 1e-5, 1e30,
                                   "null", "<<", "名", "a\nb", [1, {"a": "no"}]])
def test_what_is_dumped_reads_back(value):
    assert load_yaml(dump_yaml(value)) == value and load_yaml_value(dump_yaml(value, flow=True)) == value


@pytest.mark.parametrize("text", ['{"a": NaN}', "-Infinity", "1e400", "[" * 5000, '{"a":' * 70 + "1" + "}" * 70,
                                  "9" * 5000, "{", '{"a": 1} x', '"a\nb"', b"\xff", "", "0." + "1" * 500])
def test_what_is_no_json(text):
    with pytest.raises(BadText):
        parse_json(text)


def test_json_that_is_read():
    assert parse_json(b"\xef\xbb\xbf{}") == {} and parse_json("\ufeff[1]") == [1]
    assert parse_json('{"a\\udc00": ["\\ud83d", "\\ud83d\\ude00"]}') == {"a\ufffd": ["\ufffd", "\U0001f600"]}
    assert parse_json("[NaN, 1e400, 1.5]", foreign_numbers="null") == [None, None, 1.5]


@pytest.mark.parametrize(("override", "part"), [
    ("layers=1:30", "decimal digits"), ("layers=1e25", "integer"),
    ("layers=-100000000000000", "integer"), ("rate=.inf", "finite"),
    ("rate=.nan", "finite"),
    ("layers=" + "9" * 5000, "digits"), ("layers=[[[1]]]", "layers"), ("names={a: 1}", "names"),
    ("names=" + "[" * 70, "nested"), ("? [1]: 2=3", "known keys")])
def test_absurd_values_are_one_short_line(override, part):
    with pytest.raises(UserError, match=part) as caught:
        load_settings(Sizes, None, [override])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500


def test_values_in_errors_are_bounded(tmp_path):
    path = tmp_path / "bomb.yaml"
    path.write_text("layers: " + "{a: " * 60 + "1" + "}" * 60)
    started = time.perf_counter()
    with pytest.raises(UserError):
        load_settings(Sizes, path)
    wide = {str(i): ["x" * 1000] * 1000 for i in range(1000)}
    assert len(shown(wide)) <= 120 and len(shown(10**5000)) < 60 and time.perf_counter() - started < 1.0
    assert len(str(UserError("x" * 10_000, value="y" * 10**6))) < 2000


def test_every_value_has_a_json_text():
    import numpy as np

    text = dump_json({"a": float("nan"), "b": np.float32(1.5), 3: (1, {2}), "c": b"\xff", "d": "\ud83d",
                      None: np.arange(2)})
    assert parse_json(text) == {"a": None, "b": 1.5, "3": [1, [2]], "c": "/w==", "d": "\ufffd", "null": [0, 1]}
    assert dump_json("\ud83d", ascii_only=True) == '"\\ufffd"'


def test_a_changed_byte_in_a_json_file_is_reported(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"iteration": 100, "名": [1.5, None]})
    assert read_json(path, sealed=True) == {"iteration": 100, "名": [1.5, None]}
    path.write_text(path.read_text().replace("100", "108"))
    with pytest.raises(UserError, match="changed since it was written"):
        read_json(path)
    path.write_text('{"iteration": 108}')
    assert read_json(path) == {"iteration": 108}
    with pytest.raises(UserError, match="no digest"):
        read_json(path, sealed=True)


def test_typed_names_the_key():
    class Line(BaseModel):
        file: str
        size: int

    assert typed({"a": {"file": "x", "size": 3}}, dict[str, Line], where="f")["a"].size == 3
    with pytest.raises(UserError, match=r"f: a.size.*got 'many'"):
        typed({"a": {"file": "x", "size": "many"}}, dict[str, Line], where="f")


def test_a_line_ends_in_a_line_feed_and_nowhere_else(tmp_path):
    text = "一\u2028二\x85三\x0c四\rfünf\r\n\nzwei"
    assert split_lines(text) == ["一\u2028二\x85三\x0c四\rfünf", "", "zwei"]
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [line for _, line in text_lines(path)] == split_lines(text)
    for charset in ("utf-16", "utf-32"):
        path.write_bytes(text.encode(charset))
        assert [line for _, line in text_lines(path)] == split_lines(text)
    path.write_bytes("文字".encode("gb18030"))
    with pytest.raises(UserError, match="not UTF-8.*line 1|line 1.*not UTF-8"):
        list(text_lines(path))
    path.write_text('\ufeff{"a": 1}\n\n[2]\n')
    with pytest.raises(UserError, match="line 3.*not an object but an array"):
        list(json_lines(path))
