"""`python -m pangu serve` on a checkpoint: the same texts as `pangu generate`, reload of a newer one, the end."""

from __future__ import annotations

import json
import shutil
import signal
import urllib.request

import pytest

from pangu.data.tokenizer import Tokenizer
from pangu.settings import Run, ServeRun
from parallel.common.errors import UserError
from parallel.common.settings import load_settings, validate
from tests.pangu.serving.servers import started
from tests.pangu.tiny import tiny_model
from tests.servers import says_where

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
PROMPTS = ["今天天气很好，", "问：王芳的工作是什么？\n答：", "上联："]


def test_texts_are_those_of_generate_and_reload_takes_a_newer_model(run):
    from pangu.generation.backend import Backend, load_backend
    from pangu.generation.generate import Generator
    from pangu.generation.settings import GenerateSettings
    from parallel.checkpoint.full import save_checkpoint

    folder, settings = run
    process, address = started(run, "name=tiny")
    try:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)
        model, tokenizer = load_backend(settings, str(folder / "train")), Tokenizer(folder / "v.model")
        for rule in ({"temperature": 0.0}, {"seed": 7, "top_k": 20, "top_p": 0.9},
                     {"seed": 7, "frequency_penalty": 1.0}):
            wanted = Generator(model, tokenizer, GenerateSettings(max_new_tokens=12, **rule)).generate(PROMPTS * 2)
            fields = {name: value for name, value in rule.items() if name != "top_k"}
            fields["extra_body"] = {"top_k": rule.get("top_k", 0)}
            answer = client.completions.create(model="tiny", prompt=PROMPTS, max_tokens=12, n=2, **fields)
            # The n-th answer to a prompt is what `generate` gives to its n-th repetition.
            assert [choice.text for choice in answer.choices] == [
                completion.text for place in range(3) for completion in (wanted[place], wanted[place + 3])]
            parts = client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=12, stream=True, **fields)
            assert "".join(part.choices[0].text for part in parts) == wanted[0].text
        newer = tiny_model(5, vocabulary_size=tokenizer.vocabulary_size, sequence_length=64)
        save_checkpoint(folder / "train" / "checkpoints", 2, list(newer.get_parameters()), (),
                        {"run": settings.model_dump(mode="json")})
        with urllib.request.urlopen(urllib.request.Request(f"{address}/reload", b""), timeout=60) as message:
            assert json.load(message)["version"] == 2
        greedy = client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=12, temperature=0)
        rule = GenerateSettings(max_new_tokens=12, temperature=0)
        assert greedy.choices[0].text == Generator(Backend(newer), tokenizer, rule).generate(PROMPTS[:1])[0].text
        process.send_signal(signal.SIGTERM)
        figures = json.loads(process.stdout.read().strip().splitlines()[-1])
        assert process.wait(20) == 0 and figures["version"] == 2 and figures["requests"] == 22
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [["parallel.op=2"], ["parallel.pipeline.stages=2"]], ids=str)
def test_a_sharded_server_gives_the_texts_of_one_process_takes_a_newer_model_and_ends(run, tmp_path, layout):
    from pangu.generation.backend import Backend, load_backend
    from pangu.generation.generate import Generator
    from pangu.generation.settings import GenerateSettings
    from parallel.checkpoint.full import save_checkpoint

    folder, settings = run
    place = tmp_path / "run"
    shutil.copytree(folder / "train" / "checkpoints" / "step_00000001", place / "checkpoints" / "step_00000001")
    tokenizer = Tokenizer(folder / "v.model")
    process, address = says_where("parallel", "launch", "--config", str(folder / "run.yaml"), "--run", "serve",
                                  "--nproc", "2", "serve.port=0", "serve.engine.running=4",
                                  f"output.directory={tmp_path}", *layout, "--", "--checkpoint", str(place))
    try:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)
        generator = Generator(load_backend(settings, str(place)), tokenizer)
        for rule in ({"temperature": 0.0}, {"seed": 7, "top_p": 0.9}):
            wanted = generator.generate(PROMPTS, GenerateSettings(max_new_tokens=12, **rule))
            answer = client.completions.create(model="pangu_alpha", prompt=PROMPTS, max_tokens=12, **rule)
            assert [choice.text for choice in answer.choices] == [completion.text for completion in wanted]
        newer = tiny_model(5, vocabulary_size=tokenizer.vocabulary_size, sequence_length=64)
        state = {"run": settings.model_dump(mode="json")}
        save_checkpoint(place / "checkpoints", 2, list(newer.get_parameters()), (), state)
        other = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)
        assert other.post("/reload", cast_to=dict)["version"] == 2
        greedy = client.completions.create(model="pangu_alpha", prompt=PROMPTS, max_tokens=12, temperature=0)
        rule = GenerateSettings(max_new_tokens=12, temperature=0)
        wanted = Generator(Backend(newer), tokenizer, rule).generate(PROMPTS)
        assert [choice.text for choice in greedy.choices] == [completion.text for completion in wanted]
        save_checkpoint(place / "checkpoints", 3, list(newer.get_parameters()), (), state)
        damaged = place / "checkpoints" / "step_00000003" / "parameters.safetensors"
        data = bytearray(damaged.read_bytes())
        data[-1] ^= 1
        damaged.write_bytes(data)
        with pytest.raises(openai.APIStatusError, match="parameters.safetensors"):
            other.post("/reload", cast_to=dict)
        again = client.completions.create(model="pangu_alpha", prompt=PROMPTS, max_tokens=12, temperature=0)
        assert [choice.text for choice in again.choices] == [completion.text for completion in wanted]
        process.send_signal(signal.SIGTERM)
        figures = json.loads(process.stdout.read().strip().splitlines()[-1])
        assert process.wait(30) == 0 and figures["requests"] == 12 and figures["ranks"] == 2
    finally:
        process.kill()
        process.wait()


def test_int8_weights(run):
    process, address = started(run, "--int8")
    try:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)
        assert client.models.list().data[0].id == "pangu_alpha"
        assert client.completions.create(model="pangu_alpha", prompt=PROMPTS[0], max_tokens=3).usage.completion_tokens
    finally:
        process.kill()
        process.wait()


def test_keys_of_the_server_need_no_block(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("serve: {port: 1, name: x}\n")
    settings = load_settings(ServeRun, file, ["port=2", "serve.max_logprobs=7", "engine.running=3"])
    serve = settings.serve
    assert (serve.port, serve.name, serve.max_logprobs, serve.engine.running) == (2, "x", 7, 3)
    assert load_settings(ServeRun, None, []).serve == load_settings(Run, None, []).serve
    with pytest.raises(UserError, match="prot"):
        validate(ServeRun, {"prot": 5})
    with pytest.raises(UserError, match="chat_stop"):
        validate(ServeRun, {"chat_stop": [""]})
    with pytest.raises(UserError, match="serve"):
        validate(ServeRun, {"serve": 5, "port": 3})


def test_mistakes_are_one_line(run, tmp_path, capsys, monkeypatch):
    from pangu.__main__ import VERBS
    from parallel.common.command import main

    bad = tmp_path / "chat.jinja"
    bad.write_text("{% for %}")
    for words, message in ((["--checkpoint", str(tmp_path)], "checkpoint"), (["port=99999"], "port"),
                           ([f"chat_template={bad}"], "not a template"), (["chat_template=none.jinja"], "no template")):
        assert main("pangu", VERBS, ["serve", "--config", str(run[0] / "run.yaml"), "port=0", *words]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert message in error[-1] and error[-1].startswith("error: "), error
