"""The scorer against a slow NumPy model, the three methods, and the verb from data files to tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from data_tools.synthetic.generate import generate_corpus, generate_questions, write_jsonl
from pangu.__main__ import VERBS
from pangu.config import ModelConfig
from pangu.evaluation.evaluate import markdown
from pangu.evaluation.instances import InstanceBuilder
from pangu.evaluation.language_model import LanguageModel, RequestCache
from pangu.evaluation.lm_eval_adapter import HarnessModel
from pangu.evaluation.prefix_sharing import group_by_prefix, plan_trees, prefix_length, row_of
from pangu.evaluation.questions import common_prefix
from pangu.evaluation.scoring import Scorer
from pangu.evaluation.task import Source, load_task
from pangu.generation.settings import GenerateSettings
from parallel.common.command import main
from parallel.common.errors import UserError
from tests.pangu.numpy_model import forward, is_greedy, token_scores
from tests.pangu.tiny import VOCABULARY, PairTokenizer, arrays, tiny_model

SHARED = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def reference(model):
    """The slow scorer: one sequence at a time, in float64, without batches, caches or sharing."""
    weights = {name: value.astype(np.float64) for name, value in arrays(model).items()}
    return lambda prefix, scored: token_scores(weights, model.config, [*prefix, *scored], len(prefix))


def draw(rng, low, high):
    return rng.integers(10, VOCABULARY, rng.integers(low, high)).tolist()


# ---- sharing ------------------------------------------------------------------------------------------------------

def requests_of_all_shapes(seed=0):
    """Candidates on common beginnings, with and without examples in front, and loners."""
    rng = np.random.default_rng(seed)
    examples = draw(rng, 30, 31)
    requests = []
    for _ in range(4):
        shared = examples + draw(rng, 9, 20)
        requests += [(shared + draw(rng, 0, 4), draw(rng, 1, 9)) for _ in range(4)]
    # Whole texts that begin alike are scored from early on; one is the beginning of another; two are equal.
    text = examples + draw(rng, 12, 13)
    requests += [(text[:31], text[31:40]), (text[:31], text[31:]), (text[:31], text[31:]), (text[:35], [11]),
                 (text[:35], [12])]
    return requests, [([9], draw(rng, 3, 9)), (draw(rng, 80, 81), draw(rng, 10, 11))]


@pytest.mark.parametrize("share", [True, False])
def test_scores_equal_the_slow_scorer(model, reference, share):
    together, apart = requests_of_all_shapes()
    scorer = Scorer(model, share=share)
    for requests in (together, together + apart):
        for request, (got, _) in zip(requests, scorer.token_scores(requests), strict=True):
            assert got == pytest.approx(reference(*request), abs=2e-4)
    # The order of requests, so of candidates and instances, has no influence.
    order = np.random.default_rng(1).permutation(len(together))
    turned = scorer.loglikelihood([together[index] for index in order])
    assert turned == pytest.approx([reference(*together[index]).sum() for index in order], abs=1e-3)
    sums = scorer.loglikelihood(apart)
    assert sums == pytest.approx([reference(*request).sum() for request in apart], abs=1e-3)


@pytest.mark.parametrize("share", [True, False])
def test_greedy_continuations_are_marked(model, share):
    weights = arrays(model)
    requests = []
    for prefix, scored in [(a, b) for some in requests_of_all_shapes(4) for a, b in some]:
        ids = list(prefix)
        for _ in scored:
            ids.append(int(forward(weights, model.config, np.array(ids))[-1].argmax()))
        best = ids[len(prefix):]
        requests += [(prefix, scored), (prefix, best), (prefix, [*best[:-1], best[-1] - 1])]
    got = Scorer(model, share=share).loglikelihood_and_greedy(requests)
    expected = [is_greedy(weights, model.config, [*a, *b], len(a)) for a, b in requests]
    assert [greedy for _, greedy in got] == expected
    assert sum(expected) >= len(requests) // 3 and not all(expected)


def test_planning_reads_common_beginnings_once():
    together, apart = requests_of_all_shapes()
    items = [(np.array([*a, *b]), len(a)) for a, b in together]
    prefix = prefix_length(items)
    assert prefix == 30
    assert prefix_length(items + [(np.array([*a, *b]), len(a)) for a, b in apart]) == 0
    trees = plan_trees(items, 512, prefix)
    assert sorted(index for tree in trees for index in tree.members) == list(range(len(items)))
    read = prefix + sum(len(row_of(tree, items, prefix).ids) for tree in trees)
    assert read < sum(len(ids) - 1 for ids, _ in items) / 3
    # Each scored token of each request has its place and label once.
    for tree in trees:
        row = row_of(tree, items, prefix)
        for index, places, labels in zip(tree.members, row.predicting_at, row.labels, strict=True):
            ids, first = items[index]
            assert labels.tolist() == ids[first:].tolist()
            assert row.ids[places].tolist() == ids[first - 1:-1].tolist()
            assert row.positions[places].tolist() == list(range(first - 1, len(ids) - 1))
    assert all(len(tree.members) == 1 for tree in plan_trees(items, 0))


def test_instances_with_fewer_examples_have_a_trunk_of_their_own(model, reference):
    """Examples that do not fit are left out in front; such instances must not cost the others their trunk."""
    rng = np.random.default_rng(11)
    far, near = draw(rng, 20, 21), draw(rng, 25, 26)
    requests = [(front + draw(rng, 2, 6), draw(rng, 2, 5)) for front in (far + near, near) for _ in range(18)]
    requests.append((draw(rng, 40, 41), draw(rng, 2, 5)))
    items = [(np.array([*a, *b]), len(a)) for a, b in requests]
    groups = group_by_prefix(items)
    assert sorted(index for group in groups for index in group) == list(range(len(items)))
    assert [prefix_length([items[index] for index in group]) for group in groups] == [45, 25, 0]
    for request, (got, _) in zip(requests, Scorer(model).token_scores(requests), strict=True):
        assert got == pytest.approx(reference(*request), abs=2e-4)


def test_graphs_that_hold_too_much_memory_are_let_go(model):
    rng = np.random.default_rng(6)
    requests = [(draw(rng, size, size + 1), draw(rng, 3, 4)) for size in (10, 50, 80)]
    free, tight = Scorer(model, batch_size=1), Scorer(model, batch_size=1)
    sizes = [free.graphs.row_bytes(length) for length in (32, 64, 96)]
    tight.graphs.limit = sizes[0] + sizes[2]
    wanted = free.loglikelihood(requests)
    assert free.graphs.held() == sum(sizes)
    for _ in range(2):
        assert tight.loglikelihood(requests) == pytest.approx(wanted, abs=1e-5)
        assert tight.graphs.held() == sizes[0] + sizes[1]
    # A batch of a large model has fewer tokens.
    assert free.graphs.rows_at_once(64) == 32
    free.graphs.model = SimpleNamespace(config=ModelConfig(layers=24, hidden_size=1024, heads=16))
    assert free.graphs.rows_at_once(64) == 3
    assert free.graphs.rows_at_once(1024) == 1


def test_bad_requests_are_refused(model):
    scorer = Scorer(model)
    assert scorer.loglikelihood([]) == []
    for request in (([], [10]), ([10], []), ([10], [10] * 97), ([10], [VOCABULARY])):
        with pytest.raises(UserError, match="request 1"):
            scorer.loglikelihood([request])


# ---- the three methods --------------------------------------------------------------------------------------------

def test_rolling_scores_every_token_once(model, reference):
    text = draw(np.random.default_rng(3), 200, 201)
    got, = LanguageModel(model).loglikelihood_rolling([text])
    full, expected = [model.config.eot_id, *text], 0.0
    for begin in range(0, 200, 96):
        window = full[begin:begin + 97]
        expected += reference(window[:1], window[1:]).sum()
    assert got == pytest.approx(expected, abs=5e-3)


def test_a_stopped_run_goes_on(model, tmp_path, monkeypatch):
    together, _ = requests_of_all_shapes(5)
    full = LanguageModel(model).loglikelihood(together)
    first = LanguageModel(model, cache=RequestCache(tmp_path, "f"))
    first.loglikelihood(together[:9])
    file, = tmp_path.glob("f-0.jsonl")
    with file.open("a", encoding="utf-8") as torn:
        torn.write('["abc", 1.')  # killed while writing
    asked = []
    second = LanguageModel(model, cache=RequestCache(tmp_path, "f", rank=1))
    answer = second.scorer.loglikelihood_and_greedy
    monkeypatch.setattr(second.scorer, "loglikelihood_and_greedy",
                        lambda some, keep: asked.extend(some) or answer(some, keep))
    for (score, greedy), (wanted, likeliest) in zip(second.loglikelihood(together), full, strict=True):
        assert score == pytest.approx(wanted, abs=1e-4)
        assert greedy == likeliest
    assert len(asked) == len({str(r) for r in together}) - len({str(r) for r in together[:9]})
    third = LanguageModel(model, cache=RequestCache(tmp_path, "f"))
    monkeypatch.setattr(third.scorer, "loglikelihood_and_greedy",
                        lambda some, keep: some and pytest.fail("all answers are known"))
    assert third.loglikelihood(together) == second.loglikelihood(together)
    assert not RequestCache(tmp_path, "other").answers
    known = RequestCache(tmp_path, "f").answers
    file.write_text(file.read_text().replace("-", "-1"))
    assert known.items() > RequestCache(tmp_path, "f").answers.items()  # what has changed is asked again


class WordTokenizer(PairTokenizer):
    """Ids come out as their numbers."""

    class _Stream:
        def feed(self, number):
            return f"{number},"

        def finish(self):
            return ""

    def stream(self):
        return self._Stream()

    def normal_form(self, text):
        return text


def test_generation_is_the_slow_greedy_text(model):
    weights = arrays(model)
    language = LanguageModel(model, WordTokenizer())
    rng = np.random.default_rng(7)
    prompts = [draw(rng, 5, 12) for _ in range(3)]
    rule = GenerateSettings(max_new_tokens=5, top_k=1, stop_ids=[])
    texts = language.generate_until([*prompts, prompts[0]], rule)
    for prompt, text in zip(prompts, texts, strict=False):
        ids = list(prompt)
        for _ in range(5):
            ids.append(int(forward(weights, model.config, np.array(ids))[-1].argmax()))
        assert text == "".join(f"{n}," for n in ids[len(prompt):])
    assert texts[3] == texts[0]


class Request:
    def __init__(self, *args):
        self.args = args


def test_harness_adapter_scores_texts(model, reference):
    tokenizer = WordTokenizer()
    harness = HarnessModel(LanguageModel(model, tokenizer))
    (score, greedy), (alone, _) = harness.loglikelihood([Request("这是关于", "故事的文章"), Request("", "文章")])
    ids, front = tokenizer.encode("这是关于故事的文章"), tokenizer.encode("这是关于")
    place = common_prefix([ids, front])
    assert score == pytest.approx(reference(ids[:place], ids[place:]).sum(), abs=1e-3)
    assert greedy is is_greedy(arrays(model), model.config, ids, place)
    assert alone == pytest.approx(reference([9], tokenizer.encode("文章")).sum(), abs=1e-3)
    assert harness.loglikelihood_rolling([Request("文章")]) == [pytest.approx(alone, abs=1e-4)]
    texts = harness.generate_until([Request("这是", {"until": ["\n"], "max_gen_toks": 4}),
                                    Request("关于", {"until": [], "max_gen_toks": 2})])
    assert [text.count(",") for text in texts] == [4, 2]


def test_the_harness_itself_runs_our_model(home, tmp_path, monkeypatch):
    """Questions of the world as tasks of that package: its scores and accuracies are ours."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from pangu.evaluation import lm_eval_adapter as harness

    harness.register()
    questions = home / "data" / "synthetic" / "questions.jsonl"
    (tmp_path / "world.yaml").write_text(yaml.safe_dump({
        "task": "world_local", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "target_delimiter": "",
        "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "num_fewshot": 0,
        "metric_list": [{"metric": "acc"}]}))
    (tmp_path / "words.yaml").write_text(yaml.safe_dump({
        "task": "words_local", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "。",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}, "num_fewshot": 0,
        "metric_list": [{"metric": "exact_match"}]}))
    found = lm_eval.simple_evaluate(
        model="pangu", model_args=f"config={home / 'run.yaml'}", tasks=["world_local", "words_local"], limit=12,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), bootstrap_iters=0,
        log_samples=True)
    samples = found["samples"]["world_local"]
    assert len(samples) == 12 and len(found["samples"]["words_local"]) == 12
    assert all(isinstance(sample["filtered_resps"][0], str) for sample in found["samples"]["words_local"])
    language = LanguageModel(*_model_of(home))
    for sample in samples:
        adapter = HarnessModel(language)
        for (score, greedy), choice in zip(sample["filtered_resps"], sample["doc"]["choices"], strict=True):
            (wanted, likeliest), = adapter.loglikelihood([Request(sample["doc"]["prompt"], choice)])
            assert score == pytest.approx(wanted, abs=1e-3)
            assert greedy == likeliest
    right = [int(np.argmax([score for score, _ in sample["filtered_resps"]])) == sample["doc"]["answer"]
             for sample in samples]
    assert found["results"]["world_local"]["acc,none"] == pytest.approx(np.mean(right))


def _model_of(home):
    from pangu.data.tokenizer import Tokenizer
    from pangu.generation.backend import load_model
    from pangu.settings import Run
    from parallel.common.settings import load_settings

    settings = load_settings(Run, home / "run.yaml")
    return load_model(settings, settings.output.directory), Tokenizer(settings.data.tokenizer)


def test_harness_missing_is_one_clear_line(monkeypatch):
    import sys

    from pangu.evaluation import lm_eval_adapter as harness

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match="pip install lm-eval"):
        harness.register()


# ---- the verb -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def home(tmp_path_factory, model):
    """Vocabulary, checkpoint of an untrained tiny model, world questions and two small data sets."""
    from pangu.data.train_vocabulary import train_vocabulary
    from parallel.checkpoint.full import save_checkpoint

    home = tmp_path_factory.mktemp("evaluation")
    train_vocabulary([d["text"] for d in generate_corpus(150_000)], home / "v.model", size=950)
    big = tiny_model(vocabulary_size=950)
    save_checkpoint(home / "run" / "checkpoints", 1, list(big.get_parameters()))
    (home / "data" / "synthetic").mkdir(parents=True)
    write_jsonl([q for s in ("sentiment", "arithmetic") for q in generate_questions(s, 12)],
                home / "data" / "synthetic" / "questions.jsonl")
    (home / "data" / "cmrc2018").mkdir()
    (home / "data" / "cmrc2018" / "trial.json").write_text(json.dumps({"data": [{"paragraphs": [
        {"id": "P", "context": "小王住在北京。" * 20, "qas": [{"id": "Q", "question": "小王住在哪里？",
                                                        "answers": [{"text": "北京", "answer_start": 4}]}]}]}]}))
    config = {"model": {**big.config.model_dump(mode="json")}, "data": {"tokenizer": str(home / "v.model")},
              "output": {"directory": str(home / "run")}}
    (home / "run.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    return home


def evaluate(home, capsys, *words, code=0):
    capsys.readouterr()
    assert main("pangu", VERBS, ["evaluate", "--config", str(home / "run.yaml"), "--data", str(home / "data"),
                                 *map(str, words)]) == code
    captured = capsys.readouterr()
    return json.loads(captured.out.strip().splitlines()[-1]) if code == 0 else captured.err.strip().splitlines()[-1]


def test_verb_on_tasks(home, capsys, tmp_path):
    tasks = "synthetic_sentiment,synthetic_arithmetic,cmrc2018"
    figures = evaluate(home, capsys, "--tasks", tasks, "--shots", "1", "--output", tmp_path, "--log-samples",
                       tmp_path / "samples.jsonl")
    assert set(figures["results"]) == set(tasks.split(","))
    assert figures["instances_per_second"] > 0
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    for name, result in figures["results"].items():
        rows = [row for row in samples if row["task"] == name]
        assert result["instances"] == len(rows)
        assert {"metric", "stderr", "instances"} <= result.keys()
        if name == "cmrc2018":
            assert rows[0]["scores"] == []
            assert rows[0]["target"] == ["北京"]
            assert rows[0]["truncated"] > 0
            continue
        right = [row["prediction"] == row["target"] == int(np.argmin(row["scores"])) for row in rows]
        assert result["metric"] == result["accuracy"] == pytest.approx(np.mean(right))
        p = np.mean(right)
        assert result["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / len(rows)), abs=0.04)
    saved = json.loads((tmp_path / "results_1.json").read_text())
    assert saved["results"] == figures["results"]
    assert "| cmrc2018 | f1 |" in (tmp_path / "results_1.md").read_text()
    # A second run finds every answer.
    again = evaluate(home, capsys, "--tasks", tasks, "--shots", "1", "--output", tmp_path)
    assert again["results"] == figures["results"]


def test_verb_equals_the_slow_scorer_and_the_unshared_one(home, capsys, tmp_path):
    from pangu.data.tokenizer import Tokenizer

    slow = {name: value.astype(np.float64) for name, value in arrays(tiny_model(vocabulary_size=950)).items()}
    config = tiny_model(vocabulary_size=950).config
    for words in ((), ("--no-sharing", "--batch", "3")):
        evaluate(home, capsys, "--tasks", "synthetic_arithmetic", "--no-cache", "--limit", 5, "--output", tmp_path,
                 "--log-samples", tmp_path / "s", *words)
        rows = [json.loads(line) for line in (tmp_path / "s").read_text().splitlines()]
        source = Source(load_task("synthetic_arithmetic"), home / "data")
        instances = InstanceBuilder(source.task, source, Tokenizer(home / "v.model"), 96).instances(5)
        assert [row["id"] for row in rows] == [instance.id for instance in instances]
        for row, instance in zip(rows, instances, strict=True):
            expected = [-token_scores(slow, config, [*a, *b], len(a)).mean() for a, b in instance.requests]
            assert row["scores"] == pytest.approx(expected, abs=1e-3)


def test_verb_on_questions(home, capsys):
    figures = evaluate(home, capsys, "--questions", home / "data" / "synthetic" / "questions.jsonl", "--limit", 6)
    assert set(figures["results"]) == {"sentiment", "arithmetic"}
    for result in figures["results"].values():
        assert result["metric"] == result["accuracy"]
        assert result["instances"] == 6
    assert figures["instances_per_second"] > 0


@pytest.mark.parametrize(("words", "part"), [
    ((), "give --tasks NAMES or --questions"), (("--tasks", "tnew"), "did you mean tnews"),
    (("--tasks", "tnews"), "expected"), (("--tasks", "c3", "--shots", "-1"), "--shots"),
    (("--tasks", "c3", "--batch", "0"), "--batch"), (("--tasks", "c3", "--limit", "0"), "--limit"),
    (("--questions", "x", "--log-samples", "y"), "--log-samples"),
    (("--tasks", "synthetic_sentiment", "--checkpoint", "nowhere"), "no checkpoint")])
def test_mistakes_are_one_line(home, capsys, words, part):
    line = evaluate(home, capsys, *words, code=2)
    assert line.startswith("error: ")
    assert part in line


def test_table_shows_the_papers_figures():
    text = markdown({"tnews": {"metric": 0.5, "name": "accuracy", "stderr": 0.01, "instances": 10, "shots": 1.0,
                               "chance": 0.25}}, "1")
    assert "| tnews | accuracy | 50.00 | 1.00 | 25.0 | 10 | 1.0 | 69.5 | 57.95 | 63.83 |" in text


@pytest.mark.slow
def test_two_processes_equal_one(home, capsys, tmp_path):
    words = ("--tasks", "synthetic_sentiment,cmrc2018", "--no-cache", "--shots", "1")
    one = evaluate(home, capsys, *words, "--output", tmp_path / "one", "--log-samples", tmp_path / "one.jsonl")
    two = evaluate(home, capsys, *words, "--output", tmp_path / "two", "--log-samples", tmp_path / "two.jsonl",
                   "--nproc", 2)
    assert two["ranks"] == 2
    first, second = ([json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
                     for name in ("one", "two"))
    assert [row["id"] for row in first] == [row["id"] for row in second]
    for a, b in zip(first, second, strict=True):
        assert a["prediction"] == b["prediction"]
        assert a["scores"] == pytest.approx(b["scores"], abs=1e-4)
    assert one["results"]["cmrc2018"] == two["results"]["cmrc2018"]


# ---- the published data -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def published():
    """The published vocabulary and a model of its size that is as narrow as possible."""
    from pangu.data.tokenizer import Tokenizer

    if not SHARED.is_dir():
        pytest.skip("the published data sets are not in ../shared")
    model = tiny_model(vocabulary_size=40000, hidden_size=8, sequence_length=192)
    weights = {name: value.astype(np.float64) for name, value in arrays(model).items()}
    return LanguageModel(model, Tokenizer(SHARED / "tokenizer" / "pangu_alpha_vocab.model")), weights


PUBLISHED = ["ocnli", "tnews", "chid", "cluewsc2020", "csl", "iflytek", "c3", "afqmc", "cmrc2019"]


@pytest.mark.shared_data
@pytest.mark.parametrize(("name", "shots"), [
    *((name, 0) for name in PUBLISHED),
    # Examples are put before an instance in one way for all tasks: one of each kind, labels and texts.
    *(pytest.param(name, 2, marks=() if name in ("tnews", "cmrc2019") else pytest.mark.slow) for name in PUBLISHED)])
def test_published_tasks_equal_the_slow_scorer(published, name, shots):
    language, weights = published
    source = Source(load_task(name), SHARED / "evaluation")
    instances = InstanceBuilder(source.task, source, language.tokenizer, 192, shots).instances(3)
    requests = [request for instance in instances for request in instance.requests]
    assert len(instances) == 3
    got = language.loglikelihood(requests)
    for (prefix, scored), (total, _) in zip(requests, got, strict=True):
        expected = token_scores(weights, language.config, [*prefix, *scored], len(prefix))
        assert total / len(scored) == pytest.approx(expected.mean(), abs=1e-3)


@pytest.mark.shared_data
@pytest.mark.parametrize("name, count", [
    ("afqmc", 4316), ("cmrc2017", 2000), ("cmrc2019", 1504), ("drcd", 3524), ("pd_cft", 1953)])
def test_published_files_are_read_to_their_end(name, count):
    """As many instances as the publishers say (CMRC2019: the blanks of its trial file), none without an answer."""
    records = list(Source(load_task(name), SHARED / "evaluation").records())
    assert len(records) == count and len({record["id"] for record in records}) == count
    assert all("XXXXX" not in record.get("context", "") + record.get("question", "") for record in records)
    assert all(record.get("answer", record.get("label")) not in (None, "") for record in records)


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["cmrc2018", "cmrc2017", "drcd", "pd_cft"])
def test_published_generation_equals_slow_greedy_decoding(published, name):
    language, weights = published
    source = Source(load_task(name), SHARED / "evaluation")
    instance, = InstanceBuilder(source.task, source, language.tokenizer, 192, 2).instances(1)
    rule = GenerateSettings(max_new_tokens=3, temperature=0.0, stop_ids=[])
    text, = language.generate_until([instance.prompt], rule)
    ids = list(instance.prompt)
    for _ in range(3):
        ids.append(int(forward(weights, language.config, np.array(ids))[-1].argmax()))
    assert text == language.tokenizer.decode(ids[-3:])


@pytest.mark.shared_data
def test_examples_joined_as_ids_are_the_joined_text(published):
    language, _ = published
    source = Source(load_task("ocnli"), SHARED / "evaluation")
    records = list(source.records())[:20]
    encode = language.tokenizer.encode
    for first, second in zip(records, records[1:], strict=False):
        a, b = f"{first['sentence1']}?对，{first['sentence2']}\n", f"{second['sentence1']}?错，"
        assert encode(a) + encode(b) == encode(a + b)
