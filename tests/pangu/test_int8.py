"""PanGu-alpha with int8 weights: its scores and texts, the verb, and every way to get such a model."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml

from data_tools.synthetic.generate import generate_corpus, generate_questions, write_jsonl
from pangu.__main__ import VERBS
from parallel.common.command import main
from parallel.layers import int8
from parallel.layers.int8_numbers import GROUP, dequantize, quantize
from tests.pangu.numpy_model import forward
from tests.pangu.tiny import VOCABULARY, arrays, tiny_model

SIZES = {"hidden_size": 160, "heads": 4, "ffn_size": 200, "layers": 3, "embedding_std": 0.1, "linear_std": 0.1,
         "ffn_std": 0.1}


def quantized(group=None, kernel=True, monkeypatch=None):
    """(a model with int8 weights, the float arrays that they stand for, relative errors)."""
    from pangu.int8 import fill, swap

    model = tiny_model(**SIZES)
    expected = {}
    for name, array in arrays(model).items():
        matrix = array.ndim == 2 and "position" not in name and "query_embedding" not in name
        expected[name] = dequantize(*quantize(array.T, group)).T if matrix else array.copy()
    errors = fill(model, swap(model, group))
    if not kernel:
        monkeypatch.setattr(int8, "library", lambda: None)
    mode = int8.prepare(model)
    if kernel and mode != "kernel":
        pytest.skip("no C++ compiler here")
    model.set_train(False)
    return model, expected, errors


@pytest.mark.parametrize(("group", "kernel"), [(None, True), (GROUP, True), (None, False), (GROUP, False)])
def test_a_quantized_model_is_the_model_of_its_widened_weights(group, kernel, monkeypatch):
    from mindspore import Tensor

    model, expected, errors = quantized(group, kernel, monkeypatch)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 96)
    positions, mask = np.arange(96, dtype=np.int32)[None], np.tril(np.ones((1, 96, 96), np.float32))
    logits = model(Tensor(ids[None].astype(np.int32)), Tensor(positions), Tensor(mask)).asnumpy()
    wanted = forward(expected, model.config, ids)
    np.testing.assert_allclose(logits, wanted, atol=2e-5 * np.abs(wanted).max())
    exact = forward(arrays(tiny_model(**SIZES)), model.config, ids)
    assert 0 < np.abs(logits - exact).max() < 0.2 * np.abs(exact).max()
    assert len(errors) == 1 + 6 * 3 and 0 < max(errors.values()) < 0.02


@pytest.mark.parametrize("group", [None, GROUP])
def test_scores_and_texts_are_those_of_the_widened_weights(group):
    from pangu.evaluation.scoring import Scorer
    from pangu.generation.generate import Generator
    from pangu.generation.settings import GenerateSettings
    from tests.pangu.numpy_model import token_scores

    model, expected, _ = quantized(group)
    rng = np.random.default_rng(1)
    requests = [(rng.integers(10, VOCABULARY, 20).tolist(), rng.integers(10, VOCABULARY, 5).tolist()) for _ in range(4)]
    for (prefix, tail), score in zip(requests, Scorer(model).loglikelihood(requests), strict=True):
        assert score == pytest.approx(token_scores(expected, model.config, [*prefix, *tail], 20).sum(), abs=2e-3)
    settings = GenerateSettings(max_new_tokens=6, temperature=0.0, stop_ids=[])
    for (prefix, _), completion in zip(requests, Generator(model, None, settings).generate_ids(
            [prefix for prefix, _ in requests]), strict=True):
        grown = list(prefix)
        for _ in range(6):
            grown.append(int(forward(expected, model.config, np.array(grown))[-1].argmax()))
        assert completion.ids == grown[20:]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run with a vocabulary, records and the checkpoint of an untrained model."""
    from parallel.checkpoint.full import save_checkpoint

    home = tmp_path_factory.mktemp("int8")
    write_jsonl(generate_corpus(150_000), home / "corpus.jsonl")
    model = tiny_model(vocabulary_size=950, **SIZES)
    config = {"model": model.config.model_dump(mode="json"),
              "data": {"tokenizer": str(home / "v.model"), "corpus": str(home / "corpus.jsonl"),
                       "directory": str(home / "records")},
              "output": {"directory": str(home / "run")}}
    (home / "run.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    for verb in ("train-vocabulary", "pack"):
        assert main("pangu", VERBS, [verb, "--config", str(home / "run.yaml")]) == 0
    save_checkpoint(home / "run" / "checkpoints", 5, list(model.get_parameters()), (), {"run": {"note": "kept"}})
    return home


def run(home, capsys, verb, *words, code=0):
    capsys.readouterr()
    assert main("pangu", VERBS, [verb, "--config", str(home / "run.yaml"), *map(str, words)]) == code
    captured = capsys.readouterr()
    return json.loads(captured.out.strip().splitlines()[-1]) if code == 0 else captured.err.strip().splitlines()


def test_from_the_command_line(home, capsys):
    """Quantized beforehand or while loading, by the kernels' loader or by the model's: the same texts and scores."""
    found = run(home, capsys, "quantize", "--output", home / "q", "--records", 8)
    assert set(found) >= {"bytes_before", "bytes_after", "perplexity_before", "perplexity_after", "max_relative_error"}
    assert found["bytes_after"] < 0.45 * found["bytes_before"]  # half of so small a model is positions
    assert 0 < found["max_relative_error"] < 0.02 and found["quantized"] == 19
    assert found["perplexity_after"] == pytest.approx(found["perplexity_before"], rel=0.1)
    assert found["perplexity_after"] != found["perplexity_before"]
    from parallel.checkpoint.full import Checkpoint

    state = Checkpoint(home / "q" / "checkpoints" / "step_00000005").state
    assert state["quantization"] == {"bits": 8, "group": None} and state["run"] == {"note": "kept"}

    words = ["--prompt", "问：3加4等于几？", "--prompt", "北京", "generate.max_new_tokens=12",
             "generate.temperature=0.7"]
    plain = run(home, capsys, "generate", *words)["outputs"]
    stored = run(home, capsys, "generate", "--checkpoint", home / "q", *words)["outputs"]
    assert run(home, capsys, "generate", "--int8", *words)["outputs"] == stored != plain

    write_jsonl(generate_questions("sentiment", 10), home / "questions.jsonl")
    asked = ["--questions", home / "questions.jsonl"]
    assert (run(home, capsys, "evaluate", "--int8", *asked)["results"]
            == run(home, capsys, "evaluate", "--checkpoint", home / "q", *asked)["results"])


def test_perplexity_is_that_of_training(home, capsys):
    """Over the same records, the validation of the trainer gives the same number."""
    from pangu.generation.backend import load_model
    from pangu.quantize import perplexity
    from pangu.settings import Run
    from pangu.train import sources, training_step
    from parallel.checkpoint.full import load_parameters
    from parallel.common.settings import load_settings
    from parallel.training.device import start_device
    from parallel.training.mindspore_backend import MindSporeBackend
    from parallel.training.validation import Validation

    processes = start_device()
    settings = load_settings(Run, home / "run.yaml", ["train.global_batch_size=8"])
    ours = perplexity(load_model(settings, home / "run"), settings, 1000)
    step = training_step(settings, processes)
    load_parameters(home / "run" / "checkpoints" / "step_00000005", list(step.network.model.get_parameters()))
    figures = Validation(MindSporeBackend(step), sources(settings, (0, 1))[1])(0)
    assert ours == pytest.approx(figures["validation_perplexity"], rel=1e-4)


def test_mistakes_are_one_line(home, capsys):
    run(home, capsys, "quantize", "--output", home / "twice", "--records", 0, "--group", 128)
    for words, message in ((["--checkpoint", home / "twice", "--output", home / "r"], "quantized already"),
                           (["--output", home / "run"], "of its own"),
                           (["--output", home / "r", "--checkpoint", home / "none"], "no checkpoint"),
                           (["--output", home / "r", f"data.directory={home / 'none'}"], "none")):
        line, = run(home, capsys, "quantize", *words, code=2)
        assert message in line
    line, = run(home, capsys, "generate", "--checkpoint", home / "twice", "--int8", "--prompt", "北", code=2)
    assert "quantized already" in line


@pytest.mark.slow
def test_a_program_generates_the_same_texts_from_the_command(home, capsys, tmp_path):
    words = ["--config", str(home / "run.yaml"), "parallel.op=1", "generate.batch_size=2", "generate.prefill_chunk=16"]
    quantized, program = str(home / "program_q"), str(tmp_path / "program")
    run(home, capsys, "quantize", "--output", quantized, "--records", 0)
    rules = ["generate.max_new_tokens=12", "generate.temperature=0.0", "generate.batch_size=2"]
    asked = ["--prompt", "问：3加4等于几？", "--prompt", "北京"]
    wanted = run(home, capsys, "generate", "--checkpoint", quantized, *asked, *rules)["outputs"]
    told = {}
    for name, command in (("export", [*words, "--graphs", "decode,prefill,score", "--output", program]),
                          ("launch", [*words, *rules[:2], "--run", "generate", "--program", program, "--nproc", "1",
                                      "--", "--checkpoint", quantized, *asked])):
        made = subprocess.run([sys.executable, "-m", "parallel", name, *command], capture_output=True, text=True,
                              timeout=600)
        assert made.returncode == 0, made.stderr[-3000:]
        told[name] = json.loads(made.stdout.strip().splitlines()[-1])
    assert told["launch"]["outputs"] == wanted
