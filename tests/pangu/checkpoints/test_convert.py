"""Checkpoints of other codes: names, files, the slices, and forward passes by the other layouts' own conventions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from pangu.__main__ import VERBS
from pangu.checkpoints.mindspore_file import MindSporeFile, write_mindspore
from pangu.checkpoints.names import NAMINGS, keys, shapes
from pangu.checkpoints.slices import TABLES, SlicedCheckpoint, SliceLayout, read_strategy, release_layouts
from parallel.checkpoint.safetensors_file import SafetensorsFile
from parallel.common import protobuf_wire as wire
from parallel.common.command import main
from parallel.common.errors import UserError
from tests.pangu.numpy_model import forward
from tests.pangu.tiny import arrays, tiny_model

PUBLISHED = Path(__file__).parents[4] / "shared" / "data" / "checkpoint" / "pangu_alpha_2.6B_ckpt_strategy.ckpt"
SIZES = {"vocabulary_size": 40, "sequence_length": 8, "layers": 3, "hidden_size": 16, "heads": 2}


@pytest.fixture(scope="module")
def model():
    return tiny_model(**SIZES)


@pytest.fixture(scope="module")
def values(model):
    """Random values everywhere, biases and norms too, so that any mix-up shows."""
    from mindspore import Tensor

    rng = np.random.default_rng(0)
    for _, item in model.parameters_and_names():
        item.set_data(Tensor(rng.normal(0, 0.4, item.shape).astype(np.float32)))
    return arrays(model)


@pytest.fixture(scope="module")
def home(tmp_path_factory, model, values):
    """Our own checkpoint of the model and its config."""
    from parallel.checkpoint.full import save_checkpoint

    home = tmp_path_factory.mktemp("convert")
    save_checkpoint(home / "own", 1, list(model.get_parameters()))
    (home / "run.yaml").write_text(yaml.safe_dump({"model": model.config.model_dump(mode="json")}))
    return home


def convert(home, capsys, *words, code=0):
    capsys.readouterr()
    assert main("pangu", VERBS, ["convert", "--config", str(home / "run.yaml"), *map(str, words)]) == code
    captured = capsys.readouterr()
    return json.loads(captured.out.strip().splitlines()[-1]) if code == 0 else captured.err.strip().splitlines()[-1]


def own_values(folder):
    file = SafetensorsFile(folder / "parameters.safetensors")
    return {name: file.read(name) for name in file}


# ---- names --------------------------------------------------------------------------------------------------------

def test_our_names_are_the_models(model):
    assert shapes(model.config) == {name: tuple(item.shape) for name, item in model.parameters_and_names()}


@pytest.mark.parametrize("naming", NAMINGS)
def test_names_are_one_to_one(model, naming):
    named = keys(model.config, naming)
    assert len({key.foreign for key in named}) == len(named) == len({key.name for key in named})


@pytest.mark.shared_data
def test_names_are_those_of_the_published_strategy():
    if not PUBLISHED.is_file():
        pytest.skip("the published strategy file is not in ../shared")
    layouts = read_strategy(PUBLISHED)
    config = tiny_model(**{**SIZES, "layers": 32}).config
    assert {key.foreign for key in keys(config, "mindspore")} == set(layouts)
    assert release_layouts(config) == layouts
    # The shapes of one rank's slices at width 2560, as the release has them.
    slices = {"attention.dense1.weight": ((2560, 2560), (5, 2560)), "attention.dense1.bias": ((2560,), (5,)),
              "attention.projection.weight": ((2560, 2560), (5, 2560)),
              "output.mapping.weight": ((2560, 10240), (40, 1280)), "output.mapping.bias": ((10240,), (20,)),
              "output.projection.weight": ((10240, 2560), (20, 2560)), "output.projection.bias": ((2560,), (2560,))}
    for name, (full, part) in slices.items():
        extent = layouts[f"backbone.blocks.7.{name}"].extent(13, full)
        assert tuple(stop - start for start, stop in extent) == part


# ---- MindSpore's file ---------------------------------------------------------------------------------------------

def test_file_is_mindspores(tmp_path, monkeypatch):
    import mindspore as ms

    rng = np.random.default_rng(1)
    tensors = {"a.weight": rng.normal(size=(3, 5)).astype(np.float32), "b": rng.normal(size=7).astype(np.float16),
               "large": rng.normal(size=(40, 10)).astype(np.float32)}
    # What MindSpore writes is read here.
    ms.save_checkpoint([{"name": k, "data": ms.Tensor(v)} for k, v in tensors.items()], str(tmp_path / "theirs.ckpt"))
    # What is written here, in several pieces, is read by MindSpore.
    monkeypatch.setattr("pangu.checkpoints.mindspore_file._PIECE", 256)
    names = {np.dtype("float32"): "F32", np.dtype("float16"): "F16"}
    write_mindspore(tmp_path / "ours.ckpt", [(k, names[v.dtype], v.shape, lambda v=v: v) for k, v in tensors.items()])
    loaded = ms.load_checkpoint(str(tmp_path / "ours.ckpt"))
    for name, value in tensors.items():
        np.testing.assert_array_equal(loaded[name].asnumpy(), value)
        for file in ("theirs.ckpt", "ours.ckpt"):
            opened = MindSporeFile(tmp_path / file)
            np.testing.assert_array_equal(opened.read(name), value)
    assert len(opened.entries["large"].pieces) == 7


def test_parts_of_mindspores_large_parameters(tmp_path, monkeypatch):
    import mindspore as ms
    from mindspore.train import serialization

    monkeypatch.setattr(serialization, "SLICE_SIZE", 64)
    value = np.arange(5000, dtype=np.float32).reshape(50, 100)
    ms.save_checkpoint([{"name": "w", "data": ms.Tensor(value)}], str(tmp_path / "w.ckpt"))
    np.testing.assert_array_equal(MindSporeFile(tmp_path / "w.ckpt").read("w"), value)


@pytest.mark.parametrize("content", [b"", b"\x80", b"not a checkpoint at all", b"\x0a\x7fabc"])
def test_damaged_files_are_refused(tmp_path, content):
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="x.ckpt"):
        MindSporeFile(path)


# ---- slices -------------------------------------------------------------------------------------------------------

def strategy_bytes(config, data, op):
    """A strategy file with the release's layout of a matrix [data, op], optimizer states included."""
    def layout(name, shape):
        kind = name.rsplit(".", 2)[-2:]
        full = "layernorm" in name or "embedding" in name or kind in (["projection", "bias"],)
        if full:
            return [-1] * len(shape), 0, 0
        return [-1, 0] if kind == ["mapping", "weight"] else [0, -1][:len(shape)], op, -1

    items = b""
    for key in keys(config, "mindspore"):
        dims, step, parts = layout(key.foreign, key.their_shape)
        placed = (wire.field(1, wire.field(1, data) + wire.field(1, op))
                  + wire.field(2, b"".join(wire.field(1, dim) for dim in dims))
                  + wire.field(5, 0) + wire.field(6, step) + wire.field(7, parts))
        for name in (key.foreign, f"adam_v.{key.foreign}"):
            items += wire.field(3, wire.field(1, name.encode()) + wire.field(2, placed))
    return wire.field(1, 1) + items


def reference_slices(values, config, data, op):
    """Each rank's parameters by the release's table, written out with NumPy's split alone."""
    ranks = [{} for _ in range(data * op)]
    for key in keys(config, "mindspore"):
        full = values[key.name].T if key.transposed else values[key.name]
        name = key.foreign
        if "embedding_table" in name:
            continue
        for index in range(data):
            for column in range(op):
                part = full
                if "layernorm" not in name and not name.endswith("projection.bias"):
                    part = np.split(full, op, axis=1 if name.endswith("mapping.weight") else 0)[column]
                    part = np.split(part, data, axis=0)[index]
                ranks[index * op + column][name] = part
    return ranks


@pytest.fixture(scope="module")
def sliced(tmp_path_factory, model, values):
    """Synthetic slices of the small model, 4 x 2 ranks, with the release's layout."""
    import mindspore as ms

    folder = tmp_path_factory.mktemp("slices")
    (folder / "strategy.ckpt").write_bytes(strategy_bytes(model.config, 4, 2))
    for rank, parts in enumerate(reference_slices(values, model.config, 4, 2)):
        ms.save_checkpoint([{"name": name, "data": ms.Tensor(np.ascontiguousarray(part))}
                            for name, part in parts.items()], str(folder / f"filerted_{rank}.ckpt"))
    for key in keys(model.config, "mindspore"):
        if key.foreign in TABLES:
            np.save(folder / TABLES[key.foreign], values[key.name])
    return folder


def test_slices_become_a_checkpoint(home, sliced, capsys, tmp_path, values):
    figures = convert(home, capsys, "--from", "mindspore-512", "--to", "pangu", "--slices", sliced, "--strategy",
                      sliced / "strategy.ckpt", "--embeddings", sliced, "--output", tmp_path / "ours")
    assert figures["unmapped"] == 0
    assert figures["mapped"] == len(values)
    assert figures["parameters"] == sum(value.size for value in values.values())
    got = own_values(tmp_path / "ours")
    for name, value in values.items():
        np.testing.assert_array_equal(got[name], value)
    # And back: the same slices.
    convert(home, capsys, "--from", "pangu", "--to", "mindspore-512", "--input", tmp_path / "ours", "--strategy",
            sliced / "strategy.ckpt", "--output", tmp_path / "again")
    for rank in range(8):
        first, second = (MindSporeFile(folder / f"filerted_{rank}.ckpt") for folder in (sliced, tmp_path / "again"))
        assert set(first.entries) == set(second.entries)
        for name in first.entries:
            np.testing.assert_array_equal(first.read(name), second.read(name))
    assert read_strategy(tmp_path / "again" / "strategy.ckpt") == read_strategy(sliced / "strategy.ckpt")
    for table in TABLES.values():
        np.testing.assert_array_equal(np.load(sliced / table), np.load(tmp_path / "again" / table))


def test_slices_of_the_published_layout_cover_everything():
    """[64, 8] as published: every element of a parameter is held, once or by all."""
    for dims, step, parts in (((0, -1), 8, -1), ((-1, 0), 8, -1), ((-1, -1), 0, 0)):
        layout, held = SliceLayout((64, 8), dims, step, parts), np.zeros((512, 512), np.int32)
        for rank in range(512):
            held[tuple(slice(*span) for span in layout.extent(rank, held.shape))] += 1
        assert (held == (1 if step else 512)).all()


def test_mindspore_merges_what_is_written_here(home, sliced, capsys, tmp_path, values, model):
    """MindSpore's own transformation of the slices written here gives the whole parameters."""
    import mindspore as ms

    convert(home, capsys, "--from", "pangu", "--to", "mindspore-512", "--input", home / "own", "--strategy",
            sliced / "strategy.ckpt", "--output", tmp_path / "s")
    for rank in range(8):
        (tmp_path / "s" / f"rank_{rank}").mkdir()
        (tmp_path / "s" / f"filerted_{rank}.ckpt").rename(tmp_path / "s" / f"rank_{rank}" / f"c{rank}.ckpt")
    ms.transform_checkpoints(str(tmp_path / "s"), str(tmp_path / "t"), "whole", str(tmp_path / "s" / "strategy.ckpt"))
    merged = MindSporeFile(tmp_path / "t" / "rank_0" / "whole0.ckpt")
    for key in keys(model.config, "mindspore"):
        if key.foreign not in TABLES:
            full = values[key.name].T if key.transposed else values[key.name]
            np.testing.assert_array_equal(merged.read(key.foreign), full)


def test_missing_and_foreign_slices_are_refused(home, sliced, capsys, tmp_path, model):
    shape_of = {key.foreign: key.their_shape for key in keys(model.config, "mindspore")}
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    for path in sliced.iterdir():
        if path.name != "filerted_5.ckpt":
            (lacking / path.name).symlink_to(path)
    with pytest.raises(UserError, match="1 of 8 slices are missing, the first is of rank 5"):
        SlicedCheckpoint(lacking, read_strategy(sliced / "strategy.ckpt"), None, shape_of)
    line = convert(home, capsys, "--from", "mindspore-512", "--to", "pangu", "--slices", sliced, "--strategy",
                   sliced / "strategy.ckpt", "--output", tmp_path / "x", "model.hidden_size=32", code=2)
    assert "config of this model's size" in line
    assert not (tmp_path / "x").exists()
    line = convert(home, capsys, "--from", "mindspore-512", "--to", "pangu", "--output", tmp_path / "x", code=2)
    assert "needs --slices" in line
    for content in (b"", b"\x00" * 40, b"nonsense"):
        (tmp_path / "s").write_bytes(content)
        with pytest.raises(UserError, match="strategy"):
            read_strategy(tmp_path / "s")


# ---- round trips --------------------------------------------------------------------------------------------------

OUTPUTS = {"mindspore": "m.ckpt", "mindformers": "f.ckpt", "huggingface": "hf", "megatron": "g.pt", "pangu": "ours"}


@pytest.mark.parametrize(("layout", "output"), [*OUTPUTS.items(), ("mindformers", "f.safetensors")])
def test_round_trips_are_identities(home, capsys, tmp_path, values, layout, output):
    if layout == "megatron":
        pytest.importorskip("torch")
    convert(home, capsys, "--from", "pangu", "--to", layout, "--input", home / "own", "--output", tmp_path / output)
    figures = convert(home, capsys, "--from", layout, "--to", "pangu", "--input", tmp_path / output, "--output",
                      tmp_path / "back")
    assert (figures["mapped"], figures["unmapped"]) == (len(values), 0)
    for name, value in own_values(tmp_path / "back").items():
        np.testing.assert_array_equal(value, values[name])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_converted_checkpoint_loads(home, capsys, tmp_path, model, values):
    from pangu.generation.backend import load_model
    from pangu.settings import Run
    from parallel.common.settings import load_settings

    convert(home, capsys, "--from", "pangu", "--to", "mindspore", "--input", home / "own", "--output",
            tmp_path / "half.ckpt", "--dtype", "fp16")
    assert MindSporeFile(tmp_path / "half.ckpt").entries["backbone.layernorm.beta"].dtype == "F16"
    convert(home, capsys, "--from", "mindspore", "--to", "pangu", "--input", tmp_path / "half.ckpt", "--output",
            tmp_path / "ours")
    loaded = load_model(load_settings(Run, home / "run.yaml"), str(tmp_path / "ours"))
    for name, item in loaded.parameters_and_names():
        np.testing.assert_array_equal(item.asnumpy(), values[name].astype(np.float16).astype(np.float32))


# ---- what the others compute --------------------------------------------------------------------------------------

IDS = np.array([5, 30, 12, 9, 22, 7])


def norm(x, weight, bias):
    spread = x - x.mean(-1, keepdims=True)
    return spread / np.sqrt((spread ** 2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def attend(q, k, v, heads):
    """Causal attention of [S, D] arrays."""
    q, k, v = (x.reshape(len(x), heads, -1).transpose(1, 0, 2) for x in (q, k, v))
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]) + np.triu(np.full((len(IDS), len(IDS)), -1e9), 1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return ((weights / weights.sum(-1, keepdims=True)) @ v).transpose(1, 0, 2).reshape(len(IDS), -1)


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))


def release_logits(p):
    """The released code: Dense layers multiply by the transpose, Mapping layers by the matrix itself."""
    def block(name, x, query=None):
        normed = norm(x, p[f"{name}.layernorm1.gamma"], p[f"{name}.layernorm1.beta"])
        dense = [source @ p[f"{name}.attention.dense{n}.weight"].T + p[f"{name}.attention.dense{n}.bias"]
                 for n, source in ((1, normed if query is None else query), (2, normed), (3, normed))]
        x = x + attend(*dense, 2) @ p[f"{name}.attention.projection.weight"] + p[f"{name}.attention.projection.bias"]
        inner = norm(x, p[f"{name}.layernorm2.gamma"], p[f"{name}.layernorm2.beta"])
        inner = tanh_gelu(inner @ p[f"{name}.output.mapping.weight"] + p[f"{name}.output.mapping.bias"])
        return x + inner @ p[f"{name}.output.projection.weight"] + p[f"{name}.output.projection.bias"]

    words = p["backbone.word_embedding.embedding_table"]
    x = words[IDS] + p["backbone.position_embedding.embedding_table"][:len(IDS)]
    for number in range(SIZES["layers"] - 1):
        x = block(f"backbone.blocks.{number}", x)
    x = norm(x, p["backbone.layernorm.gamma"], p["backbone.layernorm.beta"])
    x = block("backbone.top_query_layer", x, p["backbone.top_query_embedding.embedding_table"][:len(IDS)])
    return x @ words.T


def huggingface_logits(p):
    """The Hugging Face port: every layer a torch Linear, the query layer the last block, ln_f before it."""
    def linear(name, x):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def block(name, x, query=None):
        normed = norm(x, p[f"{name}.ln_1.weight"], p[f"{name}.ln_1.bias"])
        x = x + linear(f"{name}.attn.c_proj", attend(
            linear(f"{name}.attn.q_proj", normed if query is None else query), linear(f"{name}.attn.k_proj", normed),
            linear(f"{name}.attn.v_proj", normed), 2))
        inner = norm(x, p[f"{name}.ln_2.weight"], p[f"{name}.ln_2.bias"])
        return x + linear(f"{name}.mlp.c_proj", tanh_gelu(linear(f"{name}.mlp.c_fc", inner)))

    x, last = p["transformer.wte.weight"][IDS] + p["transformer.wpe.weight"][:len(IDS)], SIZES["layers"] - 1
    for number in range(last):
        x = block(f"transformer.h.{number}", x)
    x = norm(x, p["transformer.ln_f.weight"], p["transformer.ln_f.bias"])
    return block(f"transformer.h.{last}", x, p["transformer.wqe.weight"][:len(IDS)]) @ p["transformer.wte.weight"].T


def test_outputs_are_those_of_the_other_codes(home, capsys, tmp_path, model, values):
    import mindspore as ms

    length = len(IDS)
    ours = model(ms.Tensor(IDS[None].astype(np.int32)), ms.Tensor(np.arange(length, dtype=np.int32)[None]),
                 ms.Tensor(np.tril(np.ones((1, length, length), np.float32)))).asnumpy()
    convert(home, capsys, "--from", "pangu", "--to", "mindspore", "--input", home / "own", "--output",
            tmp_path / "m.ckpt")
    file = MindSporeFile(tmp_path / "m.ckpt")
    assert release_logits({name: file.read(name) for name in file.entries}) == pytest.approx(ours, abs=2e-4)
    convert(home, capsys, "--from", "mindspore", "--to", "huggingface", "--input", tmp_path / "m.ckpt", "--output",
            tmp_path / "hf")
    file = SafetensorsFile(tmp_path / "hf" / "model.safetensors")
    assert huggingface_logits({name: file.read(name) for name in file}) == pytest.approx(ours, abs=2e-4)
    assert forward(values, model.config, IDS) == pytest.approx(ours, abs=2e-4)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["num_layers"], config["vocab_size"], config["eos_token_id"]) == (3, 40, 9)


# ---- every key is accounted for -----------------------------------------------------------------------------------

def write_hf(folder, values, config, extra):
    from parallel.checkpoint.safetensors_file import dtype_name, write_safetensors

    folder.mkdir()
    tensors = {key.foreign: values[key.name] for key in keys(config, "huggingface")} | extra
    write_safetensors(folder / "model.safetensors",
                      [(k, dtype_name(v.dtype), v.shape, lambda v=v: v) for k, v in tensors.items() if v is not None])


@pytest.mark.parametrize(("extra", "part"), [
    ({"transformer.h.9.ln_1.weight": np.ones(3, np.float32)}, "1 keys of the source belong to no parameter"),
    ({"transformer.wqe.weight": None}, "lacks 1 of"),
    ({"transformer.ln_f.bias": np.zeros(17, np.float32)}, "has shape [17] and the model wants [16]"),
    ({"transformer.ln_f.bias": np.zeros(16, np.int64)}, "type I64, not a float"),
    ({"lm_head.weight": np.ones((40, 16), np.float32)}, "lm_head.weight"),
])
def test_what_does_not_fit_is_refused(home, capsys, tmp_path, values, model, extra, part):
    write_hf(tmp_path / "hf", values, model.config, extra)
    line = convert(home, capsys, "--from", "huggingface", "--to", "pangu", "--input", tmp_path / "hf", "--output",
                   tmp_path / "x", code=2)
    assert part in line
    assert not (tmp_path / "x").exists()


def test_known_extras_are_ignored_and_counted(home, capsys, tmp_path, values, model):
    extra = {"lm_head.weight": values["embedding.word.table"], "transformer.h.0.attn.bias": np.ones((1, 8), np.uint8),
             "odd": np.ones(2, np.float32)}
    write_hf(tmp_path / "hf", values, model.config, extra)
    figures = convert(home, capsys, "--from", "huggingface", "--to", "pangu", "--input", tmp_path / "hf", "--output",
                      tmp_path / "x", "--allow-unmapped")
    assert (figures["ignored"], figures["unmapped"], figures["unmapped_names"]) == (2, 1, ["odd"])


def test_megatrons_padding_rows_are_left_out(home, capsys, tmp_path, values, model):
    torch = pytest.importorskip("torch")
    convert(home, capsys, "--from", "pangu", "--to", "megatron", "--input", home / "own", "--output", tmp_path / "g.pt")
    tree = torch.load(tmp_path / "g.pt", weights_only=True)
    table = tree["model"]["language_model"]["embedding"]["word_embeddings"]
    table["weight"] = torch.cat([table["weight"], torch.ones(24, 16)]).to(torch.bfloat16)
    torch.save(tree, tmp_path / "padded.pt")
    figures = convert(home, capsys, "--from", "megatron", "--to", "pangu", "--input", tmp_path / "padded.pt",
                      "--output", tmp_path / "x")
    assert "24 padding rows" in figures["notes"][0]
    got = own_values(tmp_path / "x")["embedding.word.table"]
    assert got == pytest.approx(values["embedding.word.table"], rel=1e-2)


def test_an_existing_output_is_kept(home, capsys, tmp_path):
    (tmp_path / "x").mkdir()
    line = convert(home, capsys, "--from", "pangu", "--to", "pangu", "--input", home / "own", "--output",
                   tmp_path / "x", code=2)
    assert "exists already" in line


class Harm:
    """Runs code where a pickle is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize(("layout", "name"), [("megatron", "h.pt"), ("huggingface", "pytorch_model.bin")])
@pytest.mark.parametrize("zipped", [False, True])
def test_files_that_run_code_are_refused(home, capsys, tmp_path, layout, name, zipped):
    torch = pytest.importorskip("torch")
    import pickle

    content = {"model": Harm(tmp_path / "harm"), "transformer.ln_f.bias": torch.ones(2)}
    folder = tmp_path / "from"
    folder.mkdir()
    if zipped:
        torch.save(content, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(content["model"]))
    line = convert(home, capsys, "--from", layout, "--to", "pangu", "--input",
                   folder if layout == "huggingface" else folder / name, "--output", tmp_path / "x", code=2)
    assert line.startswith("error: ") and "cannot read it safely" in line and name in line
    assert not (tmp_path / "harm").exists() and not (tmp_path / "x").exists()


def test_huggingfaces_shards_of_pytorch_are_read(home, capsys, tmp_path, values, model):
    """As transformers saved them before safetensors, with its buffers of masks, the head and another .bin beside."""
    torch = pytest.importorskip("torch")
    tensors = {key.foreign: torch.from_numpy(values[key.name].T.copy() if key.transposed else values[key.name])
               for key in keys(model.config, "huggingface")}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    tensors |= {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
                "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    names = sorted(tensors)
    (tmp_path / "hf").mkdir()
    for number, part in enumerate((names[:9], names[9:]), start=1):
        torch.save({name: tensors[name] for name in part}, tmp_path / "hf" / f"pytorch_model-0000{number}-of-00002.bin")
    torch.save(Harm(tmp_path / "harm"), tmp_path / "hf" / "training_args.bin")
    figures = convert(home, capsys, "--from", "huggingface", "--to", "pangu", "--input", tmp_path / "hf", "--output",
                      tmp_path / "x")
    assert (figures["mapped"], figures["unmapped"], figures["ignored"]) == (len(values), 0, 3)
    assert not (tmp_path / "harm").exists()
    for name, value in own_values(tmp_path / "x").items():
        np.testing.assert_array_equal(value, values[name])
