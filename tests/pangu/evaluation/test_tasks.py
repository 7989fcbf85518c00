"""Tasks: their YAMLs, the published file formats (tiny files made here), candidates, examples, lengths, invariance."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from pangu.adaptation.pairs import read_pairs
from pangu.evaluation.evaluate import judge, markdown, summarize
from pangu.evaluation.instances import InstanceBuilder
from pangu.evaluation.questions import read_questions
from pangu.evaluation.task import Source, load_task, render, task_names
from parallel.common.errors import UserError
from tests.pangu.tiny import HashScorer, PairTokenizer

PAPER_TASKS = ["cmrc2018", "drcd", "dureader", "webqa", "pd_cft", "cmrc2017", "chid", "cmrc2019", "cmnli", "ocnli",
               "tnews", "iflytek", "afqmc", "csl", "cluewsc2020", "c3", "wplc"]
TOKENIZER = PairTokenizer()


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


SQUAD = {"data": [{"id": "D", "paragraphs": [{"id": "P", "context": "甲在北京。乙在上海，丙也在。", "qas": [
    {"id": "Q0", "question": "乙在哪里？", "answers": [{"text": "上海", "answer_start": 7}]},
    {"id": "Q1", "question": "谁在北京？", "answers": [{"text": "甲", "answer_start": 0}, {"text": "甲人"}]}]}]}]}
CLOZE = "1 ||| 小 猫 说 。\n2 ||| XXXXX 来 了 。\n3 ||| 天 黑 了 。\n<qid_0> ||| XXXXX 来 了 。{}\n"
FILES = {
    "cmrc2018": {"cmrc2018_dev.json": json.dumps(SQUAD)},
    "dureader": {"zhidao.dev.json": lines(
        {"question_id": 5, "question": "为何", "answers": ["因为", "由于"], "documents": [
            {"is_selected": False, "paragraphs": ["没选"]}, {"is_selected": True, "paragraphs": ["选中", "二"]}]})},
    "webqa": {"me_test.ann.json": json.dumps({"Q1": {"question": "首都？", "evidences": {
        "E1": {"answer": ["no_answer"], "evidence": "x"}, "E2": {"answer": ["北京"], "evidence": "y"}}}})},
    "pd_cft": {"pd.test": CLOZE.format(" ||| 小狗"), "cft.test.human": CLOZE.format(" ||| 大象")},
    "cmrc2017": {"cloze.valid.doc_query": CLOZE.format(""), "cloze.valid.answer": "<qid_0> ||| 小狗\n"},
    "chid": {"dev.json": lines({"content": ["他#idiom000001#，又#idiom000002#。"], "candidates": list("甲乙丙")}),
             "dev_answer.json": json.dumps({"#idiom000001#": 2, "#idiom000002#": 0})},
    "cmrc2019": {"cmrc2019_trial.json": json.dumps({"data": [
        {"context_id": "T1", "context": "开头[BLANK1]，中间[BLANK2]。", "choices": ["一句", "二句", "三句"],
         "answers": [1, 0]}]})},
    "cmnli": {"dev.json": lines({"sentence1": "天黑", "sentence2": "夜里", "label": "entailment"},
                                {"sentence1": "a", "sentence2": "b", "label": "-"})},
    "ocnli": {"dev.json": lines({"sentence1": "天黑", "sentence2": "夜里", "label": "neutral"})},
    "tnews": {"dev.json": lines({"label": "102", "label_desc": "news_entertainment", "sentence": "歌手"})},
    "iflytek": {"dev.json": lines(*({"label": str(n), "label_des": word, "sentence": f"应用{word}"}
                                    for n, word in enumerate(("打车", "地图", "租房", "音乐", "游戏"))))},
    "afqmc": {"dev.json": lines({"sentence1": "怎么还款", "sentence2": "如何还款", "label": "1"})},
    "csl": {"dev.json": lines({"id": 1, "abst": "摘要文字", "keyword": ["词一", "词二"], "label": "0"})},
    "cluewsc2020": {"dev.json": lines(
        {"idx": 3, "text": "小明说他累了。", "label": "true",
         "target": {"span1_text": "小明", "span1_index": 0, "span2_text": "他", "span2_index": 3}},
        {"idx": 4, "text": "小明说他累了。", "label": "false",
         "target": {"span1_text": "小明", "span1_index": 0, "span2_text": "他", "span2_index": 4}})},
    "c3": {"d-dev.json": json.dumps([[["男：走吗", "女：走"], [
        {"question": "谁走", "choice": ["男", "女", "都走"], "answer": "都走"}], "7-1"]])},
    "wplc": {"test.json": lines({"masked_text": "他去了<mask>", "score": 1, "correct_word": "北京"})},
    "drcd": {"DRCD_dev.json": json.dumps(SQUAD).replace("\\u4e0a\\u6d77", "\\u8a9e\\u6587")},
}


@pytest.fixture
def place(tmp_path):
    def make(name, files=None):
        for file, content in (files or FILES[name]).items():
            folder = tmp_path / load_task(name).folders[0]
            folder.mkdir(exist_ok=True)
            (folder / file).write_text(content, encoding="utf-8")
        return Source(load_task(name), tmp_path)
    return make


def build(source, shots=0, context=200, **options):
    return InstanceBuilder(source.task, source, TOKENIZER, context, shots, **options).instances()


def test_all_tasks_of_the_paper_are_there():
    assert set(PAPER_TASKS) <= set(task_names())
    for name in task_names():
        task = load_task(name)
        assert task.name == name
        assert task.files
        assert task.published


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match="did you mean tnews"):
        load_task("tnew")


def test_missing_data_say_where_they_are_published(tmp_path):
    with pytest.raises(UserError, match=r"expected \{tnews,tnews_public\}.*CLUEbenchmark"):
        Source(load_task("tnews"), tmp_path)


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_published_formats_are_read(place, name):
    if name == "drcd":
        pytest.importorskip("opencc")
    records = list(place(name).records())
    expected = {
        "cmrc2018": ("上海", "P"), "drcd": ("语文", "P"), "dureader": ("因为", "选中"), "webqa": ("北京", "Q1"),
        "pd_cft": ("小狗", "pd.test"), "cmrc2017": ("小狗", "qid_0"), "chid": (2, "他"), "cmrc2019": (1, "T1"),
        "cmnli": ("entailment", "天黑"), "ocnli": ("neutral", "天黑"), "tnews": ("news_entertainment", "歌手"),
        "iflytek": ("打车", "应用打车"), "afqmc": ("1", "怎么还款"), "csl": ("0", "词一,词二"),
        "cluewsc2020": (1, "小明说"), "c3": (2, "男：走吗女：走"), "wplc": ("北京", "他去了")}[name]
    for value in expected:
        assert value in records[0].values()
    assert all(isinstance(record["id"], str) for record in records)


@pytest.mark.parametrize("name", [name for name in PAPER_TASKS if name != "drcd"])
def test_a_byte_order_mark_and_carriage_returns_are_no_data(place, tmp_path, name):
    wanted = list(place(name).records())
    for path in (tmp_path / load_task(name).folders[0]).iterdir():
        path.write_bytes(("\ufeff" + path.read_text(encoding="utf-8").replace("\n", "\r\n")).encode())
    assert list(Source(load_task(name), tmp_path).records()) == wanted


OCNLI = {"sentence1": "天黑", "sentence2": "天亮", "label": "neutral"}


@pytest.mark.parametrize(("row", "message"), [
    ({**OCNLI, "sentence1": None}, "record 4: 'sentence1' is no text"),
    ({**OCNLI, "sentence2": ["a"]}, "record 4: 'sentence2' is no text"),
    ({**OCNLI, "label": None}, "record 4: 'label' is no text"),
    ({"sentence1": "a"}, "record 4: a record has no field")])
def test_a_record_without_a_text_is_named_as_in_the_file(tmp_path, row, message):
    (tmp_path / "dev.json").write_text(lines({**OCNLI, "label": "-"}, OCNLI) + "\n" + lines(row, OCNLI))
    with pytest.raises(UserError, match=message):
        list(Source(load_task("ocnli"), tmp_path).records())


@pytest.mark.parametrize(("name", "file", "content", "message"), [
    ("cmrc2018", "cmrc2018_dev.json",
     [{"context": "甲", "qas": [{"question": "问", "id": 1, "answers": [{"text": None}]}]}], "an answer is no text"),
    ("c3", "c3-d-dev.json", [[["男"], [{"question": "问", "choice": ["a", None], "answer": "a"}], "T"]],
     "'candidates' is no list of texts"),
    ("cluewsc2020", "dev.json", {"target": {"span1_text": "他", "span2_text": "天", "span2_index": 0}, "text": "天黑",
                                 "label": None, "idx": 7}, "record 7: the label is neither")])
def test_null_is_no_text_and_no_label(tmp_path, name, file, content, message):
    (tmp_path / file).write_text(json.dumps(content, ensure_ascii=False) + "\n")
    with pytest.raises(UserError, match=message):
        list(Source(load_task(name), tmp_path).records())


def test_bytes_that_are_no_text_are_named_by_their_line(tmp_path):
    (tmp_path / "pd.test").write_bytes("1 ||| 甲\n".encode() + "2 ||| 乙XXXXX\n".encode("gb18030"))
    with pytest.raises(UserError, match="pd.test, line 2: not UTF-8"):
        list(Source(load_task("pd_cft"), tmp_path).records())


def test_questions_and_pairs_with_a_byte_order_mark(tmp_path):
    question = {"skill": "s", "prompt": "p", "choices": ["a", "b"], "answer": 0}
    (tmp_path / "q.jsonl").write_bytes(("\ufeff" + lines(question)).encode())
    assert list(read_questions(tmp_path / "q.jsonl")) == [question]
    (tmp_path / "p.jsonl").write_bytes(("\ufeff" + lines({"prompt": "p\u2028", "answer": "a"})).encode())
    assert read_pairs(tmp_path / "p.jsonl") == [("p\u2028", "a")]
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "\xff", "answer": "a"}\n')
    with pytest.raises(UserError, match="line 1.*|not UTF-8"):
        read_pairs(tmp_path / "p.jsonl")


def test_details_of_the_readers(place):
    assert [r["answers"] for r in place("cmrc2018").records()] == [["上海"], ["甲", "甲人"]]
    cloze, = place("cmrc2017").records()
    assert (cloze["context"], cloze["recent"], cloze["question"]) == ("小猫说。天黑了。", "天黑了。小猫说。", "")
    assert [r["part"] for r in place("pd_cft").records()] == ["pd.test", "cft.test.human"]

    assert [(r["before"], r["after"], r["answer"]) for r in place("chid").records()] == [
        ("他", "，又。", 2), ("他，又", "。", 0)]
    assert [(r["before"], r["after"]) for r in place("cmrc2019").records()] == [
        ("开头", "，中间。"), ("开头，中间", "。")]
    assert len(list(place("cmnli").records())) == 1  # "-" is no label
    # The second row's index is one too far; the pronoun is found all the same.
    assert [(r["before"], r["candidates"], r["answer"]) for r in place("cluewsc2020").records()] == [
        ("小明说", ["他", "小明"], 1), ("小明说", ["他", "小明"], 0)]


def test_cloze_questions_with_a_number_in_place_of_a_name(tmp_path):
    """As in the file for people of the Fairy Tale test: the question is the line with an answer at its end."""
    from pangu.tasks.cloze import read

    text = "".join(f"{line}\n" for line in (
        "1 ||| 小 猫 说 。", "2 ||| XXXXX 来 了 。", "3 ||| 天 黑 了 。", "4 ||| XXXXX 来 了 。 ||| 大象",
        "1 ||| 雨 下 了 。", "2 ||| XXXXX 笑 了 。", "3 ||| 他们 说 XXXXX 笑 了 ||| 猫"))
    (tmp_path / "cft.test.human").write_text(text, encoding="utf-8")
    first, second = read(tmp_path / "cft.test.human")
    assert (first["id"], first["context"], first["question"], first["answers"]) == (
        "0", "小猫说。天黑了。", "", ["大象"])
    assert (second["id"], second["context"], second["question"], second["answers"]) == (
        "1", "雨下了。", "他们说", ["猫"])


def test_another_format_is_one_clear_line(place):
    source = place("csl", {"dev.json": lines({"id": 1, "abst": "x", "label": "0"})})
    with pytest.raises(UserError, match="not the published format of csl.*keyword"):
        list(source.records())


def test_templates_interpret_nothing_but_names():
    assert render("{a}|{b}", {"a": "{b}", "b": "{0.__class__}"}) == "{b}|{0.__class__}"
    with pytest.raises(UserError, match="no field 'c'"):
        render("{c}", {"id": "7"})


def text_of(instance, index):
    prefix, scored = instance.requests[index]
    return prefix + scored


@pytest.mark.parametrize(("name", "texts"), [
    ("tnews", None), ("ocnli", ["天黑?对，夜里", "天黑?错，夜里", "天黑?或许，夜里"]),
    ("afqmc", ["下面两个句子语义不同：怎么还款。如何还款", "下面两个句子语义相同：怎么还款。如何还款"]),
    ("csl", ["摘要：摘要文字，关键词：词一,词二不是真实关键词", "摘要：摘要文字，关键词：词一,词二是真实关键词"]),
    ("c3", [f"问: 谁走\n答:{c}\n该答案来自对话: 男：走吗女：走" for c in ("男", "女", "都走")]),
])
def test_texts_of_the_candidates(place, name, texts):
    instance = build(place(name))[0]
    if texts is not None:
        assert {tuple(text_of(instance, i)) for i in range(len(texts))} == {tuple(TOKENIZER.encode(t)) for t in texts}
    assert len(instance.requests) == len(instance.candidates) == len(texts or "1234")


def test_the_scored_part_begins_where_ids_part(place):
    for name in ("tnews", "ocnli", "c3", "afqmc"):
        source = place(name)
        for instance in build(source):
            record = next(iter(source.records()))
            for word, (prefix, scored) in zip(instance.candidates, instance.requests, strict=True):
                front = TOKENIZER.encode(render(source.task.prefix, {**record, "label": word}))
                assert prefix == front[:len(prefix)]
                # The very next id is another one, or the prefix is wholly shared.
                assert len(prefix) == len(front) or scored[0] != front[len(prefix)]


def test_one_prefix_means_one_position(place):
    rows = [{"prompt": "问：甲\n答", "choices": list("春夏秋冬乙丙"), "answer": 0, "skill": "context", "id": str(n)}
            for n in range(2)]
    for instance in build(place("synthetic_context", {"questions.jsonl": lines(*rows)})):
        assert len({tuple(prefix) for prefix, _ in instance.requests}) == 1


def test_four_way_sampling(place):
    label = load_task("tnews").labels
    rows = [{"label_desc": key, "sentence": f"第{n}条", "id": n} for n, key in enumerate(list(label) * 12)]
    instances = build(place("tnews", {"dev.json": lines(*rows)}))
    assert all(len(set(i.candidates)) == 4 for i in instances)
    assert all(i.candidates[i.target] == label[row["label_desc"]] for i, row in zip(instances, rows, strict=True))
    wrong = Counter(word for i in instances for n, word in enumerate(i.candidates) if n != i.target)
    assert len(wrong) == 15
    assert max(wrong.values()) < 3 * min(wrong.values())
    again = build(place("tnews", {"dev.json": lines(*rows)}))
    assert [i.candidates for i in again] == [i.candidates for i in instances]
    other = build(place("tnews", {"dev.json": lines(*rows)}), seed=2)
    assert [i.candidates for i in other] != [i.candidates for i in instances]


def answers_of(instances, task):
    scorer = HashScorer()
    answers = [[-s / len(r[1]) for s, r in zip(scorer.loglikelihood(i.requests), i.requests, strict=True)]
               for i in instances]
    return judge(task, instances, answers)


def test_predictions_do_not_depend_on_the_order_of_labels(place):
    rows = [{"sentence1": f"第{n}句话", "sentence2": f"第{n * 7}句", "label": label, "id": n}
            for n, label in enumerate(["entailment", "neutral", "contradiction"] * 10)]
    source = place("ocnli", {"dev.json": lines(*rows), "train.json": lines(*rows[:9])})
    first = answers_of(build(source, shots=3), source.task)
    permuted = source.task.model_copy(update={"labels": dict(reversed(source.task.labels.items()))})
    source.task = permuted
    second = answers_of(build(source, shots=3), permuted)
    assert [row["candidates"][row["prediction"]] for row in first] == [
        row["candidates"][row["prediction"]] for row in second]
    assert len({row["prediction"] for row in first}) > 1


def test_predictions_do_not_depend_on_the_order_of_candidates(place):
    def rows(order):
        return [[[f"男：话{n}"], [{"question": f"问{n}", "choice": [["红", "绿", "蓝", "蓝"][i] for i in order],
                                "answer": "绿"}], str(n)] for n in range(12)]
    picked = []
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 0, 3, 1)):
        source = place("c3", {"d-dev.json": json.dumps(rows(order))})
        result = answers_of(build(source), source.task)
        picked.append([row["candidates"][row["prediction"]] for row in result])
        assert summarize(source.task, result)["instances"] == 12
    assert picked[0] == picked[1] == picked[2]


# ---- demonstrations -----------------------------------------------------------------------------------------------

def ocnli_rows(count, start=0):
    return [{"sentence1": f"前{n}", "sentence2": f"后{n}", "id": n,
             "label": ("entailment", "neutral", "contradiction")[n % 3]} for n in range(start, start + count)]


def test_examples_are_balanced_seeded_and_the_same_for_all(place):
    source = place("ocnli", {"dev.json": lines(*ocnli_rows(4)), "train.json": lines(*ocnli_rows(30, 100))})
    instances = build(source, shots=6)
    front = [i.requests[0][0] for i in instances]
    shared = min(map(len, front)) - 6
    assert len({tuple(ids[:shared]) for ids in front}) == 1
    assert [i.shots for i in instances] == [6] * 4
    counts = Counter(word for n in range(100, 130) for label, word in source.task.labels.items()
                     if label == ("entailment", "neutral", "contradiction")[n % 3] and _holds(
                         front[0], TOKENIZER.encode(f"前{n}?{word}，后{n}\n")))
    assert counts == {"对": 2, "或许": 2, "错": 2}
    # One-shot's example is the first drawn, which stands next to the instance.
    one = build(source, shots=1)[0].requests[0][0]
    assert front[0][-len(one):] == one


def _holds(ids, part):
    return any(ids[at:at + len(part)] == part for at in range(len(ids) - len(part) + 1))


def test_an_instance_is_never_its_own_example(place):
    source = place("ocnli", {"dev.json": lines(*ocnli_rows(5))})
    assert not source.examples_apart
    for row, instance in zip(ocnli_rows(5), build(source, shots=4), strict=True):
        assert instance.shots == 4
        own = {"entailment": "对", "neutral": "或许", "contradiction": "错"}[row["label"]]
        assert not _holds(instance.requests[0][0], TOKENIZER.encode(f"前{row['id']}?{own}，后{row['id']}\n"))


def test_few_is_the_papers_number(place):
    source = place("ocnli", {"dev.json": lines(*ocnli_rows(2)), "train.json": lines(*ocnli_rows(30, 100))})
    assert build(source, shots="few")[0].shots == 6


def test_dynamic_examples_are_sentences_with_the_answer(place):
    long = "无关的话。" * 60
    train = {"data": [{"paragraphs": [{"id": f"T{n}", "context": f"{long}答案{n}在此处。{long}", "qas": [
        {"id": f"T{n}", "question": f"问{n}", "answers": [{"text": f"答案{n}"}]}]}]} for n in range(8)]}
    source = place("cmrc2018", {**FILES["cmrc2018"], "cmrc2018_train.json": json.dumps(train)})
    instance = build(source, shots="few", context=400)[0]
    assert instance.shots == 5
    assert sum(_holds(instance.prompt, TOKENIZER.encode(f"阅读文章：答案{n}在此处。\n问：问{n}\n答：答案{n}\n"))
               for n in range(8)) == 5
    # One-shot takes whole passages below 400 characters, of which there is none.
    assert build(source, shots=1, context=400)[0].shots == 0


# ---- lengths ------------------------------------------------------------------------------------------------------

def test_demonstrations_are_left_out_before_anything_is_truncated(place):
    source = place("ocnli", {"dev.json": lines(*ocnli_rows(1)), "train.json": lines(*ocnli_rows(30, 100))})
    full = build(source, shots=0)[0]
    for context in range(12, 80):
        instance = build(source, shots=6, context=context)[0]
        assert instance.truncated == 0
        assert [scored for _, scored in instance.requests] == [scored for _, scored in full.requests]
        assert max(len(text_of(instance, i)) for i in range(3)) <= context + 1
    assert build(source, shots=6, context=16)[0].shots < 6


def test_truncation_is_counted_alike_for_all_candidates_and_never_silent(place):
    long = "".join(chr(0x4E00 + n) for n in range(300))
    source = place("tnews", {"dev.json": lines({"label_desc": "news_car", "sentence": long, "id": 1})})
    instance = build(source, context=60)[0]
    assert instance.truncated > 0
    kept = long[:len(long) - instance.truncated]
    for index, word in enumerate(instance.candidates):
        assert text_of(instance, index) == TOKENIZER.encode(f"这是关于{word}的文章：{kept}")
        assert len(text_of(instance, index)) <= 61
    # As much as fits is kept: one more character would be too long for some candidate.
    more = long[:len(kept) + 1]
    assert max(len(TOKENIZER.encode(f"这是关于{word}的文章：{more}")) for word in instance.candidates) > 61
    rows = answers_of([instance], source.task)
    assert summarize(source.task, rows)["truncated"] == 1


LONG = "".join(chr(0x4E00 + n) for n in range(90))
LONG_FILES = {
    "afqmc": {"dev.json": lines({"sentence1": LONG, "sentence2": LONG[::-1], "label": "1"})},
    "c3": {"d-dev.json": json.dumps([[[LONG, LONG[::-1]], [
        {"question": "谁走", "choice": ["男", "女的", "都走"], "answer": "都走"}], "7-1"]])},
    "chid": {"dev.json": lines({"content": f"{LONG}#idiom#{LONG[::-1]}", "candidates": ["一石二鸟", "画蛇添足"],
                                "id": 1, "answer": 0})},
    "cluewsc2020": {"dev.json": lines({"idx": 3, "text": f"{LONG}他累了{LONG}。", "label": "true", "target": {
        "span1_text": LONG[:2], "span1_index": 0, "span2_text": "他", "span2_index": 90}})},
    "cmnli": {"dev.json": lines({"sentence1": LONG, "sentence2": LONG[::-1], "label": "neutral"})},
    "cmrc2019": {"cmrc2019_trial.json": json.dumps({"data": [{"context_id": "T", "context": f"{LONG}[BLANK1]{LONG}",
                                                              "choices": ["一句", "第二句"], "answers": [1]}]})},
    "csl": {"dev.json": lines({"id": 1, "abst": LONG, "keyword": ["词一", "词二"], "label": "0"})},
    "iflytek": {"dev.json": lines(*({"label_des": word, "sentence": LONG} for word in ("打车", "地图", "租房")))},
    "ocnli": {"dev.json": lines({"sentence1": LONG, "sentence2": LONG[::-1], "label": "neutral"})},
    "tnews": {"dev.json": lines({"label_desc": "news_car", "sentence": LONG, "id": 1})},
    "wplc": {"test.json": lines({"masked_text": f"{LONG}<mask>", "correct_word": "北京"})},
}


@pytest.mark.parametrize("name", LONG_FILES)
def test_no_context_truncates_the_scored_span_in_silence(place, name):
    """At every length of context all ids fit, and a scored span is whole or its instance says that it was cut."""
    source = place(name, LONG_FILES[name])
    full = build(source, context=2000)[0]
    assert full.truncated == 0
    seen = set()
    for context in range(24, 260, 3):
        instance = build(source, context=context)[0]
        assert max(len(prefix) + len(scored) for prefix, scored in instance.requests) <= context + 1
        assert instance.requests == full.requests or instance.truncated > 0
        seen.add(instance.truncated > 0)
    assert seen == {True, False}


def test_what_cannot_be_shortened_is_an_error(place):
    source = place("webqa", {"me_test.ann.json": json.dumps({"Q": {"question": "问" * 200, "answer": ["x"]}})})
    with pytest.raises(UserError, match="do not fit"):
        build(source, context=100)


def test_passages_lose_their_far_end(place):
    files = {"cloze.valid.doc_query": "1 ||| " + "远" * 200 + "。\n2 ||| 近处的话。\n<qid_0> ||| 他是 XXXXX 。\n",
             "cloze.valid.answer": "<qid_0> ||| 谁\n"}
    instance = build(place("cmrc2017", files), context=40)[0]
    assert instance.prompt[-4:] == TOKENIZER.encode("近处的话。他是")[-4:]
    assert len(instance.prompt) + 5 <= 41


def test_limit_draws_from_all_of_the_file(place):
    source = place("ocnli", {"dev.json": lines(*ocnli_rows(60))})
    builder = InstanceBuilder(source.task, source, TOKENIZER, 200, 0)
    ids = [int(i.id) for i in builder.instances(limit=20)]
    assert ids == sorted(ids)
    assert len(set(ids)) == 20
    assert max(ids) > 30 > min(ids)


def test_blanks_take_different_candidates(place):
    pytest.importorskip("scipy")
    source = place("cmrc2019")
    instances = build(source)
    rows = judge(source.task, instances, [[0.0, 5.0, 9.0], [1.0, 2.0, 9.0]])
    assert [row["prediction"] for row in rows] == [0, 1]
    result = summarize(source.task, rows)
    assert result["accuracy"] == 0.0
    rows = judge(source.task, instances, [[1.0, 0.5, 9.0], [0.0, 0.4, 9.0]])
    assert summarize(source.task, rows)["passage_accuracy"] == 1.0


def test_perplexity_is_over_tokens_and_top_1_over_words(place):
    source = place("wplc", {"test.json": lines({"masked_text": "他去了<mask>", "correct_word": "北京"},
                                               {"masked_text": "她也去了<mask>", "correct_word": "上海市"})})
    instances = build(source)
    rows = judge(source.task, instances, [[2.0, True], [1.0, False]])
    few, many = (len(instance.requests[0][1]) for instance in instances)
    result = summarize(source.task, rows)
    assert result["perplexity"] == result["metric"] == pytest.approx(np.exp((2.0 * few + many) / (few + many)))
    assert result["accuracy"] == 0.5
    assert f"| {result['perplexity']:.2f} (top-1 50.00) |" in markdown({"wplc": result}, "0")
