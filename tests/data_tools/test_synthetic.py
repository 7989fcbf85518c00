"""The generated world: determinism, variety, held-out questions, bad input, the command."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import re
import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.synthetic import generate as synthetic
from data_tools.synthetic import skills
from data_tools.synthetic.words import _TABLE, load_words
from parallel.common.errors import UserError

SIZE = 150_000


@pytest.fixture(scope="module")
def corpus() -> list[dict]:
    return list(synthetic.generate_corpus(SIZE, seed=1))


@pytest.fixture(scope="module")
def questions() -> dict[str, list[dict]]:
    return {skill: list(synthetic.generate_questions(skill, 150, seed=1)) for skill in synthetic.SKILLS}


def test_same_seed_same_corpus_other_seed_another(corpus):
    assert list(synthetic.generate_corpus(SIZE, seed=1)) == corpus
    other = {document["text"] for document in synthetic.generate_corpus(SIZE, seed=2)}
    assert len(other & {document["text"] for document in corpus}) < 0.02 * len(corpus)


def test_smaller_corpus_is_the_beginning_of_the_larger(corpus):
    small = list(synthetic.generate_corpus(SIZE // 10, seed=1))
    assert small == corpus[: len(small)]


def test_size_and_shape(corpus):
    sizes = [len(document["text"].encode()) for document in corpus]
    assert sum(sizes) >= SIZE > sum(sizes[:-1])
    assert all(set(document) == {"id", "text", "source"} for document in corpus)
    assert len({document["id"] for document in corpus}) == len(corpus)


def test_no_two_documents_are_equal_and_all_kinds_appear(corpus):
    assert len({document["text"] for document in corpus}) == len(corpus)
    assert {document["source"] for document in corpus} == {f"world/{name}" for name, _, _ in synthetic.KINDS}


def test_every_pattern_is_filled(corpus):
    assert not [document["text"] for document in corpus if re.search(r"[{}]|None|\bnan\b", document["text"])]


def test_text_is_chinese(corpus):
    text = "".join(document["text"] for document in corpus)
    chinese = sum("\u4e00" <= char <= "\u9fff" for char in text)
    assert chinese > 0.6 * len(text)
    assert len(set(text)) > 500


def test_words_have_no_doubles():
    def walk(node, path):
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{path}.{key}")
        elif isinstance(node, list) and all(isinstance(item, str) for item in node) and "joins" not in path \
                and "turns" not in path:
            assert len(set(node)) == len(node), path

    walk(load_words(), "words")
    assert yaml.safe_load(_TABLE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("skill", synthetic.SKILLS)
def test_questions_are_well_formed_and_answers_spread(questions, skill):
    items = questions[skill]
    assert len({item["prompt"] for item in items}) == len(items) == 150
    assert len({item["id"] for item in items}) == len(items)
    assert list(synthetic.generate_questions(skill, 150, seed=1)) == items
    for item in items:
        assert set(item) == {"id", "skill", "prompt", "choices", "answer"} and item["skill"] == skill
        assert item["prompt"].endswith("\n答：") and len(set(item["choices"])) == len(item["choices"])
    places = [item["answer"] for item in items]
    choices = len(items[0]["choices"])
    assert all(places.count(place) > 0.5 * len(items) / choices for place in range(choices)), "no place is favoured"


def test_no_question_is_answered_in_the_corpus(corpus, questions):
    """Neither the sums, nor the opinions, nor the pairings of person and value of the questions are in training."""
    text = "\n".join(document["text"] for document in corpus)
    for item in questions["context"]:
        assert item["choices"][item["answer"]] not in text
    for item in questions["sentiment"]:
        assert item["prompt"].split("\n")[0].split("：")[1] not in text
    for item in questions["arithmetic"]:
        assert re.search(r"问：.*\n", item["prompt"])[0] not in text


def test_context_questions_can_be_answered_from_the_context(questions):
    for item in questions["context"]:
        passage, question = item["prompt"].split("\n")[:2]
        right = item["choices"][item["answer"]].rstrip("。")
        assert right in passage
        assert not any(choice.rstrip("。") in passage for choice in item["choices"] if choice.rstrip("。") != right)


def _evaluate(question: str) -> int:
    first, second = (int(number) for number in re.findall(r"\d+", question))
    return first - second if re.search("减|送给|拿走", question) else first + second


def test_sums_are_right(corpus, questions):
    pairs = [pair for document in corpus if document["source"] == "world/arithmetic"
             for pair in re.findall(r"问：(.*)\n答：.*等于(\d+)。", document["text"])]
    assert len(pairs) > 200
    for question, answer in pairs:
        assert _evaluate(question) == int(answer), question
    for item in questions["arithmetic"]:
        assert item["choices"][item["answer"]].endswith(f"等于{_evaluate(item['prompt'])}。")


def test_held_out_sums_never_appear_in_any_words(corpus):
    for document in corpus:
        if document["source"] != "world/arithmetic":
            continue
        for first, second in re.findall(r"(\d+)加上?(\d+)", document["text"]):
            assert not skills.held_out_sum(int(first), int(second))
        for first, second in re.findall(r"(\d+)减去?(\d+)", document["text"]):
            assert not skills.held_out_sum(int(second), int(first) - int(second))


def test_held_out_sums_are_an_eighth_and_their_mirrors_are_shown():
    terms = range(skills.LARGEST_TERM + 1)
    held = [(a, b) for a, b in itertools.product(terms, terms) if skills.held_out_sum(a, b)]
    assert 0.05 < len(held) / len(terms) ** 2 < 0.2
    assert not any(skills.held_out_sum(b, a) for a, b in held)


def test_sentiment_labels_are_balanced(questions):
    right = [item["choices"][item["answer"]] for item in questions["sentiment"]]
    assert 0.35 < right.count("好评。") / len(right) < 0.65


@settings(max_examples=10, deadline=None)
@given(st.integers(-(2**70), 2**70))
def test_any_seed_makes_a_corpus(seed):
    texts = [document["text"] for document in synthetic.generate_corpus(3000, seed)]
    assert len(set(texts)) == len(texts) and all(text.strip() == text for text in texts)


@pytest.mark.parametrize(("text", "size"), [("2MB", 2 * 10**6), ("500k", 500_000), ("1.5 GB", 15 * 10**8), ("77", 77)])
def test_parse_bytes(text, size):
    assert synthetic.parse_bytes(text) == size


@pytest.mark.parametrize("call", [
    lambda: synthetic.parse_bytes("many"), lambda: next(synthetic.generate_corpus(10)),
    lambda: next(synthetic.generate_questions("singing", 1)),
])
def test_bad_input_is_one_line(call):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)


def test_more_questions_than_there_are(monkeypatch):
    fixed = {"prompt": "问：1加1等于几？\n答：", "choices": ["2。", "3。"], "answer": 0}
    monkeypatch.setitem(synthetic.QUESTIONS, "arithmetic", lambda draw: dict(fixed))
    with pytest.raises(UserError, match="only about 1"):
        list(synthetic.generate_questions("arithmetic", 2))


@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_written_files_read_back(tmp_path, suffix, opener):
    documents = list(synthetic.generate_corpus(5000, seed=4))
    path = tmp_path / f"world.jsonl{suffix}"
    figures = synthetic.write_jsonl(documents, path)
    with opener(path, "rt", encoding="utf-8") as file:
        assert [json.loads(line) for line in file] == documents
    assert figures == {"documents": len(documents), "bytes": sum(len(each["text"].encode()) for each in documents)}
    first = path.read_bytes()
    synthetic.write_jsonl(documents, path)
    assert path.read_bytes() == first, "same corpus, same file"


def test_command(tmp_path, root):
    command = [sys.executable, "-m", "data_tools", "generate-corpus", "--bytes", "20k", "--seed", "3", "--count", "5",
               "--output", str(tmp_path / "w.jsonl.zst"), "--questions", str(tmp_path / "q.jsonl")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["bytes"] >= 20_000 and figures["questions"] == 15
    assert len((tmp_path / "q.jsonl").read_text(encoding="utf-8").splitlines()) == 15


def test_command_refuses_in_one_line(tmp_path, root):
    command = [sys.executable, "-m", "data_tools", "generate-corpus", "--bytes", "lots", "--output",
               str(tmp_path / "w.jsonl")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())
