"""The quality loop: samples that can be compared, and one command from two versions to a verdict."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools import compare_versions
from data_tools.__main__ import VERBS
from data_tools.compare_versions import draw_sample
from data_tools.records import ReadSettings
from data_tools.settings import ComparisonSettings
from parallel.common.command import main
from parallel.common.errors import UserError
from tests.data_tools.planted import make_text, read_jsonl, write_jsonl


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """Version a, version b with half of its documents damaged, and a development set of which a holds one text."""
    folder, rng = tmp_path_factory.mktemp("versions"), random.Random(1)
    texts = [make_text(rng, 100, 1) for _ in range(100)]
    write_jsonl(folder / "a" / "x.jsonl", [{"text": text} for text in texts])
    write_jsonl(folder / "b" / "x.jsonl", [{"text": text[::-1] if n % 2 else text} for n, text in enumerate(texts)])
    write_jsonl(folder / "dev" / "x.jsonl", [{"text": make_text(rng, 100, 1)}, {"text": texts[0]}])
    return folder, texts


def test_samples_have_one_size_share_documents_and_leave_the_development_set_out(versions, tmp_path):
    folder, texts = versions
    excluded = compare_versions._write_development([str(folder / "dev")], ReadSettings(), tmp_path)
    found = {}
    for name in ("a", "b"):
        quality, path = ComparisonSettings(characters=4000), tmp_path / name / "part-00000.jsonl"
        assert 4000 <= draw_sample([str(folder / name)], ReadSettings(), quality, path, excluded) < 4200
        found[name] = {d["text"] for d in read_jsonl(path.parent)}
    assert texts[0] not in found["a"] | found["b"]
    assert found["a"] & found["b"] and found["a"] != found["b"]
    with pytest.raises(UserError, match="too few characters"):
        draw_sample([str(folder / "a")], ReadSettings(), ComparisonSettings(), tmp_path / "x.jsonl", set())


def test_the_loop_trains_each_version_once_on_equal_terms(versions, tmp_path, monkeypatch, capsys):
    """The language model's command line is replaced by one that counts reversed texts: what is tested is the order,
    the equal settings and the comparison."""
    folder, texts = versions
    calls = []

    def fake(verb, config, overrides):
        calls.append((verb, config, overrides))
        if verb == "train-vocabulary":
            Path(overrides["data.tokenizer"]).write_text("vocabulary")
        if verb != "train":
            return {}
        sample = read_jsonl(Path(overrides["data.directory"]).parent / "sample")
        return {"validation_perplexity": 10.0 + sum(d["text"] not in texts for d in sample)}

    monkeypatch.setattr(compare_versions, "call_pangu", fake)
    words = ["compare-versions", "--versions", str(folder / "b"), str(folder / "a"), "--development",
             str(folder / "dev"),
             "--output", str(tmp_path / "out"), "quality.characters=4000", "quality.pangu={train.steps: 7}"]
    assert main("data_tools", VERBS, words) == 0
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert line["better"] == "a" and line["perplexity"]["a"] == 10.0 < line["perplexity"]["b"]
    assert [verb for verb, *_ in calls] == ["train-vocabulary", "pack", "pack", "train", "pack", "train"]
    trained = [overrides for verb, _, overrides in calls if verb == "train"]
    same = {"train.steps", "data.tokenizer", "data.validation_directory"}
    assert all({key: entry[key] for key in same} == {key: trained[0][key] for key in same} for entry in trained)
    assert trained[0]["train.steps"] == 7 and trained[0]["output.directory"] != trained[1]["output.directory"]
    calls.clear()
    assert main("data_tools", VERBS, words) == 0
    assert [verb for verb, *_ in calls] == ["pack"]
    assert main("data_tools", VERBS, [*words[:2], *words[3:]]) == 2


@pytest.mark.slow
def test_shuffled_text_is_judged_worse(tmp_path):
    """The real thing: two tiny models; a version whose characters are shuffled must come out worse."""
    from data_tools.synthetic.generate import generate_corpus

    rng = random.Random(1)
    texts = [document["text"] for document in generate_corpus(700_000, seed=1)]
    shuffled = ["".join(rng.sample(text, len(text))) for text in texts]
    for name, version in (("whole", texts), ("shuffled", shuffled)):
        write_jsonl(tmp_path / name / "x.jsonl", [{"text": text} for text in version])
    write_jsonl(tmp_path / "dev" / "x.jsonl", [{"text": d["text"]} for d in generate_corpus(50_000, seed=9)])
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "my.yaml").write_text(f"base: {root}/configs/pangu/tiny.yaml\n")
    done = subprocess.run(
        [sys.executable, "-m", "data_tools", "compare-versions", "--versions", "shuffled", "whole", "--development",
         "dev", "--output", "out", "quality.pangu_config=my.yaml", "quality.characters=150000",
         "quality.vocabulary_size=1000",
         "quality.pangu={train.steps: 60, train.validate_every: null, model.layers: 2, model.hidden_size: 64}"],
        cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr[-2000:]
    line = json.loads(done.stdout.strip().splitlines()[-1])
    assert line["better"] == "whole" and line["perplexity"]["whole"] < 0.9 * line["perplexity"]["shuffled"]
