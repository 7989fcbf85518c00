"""The generator with a tiny model: stops, limits, streams, recipes, the verb, and what bad input gets."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest

from pangu.generation.completion import StopScanner
from pangu.generation.generate import Generator, check_vocabulary, fit_prompt, run_generate
from pangu.generation.prompts import RECIPES, Recipe, find_recipe, read_prompts
from pangu.generation.settings import GenerateSettings
from parallel.common.errors import UserError
from parallel.common.settings import load_settings

LETTERS = "abcdefghijklmnopqrstuvwxyz,.!?;:-"
VOCABULARY = 10 + len(LETTERS)
CONTEXT = 24


class LetterTokenizer:
    """One id per letter, special ids below 10."""

    vocabulary_size = VOCABULARY

    def encode(self, text: str) -> list[int]:
        return [10 + LETTERS.index(letter) for letter in text]

    def decode(self, ids) -> str:
        return "".join("<>" if number < 10 else LETTERS[number - 10] for number in ids)

    def normal_form(self, text: str) -> str:
        return text.replace("ｌ", "l").replace("！", "")

    def stream(self):
        return self

    def feed(self, number: int) -> str:
        return self.decode([number])

    def finish(self) -> str:
        return ""


@pytest.fixture(scope="module")
def model():
    import mindspore as ms
    from mindspore.nn.utils import no_init_parameters

    from pangu.config import ModelConfig
    from pangu.model import PanGuAlpha
    from parallel.layers.parameter import initialize

    ms.set_context(mode=ms.GRAPH_MODE)
    with no_init_parameters():
        network = PanGuAlpha(ModelConfig(layers=2, hidden_size=16, heads=2, vocabulary_size=VOCABULARY,
                                         sequence_length=CONTEXT, embedding_std=1.0, linear_std=0.4, ffn_std=0.4))
    initialize(network, 4)
    return network


@pytest.fixture(scope="module")
def generator(model):
    settings = GenerateSettings(max_new_tokens=6, prefill_chunk=8, batch_size=2, seed=5)
    return Generator(model, LetterTokenizer(), settings)


def with_(generator, **changes) -> GenerateSettings:
    return generator.settings.model_copy(update=changes)


# ---------------------------------------------------------------- generation

def test_same_seed_same_text_other_seed_other_text(generator):
    prompts = ["hello", "hello", "abc"]
    first = generator.generate(prompts)
    assert [output.text for output in first] == [output.text for output in generator.generate(prompts)]
    assert first[0].text != first[1].text
    assert [len(output.ids) for output in first] == [6, 6, 6]
    other = generator.generate(prompts, with_(generator, seed=6))
    assert [output.text for output in first] != [output.text for output in other]


def test_order_of_the_prompts_changes_nothing(generator):
    prompts = ["hello", "abc", "a,b.c"]
    forward = [output.text for output in generator.generate(prompts)]
    assert forward == [output.text for output in generator.generate(prompts[::-1])][::-1]


def test_stop_id_and_stop_string_end_the_text(generator):
    free = generator.generate(["hello", "abc"], with_(generator, stop_ids=[]))[0]
    assert free.reason == "max_new_tokens"
    by_id = generator.generate(["hello", "abc"], with_(generator, stop_ids=[free.ids[3]]))[0]
    assert (by_id.reason, by_id.ids) == ("stop_id", free.ids[:free.ids.index(free.ids[3])])
    by_text = generator.generate(["hello", "abc"], with_(generator, stop=[free.text[2:4]], stop_ids=[]))[0]
    assert (by_text.reason, by_text.text) == ("stop", free.text[:free.text.index(free.text[2:4])])


def test_eot_is_the_default_stop(model):
    ids = Generator(model, LetterTokenizer(), GenerateSettings(batch_size=2, prefill_chunk=8, max_new_tokens=6))
    made = ids.generate_ids([[11, 12], [13]])
    assert all(9 not in output.ids for output in made)


def test_a_stop_string_is_looked_for_as_the_tokenizer_writes_it(generator):
    assert generator._stops(GenerateSettings(stop=["ｌl", "a"])) == ["ll", "a"]
    with pytest.raises(UserError, match="never be found"):
        generator._stops(GenerateSettings(stop=["！"]))


def test_stream_gives_the_text_of_generate(generator):
    settings = with_(generator, stop=["zzzz"])
    parts = list(generator.stream("hello", settings))
    assert "".join(parts) == generator.generate(["hello"], settings)[0].text
    assert len(parts) > 1


def test_context_ends_the_text(generator):
    output = generator.generate(["a" * (CONTEXT - 2), "b"], with_(generator, stop_ids=[]))[0]
    assert (output.reason, len(output.ids), output.prompt_tokens) == ("context", 3, CONTEXT - 2)


def test_truncation_keeps_the_end_and_room(generator):
    settings = with_(generator, truncate=True, stop_ids=[])
    long, short = generator.generate(["b" * 30 + "a" * (CONTEXT - 5), "a" * (CONTEXT - 5)], settings)
    assert (long.prompt_tokens, len(long.ids)) == (CONTEXT - 5, 6)
    assert short.prompt_tokens == CONTEXT - 5
    greedy = settings.model_copy(update={"temperature": 0.0})
    assert len({o.text for o in generator.generate(["b" * 30 + "a" * (CONTEXT - 5), "a" * (CONTEXT - 5)], greedy)}) == 1
    most = with_(generator, truncate=True, max_new_tokens=CONTEXT)
    assert generator.generate(["ab"], most)[0].prompt_tokens == 1
    with pytest.raises(UserError, match="no room for a prompt") as error:
        generator.generate(["ab"], with_(generator, truncate=True, max_new_tokens=CONTEXT + 1))
    assert (error.value.where, error.value.value) == ("generate.max_new_tokens", CONTEXT + 1)


def test_scores_equal_the_models_own_probabilities(model):
    from mindspore import Tensor

    from pangu.evaluation.scoring import Scorer

    generator = np.random.default_rng(2)
    requests = [(generator.integers(10, VOCABULARY, size).tolist(), generator.integers(10, VOCABULARY, tail).tolist())
                for size, tail in [(3, 2), (9, 1), (CONTEXT + 4, 3), (1, CONTEXT)]]
    scores = Scorer(model, batch_size=3).loglikelihood(requests)
    for (prefix, tail), score in zip(requests, scores, strict=True):
        ids = (prefix + tail)[-CONTEXT - 1:]
        padded = np.full((1, CONTEXT), 6, np.int32)
        padded[0, :len(ids) - 1] = ids[:-1]
        logits = model(Tensor(padded), Tensor(np.arange(CONTEXT, dtype=np.int32)[None]),
                       Tensor(np.tril(np.ones((1, CONTEXT, CONTEXT), np.float32)))).asnumpy().astype(np.float64)
        log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(
            -1, keepdims=True)
        expected = sum(log_p[place - 1, ids[place]] for place in range(len(ids) - len(tail), len(ids)))
        assert score == pytest.approx(expected, abs=2e-4)
    with pytest.raises(UserError, match="at least one token"):
        Scorer(model).loglikelihood([([], [11])])
    with pytest.raises(UserError, match="longer than the context"):
        Scorer(model).loglikelihood([([11], [11] * (CONTEXT + 1))])


# ---------------------------------------------------------------- pieces

def test_scanner_holds_back_what_may_become_a_stop():
    scanner = StopScanner(["停止", "ab"])
    assert [scanner.feed(part) for part in ["天停", "水a", "a", "b后"]] == ["天", "停水", "a", ""]
    assert scanner.found
    assert scanner.feed("更多") == ""
    open_end = StopScanner(["abc"])
    assert (open_end.feed("xab"), open_end.finish(), open_end.found) == ("x", "ab", False)


@pytest.mark.parametrize(("name", "text", "prompts"), [
    ("A.JSONL", '{"prompt": "甲\\u2028"}\n\n"乙"\n', ["甲\u2028", "乙"]), ("a.ndjson", '"甲"\n', ["甲"]),
    ("a.json", '[\n{"prompt": "甲"},\n"乙"]', ["甲", "乙"]), ("a.json", '{"prompt":\n"甲"}', ["甲"]),
    ("a.json", '"甲"\n"乙"\n', ["甲", "乙"]), ("a.txt", "甲\n\n[乙]\r\n", ["甲", "[乙]"])])
def test_a_file_of_prompts_is_read_by_its_name(tmp_path, name, text, prompts):
    (tmp_path / name).write_text(text, encoding="utf-16", newline="")
    assert read_prompts(str(tmp_path / name), None, GenerateSettings())[0] == prompts
    (tmp_path / name).write_text("\n")
    with pytest.raises(UserError, match=f"{name}: no prompt"):
        read_prompts(str(tmp_path / name), None, GenerateSettings())
    if name != "a.txt":
        (tmp_path / name).write_text('\n{"text": "甲"}\n')
        with pytest.raises(UserError, match="(line 2|item 1): neither a string"):
            read_prompts(str(tmp_path / name), None, GenerateSettings())


@pytest.mark.parametrize(("ids", "message"), [([], "empty"), ([11] * (CONTEXT + 1), "longer than the model's context"),
                                              ([VOCABULARY], "outside the vocabulary")])
def test_bad_prompts_are_refused(ids, message):
    with pytest.raises(UserError, match=message):
        fit_prompt(ids, CONTEXT, VOCABULARY, GenerateSettings(), 0)


def test_another_vocabulary_is_refused():
    with pytest.raises(UserError, match=f"{VOCABULARY} pieces"):
        check_vocabulary(LetterTokenizer(), VOCABULARY + 1)


# ---------------------------------------------------------------- prompts and recipes

@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_fill_their_own_examples(path):
    recipe = load_settings(Recipe, path)
    assert recipe.inputs
    texts, rules = read_prompts(path.stem, None, GenerateSettings())
    assert len(texts) == len(recipe.inputs)
    assert all(value in text for text, inputs in zip(texts, recipe.inputs, strict=True) for value in inputs.values())
    assert rules == recipe.generate
    assert read_prompts(path.stem, None, GenerateSettings(seed=77))[1].seed == 77


def test_the_papers_recipes_are_there():
    assert {path.stem for path in RECIPES.glob("*.yaml")} >= {"summary", "question_answering", "dialogue", "couplet",
                                                              "poem"}


def test_typed_inputs_fill_a_recipe():
    assert read_prompts("couplet", ["天高云淡"], GenerateSettings())[0] == ["上联：天高云淡\n下联："]
    typed = json.dumps({"passage": "甲", "question": "乙"})
    assert read_prompts("question_answering", [typed], GenerateSettings())[0] == ["阅读文章：甲\n问：乙\n答："]
    with pytest.raises(UserError, match="several inputs"):
        read_prompts("question_answering", ["甲"], GenerateSettings())
    with pytest.raises(UserError, match="inputs are others"):
        read_prompts("question_answering", ['{"passage": "甲"}'], GenerateSettings())


def test_prompt_files(tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("第一\n\n第二\n", encoding="utf-8")
    assert read_prompts(str(lines), ["零"], GenerateSettings())[0] == ["零", "第一", "第二"]
    objects = tmp_path / "prompts.jsonl"
    objects.write_text('{"prompt": "问\\n答"}\n"直接"\n', encoding="utf-8")
    assert read_prompts(str(objects), None, GenerateSettings())[0] == ["问\n答", "直接"]
    objects.write_text('{"text": 1}\n', encoding="utf-8")
    for broken, message in [(objects, "line 1"), (tmp_path / "none.txt", "no such file"), (None, "nothing to")]:
        with pytest.raises(UserError, match=message):
            read_prompts(str(broken) if broken else None, None, GenerateSettings())
    lines.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        read_prompts(str(lines), None, GenerateSettings())
    assert find_recipe("poem") == RECIPES / "poem.yaml"
    assert find_recipe("not_a_recipe") is None


# ---------------------------------------------------------------- the verb

@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """Settings of a run whose checkpoint is the tiny model; the tokenizer is the letters'."""
    import pangu.data.tokenizer
    from pangu.settings import Run
    from parallel.checkpoint.full import save_checkpoint

    monkeypatch.setattr(pangu.data.tokenizer, "Tokenizer", lambda path: LetterTokenizer())
    save_checkpoint(tmp_path / "checkpoints", 3, list(model.get_parameters()))
    settings = Run(model=model.config)
    settings.output.directory = str(tmp_path)
    settings.generate = GenerateSettings(max_new_tokens=4, prefill_chunk=8, batch_size=2)
    return settings


def words(**given) -> argparse.Namespace:
    return argparse.Namespace(**{"checkpoint": None, "prompt": None, "prompts": None, "stream": False, "int8": False,
                                 **given})


def test_the_verb_generates_from_a_checkpoint(run, generator, capsys):
    figures = run_generate(run, words(prompt=["hello", "abc"]))
    expected = [output.text for output in generator.generate(["hello", "abc"], run.generate)]
    assert figures["outputs"] == expected
    assert figures["tokens_per_second"] > 0
    assert "hello" + expected[0] in capsys.readouterr().err
    streamed = run_generate(run, words(prompt=["hello"], stream=True))
    assert streamed["outputs"][0] in capsys.readouterr().err


def test_the_verb_refuses_in_one_line(run, tmp_path):
    with pytest.raises(UserError, match="nothing to generate"):
        run_generate(run, words())
    with pytest.raises(UserError, match="no checkpoint"):
        run_generate(run, words(prompt=["a"], checkpoint=str(tmp_path / "none")))
    with pytest.raises(UserError, match="longer than the model's context"):
        run_generate(run, words(prompt=["a" * (CONTEXT + 1)]))
    run.model = run.model.model_copy(update={"hidden_size": 32})
    with pytest.raises(UserError, match="shape"):
        run_generate(run, words(prompt=["a"]))
    run.model = run.model.model_copy(update={"vocabulary_size": 100})
    with pytest.raises(UserError, match="the tokenizer has"):
        run_generate(run, words(prompt=["a"]))
