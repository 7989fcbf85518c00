"""A trained model adapted to pairs: it learns the answers, adapters merged are adapters beside, frozen stays frozen."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from data_tools.synthetic.skills import sentiment_document
from data_tools.synthetic.words import Draw
from pangu.__main__ import VERBS
from pangu.adaptation.pairs import PairsDataset, read_pairs
from parallel.checkpoint.folder import PARAMETERS_FILE, resolve_checkpoint
from parallel.checkpoint.sharded import Slices
from parallel.common.command import main
from parallel.common.errors import UserError
from parallel.training.metrics_log import read_metrics
from tests.pangu.tiny import PairTokenizer

ROOT = Path(__file__).parents[3]
TINY = str(ROOT / "configs/pangu/tiny.yaml")
SMALL = ["model.layers=2", "model.hidden_size=32", "model.heads=2", "model.sequence_length=32", "model.ffn_std=0.2",
         "model.linear_std=0.2", "model.vocabulary_size=600", "train.global_batch_size=8", "train.validate_every=null",
         "train.optimizer.schedule.warmup_steps=2", "output.tensorboard=false", "output.loss_curve=false"]
COLOURS = {"天": "蓝", "草": "绿", "血": "红", "雪": "白", "夜": "黑", "金": "黄"}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A vocabulary, a base model of three steps, and pairs."""
    home = tmp_path_factory.mktemp("adaptation")
    lines = [f"{thing}是{colour}色的。问：{thing}是什么颜色？答：{colour}色。" for thing, colour in COLOURS.items()]
    draw = Draw(random.Random(1))
    texts = [sentiment_document(draw) for _ in range(1500)] + lines * 20
    (home / "corpus.jsonl").write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n"
                                               for text in texts), encoding="utf-8")
    pairs = [{"prompt": f"问：{thing}是什么颜色？答：", "answer": f"{colour}色。"} for thing, colour in COLOURS.items()]
    (home / "pairs.jsonl").write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs),
                                      encoding="utf-8")
    for verb in ("train-vocabulary", "pack", "train"):
        assert main("pangu", VERBS, [verb, "--config", TINY, *where(home), f"output.directory={home / 'base'}",
                                     "train.steps=3"]) == 0
    return home


def where(home: Path) -> list[str]:
    return [*SMALL, f"data.corpus={home / 'corpus.jsonl'}", f"data.tokenizer={home / 'v.model'}",
            f"data.directory={home / 'records'}"]


def finetune(home: Path, name: str, *words: str) -> list[str]:
    message = [*where(home), f"adapt.checkpoint={home / 'base'}", f"adapt.pairs={home / 'pairs.jsonl'}",
               f"adapt.validation={home / 'pairs.jsonl'}", f"output.directory={home / name}",
               "train.optimizer.learning_rate=0.01", *words]
    assert main("pangu", VERBS, ["finetune", "--config", TINY, *message]) == 0
    return message


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def parameters(folder: Path) -> dict[str, np.ndarray]:
    slices = Slices(folder)
    return {name: slices.read(name) for name in slices.names(PARAMETERS_FILE)}


# ---------------------------------------------------------------- pairs as batches

def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)}\n"
                            for row in rows), encoding="utf-8")
    return path


def test_the_loss_counts_answers_and_their_ends_alone(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "甲乙丙", "answer": "丁"}, {"prompt": "戊", "answer": "己庚"})
    tokenizer = PairTokenizer()
    data = PairsDataset(path, tokenizer, batch_size=1, seed=1, sequence_length=15, repeat=False)
    ids, positions, documents, counted = next(data.batches(0))
    encoded = [[tokenizer.encode(text) for text in pair] for pair in read_pairs(path)]
    laid = [number for prompt, answer in encoded for number in [*prompt, *answer, tokenizer.eot_id]]
    assert ids[0, :len(laid)].tolist() == laid and (ids[0, len(laid):] == tokenizer.pad_id).all()
    wanted = [flag for prompt, answer in encoded for flag in [0] * len(prompt) + [1] * (len(answer) + 1)]
    assert counted[0].tolist() == wanted[1:] + [0] * (15 - len(wanted) + 1)
    second = len(encoded[0][0]) + len(encoded[0][1]) + 1
    assert positions[0, second] == 0 and documents[0, second] == documents[0, second - 1] + 1


def test_ranks_share_the_batch_of_one_process_and_every_pair_comes_once_an_epoch(tmp_path):
    path = write(tmp_path / "p.jsonl", *({"prompt": f"问{n}", "answer": f"答{n}"} for n in range(23)))
    shared = {"batch_size": 4, "seed": 3, "sequence_length": 8}
    single = PairsDataset(path, PairTokenizer(), **shared)
    halves = [PairsDataset(path, PairTokenizer(), shard=(rank, 2), **shared) for rank in range(2)]
    for step in range(7):
        together = [np.concatenate(parts) for parts in zip(*(next(half.batches(step)) for half in halves), strict=True)]
        assert all(np.array_equal(a, b) for a, b in zip(together, next(single.batches(step)), strict=True))
    numbers = np.concatenate([single._numbers(step) for step in range(single.records)])
    assert (np.bincount(numbers, minlength=single.records) == 4).all()


@pytest.mark.parametrize("rows, message", [
    (['{"prompt": "a"}'], "line 1: 'answer' is no text"), (["[1]"], "line 1: not a JSON object"),
    (["{"], "line 1: not JSON"), ([], "no pairs"), ([{"prompt": "字" * 50, "answer": "b"}], "line 1: the pair has")])
def test_bad_pairs_are_one_line(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        PairsDataset(write(tmp_path / "p.jsonl", *rows), PairTokenizer(), batch_size=1, seed=1, sequence_length=15)


# ---------------------------------------------------------------- from the command line to the answers

def answers(home: Path, checkpoint: Path, capsys) -> list[str]:
    capsys.readouterr()
    prompts = write(home / "prompts.txt", *(f"问：{thing}是什么颜色？答：" for thing in COLOURS))
    assert main("pangu", VERBS, ["generate", "--config", TINY, *where(home), "--checkpoint", str(checkpoint),
                                 "--prompts", str(prompts), "generate.temperature=0",
                                 "generate.max_new_tokens=6"]) == 0
    return [output["text"] if isinstance(output, dict) else output for output in last_json(capsys)["outputs"]]


@pytest.mark.slow
def test_full_fine_tuning_learns_the_answers(home, capsys):
    finetune(home, "full", "train.steps=60")
    figures = last_json(capsys)
    assert figures["validation_loss"] < 0.2
    right = sum(text.startswith(colour) for text, colour in
                zip(answers(home, home / "full", capsys), COLOURS.values(), strict=True))
    assert right == len(COLOURS)


def test_adapters_train_alone_and_merged_they_are_the_same_model(home, capsys):
    words = ["adapt.low_rank.rank=4", "adapt.low_rank.targets=[query,value,output,mapping,projection]"]
    finetune(home, "low_rank", "train.steps=120", *words)
    assert last_json(capsys)["validation_loss"] < 0.5
    base, adapted = parameters(home / "base"), parameters(home / "low_rank")
    assert all(np.array_equal(base[name], adapted[name]) for name in base)
    added = set(adapted) - set(base)
    assert len(added) == 2 * 5 * 2 and all(np.abs(adapted[name]).max() > 0 for name in added)
    states = Slices(home / "low_rank").names("optimizer.safetensors")
    assert {name.partition(".")[2] for name in states} == added

    assert main("pangu", VERBS, ["extract-adapter", "--checkpoint", str(home / "low_rank"), "--output",
                                 str(home / "adapter")]) == 0
    for number, extra in enumerate(([str(home / "low_rank")], [str(home / "base"), "--adapter",
                                                               str(home / "adapter")])):
        assert main("pangu", VERBS, ["merge-adapter", "--checkpoint", *extra, "--output",
                                     str(home / f"merged{number}")]) == 0
    one, two = parameters(home / "merged0"), parameters(home / "merged1")
    assert one.keys() == base.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    capsys.readouterr()
    assert main("pangu", VERBS, ["generate", "--config", TINY, *where(home), "--checkpoint", str(home / "low_rank"),
                                 "--prompt", "问"]) == 2
    assert "merge its adapters" in capsys.readouterr().err
    beside, within = losses(home, home / "low_rank", words), losses(home, home / "merged0", [])
    assert beside == pytest.approx(within, rel=1e-5)
    assert losses(home, home / "base", []) > 2 * beside


def losses(home: Path, checkpoint: Path, words: list[str]) -> float:
    """Loss of the pairs under a checkpoint."""
    import mindspore as ms

    from pangu.build import training_network
    from pangu.data.tokenizer import Tokenizer
    from pangu.settings import Run
    from parallel.checkpoint.full import load_parameters
    from parallel.common.settings import load_settings

    settings = load_settings(Run, TINY, [*where(home), f"adapt.checkpoint={checkpoint}",
                                         f"adapt.pairs={home / 'pairs.jsonl'}", *words])
    network = training_network(settings, "float32")
    load_parameters(checkpoint, list(network.model.get_parameters()))
    network.set_train(False)
    data = PairsDataset(home / "pairs.jsonl", Tokenizer(home / "v.model"), batch_size=2, seed=1, sequence_length=32,
                        repeat=False)
    return float(np.mean([network(*map(ms.Tensor, batch)).asnumpy() for batch in data.batches(0)]))


@pytest.mark.slow
def test_resumed_is_uninterrupted(home):
    finetune(home, "straight", "train.steps=6", "adapt.low_rank.rank=2", "train.optimizer.schedule.decay_steps=6")
    finetune(home, "stopped", "train.steps=3", "adapt.low_rank.rank=2", "train.optimizer.schedule.decay_steps=6")
    finetune(home, "stopped", "train.steps=6", "adapt.low_rank.rank=2", "train.optimizer.schedule.decay_steps=6")
    one, two = parameters(home / "straight"), parameters(home / "stopped")
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [["parallel.data=2", "parallel.op=2", "parallel.optimizer.shard=-1"],
                                    ["parallel.op=2", "parallel.pipeline.stages=2",
                                     "parallel.pipeline.micro_batches=2"]])
def test_sharded_adapters_equal_one_device(layout, capsys):
    from parallel.__main__ import VERBS as PROOFS

    words = ["adapt.checkpoint=none", "adapt.pairs=none",
             "adapt.low_rank.targets=[query,value,output,mapping,projection]"]
    assert main("parallel", PROOFS, ["replay", "--config", TINY, "--steps", "2", *words, *layout]) == 0
    assert last_json(capsys)["equal"]


@pytest.mark.slow
def test_launched_adapters_under_tensor_parallelism_equal_one_process(home, capsys):
    """`launch --run finetune` over gloo on real pairs: losses of one process, the frozen weights those of the base."""
    from parallel.__main__ import VERBS as LAUNCH

    words = ["adapt.low_rank.rank=4", "adapt.low_rank.targets=[query,value,output,mapping,projection]",
             "train.steps=12", "train.log_every=1"]
    message = finetune(home, "one_process", *words)
    message = [word for word in message if not word.startswith("output.directory")]
    assert main("parallel", LAUNCH, ["launch", "--config", TINY, "--nproc", "2", "--run", "finetune", *message,
                                     "parallel.op=2", f"output.directory={home / 'op_2'}"]) == 0
    assert last_json(capsys)["layout"] == "op 2"
    one, two = (read_metrics(home / name / "metrics.jsonl") for name in ("one_process", "op_2"))
    losses_of = [[row["loss"] for row in rows if "loss" in row] for rows in (one, two)]
    np.testing.assert_allclose(*losses_of, rtol=1e-5)
    base, adapted = parameters(home / "base"), parameters(home / "op_2")
    assert all(np.array_equal(base[name], adapted[name]) for name in base) and len(adapted) > len(base)


def test_a_launched_finetune_says_what_it_misses(home, capsys):
    from parallel.__main__ import VERBS as LAUNCH

    assert main("parallel", LAUNCH, ["launch", "--config", TINY, "--nproc", "2", "--run", "finetune", *where(home),
                                     "parallel.op=2", f"output.directory={home / 'never'}"]) == 2
    assert "adapt: the config file does not say what to adapt to" in capsys.readouterr().err


@pytest.mark.parametrize("verb, words, message", [
    ("finetune", [], "adapt: the config file does not say what to adapt to"),
    ("extract-adapter", ["--checkpoint", "{base}", "--output", "{new}"], "there are no adapters in the checkpoint"),
    ("merge-adapter", ["--checkpoint", "{base}", "--output", "{new}"], "there are no adapters in the checkpoint")])
def test_mistakes_are_one_line(home, capsys, verb, words, message):
    words = [word.format(base=home / "base", new=home / "new") for word in words]
    config = ["--config", TINY, *where(home)] if verb == "finetune" else []
    assert main("pangu", VERBS, [verb, *config, *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and resolve_checkpoint(home / "base").exists()


def test_adapters_are_not_resumed_from_a_run_without_them(home, capsys):
    assert main("pangu", VERBS, [
        "finetune", "--config", TINY, *where(home), f"adapt.checkpoint={home / 'base'}", "train.steps=9",
        f"adapt.pairs={home / 'pairs.jsonl'}", f"output.directory={home / 'base'}", "adapt.low_rank.rank=4"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "adapt.low_rank" in error and "another output.directory" in error


def test_pairs_of_a_task(tmp_path, capsys):
    folder = tmp_path / "tnews"
    folder.mkdir()
    write(folder / "train_few_all.json", {"sentence": "球队赢了", "label_desc": "news_sports", "id": 1})
    write(folder / "test_public.json", {"sentence": "股票涨了", "label_desc": "news_stock", "id": 2})
    words = ["make-pairs", "--task", "tnews_topic", "--data", str(tmp_path), "--output", str(tmp_path / "out.jsonl")]
    assert main("pangu", VERBS, words) == 0
    assert last_json(capsys) == {"output": str(tmp_path / "out.jsonl"), "pairs": 1, "task": "tnews_topic"}
    assert read_pairs(tmp_path / "out.jsonl") == [("标题：球队赢了\n主题：", "体育")]
    (folder / "train_few_all.json").unlink()
    assert main("pangu", VERBS, words) == 2
    assert "not to be trained on" in capsys.readouterr().err
