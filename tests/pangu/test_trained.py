"""A model trained on the generated corpus is well above chance on generated tasks, so the machinery measures something.

One test trains a minute on the corpus's opinions alone; the other trains the config of the quickstart on all of the
corpus, and also checks its scores of the published data sets against the slow scorer.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from data_tools.synthetic.generate import generate_corpus, generate_questions, write_jsonl
from data_tools.synthetic.skills import sentiment_document
from data_tools.synthetic.words import Draw
from pangu.__main__ import VERBS
from parallel.common.command import main
from tests.pangu.numpy_model import token_scores
from tests.pangu.tiny import arrays

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data" / "evaluation"
SMALL = ["model.layers=2", "model.hidden_size=64", "model.heads=2", "model.sequence_length=96", "model.ffn_std=0.125",
         "model.linear_std=0.125", "model.vocabulary_size=600", "train.steps=500", "train.global_batch_size=16",
         "train.validate_every=null", "train.optimizer.learning_rate=0.004",
         "train.optimizer.schedule.warmup_steps=20"]
TINY, QUICKSTART = (str(ROOT / f"configs/pangu/{name}.yaml") for name in ("tiny", "quickstart"))
PUBLISHED = ["ocnli", "tnews", "chid", "cluewsc2020", "csl", "iflytek", "c3"]


def trained(config: str, home: Path, documents, questions, *words: str) -> list[str]:
    """Trains with the plain verbs on `documents`; returns the words that name the run and its settings."""
    write_jsonl(documents, home / "corpus.jsonl")
    (home / "data" / "synthetic").mkdir(parents=True)
    write_jsonl(questions, home / "data" / "synthetic" / "questions.jsonl")
    where = ["--config", config, f"data.corpus={home / 'corpus.jsonl'}", f"data.tokenizer={home / 'v.model'}",
             f"data.directory={home / 'records'}", f"output.directory={home / 'run'}", "output.tensorboard=false",
             "output.save_optimizer=false", *words]
    for verb in ("train-vocabulary", "pack", "train"):
        assert main("pangu", VERBS, [verb, *where]) == 0
    return where


def evaluate(where: list[str], home: Path, capsys, *words: object) -> dict:
    capsys.readouterr()
    assert main("pangu", VERBS, ["evaluate", "--output", str(home / "evaluation"), *map(str, words), *where]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])["results"]


def assert_above_chance(result: dict, least: float, standard_errors: float = 5.0) -> None:
    """At least `least`, and further above chance than luck allows."""
    assert result["metric"] >= least
    chance = result["chance"]
    assert result["metric"] - chance > standard_errors * (chance * (1 - chance) / result["instances"]) ** 0.5


@pytest.mark.slow
def test_a_model_of_opinions_is_above_chance_with_and_without_examples(tmp_path, capsys):
    draw = Draw(random.Random(3))
    where = trained(TINY, tmp_path, [{"text": sentiment_document(draw)} for _ in range(9000)],
                    generate_questions("sentiment", 150), *SMALL)
    words = ("--tasks", "synthetic_sentiment", "--data", tmp_path / "data")
    for shots in (0, 2):
        result = evaluate(where, tmp_path, capsys, *words, "--shots", shots)["synthetic_sentiment"]
        assert result["instances"] == 150
        assert result["shots"] >= 0.4 * shots  # as many as fit
        assert_above_chance(result, 0.65, 3.5)
    # After one step it is near chance, so it is the training that is measured.
    young = [*where, "train.steps=1", f"output.directory={tmp_path / 'young'}"]
    assert main("pangu", VERBS, ["train", *young]) == 0
    result = evaluate(young, tmp_path / "young", capsys, *words)["synthetic_sentiment"]
    assert abs(result["metric"] - 0.5) < 4 * (0.25 / 150) ** 0.5


@pytest.mark.slow
def test_the_quickstarts_model_is_above_chance_and_scores_as_the_slow_scorer(tmp_path, capsys):
    """Trains about 5 minutes."""
    questions = [q for skill, count in (("context", 400), ("sentiment", 200), ("arithmetic", 200))
                 for q in generate_questions(skill, count)]
    where = trained(QUICKSTART, tmp_path, generate_corpus(), questions)
    tasks = "synthetic_context,synthetic_sentiment,synthetic_arithmetic"
    for shots, context in ((0, 0.6), (1, 0.35), (2, 0.3)):  # other passages in front make it harder to find the fact
        results = evaluate(where, tmp_path, capsys, "--tasks", tasks, "--data", tmp_path / "data", "--shots", shots)
        assert_above_chance(results["synthetic_sentiment"], 0.7)
        assert_above_chance(results["synthetic_context"], context, 2.0)
        assert_above_chance(results["synthetic_arithmetic"], 0.35, 3.0)
        assert results["synthetic_sentiment"]["shots"] == shots
    if not SHARED.is_dir():
        return
    from pangu.evaluation.instances import InstanceBuilder
    from pangu.evaluation.task import Source, load_task

    model, tokenizer = _model_of(where)
    slow = {name: value.astype(np.float64) for name, value in arrays(model).items()}
    for name in PUBLISHED:
        samples = tmp_path / f"{name}.jsonl"
        evaluate(where, tmp_path, capsys, "--tasks", name, "--data", SHARED, "--shots", 1, "--limit", 3,
                 "--log-samples", samples)
        source = Source(load_task(name), SHARED)
        instances = InstanceBuilder(source.task, source, tokenizer, model.config.sequence_length, 1).instances(3)
        for row, instance in zip(map(json.loads, samples.read_text().splitlines()), instances, strict=True):
            expected = [-token_scores(slow, model.config, [*a, *b], len(a)).mean() for a, b in instance.requests]
            assert row["scores"] == pytest.approx(expected, abs=2e-3)
            assert row["prediction"] == int(np.argmin(expected)) or np.ptp(expected) < 5e-3


def _model_of(where: list[str]):
    from pangu.data.tokenizer import Tokenizer
    from pangu.generation.backend import load_model
    from pangu.settings import Run
    from parallel.common.settings import load_settings

    settings = load_settings(Run, QUICKSTART, where[2:])
    return load_model(settings, settings.output.directory), Tokenizer(settings.data.tokenizer)
