"""Graphs by which a trained model is used: what a device holds and sends, and all ranks against one device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pangu.config import ModelConfig
from pangu.generation.settings import GenerateSettings
from pangu.generation.sharded.runner import Call, sample_call
from pangu.generation.sharded.shapes import KINDS, SLOTS, span_shape
from pangu.generation.weights import parameter_shapes
from parallel.__main__ import VERBS
from parallel.common.command import main
from parallel.proof.compile.casts import parameter_casts
from parallel.proof.compile.graph import read_graph
from parallel.proof.compile.rank_compiler import Request
from parallel.task import load_run

CONFIG = str(Path(__file__).parents[3] / "configs" / "pangu" / "tiny.yaml")
SIZES = {"layers": 3, "hidden_size": 32, "heads": 4, "vocabulary_size": 304, "sequence_length": 64}
SMALL = [*(f"model.{name}={size}" for name, size in SIZES.items()), "generate.batch_size=3",
         "generate.prefill_chunk=16", "model.linear_std=0.2", "model.ffn_std=0.2", "model.embedding_std=0.5"]
RANKERS = Path(CONFIG).parents[1] / "recsys"
ONE_DEVICE = ["parallel.data=1", "parallel.op=1", "parallel.expert=1", "parallel.optimizer.shard=1",
              "parallel.pipeline.stages=1"]
LAYOUTS = ["parallel.op=4", "parallel.pipeline.stages=2", "parallel.op=2 parallel.vocabulary=false",
           "parallel.op=2 parallel.pipeline.stages=2"]


def told(capsys, *words, code=0):
    capsys.readouterr()
    assert main("parallel", VERBS, [*words, "--config", CONFIG, *SMALL]) == code
    out, err = capsys.readouterr()
    return json.loads(out.strip().splitlines()[-1]) if code == 0 else err.strip().splitlines()[-1]


def test_ranks_of_op_2_decode_what_one_device_does(capsys):
    figures = told(capsys, "replay", "--graph", "decode", "parallel.op=2", "parallel.data=2")
    assert figures["world"] == 2 and figures["result"] < 1e-12 and figures["cache"] < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_graph_of_every_layout_is_one_devices(capsys, kind, layout):
    figures = told(capsys, "replay", "--graph", kind, *layout.split())
    assert figures["result"] < 1e-12 and figures["cache"] < 1e-12


@pytest.mark.slow
def test_a_dry_run_tells_weights_and_cache_of_every_stage(capsys):
    figures = told(capsys, "dryrun", "--graph", "decode", "--ranks", "all-distinct", "--strict", "parallel.op=2",
                   "parallel.pipeline.stages=2", "train.precision=bf16")
    first, last = figures["ranks"]
    shape = span_shape("decode", ModelConfig(**SIZES), GenerateSettings(batch_size=3, prefill_chunk=16))
    layer = 2 * 2 * SIZES["hidden_size"] // 2 * shape.cache  # keys and values of a rank's heads in bfloat16
    assert (first["cache_bytes"], last["cache_bytes"]) == (2 * layer, layer)
    whole = sum(2 * size[0] * (size[1] if len(size) > 1 else 1) for size in
                parameter_shapes(ModelConfig(**SIZES)).values())
    table = 2 * SIZES["vocabulary_size"] * SIZES["hidden_size"] // 2  # both stages hold the words
    assert whole / 2 < first["weight_bytes"] + last["weight_bytes"] < whole / 2 + table + 40_000
    assert first["collectives"]["Send"]["count"] == last["collectives"]["Receive"]["count"] == 1
    assert first["unexpected_redistributions"] == 0


def casts_of(compilers, config: Path, kind: str, *words: str) -> dict:
    """The casts of parameters in a graph of inference on one device."""
    request = Request(1, 0, str(config), [*ONE_DEVICE, *words], graph=kind)
    return parameter_casts(read_graph(compilers.compile([request])[0].graph))


def test_a_token_and_a_candidate_cast_no_weight(compilers):
    assert casts_of(compilers, Path(CONFIG), "decode", "train.precision=bf16", *SMALL) == {}
    separated = RANKERS / "tokenmixer_large_ug_sep.yaml"
    assert casts_of(compilers, separated, "candidates_64", "train.precision=fp16") == {}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_graph_of_the_language_model_casts_a_weight(compilers, kind, precision):
    assert casts_of(compilers, Path(CONFIG), kind, f"train.precision={precision}", *SMALL) == {}


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(RANKERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_no_pass_of_a_ranker_casts_a_weight(compilers, path):
    package, settings = load_run(path)
    if settings.data.tables.place == "host":
        pytest.skip("tables on the host are served by one process without such graphs")
    kinds = {kind.rpartition("_")[0]: kind for kind in package.inference_kinds(settings, "serve")}
    for kind in kinds.values():
        assert casts_of(compilers, path, kind, "train.precision=bf16") == {}


def test_what_has_no_such_graph_is_one_line(capsys):
    assert "known: step, decode, prefill, score" in told(capsys, "dryrun", "--graph", "decoed", code=2)
    assert "is for the training step" in told(capsys, "dryrun", "--graph", "decode", "--html", "x", code=2)
    assert "is for the training step" in told(capsys, "replay", "--graph", "decode", "--float32", code=2)
    assert "does not divide" in told(capsys, "dryrun", "--graph", "decode", "parallel.op=3", code=2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_is_told_to_the_other_ranks_as_it_is(kind):
    model = ModelConfig(**SIZES)
    shape = span_shape(kind, model, GenerateSettings(batch_size=3, prefill_chunk=16))
    arrays = sample_call(kind, shape, model, 1)
    assert [array.shape for array in arrays] == list(shape.inputs().values())
    ids, positions, write, read, visible, wanted = arrays
    # A token sees its own slot and as many as stand before it.
    tokens = visible.reshape(-1, shape.seen).sum(-1)
    real = tokens > 0
    assert (tokens[real] == positions.reshape(-1)[real] + 1).all() and real.any()
    for row in real.nonzero()[0]:
        assert write[row] in read[row // shape.tokens][visible.reshape(-1, shape.seen)[row] > 0]
    assert len(set(write[real])) == real.sum() and write.max() < shape.cache and SLOTS == 16
    call = Call(kind, [])
    assert Call.unpacked(call.packed()) == call
