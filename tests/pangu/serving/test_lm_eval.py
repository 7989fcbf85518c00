"""lm-evaluation-harness over HTTP scores as the adapter in this process does, sample by sample."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml

from pangu.evaluation.language_model import LanguageModel
from pangu.evaluation.lm_eval_adapter import HarnessModel
from pangu.generation.backend import Backend
from pangu.serving.engine import BatchingEngine
from pangu.serving.engine_settings import EngineSettings
from tests.pangu.numpy_model import forward
from tests.pangu.serving.servers import TEXT, serving
from tests.pangu.tiny import arrays, tiny_model

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("fastapi")
PROMPTS = ("问：王芳的工作是什么？\n答：", "今天天气很好，", "上联：春风吹绿江南岸，下联：", "问：3加4等于几？\n答：",
           "李娜：好久不见！张伟：")
ENDINGS = ("教师。", "我们去公园看花。", "明月照我还。")


def engine_of(model):
    return BatchingEngine(Backend(model), "random", EngineSettings(running=4, prefill_chunk=16))


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(3, vocabulary_size=tokenizer.vocabulary_size, sequence_length=64)


@pytest.fixture(scope="module")
def tasks(model, tokenizer, tmp_path_factory):
    """A folder with two tasks: choices, among them what the model itself would say; and free text."""
    folder, weights = tmp_path_factory.mktemp("tasks"), arrays(model)

    def likeliest(prompt):
        """The text that the model goes on with; None where it is cut into other tokens when it stands in a text."""
        ids = tokenizer.encode(prompt)
        if len(ids) > 50:
            return None
        best = int(forward(weights, model.config, np.array(ids))[-1].argmax())
        text = tokenizer.decode([best])
        return text if tokenizer.encode(prompt + text) == [*ids, best] else None

    documents = [{"prompt": prompt, "choices": [*ENDINGS, "花"], "answer": 0} for prompt in PROMPTS]
    endings = ((TEXT[:place], likeliest(TEXT[:place])) for place in range(1, len(TEXT) // 20))
    documents += [{"prompt": prompt, "choices": [ending, "花"], "answer": 0} for prompt, ending in endings
                  if ending][:3]
    (folder / "questions.jsonl").write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in documents))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
              "test_split": "test", "doc_to_text": "{{prompt}}", "target_delimiter": "", "num_fewshot": 0}
    for task in ({"task": "choices", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}",
                  "doc_to_target": "answer", "metric_list": [{"metric": "acc"}]},
                 {"task": "words", "output_type": "generate_until", "doc_to_target": "。",
                  "generation_kwargs": {"until": ["。"], "max_gen_toks": 6, "temperature": 0},
                  "metric_list": [{"metric": "exact_match"}]},
                 {"task": "texts", "output_type": "loglikelihood_rolling", "doc_to_target": "{{prompt}}",
                  "metric_list": [{"metric": "bits_per_byte"}]}):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**task, **common}, allow_unicode=True))
    return folder


def evaluate(address, folder, *names):
    """Samples of each task, by the harness against a server."""
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="local-completions", tasks=list(names), bootstrap_iters=0, log_samples=True,
        model_args=f"base_url={address}/v1/completions,model=pangu-test,tokenizer_backend=remote,num_concurrent=4,"
                   "batch_size=8,max_length=64",
        task_manager=TaskManager(include_path=str(folder), include_defaults=False))
    return found["samples"]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_over_http_as_in_process(model, tokenizer, tasks):
    adapter = HarnessModel(LanguageModel(model, tokenizer))
    with serving(engine_of(model), tokenizer) as (address, _):
        samples = evaluate(address, tasks, "choices", "words", "texts")
    assert len(samples["choices"]) > len(PROMPTS)
    scored = [pair for sample in samples["choices"] for pair in sample["filtered_resps"]]
    for (score, greedy), (wanted, is_greedy) in zip(scored, adapter.loglikelihood(pairs_of(samples["choices"])),
                                                    strict=True):
        assert abs(score - wanted) < 1e-4 and greedy == is_greedy
    assert {greedy for _, greedy in scored} == {True, False}
    options = {"until": ["。"], "max_gen_toks": 6}
    assert [sample["filtered_resps"][0] for sample in samples["words"]] == adapter.generate_until(
        [Request(sample["doc"]["prompt"], options) for sample in samples["words"]])
    texts = adapter.loglikelihood_rolling([Request(sample["doc"]["prompt"]) for sample in samples["texts"]])
    np.testing.assert_allclose([sample["filtered_resps"][0] for sample in samples["texts"]], texts, rtol=0, atol=1e-4)


def pairs_of(samples):
    """The (context, continuation) of all samples, in order."""
    return [Request(sample["doc"]["prompt"], choice) for sample in samples for choice in sample["doc"]["choices"]]


def test_a_server_that_drops_echo_is_noticed(model, tokenizer, tasks):
    """The control: many servers ignore `echo`, and then every answer scores alike."""
    adapter = HarnessModel(LanguageModel(model, tokenizer))
    with serving(engine_of(model), tokenizer) as (address, service):
        begin = service.begin
        service.begin = lambda ask: begin(replace(ask, echo=False, params=replace(ask.params, prompt_logprobs=None)))
        samples = evaluate(address, tasks, "choices")["choices"]
    for sample in samples:
        assert len({score for score, _ in sample["filtered_resps"]}) == 1, "without echo nothing tells them apart"
    scores = [score for sample in samples for score, _ in sample["filtered_resps"]]
    assert all(abs(score - wanted) > 1e-4 for score, (wanted, _) in
               zip(scores, adapter.loglikelihood(pairs_of(samples)), strict=True))
