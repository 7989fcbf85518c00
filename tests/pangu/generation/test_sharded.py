"""A model over several processes computes what one process does: logits, greedy text, drawn text."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import yaml

from pangu.__main__ import VERBS as PANGU_VERBS
from pangu.build import PACKAGE
from pangu.config import ModelConfig
from pangu.generation.generate import Generator
from pangu.generation.sharded.dealing import dealt
from pangu.generation.sharded.model import open_sharded
from pangu.settings import Run
from parallel.__main__ import VERBS
from parallel.checkpoint.full import save_checkpoint
from parallel.common.command import main
from parallel.common.errors import UserError
from parallel.common.settings import load_settings
from parallel.launch.inference import grouped, launch_inference
from parallel.launch.plan import add_node_arguments
from parallel.proof.export import exported_inference
from tests.pangu.generation.sharded_child import GREEDY, SEEDED, texts
from tests.pangu.kernel_model import parameters
from tests.pangu.numpy_model import forward

CONFIG = ModelConfig(layers=3, hidden_size=48, heads=4, ffn_size=72, vocabulary_size=96, sequence_length=80,
                     dropout=0.0)
OP_2 = {"op": 2}
OTHERS = [{"op": 4}, {"pipeline": {"stages": 2}}, {"op": 2, "pipeline": {"stages": 2}}, {"data": 2, "op": 2},
          {"data": 2}, {"op": 2, "vocabulary": False}]


class Held:
    """A float32 array as a `NamedTensor`."""

    dtype = "F32"

    def __init__(self, name, value):
        self.name, self.value, self.shape = name, value, value.shape

    def read(self):
        return self.value

    def assign(self, value):
        self.value[...] = value


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A whole checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("sharded") / "run"
    save_checkpoint(folder / "checkpoints", 1, [Held(name, value) for name, value in parameters(CONFIG).items()])
    return folder


@pytest.fixture(scope="module")
def int8_checkpoint(checkpoint, tmp_path_factory):
    """The same checkpoint with int8 weights."""
    folder = tmp_path_factory.mktemp("quantized")
    words = ["quantize", "--config", str(written(folder)), "--checkpoint", str(checkpoint), "--records", "0"]
    assert main("pangu", PANGU_VERBS, [*words, "--output", str(folder / "int8")]) == 0
    return folder / "int8"


def written(folder, config=CONFIG, **blocks):
    """A config file of the model with some blocks."""
    tree = {"model": config.model_dump(mode="json"), "output": {"directory": str(folder / "out")},
            "generate": {"batch_size": 3, "prefill_chunk": 16}, **blocks}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder / "run.yaml"


def launched(checkpoint, folder, layout, nproc, config=CONFIG, flags=()):
    """What the ranks of a layout wrote: logits of each text, and the texts generated."""
    path = written(folder, config, parallel=layout)
    parser = argparse.ArgumentParser()
    add_node_arguments(parser)
    arguments = parser.parse_args(["--nproc", str(nproc)])
    settings, plan = grouped(load_settings(Run, path), arguments)
    command = ["-m", "tests.pangu.generation.sharded_child", str(path), str(checkpoint), str(folder / "told"), *flags]
    figures = launch_inference(PACKAGE, settings, plan, "generate", command, folder / "logs")
    assert figures["failed_rank"] is None
    with np.load(folder / "told.npz") as found:
        logits = [found[str(number)] for number in range(len(found.files))]
    return logits, json.loads((folder / "told.json").read_text())


def one_process(checkpoint):
    """Greedy and drawn continuations by the C++ kernels."""
    from pangu.generation.backend import Backend
    from pangu.generation.weights import CheckpointWeights
    from parallel.checkpoint.folder import resolve_checkpoint

    generator = Generator(Backend(CheckpointWeights(CONFIG, resolve_checkpoint(checkpoint)).packed()), None)
    return {name: [done.ids for done in generator.generate_ids(texts(CONFIG.vocabulary_size), rule)]
            for name, rule in (("greedy", GREEDY), ("seeded", SEEDED))}


def assert_equals_one_process(checkpoint, folder, layout, nproc):
    logits, generated = launched(checkpoint, folder, layout, nproc)
    for ids, rows in zip(texts(CONFIG.vocabulary_size), logits, strict=True):
        expected = forward(parameters(CONFIG), CONFIG, np.array(ids))
        np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert generated == one_process(checkpoint)


def test_op_2_computes_what_one_process_does(checkpoint, tmp_path):
    assert_equals_one_process(checkpoint, tmp_path, OP_2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", OTHERS, ids=str)
def test_every_layout_computes_what_one_process_does(checkpoint, tmp_path, layout):
    size = layout.get("data", 1) * layout.get("op", 1) * layout.get("pipeline", {}).get("stages", 1)
    assert_equals_one_process(checkpoint, tmp_path, layout, size)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"op": 2}, {"op": 4}, {"op": 2, "pipeline": {"stages": 2}}], ids=str)
def test_int8_weights_of_shards_are_those_of_one_device(checkpoint, int8_checkpoint, tmp_path, layout):
    """Quantized while they are read, and from a quantized checkpoint; also where a rank has a part of the inputs."""
    size = layout.get("op", 1) * layout.get("pipeline", {}).get("stages", 1)
    floating, _ = launched(checkpoint, tmp_path / "floating", {}, 1)
    for name, place, flags in (("read", checkpoint, ["int8"]), ("stored", int8_checkpoint, [])):
        wanted, texts_of_one = launched(place, tmp_path / name / "one", {}, 1, flags=flags)
        found, generated = launched(place, tmp_path / name / "shards", layout, size, flags=flags)
        for one, other, wide in zip(found, wanted, floating, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())
            assert np.abs(other - wide).max() > 1e-3 * np.abs(wide).max()
        assert generated == texts_of_one


@pytest.mark.slow
def test_a_rank_holds_its_shards_and_never_the_model(tmp_path):
    """Opening a checkpoint of 167 MB takes a rank its 83 MB and less than the 25 MB of the largest tensor."""
    big = CONFIG.model_copy(update={"hidden_size": 768, "ffn_size": 3072, "vocabulary_size": 8000, "layers": 5})
    whole = parameters(big)
    save_checkpoint(tmp_path / "run" / "checkpoints", 1, [Held(name, value) for name, value in whole.items()])
    total, largest = sum(value.nbytes for value in whole.values()), max(value.nbytes for value in whole.values())
    launched(tmp_path / "run", tmp_path, OP_2, 2, big)
    cache = 2 * 4 * big.layers * big.hidden_size // 2 * (3 * big.sequence_length + 16)
    for rank in range(2):
        taken = int((tmp_path / f"told.memory-{rank}").read_text())
        assert total / 2 < taken < total / 2 + largest + cache + (16 << 20)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The exported program of one device, and the config file."""
    path = written(tmp_path_factory.mktemp("program"))
    return exported_inference(str(path), []), path


@pytest.mark.slow
def test_what_cannot_be_opened_is_one_line_with_what_fits(checkpoint, program, monkeypatch, tmp_path):
    from parallel.torch_runtime.inference import rank

    folder, path = program
    monkeypatch.setenv("PARALLEL_PROGRAM", str(folder))
    settings = load_settings(Run, path)
    assert open_sharded(settings, checkpoint).backend is not None
    weights = sum(value.nbytes for value in parameters(CONFIG).values())
    monkeypatch.setattr(rank, "free_bytes", lambda device: weights + 100_000)
    with pytest.raises(UserError, match=r"generate.batch_size: the cache needs .* are left \(got 3\); 1 fits"):
        open_sharded(settings, checkpoint)
    monkeypatch.undo()
    monkeypatch.setenv("PARALLEL_PROGRAM", str(folder))
    assert open_sharded(settings, checkpoint, int8=True).rank.weights.parts["layers.0.attention.query.weight", "eight"]
    with pytest.raises(UserError, match="generate.prefill_chunk: the program was exported with 16"):
        open_sharded(load_settings(Run, path, ["generate.prefill_chunk=32"]), checkpoint)
    monkeypatch.setenv("PARALLEL_PROGRAM", str(exported_inference(str(path), [], kinds=["prefill", "decode"])))
    with pytest.raises(UserError, match="the program holds no score graph"):
        open_sharded(settings, checkpoint)
    monkeypatch.setenv("PARALLEL_PROGRAM", str(folder))
    main("parallel", VERBS, ["reshard", "--config", str(path), "--from", str(checkpoint), "--to",
                             str(tmp_path / "slices"), "parallel.op=2"])
    next((tmp_path / "slices").glob("parameters-00001-*")).unlink()
    with pytest.raises(UserError, match="parameters-00001-of-00002.safetensors"):
        open_sharded(settings, tmp_path / "slices")


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [True, False])
def test_int8_weights_in_a_program_write_what_one_process_does(checkpoint, program, quantized, monkeypatch, tmp_path):
    """From a quantized checkpoint, and from a float one, whose word embedding stays as it is."""
    from pangu.__main__ import VERBS as PANGU
    from pangu.generation.backend import load_backend

    folder, path = program
    settings, place = load_settings(Run, path), checkpoint
    if quantized:
        place = tmp_path / "int8"
        assert main("pangu", PANGU, ["quantize", "--config", str(path), "--checkpoint", str(checkpoint), "--output",
                                     str(place), "--records", "0"]) == 0
    prompts = texts(CONFIG.vocabulary_size)
    wanted = Generator(load_backend(settings, place, not quantized), None).generate_ids(prompts, GREEDY)
    monkeypatch.setenv("PARALLEL_PROGRAM", str(folder))
    opened = open_sharded(settings, place, int8=not quantized)
    found = Generator(opened.backend, None).generate_ids(prompts, GREEDY)
    assert any(node.op == "Product" for node in opened.rank.graphs["decode"].nodes)
    same = [one.ids == other.ids for one, other in zip(found, wanted, strict=True)]
    assert all(same) if quantized else sum(same) >= len(same) // 2


def test_equal_prompts_stay_together_and_the_longest_are_spread():
    prompts = [[1] * 5, [2] * 50, [1] * 5, [3] * 40, [4] * 30]
    first, second = dealt(prompts, 2)
    assert sorted(first + second) == list(range(5))
    assert any({0, 2} <= set(part) for part in (first, second))
    assert 1 in first and 3 in second
