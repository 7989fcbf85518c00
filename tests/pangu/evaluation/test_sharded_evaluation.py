"""An evaluation by a model over several processes gives the results of one process, also when it was killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_tools.synthetic.generate import generate_questions
from data_tools.synthetic.skills import sentiment_document
from data_tools.synthetic.words import Draw
from pangu.__main__ import VERBS
from parallel.__main__ import VERBS as PARALLEL_VERBS
from parallel.common.command import main
from parallel.launch.plan import free_port
from tests.pangu.test_trained import TINY, trained

ROOT = Path(__file__).parents[3]
CONFIG = str(ROOT / "configs/pangu/tiny.yaml")
SIZES = ["model.layers=3", "model.hidden_size=32", "model.heads=4", "model.sequence_length=96", "model.ffn_std=0.125",
         "model.linear_std=0.125", "model.vocabulary_size=600"]
LAYOUTS = ["parallel.pipeline.stages=2", "parallel.op=2 parallel.pipeline.stages=2", "parallel.data=2 parallel.op=2",
           "parallel.op=4"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model that was trained for a moment, so that greedy texts are no ties; questions and passages."""
    home = tmp_path_factory.mktemp("evaluation")
    draw = Draw(random.Random(3))
    trained(TINY, home, [{"text": sentiment_document(draw)} for _ in range(1200)], generate_questions("sentiment", 40),
            *SIZES, "train.steps=30", "train.global_batch_size=16", "train.validate_every=null",
            "train.optimizer.learning_rate=0.004", "train.optimizer.schedule.warmup_steps=5")
    (home / "data" / "cmrc2018").mkdir()
    passages = [{"paragraphs": [{"id": f"P{n}", "context": f"这件衣服{n}号颜色很好看。" * 4, "qas": [
        {"id": f"Q{n}", "question": "颜色怎么样？", "answers": [{"text": "很好看", "answer_start": 7}]}]}]}
        for n in range(8)]
    (home / "data" / "cmrc2018" / "trial.json").write_text(json.dumps({"data": passages}))
    return home


def words_of(home, output, *more):
    """Flags and settings of an evaluation."""
    return ["evaluate", "--config", CONFIG, "--tasks", "synthetic_sentiment,cmrc2018", "--data", str(home / "data"),
            "--questions", str(home / "data" / "synthetic" / "questions.jsonl"), "--shots", "2", "--log-samples",
            str(output / "samples.jsonl"), "--output", str(output), "--checkpoint", str(home / "run"), *more, *SIZES,
            f"data.tokenizer={home / 'v.model'}", f"output.directory={output}", "generate.batch_size=4",
            "generate.prefill_chunk=32"]


def evaluated(home, output, capsys, *more):
    """(results, samples) of the verb."""
    capsys.readouterr()
    assert main("pangu", VERBS, words_of(home, output, *more)) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return figures["results"], [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(home, tmp_path_factory):
    """What one process says."""
    output = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "-m", "pangu", *words_of(home, output)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    return json.loads(told.strip().splitlines()[-1])["results"], samples


def assert_same(found, wanted):
    assert found[0] == wanted[0]
    for one, other in zip(found[1], wanted[1], strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)
        assert {**one, "scores": 0} == {**other, "scores": 0}


@pytest.mark.parametrize("share", [True, False])
def test_scores_by_the_engine_are_those_of_the_graphs(share):
    """Requests that share much, little and nothing; a whole context; one token before one token."""
    from pangu.evaluation.scoring import Scorer
    from pangu.evaluation.span_scoring import SpanScorer
    from pangu.generation.backend import Backend
    from tests.pangu.tiny import tiny_model

    model, generator = tiny_model(), np.random.default_rng(2)
    front, other = (generator.integers(10, 300, length).tolist() for length in (50, 33))

    def some(count):
        return generator.integers(10, 300, count).tolist()

    requests = [(front + some(1 + n % 9), some(1 + n % 5)) for n in range(20)]
    requests += [(requests[3][0], [11]), (requests[3][0][:20], [12]), (other, other), ([9], [10]), (other, other[:16]),
                 (front, some(47)), (other[:16], other[16:]), requests[3]]
    wanted = Scorer(model).loglikelihood_and_greedy(requests)
    told = {}
    scorer = SpanScorer(Backend(model), 24, share)
    found = scorer.loglikelihood_and_greedy(requests, lambda numbers, answers: told.update(
        zip(numbers, answers, strict=True)))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], abs=2e-4)
    assert [told[number] for number in range(len(requests))] == found
    assert scorer.loglikelihood_and_greedy(requests) == found  # from a warm cache


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parallel.op=2", *LAYOUTS], ids=lambda layout: layout.replace("parallel.", ""))
def test_every_layout_gives_the_results_of_one_process(home, alone, tmp_path, capsys, layout):
    words = layout.split()
    processes = int(np.prod([int(word.rpartition("=")[2]) for word in words]))
    assert_same(evaluated(home, tmp_path, capsys, "--nproc", str(processes), *words), alone)


@pytest.mark.slow
def test_slices_of_another_layout_are_evaluated_as_they_are(home, alone, tmp_path, capsys):
    layout = ["parallel.op=4", "parallel.pipeline.stages=2"]
    assert main("parallel", PARALLEL_VERBS, ["reshard", "--config", CONFIG, "--from", str(home / "run"), "--to",
                                             str(tmp_path / "slices"), *SIZES, *layout]) == 0
    assert len(list((tmp_path / "slices").glob("parameters-*"))) > 4
    capsys.readouterr()
    for name, more in (("one", []), ("two", ["--nproc", "2", "parallel.op=2"])):
        (tmp_path / name).mkdir()
        assert_same(evaluated(home, tmp_path / name, capsys, "--checkpoint", str(tmp_path / "slices"), *more), alone)


@pytest.mark.slow
def test_two_machines_share_an_evaluation(home, alone, tmp_path, capsys):
    more = ["--nodes", "2", "--master", f"127.0.0.1:{free_port()}", "--nproc", "2", "parallel.op=2"]
    other = subprocess.Popen([sys.executable, "-m", "pangu", *words_of(home, tmp_path, *more, "--node-rank", "1")],
                             cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert_same(evaluated(home, tmp_path, capsys, *more), alone)
        assert other.wait(60) == 0
    finally:
        other.kill()


def answers_in(folder):
    """Keys of the answers that are kept, each as often as it was computed."""
    lines = [line for path in folder.glob("requests/*.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line)[0] for line in lines if line.endswith("]")]


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_ends_alike(home, alone, tmp_path, capsys):
    more = ["--nproc", "4", "parallel.data=2", "parallel.op=2"]
    running = subprocess.Popen([sys.executable, "-m", "pangu", *words_of(home, tmp_path, *more)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(answers_in(tmp_path)) < 12 and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.005)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    time.sleep(2)  # its ranks end with it
    before = answers_in(tmp_path)
    assert len(before) >= 12
    found = evaluated(home, tmp_path, capsys, *more)
    after = Counter(answers_in(tmp_path))
    assert len(before) < after.total() and {key: after[key] for key in before} == Counter(before)
    assert_same(found, alone)
