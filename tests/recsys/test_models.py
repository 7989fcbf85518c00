"""Every ranker's config: it builds, learns through every parameter, and its counts are right."""

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from parallel.common.command import main
from parallel.common.errors import UserError
from parallel.layers.parameter import initialize
from parallel.sharding.config import ParallelConfig
from parallel.task import load_run
from recsys.__main__ import VERBS
from recsys.build import build, loss_network, spec_of
from recsys.layers.sizes import count
from recsys.models import NAMES

CONFIGS = Path("configs/recsys")
TINY = sorted(NAMES) + ["tokenmixer_large_moe"]
# Published dense parameters and FLOPs a batch: RankMixer Table 1, TokenMixer-Large Table 2.
PUBLISHED = {"rankmixer_100m": (107e6, 233e9), "rankmixer_1b": (1.1e9, 2.1e12),
             "tokenmixer_large_500m": (501e6, 4.2e12), "tokenmixer_large_4b": (4.6e9, 29.8e12),
             "tokenmixer_large_7b": (7.6e9, 49.0e12), "tokenmixer_large_15b": (15e9, None)}


pytestmark = pytest.mark.usefixtures("pynative")


def task(name, *overrides):
    _, settings = load_run(CONFIGS / f"{name}.yaml", ["train.global_batch_size=8", *overrides])
    made = build(settings, ParallelConfig())
    initialize(made.network.model, 1)
    return made


def products(monkeypatch):
    """FLOPs of every matrix product that runs from here on."""
    seen = []

    def record(primitive, one, other, inner):
        seen.append(2 * int(np.prod(inner.shape)) * one.shape[-2 if primitive.transpose_a else -1])
        return inner

    for kind in (ops.MatMul, ops.BatchMatMul):
        call = kind.__call__
        monkeypatch.setattr(kind, "__call__", lambda self, a, b, call=call: record(self, a, b, call(self, a, b)))
    return seen


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_learns_and_flops_are_those_that_run(name, monkeypatch):
    monkeypatch.setenv("PANGU_KERNELS", "0")  # so that every product can be seen
    made = task(name)
    network = made.network
    batch = [Tensor(array) for array in made.sample(0)]
    weights = ms.ParameterTuple(network.trainable_params())
    network.set_train()
    loss, gradients = ops.value_and_grad(network, None, weights)(*batch)
    assert np.isfinite(loss.asnumpy())
    for parameter, gradient in zip(weights, gradients, strict=True):
        assert np.abs(gradient.asnumpy()).max() > 0, parameter.name
    network.set_train(False)
    seen = products(monkeypatch)
    logits = network.model(*batch[:2])
    assert logits.shape == (8, 1)
    counted = count(network)
    assert counted["parameters"] == sum(p.size for p in weights)
    if not name.endswith("_moe"):
        assert sum(seen) == 8 * counted["flops_per_sample"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_meet_the_published_counts(name):
    module, settings = load_run(CONFIGS / f"{name}.yaml")
    counted = count(loss_network(settings, spec_of(settings), len(settings.data.labels)))
    parameters, flops = PUBLISHED[name]
    assert counted["dense_parameters"] == pytest.approx(parameters, rel=0.01)
    if flops:
        assert counted["flops_per_sample"] * settings.train.global_batch_size == pytest.approx(flops, rel=0.01)


def test_half_of_the_experts_are_half_of_the_network():
    dense = count(task("tokenmixer_large_moe", "model.moe=null").network)
    sparse = count(task("tokenmixer_large_moe", "model.moe={experts: 4, active: 2}").network)
    routers = sparse["dense_parameters"] - dense["dense_parameters"]
    blocks = 2 * 3 * 8 * 48 * 120 * 2
    assert sparse["active_parameters"] == dense["dense_parameters"] + routers - blocks // 2
    assert sparse["flops_per_sample"] == dense["flops_per_sample"] + 2 * routers - blocks


def test_params_command_prints_the_figures(capsys):
    assert main("recsys", VERBS, ["count", "--config", str(CONFIGS / "rankmixer.yaml")]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    import json

    figures = json.loads(last)
    assert {"parameters", "dense_parameters", "flops_per_batch"} <= set(figures)
    # Eq. 12: 2 k L T D^2 parameters of the blocks' matrices, and their biases, norms, projection and tower.
    tokens, width, inner, layers = 8, 64, 64, 2
    blocks = layers * (tokens * (2 * width * inner + inner + width) + 4 * width)
    widths = 13 * 16
    projection = tokens * (widths // tokens * width + width)
    assert figures["dense_parameters"] == blocks + projection + (width + 1) + (4 * 16 + 1) * 36 + 37


@pytest.mark.parametrize(("arguments", "message"), [
    (["model.widht=3"], "unknown key 'model.widht'"),
    (["model.tokens=7"], "tokens must divide width 64"),
    (["model.name=rankmixr"], "did you mean 'rankmixer'?"),
    (["data.reader=movielens"], "needs a path"),
    (["data.reader=criteo", "data.path=/nowhere"], "data.path"),
    (["data.pooling={histroy: mean}"], "no such feature"),
    (["model.tokenization=groups", "model.group_tokens={useer: 2}"], "no such group"),
    (["data.passed=5"], "makes no histories"),
    (["parallel.op=3", "parallel.devices=3"], "op"),
])
def test_mistakes_are_one_line(arguments, message, capsys):
    verb = ["train", "--config", str(CONFIGS / "rankmixer.yaml"), *arguments]
    assert main("recsys", VERBS, verb) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0], error


@pytest.mark.parametrize(("name", "parallel", "message"), [
    ("tokenmixer_large", {"op": 5}, "does not divide by 5"),
    ("tokenmixer_large", {"data": 3}, "does not divide by 3"),
    ("tokenmixer_large", {"data": 2, "expert": 2}, "no routed experts"),
    ("dlrm_mlp", {"pipeline": {"stages": 2, "micro_batches": 2}}, "no stack of blocks"),
    ("rankmixer", {"pipeline": {"stages": 4, "micro_batches": 4}}, "more stages than layers"),
    ("tokenmixer_large_moe", {"op": 2}, "not sharded along their width"),
    ("rankmixer model.moe={experts: 2}", {"pipeline": {"stages": 2, "micro_batches": 2}}, "from stage to stage"),
    ("rankmixer_ug_sep model.moe={experts: 2}", {"pipeline": {"stages": 2, "micro_batches": 2}}, "from stage to stage"),
])
def test_layouts_that_do_not_fit_are_refused(name, parallel, message):
    name, _, more = name.partition(" ")
    _, settings = load_run(CONFIGS / f"{name}.yaml", [more] if more else [])
    with pytest.raises(UserError, match=message):
        build(settings, ParallelConfig.model_validate(parallel).resolve())


def test_switches_of_tokenmixer_large():
    made = task("tokenmixer_large", "model.layers=5", "model.inter_residual=2")
    model = made.network.model
    assert model.sources == (2,) and model.auxiliary_layers == (1, 3)
    off = task("tokenmixer_large", "model.layers=5", "model.inter_residual=null", "model.auxiliary_weight=0")
    assert off.network.model.sources == () and len(off.network.model.auxiliary) == 0
    batch = [Tensor(array) for array in made.sample(0)]
    with_heads = float(made.network(*batch))
    made.network.auxiliary_weight = 0.0
    without = float(made.network(*batch))
    logits, auxiliary, _ = model.outputs(*batch[:2])
    entropy = [float(made.network.mean(made.network.cross_entropy(z, batch[2]))) for z in (logits, *auxiliary)]
    assert without == pytest.approx(entropy[0], rel=1e-5)
    assert with_heads == pytest.approx(entropy[0] + 0.1 * sum(entropy[1:]), rel=1e-5)


def test_heads_need_not_be_as_many_as_tokens():
    made = task("tokenmixer_large", "model.group_tokens={user: 2, history: 2}", "model.layers=1")
    assert (made.network.model.tokens, made.network.model.heads) == (10, 8)
    assert np.isfinite(float(made.network(*[Tensor(array) for array in made.sample(0)])))


def test_longer_reuses_the_users_keys_and_values():
    made = task("longer")
    model = made.network.model
    ids, numbers, _ = made.sample(3)
    slot = model.spec.slots["history"]
    ids[:, slot.start:slot.start + slot.length] = ids[0, slot.start:slot.start + slot.length]
    groups, sequences = model.embedding(Tensor(ids), Tensor(numbers))
    full, _, _ = model.represent(groups, sequences)
    one = model.user_state(((sequences[0][0][:1], sequences[0][1][:1]),))
    spread = tuple(tuple(part.tile((8, 1, 1, 1)) for part in layer) for layer in one)
    np.testing.assert_allclose(model.score(groups, spread).asnumpy(), full.asnumpy(), rtol=1e-5, atol=1e-6)


def test_padding_of_a_history_changes_nothing():
    for name in ("rankmixer", "longer"):
        made = task(name)
        model, (ids, numbers, _) = made.network.model, made.sample(1)
        slot = model.spec.slots["history"]
        ids[:, slot.start:slot.start + 4] = slot.offset
        before = model(Tensor(ids), Tensor(numbers)).asnumpy().copy()
        table = model.embedding.tables[0].table
        moved = table.asnumpy().copy()
        moved[slot.offset] += 5.0
        table.set_data(Tensor(moved))
        np.testing.assert_allclose(model(Tensor(ids), Tensor(numbers)).asnumpy(), before, rtol=1e-5, atol=1e-6)


def test_recipes_for_movielens_are_read():
    recipes = sorted((CONFIGS / "movielens").glob("*.yaml"))
    assert len(recipes) >= 3
    for path in recipes:
        _, settings = load_run(path, ["data.path=somewhere"])
        assert settings.model.name == path.stem and settings.data.reader == "movielens"
        assert settings.train.keep_best == "auc" and settings.train.sparse_optimizer.weight_decay > 0


@pytest.mark.parametrize("name", ["rankmixer", "longer"])
def test_slices_of_a_pipeline_give_what_the_split_gives(name):
    made = task(name)
    batch = [Tensor(array) for array in made.sample(0)][:2]
    embedding = made.network.model.embedding
    groups, sequences = embedding(*batch)
    embedding.sliced = True
    others, kept = embedding(*batch)
    pairs = [*zip(groups, others, strict=True), *((a, b) for own, other in zip(sequences, kept, strict=True)
                                                  for a, b in zip(own, other, strict=True))]
    assert all(np.array_equal(a.asnumpy(), b.asnumpy()) for a, b in pairs)


@pytest.mark.slow
def test_pipeline_stages_compile_with_one_graph_for_all_micro_batches(capsys):
    from parallel.__main__ import VERBS as PROOFS

    words = ["dryrun", "--config", str(CONFIGS / "rankmixer.yaml"), "parallel.data=2", "parallel.op=2",
             "parallel.pipeline.stages=2", "parallel.pipeline.micro_batches=2"]
    assert main("parallel", PROOFS, words) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert figures["world"] == 8 and figures["unexpected_redistributions"] == 0
    assert figures["collectives"]["Send"]["count"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_half_precision_compiles(name, capsys):
    from parallel.__main__ import VERBS as PARALLEL

    layout = ["parallel.data=2", "train.precision=fp16"]
    arguments = ["dryrun", "--config", str(CONFIGS / f"{name}.yaml"), "--rank", "0", *layout]
    assert main("parallel", PARALLEL, arguments) == 0, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world"), [("rankmixer_100m", 1), ("rankmixer_1b", 1), ("tokenmixer_large_7b_64", 64),
                                             ("tokenmixer_large_7b_256", 256)])
def test_large_presets_compile_in_little_memory(name, world, capsys):
    """Hundreds of features and billions of parameters: neither may show in the compile."""
    from parallel.__main__ import VERBS as PARALLEL

    assert main("parallel", PARALLEL, ["dryrun", "--config", str(CONFIGS / f"{name}.yaml")]) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert figures["world"] == world and figures["unexpected_redistributions"] == 0
    assert figures["peak_rss_gb"] < 4 and figures["cpu_seconds"] < 120
    if world > 1:
        # Ten exchanges forward (2 L + 1, and one for the auxiliary head) and backward, eight again in recomputation.
        assert figures["collectives"]["AlltoAll"]["count"] == 28
