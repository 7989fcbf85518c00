"""The verbs as a user types them: help, configs, the JSON line, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools.__main__ import VERBS
from data_tools.settings import DataSettings
from parallel.common.command import main
from parallel.common.settings import load_settings
from tests.data_tools.planted import raw_pages, read_jsonl, write_jsonl

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs" / "data").glob("*.yaml"))


def run(capsys, *words: str) -> dict:
    assert main("data_tools", VERBS, [str(word) for word in words]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_read(path):
    settings = load_settings(DataSettings, path)
    assert settings.rules.chinese_share.minimum == 0.6 and settings.rules.length.minimum_characters == 150
    assert settings.filter.sensitive.allowed == 3


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_help_explains_every_flag(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        main("data_tools", VERBS, [verb, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--output" in text


def test_the_reference_explains_every_key_and_reads_back(tmp_path, capsys):
    assert main("data_tools", VERBS, ["run", "--print-reference"]) == 0
    text = capsys.readouterr().out
    assert "undocumented" not in text
    (tmp_path / "all.yaml").write_text(text, "utf-8")
    assert load_settings(DataSettings, tmp_path / "all.yaml") == DataSettings()


def test_clean_filter_dedup_mix_report_one_after_the_other(tmp_path, capsys):
    write_jsonl(tmp_path / "raw" / "web.jsonl", raw_pages(60))
    line = run(capsys, "clean", "--input", tmp_path / "raw", "--output", tmp_path / "clean", "--workers", 1)
    assert line["by_rule"] == {"advertisement": 6, "chinese_share": 6, "length": 6}
    assert line["documents_in"] == 60 and line["documents_out"] == 42
    (tmp_path / "words.txt").write_text(read_jsonl(tmp_path / "clean")[0]["text"][20:23], "utf-8")
    line = run(capsys, "filter", "--input", tmp_path / "clean", "--output", tmp_path / "filter", "--workers", 1,
               f"filter.sensitive.words_file={tmp_path / 'words.txt'}", "filter.sensitive.allowed=0")
    assert line["documents_in"] == 42 and line["by_rule"]["sensitive_words"] >= 1
    line = run(capsys, "dedup", "--input", tmp_path / "filter", "--output", tmp_path / "dedup", "--format", "parquet")
    assert line["clusters"] > 0 and len(list((tmp_path / "dedup").glob("*.parquet"))) == 1
    line = run(capsys, "dedup-paragraphs", "--input", tmp_path / "dedup", "--output", tmp_path / "paragraphs")
    kept = line["documents_out"]
    line = run(capsys, "decontaminate", "--input", tmp_path / "paragraphs", "--output", tmp_path / "test-free",
               "--evaluation", tmp_path / "raw" / "web.jsonl")
    assert line["documents_in"] == kept and line["documents_out"] == 0 and line["ngrams"] > 1000
    line = run(capsys, "mix", "--input", tmp_path / "paragraphs", "--output", tmp_path / "mix", "mix.weights={web: 1}",
               "mix.maximum_epochs=1")
    assert line["documents_out"] == kept and line["categories"]["web"]["share"] == 1.0
    words = ["dedup", "--input", str(tmp_path / "filter"), "--output", str(tmp_path / "clean")]
    assert main("data_tools", VERBS, words) == 2 and "holds the output of 'clean'" in capsys.readouterr().err
    line = run(capsys, "report", "--input", tmp_path / "dedup")
    assert line["steps"] == ["dedup"] and Path(line["report"]).is_file()
    removed = read_jsonl(tmp_path / "dedup" / "removed")
    assert removed and all({"id", "kept_id", "similarity"} <= set(record) for record in removed)


def test_a_step_that_leaves_nothing_says_so(tmp_path, capsys):
    write_jsonl(tmp_path / "in.jsonl", [{"id": "a", "text": "好"}])
    words = ["clean", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out")]
    assert main("data_tools", VERBS, words) == 0
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["documents_out"] == 0
    assert "nothing is left: clean removed all 1 documents" in said.err


@pytest.mark.parametrize("words, message", [
    (["clean", "--input", "in.jsonl"], "--output: this flag is needed"),
    (["compare-versions"], "--versions: this flag is needed"),
    (["clean", "--input", "nowhere", "--output", "o"], "no documents found"),
    (["clean", "--input", "in.jsonl", "--output", "o", "--workers", "0"], "at least 1"),
    (["clean", "--input", "in.jsonl", "--output", "in.jsonl"], "is a file"),
    (["clean", "--input", "in.jsonl", "--output", "o", "rules.lenght.enabled=false"], "did you mean 'length'"),
    (["dedup", "--input", "in.jsonl", "--output", "o", "dedup.threshold=1.5"], "threshold"),
    (["dedup", "--input", "in.jsonl", "--output", "."], "other files"),
    (["filter", "--input", "in.jsonl", "--output", "o"], "no filter has its file"),
    (["filter", "--input", "in.jsonl", "--output", "o", "filter.spam.model=none.npz"], "no such classifier"),
    (["mix", "--input", "in.jsonl", "--output", "o"], "no weights"),
    (["decontaminate", "--input", "in.jsonl", "--output", "o"], "no evaluation sets"),
    (["report", "--input", "."], "no figures"),
    (["compare-versions", "--versions", "a", "--development", "in.jsonl", "--output", "o"], "at least two"),
])
def test_mistakes_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", [{"id": "a", "text": "好"}])
    assert main("data_tools", VERBS, words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
