"""What a user can get wrong is one clear line and exit code 2, and nothing is written half."""

from __future__ import annotations

import json
import shutil

import pytest

from data_tools.synthetic.generate import generate_corpus
from pangu.__main__ import VERBS
from parallel.common.command import main

SIZES = ["model.layers=2", "model.hidden_size=16", "model.heads=2", "model.sequence_length=32", "train.steps=2",
         "train.global_batch_size=2", "train.validation_batches=1", "output.tensorboard=false"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A finished tiny run: corpus, vocabulary, records, checkpoint."""
    home = tmp_path_factory.mktemp("home")
    with (home / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for document in generate_corpus(150_000):
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
    for verb in ("train-vocabulary", "pack", "train"):
        assert run(home, verb) == 0
    return home


def run(home, verb, *words):
    defaults = {"data.corpus": home / "corpus.jsonl", "data.tokenizer": home / "v.model",
                "data.directory": home / "records", "output.directory": home / "run", "model.vocabulary_size": 950}
    words = [str(word) for word in words]
    given = [f"{key}={value}" for key, value in defaults.items() if not any(w.startswith(f"{key}=") for w in words)]
    return main("pangu", VERBS, [verb, *SIZES, *given, *map(str, words)])


def refused(capsys, home, verb, *words):
    """Runs a verb that must fail; returns its one line."""
    capsys.readouterr()
    assert run(home, verb, *words) == 2
    captured = capsys.readouterr()
    line = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(line) == 1, captured.err
    assert "Traceback" not in captured.err
    assert not captured.out.strip()
    return line[0]


@pytest.mark.parametrize(("name", "content", "part"), [
    ("missing.txt", None, "missing.txt"),
    ("empty.txt", b"", "empty"),
    ("latin.txt", "caf\xe9 ".encode("latin-1") * 40, "UTF-8"),
    ("binary.txt", bytes(range(256)) * 8, "binary"),
    ("cut.jsonl.xz", b"\xfd7zXZ\x00\x00\x04", "damaged"),
    ("keys.jsonl", b'{"body": "no text"}\n', "text"),
    ("not.jsonl", b"{\n", "line 1"),
])
def test_corpus(home, capsys, tmp_path, name, content, part):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    for verb, made in (("train-vocabulary", "data.tokenizer"), ("pack", "data.directory")):
        target = tmp_path / f"made-by-{verb}"
        assert part in refused(capsys, home, verb, f"data.corpus={path}", f"{made}={target}")
        assert not target.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ([name] if content is not None else [])


def test_no_corpus_named(capsys):
    assert main("pangu", VERBS, ["train-vocabulary"]) == 2
    assert "data.corpus" in capsys.readouterr().err


def test_vocabulary_of_another_size(home, capsys):
    for verb, words in (("pack", ["pack.overwrite=true"]), ("train", []), ("generate", ["--prompt", "你好"])):
        line = refused(capsys, home, verb, "model.vocabulary_size=960", *words)
        assert "950" in line
        assert "960" in line


def test_checkpoint_of_another_shape(home, capsys):
    line = refused(capsys, home, "generate", "--prompt", "你好", "model.hidden_size=32")
    assert "16" in line
    assert "32" in line


def test_damaged_checkpoint(home, capsys, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(home / "run", copy)
    for file in copy.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    assert "damaged" in refused(capsys, home, "generate", "--prompt", "你好", "--checkpoint", copy)


def test_damaged_records(home, capsys, tmp_path):
    copy = tmp_path / "records"
    shutil.copytree(home / "records", copy)
    for file in copy.iterdir():
        if "train" in file.name and not file.name.endswith((".db", ".json")):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    line = refused(capsys, home, "train", f"data.directory={copy}", f"output.directory={tmp_path / 'run'}")
    assert "damaged" in line or "pack" in line


def test_records_of_another_length(home, capsys, tmp_path):
    line = refused(capsys, home, "train", "model.sequence_length=64", f"output.directory={tmp_path / 'run'}")
    assert "sequence_length" in line


def test_prompt_longer_than_the_context(home, capsys):
    assert "context of 32 tokens" in refused(capsys, home, "generate", "--prompt", "天" * 200)


def test_empty_prompt(home, capsys):
    assert "empty" in refused(capsys, home, "generate", "--prompt", "")


@pytest.mark.parametrize(("word", "part"), [
    ("model.head=2", "'heads'"), ("model.heads=3", "hidden_size"), ("train.optimiser.name=x", "'optimizer'"),
    ("model.dropout=1.5", "model.dropout"), ("parallel.op=2", "parallel"), ("train.precision=fp8", "train.precision")])
def test_settings(home, capsys, tmp_path, word, part):
    assert part in refused(capsys, home, "train", word, f"output.directory={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_no_disk_space(home, capsys, tmp_path, monkeypatch):
    import collections
    import os

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 0))
    target = tmp_path / "v.model"
    assert "space" in refused(capsys, home, "train-vocabulary", f"data.tokenizer={target}")
    assert list(tmp_path.iterdir()) == []
