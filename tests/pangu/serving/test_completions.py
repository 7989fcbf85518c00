"""The server as openai-python sees it: prompts of every kind, streams, stops, log-probabilities, refusals."""

from __future__ import annotations

import json
import time
import urllib.request

import pytest

from tests.pangu.serving.fake_engine import FakeEngine
from tests.pangu.serving.servers import serving

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

PROMPTS = ("问：王芳的工作是什么？", "今天天气很好，")


def client_of(address, key="none", **options):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=20, **options)


@pytest.fixture(scope="module")
def server(tokenizer):
    """(client, address, service) over an engine whose tokens are a function of the ids before them."""
    with serving(FakeEngine(tokenizer.vocabulary_size), tokenizer) as (address, service):
        yield client_of(address), address, service


@pytest.fixture(scope="module")
def client(server):
    return server[0]


def complete(client, **fields):
    return client.completions.create(**{"model": "pangu-test", "max_tokens": 8, **fields})


def streamed(client, chat=False, **fields):
    """(texts by index, finish reasons by index, usage, chunks) of a stream."""
    call = client.chat.completions if chat else client.completions
    chunks = list(call.create(**{"model": "pangu-test", "max_tokens": 8, "stream": True, **fields}))
    texts, reasons, usage = {}, {}, None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text = (choice.delta.content or "") if chat else choice.text
            texts[choice.index] = texts.get(choice.index, "") + text
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    return texts, reasons, usage, chunks


def test_models(client):
    assert [model.id for model in client.models.list().data] == ["pangu-test"]
    assert client.models.retrieve("pangu-test").object == "model"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt/9")
    assert error.value.code == "model_not_found" and error.value.param == "model"


def test_four_kinds_of_prompt_are_the_same_prompt(client, tokenizer):
    ids = [tokenizer.encode(text) for text in PROMPTS]
    text = complete(client, prompt=PROMPTS[0], seed=5)
    assert text.object == "text_completion" and text.id.startswith("cmpl-") and text.choices[0].finish_reason
    assert text.usage.prompt_tokens == len(ids[0])
    assert text.usage.total_tokens == text.usage.prompt_tokens + text.usage.completion_tokens
    assert complete(client, prompt=ids[0], seed=5).choices[0].text == text.choices[0].text
    both = complete(client, prompt=list(PROMPTS), seed=5, n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == text.choices[0].text
    assert both.usage.prompt_tokens == sum(map(len, ids))
    by_ids = complete(client, prompt=ids, seed=5, n=2)
    assert [choice.text for choice in by_ids.choices] == [choice.text for choice in both.choices]
    # n draws differently, and a prompt's answers do not depend on the prompts beside it.
    assert both.choices[0].text != both.choices[1].text
    assert both.choices[2].text == complete(client, prompt=PROMPTS[1], seed=5).choices[0].text


@pytest.mark.parametrize("fields", [
    {"seed": 3}, {"seed": 3, "n": 2}, {"temperature": 0}, {"seed": 4, "stop": ["。", "："]}, {"seed": 3, "echo": True},
    {"seed": 3, "logprobs": 2, "n": 2}])
def test_a_stream_is_the_answer_in_parts(client, fields):
    whole = complete(client, prompt=PROMPTS[0], max_tokens=20, **fields)
    texts, reasons, usage, chunks = streamed(client, prompt=PROMPTS[0], max_tokens=20,
                                             stream_options={"include_usage": True}, **fields)
    assert [texts[choice.index] for choice in whole.choices] == [choice.text for choice in whole.choices]
    assert [reasons[choice.index] for choice in whole.choices] == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage and chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1]) and len({chunk.id for chunk in chunks}) == 1
    if "logprobs" in fields:
        for choice in whole.choices:
            parts = [part.logprobs for chunk in chunks for part in chunk.choices if part.index == choice.index]
            assert [x for piece in parts for x in piece.token_logprobs] == choice.logprobs.token_logprobs
            assert [x for piece in parts for x in piece.text_offset] == choice.logprobs.text_offset


def test_raw_events_name_every_key(server):
    body = {"model": "pangu-test", "prompt": "今天", "stream": True, "max_tokens": 3, "temperature": 0, "made_up": [1]}
    request = urllib.request.Request(f"{server[1]}/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream") and answer.headers["x-request-id"]
        events = answer.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in map(json.loads, (event.removeprefix("data: ") for event in events[:-2])):
        assert set(event) == {"id", "object", "created", "model", "system_fingerprint", "choices"}
        assert set(event["choices"][0]) == {"index", "text", "logprobs", "finish_reason"}


def test_logprobs_and_echo(client, tokenizer):
    ids = tokenizer.encode(PROMPTS[0])
    answer = complete(client, prompt=[ids], echo=True, logprobs=1, max_tokens=1, temperature=0)
    found = answer.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(ids) + 1
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None and found.text_offset[0] == 0
    assert all(logprob in top.values() and len(top) <= 2
               for logprob, top in zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True))
    assert found.token_logprobs[-1] == max(found.top_logprobs[-1].values())
    assert answer.choices[0].text.startswith(tokenizer.decode(ids))
    assert "".join(found.tokens).startswith(tokenizer.decode(ids))
    engine = FakeEngine(tokenizer.vocabulary_size)
    from tests.pangu.serving.fake_engine import logprob
    assert found.token_logprobs[3] == logprob(engine.logits(ids[:3]), ids[3], 1).logprob
    # The prompt alone, and the text as it was typed.
    alone = complete(client, prompt=PROMPTS[0], echo=True, logprobs=0, max_tokens=0)
    assert alone.choices[0].text == PROMPTS[0] and len(alone.choices[0].logprobs.tokens) == len(ids)
    assert alone.usage.completion_tokens == 0 and alone.choices[0].finish_reason == "length"
    named = complete(client, prompt=[ids], logprobs=1, max_tokens=1, extra_body={"return_tokens_as_token_ids": True})
    assert named.choices[0].logprobs.tokens[0].startswith("token_id:")


def test_the_likeliest_of_ids_with_one_text_counts():
    from pangu.serving.choices import Entry
    from pangu.serving.shapes import CompletionShape

    top = CompletionShape("m", "f")._top(Entry(14, "的", -3.0, ((15, "的", -1.0), (16, "我", -2.0)), 0))
    assert top == {"的": -1.0, "我": -2.0}


@pytest.mark.parametrize("width", ["答：", "答:"])
def test_stops_span_tokens_and_match_the_normal_form(tokenizer, width):
    script = [*tokenizer.encode("明月照我还。答"), *tokenizer.encode("：教师。")]
    with serving(FakeEngine(tokenizer.vocabulary_size, script=script), tokenizer) as (address, _):
        client = client_of(address)
        whole = complete(client, prompt="问：", max_tokens=30, stop=width, logprobs=0)
        texts, reasons, *_ = streamed(client, prompt="问：", max_tokens=30, stop=[width])
        assert whole.choices[0].text == texts[0] == tokenizer.decode(tokenizer.encode("明月照我还。"))
        assert whole.choices[0].finish_reason == reasons[0] == "stop"
        assert "".join(whole.choices[0].logprobs.tokens) == whole.choices[0].text
        # What could have been the beginning of a stop comes out at the end.
        held = complete(client, prompt="问：", max_tokens=len(tokenizer.encode("明月照我还。答")), stop="答：")
        assert held.choices[0].text.endswith("答") and held.choices[0].finish_reason == "length"


def test_stop_ids(tokenizer):
    script = tokenizer.encode("明月照我还。")
    with serving(FakeEngine(tokenizer.vocabulary_size, script=script), tokenizer) as (address, _):
        client = client_of(address)
        for fields in ({"stop": [script[2]]}, {"stop_token_ids": [script[2]]}):
            answer = complete(client, prompt="问：", extra_body=fields)
            assert answer.choices[0].text == tokenizer.decode(script[:2]) and answer.choices[0].finish_reason == "stop"
            assert answer.usage.completion_tokens == 3
        endless = [9] * 4
        with serving(FakeEngine(tokenizer.vocabulary_size, script=endless), tokenizer) as (other, _):
            assert complete(client_of(other), prompt="问：", max_tokens=4).usage.completion_tokens == 1
            assert complete(client_of(other), prompt="问：", max_tokens=4,
                            extra_body={"ignore_eos": True}).usage.completion_tokens == 4


def test_characters_are_never_split(byte_tokenizer):
    ids = byte_tokenizer.encode("你好𝄞𠮷😀。")
    assert any(byte_tokenizer._model.is_byte(number) for number in ids), "the vocabulary knows these: nothing is tested"
    with serving(FakeEngine(byte_tokenizer.vocabulary_size, script=ids), byte_tokenizer) as (address, _):
        client = client_of(address)
        whole = complete(client, prompt="a", max_tokens=len(ids))
        texts, _, _, chunks = streamed(client, prompt="a", max_tokens=len(ids))
        assert whole.choices[0].text == texts[0] == byte_tokenizer.decode(ids) and "😀" in texts[0]
        assert not any("\ufffd" in choice.text for chunk in chunks for choice in chunk.choices)


def test_best_of_gives_the_likeliest(client):
    fields = {"prompt": PROMPTS[1], "seed": 9, "max_tokens": 6, "logprobs": 0}
    several = complete(client, n=4, **fields).choices

    def mean(choice):
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    best = complete(client, n=2, best_of=4, **fields)
    expected = sorted(several, key=mean, reverse=True)[:2]
    assert [choice.text for choice in best.choices] == [choice.text for choice in expected]
    assert [choice.index for choice in best.choices] == [0, 1]


def test_bias_and_penalties_reach_the_engine(client, tokenizer):
    forced = tokenizer.encode("花")[-1]
    answer = complete(client, prompt="今天", max_tokens=3, temperature=0, logit_bias={str(forced): 100})
    assert answer.choices[0].text == 3 * tokenizer.decode([forced])
    once = complete(client, prompt="今天", max_tokens=3, temperature=0, logit_bias={str(forced): 5},
                    frequency_penalty=2, presence_penalty=2)
    assert once.choices[0].text != answer.choices[0].text


def test_chat(client, tokenizer):
    messages = [{"role": "system", "content": "两人问答。"},
                {"role": "user", "content": [{"type": "text", "text": "你好"}]},
                {"role": "assistant", "content": "你好，"}, {"role": "user", "content": "今天天气？"}]
    fields = {"model": "pangu-test", "messages": messages, "seed": 2, "temperature": 1, "top_p": 1, "user": "me",
              "presence_penalty": 0, "frequency_penalty": 0}
    whole = client.chat.completions.create(max_completion_tokens=9, logprobs=True, top_logprobs=2, **fields)
    assert whole.object == "chat.completion" and whole.choices[0].message.role == "assistant"
    assert whole.usage.prompt_tokens == len(tokenizer.encode("两人问答。\n问：你好\n答：你好，\n问：今天天气？\n答："))
    content = whole.choices[0].logprobs.content
    assert len(content[0].top_logprobs) == 2 and bytes(content[0].bytes).decode() == content[0].token
    texts, reasons, usage, chunks = streamed(client, chat=True, max_tokens=9, stream_options={"include_usage": True},
                                             **fields)
    assert texts[0] == whole.choices[0].message.content and usage == whole.usage
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].object == "chat.completion.chunk"
    assert reasons[0] == chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    # Without a limit it goes on to the end of the context.
    rest = client.chat.completions.create(**fields)
    assert rest.choices[0].finish_reason in ("stop", "length")


def test_a_chat_template_of_ones_own(tokenizer, tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ raise_it }}", encoding="utf-8")
    with serving(FakeEngine(tokenizer.vocabulary_size), tokenizer, chat_template=str(file)) as (address, _):
        answer = client_of(address).chat.completions.create(model="pangu-test", max_tokens=1, messages=[
            {"role": "user", "content": "今天"}])
        assert answer.usage.prompt_tokens == len(tokenizer.encode("今天"))


WRONG = [
    ({"prompt": None}, "prompt", "missing_required_parameter"),
    ({"prompt": []}, "prompt", "invalid_value"), ({"prompt": [[]]}, "prompt", "invalid_value"),
    ({"prompt": {"a": 1}}, "prompt", "invalid_value"), ({"prompt": [1, "a"]}, "prompt", "invalid_value"),
    ({"prompt": [1, 10**30]}, "prompt", "invalid_value"), ({"prompt": [True]}, "prompt", "invalid_value"),
    ({"prompt": [5] * 65}, "prompt", "context_length_exceeded"),
    ({"prompt": "\ufffd"}, "prompt", "invalid_value"), ({"prompt": ["a", "\u200b\x01"]}, "prompt", "invalid_value"),
    ({"prompt": "长" * 9999}, "prompt", "context_length_exceeded"),
    ({"prompt": ["a"] * 300}, "prompt", "too_many_sequences"), ({"n": 300}, "n", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"), ({"n": 3, "best_of": 2}, "best_of", "invalid_value"),
    ({"best_of": 2, "stream": True}, "best_of", "invalid_value"),
    ({"max_tokens": 5000}, "max_tokens", "context_length_exceeded"),
    ({"max_tokens": -1}, "max_tokens", "invalid_value"),
    ({"max_tokens": "9"}, "max_tokens", "invalid_type"), ({"max_tokens": 1e300}, "max_tokens", "invalid_value"),
    ({"temperature": -0.1}, "temperature", "invalid_value"), ({"temperature": True}, "temperature", "invalid_type"),
    ({"top_p": 1.5}, "top_p", "invalid_value"), ({"top_k": -2}, "top_k", "invalid_value"),
    ({"logprobs": 99}, "logprobs", "invalid_value"), ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"99999": 1}}, "logit_bias", "invalid_value"), ({"logit_bias": []}, "logit_bias", "invalid_type"),
    ({"stop": [""]}, "stop", "invalid_value"), ({"stop": {"a": 1}}, "stop", "invalid_type"),
    ({"stop": ["a"] * 65}, "stop", "invalid_value"), ({"suffix": "end"}, "suffix", "unsupported_parameter"),
    ({"stream": "yes"}, "stream", "invalid_type"), ({"stream_options": {}}, "stream_options", "invalid_value"),
    ({"presence_penalty": 3}, "presence_penalty", "invalid_value"), ({"seed": 1.5}, "seed", "invalid_type"),
    ({"user": 5}, "user", "invalid_type"), ({"repetition_penalty": 1.2}, "repetition_penalty", "unsupported_parameter"),
    *((fields, next(iter(fields)), "unsupported_parameter") for fields in (
        {"include_stop_str_in_output": True}, {"response_format": {"type": "json_object"}}, {"response_format": "json"},
        {"bad_words": ["a"]}, {"guided_choice": ["a", "b"]}, {"prompt_logprobs": 1})),
]


@pytest.mark.parametrize(("fields", "param", "code"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_wrong_fields_are_named(client, fields, param, code):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="pangu-test", prompt="今天", extra_body=fields)
    body = error.value.body
    assert (error.value.param, error.value.code) == (param, code)
    assert set(body) == {"message", "type", "param", "code"} and body["type"] == "invalid_request_error"
    assert "\n" not in body["message"] and len(body["message"]) < 300


@pytest.mark.parametrize("fields", [
    {"messages": []}, {"messages": "hi"}, {"messages": [{"role": "robot", "content": "a"}]},
    {"messages": [{"role": "user"}]}, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    {"tools": [{"type": "function"}]}, {"response_format": {"type": "json_object"}}, {"top_logprobs": 3}])
def test_wrong_chats_are_refused(client, fields):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="pangu-test", messages=[{"role": "user", "content": "a"}],
                                       extra_body=fields)
    assert error.value.param == next(iter(fields)) or fields.keys() == {"messages"}


def test_what_clients_send_beside_is_let_be(client):
    answer = complete(client, prompt="今天", user="someone", presence_penalty=0, frequency_penalty=0.0, top_p=1,
                      logit_bias={}, extra_body={"made_up": {"a": [1]}, "suffix": None, "best_of": None, "min_p": 0,
                                                 "repetition_penalty": 1.0, "service_tier": "auto", "bad_words": [],
                                                 "include_stop_str_in_output": False, "guided_json": None,
                                                 "response_format": {"type": "text"}})
    assert answer.choices[0].finish_reason
    assert complete(client, prompt="", max_tokens=2).usage.prompt_tokens == 1  # the beginning of a document


def test_other_refusals(server):
    client, address, _ = server
    with pytest.raises(openai.NotFoundError) as error:
        complete(client, prompt="a", model="gpt-9")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="pangu-test", input="a")
    for raw in (b"{", b"[1]", b"\xff", b"null", b'{"prompt": NaN}', b"[" * 5000, b'{"prompt": ' + b"9" * 5000 + b"}"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(f"{address}/v1/completions", raw), timeout=20)
        assert refused.value.code == 400 and json.load(refused.value)["error"]["type"] == "invalid_request_error"
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{address}/v1/completions", timeout=20)
    assert refused.value.code == 405 and json.load(refused.value)["error"]["code"] == "method_not_allowed"


def test_api_key_and_foreign_pages(tokenizer, monkeypatch):
    monkeypatch.setenv("SERVE_API_KEY", "sesame")
    engine = FakeEngine(tokenizer.vocabulary_size)
    with serving(engine, tokenizer, cors_origins=["https://pages.example"], max_body_bytes=2000) as (address, _):
        with pytest.raises(openai.AuthenticationError) as error:
            complete(client_of(address, "wrong"), prompt="a")
        assert error.value.code == "invalid_api_key"
        assert complete(client_of(address, "sesame"), prompt="a").choices
        with urllib.request.urlopen(f"{address}/health", timeout=20) as answer:
            assert json.load(answer)["status"] == "ok"
        preflight = urllib.request.Request(f"{address}/v1/completions", method="OPTIONS", headers={
            "Origin": "https://pages.example", "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type"})
        with urllib.request.urlopen(preflight, timeout=20) as answer:
            assert answer.headers["access-control-allow-origin"] == "https://pages.example"
            assert "authorization" in answer.headers["access-control-allow-headers"].lower()
        foreign = client_of(address, "sesame", default_headers={"Sec-Fetch-Site": "cross-site",
                                                                "Origin": "https://x.example"})
        with pytest.raises(openai.PermissionDeniedError):
            complete(foreign, prompt="a")
        with pytest.raises(openai.APIStatusError) as error:
            complete(client_of(address, "sesame"), prompt="长" * 3000)
        assert error.value.status_code == 413


def test_a_full_queue_is_429(tokenizer):
    engine = FakeEngine(tokenizer.vocabulary_size, seconds_per_token=0.05, queue=2)
    with serving(engine, tokenizer) as (address, _):
        client = client_of(address)
        stream = complete(client, prompt="今天", max_tokens=60, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as error:
            complete(client, prompt=["今天", "今天"])
        assert error.value.response.headers["retry-after"] == "1" and error.value.code == "queue_full"
        # What was taken of the refused request is freed.
        deadline = time.monotonic() + 5
        while engine.stats().running > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert complete(client, prompt="今天", max_tokens=1).choices
        stream.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_slots(tokenizer, stream, capfd):
    engine = FakeEngine(tokenizer.vocabulary_size, context=10_000, seconds_per_token=0.02)
    with serving(engine, tokenizer) as (address, _):
        client = client_of(address).with_options(timeout=0.3)
        fields = {"prompt": "今天", "max_tokens": 9000, "n": 3, "extra_body": {"ignore_eos": True}}
        if stream:
            answer = complete(client, stream=True, **fields)
            next(iter(answer))
            assert engine.stats().running == 3
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                complete(client, **fields)
        deadline = time.monotonic() + 5
        while engine.stats().running and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.stats().running == 0 and engine.stats().cancelled_total == 3
    assert "Traceback" not in capfd.readouterr().err


def test_tokenizer_paths_and_metrics(server, tokenizer):
    def post(path, body):
        request = urllib.request.Request(server[1] + path, json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    ids = tokenizer.encode(PROMPTS[0])
    found = post("/tokenize", {"prompt": PROMPTS[0], "add_special_tokens": False, "return_token_strs": True})
    assert found["tokens"] == ids and found["count"] == len(ids) and found["max_model_len"] == 64
    assert "".join(found["token_strs"]) == tokenizer.decode(ids)
    assert post("/tokenize", {"prompt": "<eot>"})["tokens"] == [9]
    assert 9 not in post("/tokenize", {"prompt": "a<eot>"})["tokens"]
    assert post("/detokenize", {"tokens": ids})["prompt"] == tokenizer.decode(ids)
    assert post("/detokenize", {"tokens": []})["prompt"] == ""
    with urllib.request.urlopen(f"{server[1]}/tokenizer_info", timeout=20) as answer:
        info = json.load(answer)
    assert info["eos_token"] == "<eot>" and "问：" in info["chat_template"]
    with urllib.request.urlopen(f"{server[1]}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    for name in ("pangu_num_requests_running", "pangu_prompt_tokens_total", "pangu_time_to_first_token_seconds_bucket",
                 "pangu_e2e_request_latency_seconds_count", 'pangu_requests_total{code="200"}'):
        assert name in text, name
