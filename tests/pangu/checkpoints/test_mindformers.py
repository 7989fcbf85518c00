"""The bridge, for real, in a process of its own: MindFormers sets global state and writes logs where it stands."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pangu.config import ModelConfig
from parallel.common.errors import UserError

ROOT = Path(__file__).parents[3]

SCRIPT = """
import json, sys
import mindspore as ms
import numpy as np
ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
from mindformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Trainer, pipeline
from mindformers.tools.register import MindFormerConfig
from pangu.generation.generate import Generator
from pangu.generation.settings import GenerateSettings
from pangu.checkpoints.mindformers import register, to_model_config
from pangu.data.tokenizer import Tokenizer
from pangu.model import PanGuAlpha
from parallel.sharding.config import ParallelConfig
from parallel.sharding.layout import apply_sharding
from tests.pangu.numpy_model import forward

vocabulary, folder = sys.argv[1:]
Config, Model, OurTokenizer = register()
config = Config(seq_length=24, vocab_size=950, hidden_size=16, num_layers=2, num_heads=2, compute_dtype="float32",
                dropout=0.0, batch_size=2)
model, found = AutoModel.from_config(config), {}
found["class"] = type(model).__name__
weights = {p.name: p.asnumpy().copy() for p in model.get_parameters()}
model.set_train(False)
ids = np.array([[20, 300, 41, 77, 5]], np.int32)
logits, *_ = model(ms.Tensor(ids))
found["logits"] = float(np.abs(logits.asnumpy() - forward(weights, to_model_config(config), ids[0])).max())
plain, tokenizer = Tokenizer(vocabulary), OurTokenizer(vocabulary)
text = "今天天气很好"
found["ids"] = tokenizer(text)["input_ids"] == plain.encode(text)
found["text"] = tokenizer.decode(plain.encode(text)) == plain.decode(plain.encode(text))
tokenizer.save_pretrained(folder + "/tokenizer", save_json=True)
again = AutoTokenizer.from_pretrained(folder + "/tokenizer")
found["tokenizer"] = [type(again).__name__, again(text)["input_ids"] == plain.encode(text)]
answer = pipeline("text_generation", model=model, tokenizer=tokenizer)(text, max_new_tokens=4, do_sample=False)
ours, = Generator(model.network, plain).generate([text], GenerateSettings(max_new_tokens=4, temperature=0.0))
found["pipeline"] = answer[0]["text_generation_text"][0] == text + ours.text
cached = Config(seq_length=24, vocab_size=950, hidden_size=16, num_layers=2, num_heads=2, compute_dtype="float32",
                dropout=0.0, batch_size=2, use_past=True)
cached = AutoModel.from_config(cached)
prompts = [plain.encode(text), plain.encode(text)[:3]]
wanted = [item.ids for item in Generator(model.network, plain).generate_ids(
    prompts, GenerateSettings(max_new_tokens=6, temperature=0.0, stop_ids=[]))]
rows_ = np.array([ids + [6] * (len(prompts[0]) - len(ids)) for ids in prompts], np.int32)
told = cached.generate(rows_, max_new_tokens=6, do_sample=False, eos_token_id=[-1])
found["use_past"] = [list(map(int, row[len(ids):])) for row, ids in zip(told, prompts)] == wanted
def strategies(network):
    return {(name, place): str(primitive.attrs.get("in_strategy")) for name, cell in network.cells_and_names()
            for place, primitive in cell._primitives.items() if primitive is not None}


laid = AutoModel.from_config(Config(seq_length=24, vocab_size=950, hidden_size=16, num_layers=2, num_heads=2,
                                    parallel_config={"data_parallel": 2, "model_parallel": 2, "vocab_emb_dp": False}))
ours_laid = apply_sharding(PanGuAlpha(to_model_config(laid.config)), ParallelConfig(data=2, op=2))
found["laid"] = strategies(laid.network) == strategies(ours_laid) and any(
    "2" in told for told in strategies(laid.network).values())
model.save_pretrained(folder + "/model", save_json=True)
loaded = AutoModelForCausalLM.from_pretrained(folder + "/model")
found["loaded"] = all((weights[p.name] == p.asnumpy()).all() for p in loaded.get_parameters())


def rows():
    draw = np.random.default_rng(0)
    for _ in range(8):
        yield (draw.integers(10, 950, 25).astype(np.int32),)


model.set_train(True)
run = MindFormerConfig(
    seed=1, output_dir=folder + "/output", run_mode="train", use_parallel=False, load_checkpoint="",
    auto_trans_ckpt=False, resume_training=False, only_save_strategy=False, micro_batch_interleave_num=1,
    monitor_config={"monitor_on": False}, context={"mode": 0, "device_target": "CPU", "device_id": 0},
    runner_config={"epochs": 1, "batch_size": 2, "sink_mode": False, "sink_size": 1},
    runner_wrapper={"type": "PanGuTrainOneStepCell", "scale_sense": 1.0, "use_clip_grad": True},
    optimizer={"type": "AdamWeightDecay", "learning_rate": 1e-2}, parallel={"parallel_mode": 0},
    parallel_config={"data_parallel": 1, "model_parallel": 1, "pipeline_stage": 1, "micro_batch_num": 1},
    trainer={"type": "CausalLanguageModelingTrainer", "model_name": "pangu_alpha"},
    callbacks=[{"type": "MFLossMonitor"}], train_dataset={},
    train_dataset_task={"type": "CausalLanguageModelDataset"},
    model={"model_config": {"type": "PanGuAlphaConfig"}, "arch": {"type": "PanGuAlphaForCausalLM"}})
data = ms.dataset.GeneratorDataset(rows, column_names=["input_ids"]).batch(2)
Trainer(args=run, task="text_generation", model=model, train_dataset=data).train()
found["trained"] = any((weights[p.name] != p.asnumpy()).any() for p in model.get_parameters())
print(json.dumps(found))
"""


@pytest.mark.slow
def test_auto_classes_pipeline_and_trainer(tmp_path):
    if importlib.util.find_spec("mindformers") is None:  # importing it here would write logs into the checkout
        pytest.skip("mindformers is not installed")
    from data_tools.synthetic.generate import generate_corpus
    from pangu.data.train_vocabulary import train_vocabulary

    train_vocabulary([d["text"] for d in generate_corpus(150_000)], tmp_path / "v.model", size=950)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LOCAL_DEFAULT_PATH": str(tmp_path / "logs")}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "v.model"), str(tmp_path)], cwd=tmp_path,
                          env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found.pop("class") == "PanGuAlphaForCausalLM"
    assert found.pop("logits") < 1e-4
    assert found.pop("tokenizer") == ["PanGuAlphaTokenizer", True]
    assert all(found.values()), found


def test_names_become_model_config():
    from types import SimpleNamespace

    from pangu.checkpoints.mindformers import to_model_config

    theirs = SimpleNamespace(num_layers=3, hidden_size=32, intermediate_size=None, num_heads=4, vocab_size=950,
                             seq_length=24, dropout=0.0, final_norm="after_query", gelu="fast",
                             softmax_compute_type="float16", pad_token_id=6, eos_token_id=9)
    assert to_model_config(theirs) == ModelConfig(
        layers=3, hidden_size=32, heads=4, vocabulary_size=950, sequence_length=24, dropout=0.0,
        final_norm="after_query", gelu="fast", softmax_dtype="float16")


def test_parallel_settings_become_ours():
    from pangu.checkpoints.mindformers import to_parallel_config

    theirs = {"data_parallel": 2, "model_parallel": 4, "pipeline_stage": 2, "micro_batch_num": 4, "vocab_emb_dp": False,
              "use_seq_parallel": True, "recompute": {"recompute": True}, "gradient_aggregation_group": 2}
    found = to_parallel_config(theirs)
    assert (found.data, found.op, found.pipeline.stages, found.pipeline.micro_batches) == (2, 4, 2, 4)
    assert found.sequence and found.vocabulary and found.recompute.policy == "full"
    assert found.gradient_fusion_groups == 2
    assert to_parallel_config({}).world == 1
    with pytest.raises(UserError, match="parallel_config.context_parallel"):
        to_parallel_config({"context_parallel": 2})


def test_missing_package_is_one_clear_line(monkeypatch):
    from pangu.checkpoints.mindformers import register

    monkeypatch.setitem(sys.modules, "mindformers", None)
    with pytest.raises(UserError, match="pip install"):
        register.__wrapped__()
