"""UG-Sep: U tokens know nothing of the candidate, and two passes are the forward pass."""

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from parallel.common.errors import UserError
from parallel.layers.grouped import TokenLayout
from parallel.layers.norm import LayerNorm, RMSNorm
from parallel.layers.parameter import initialize
from parallel.sharding.config import ParallelConfig
from parallel.task import load_run
from recsys.build import build
from recsys.models.rankmixer import separated as separated_rankmixer
from recsys.models.rankmixer.model import RankMixerSettings
from recsys.models.tokenmixer_large import model as tokenmixer_large
from recsys.models.tokenmixer_large.model import TokenMixerLargeSettings
from recsys.models.tokenmixer_large.separated_blocks import separated_block
from recsys.ug_sep.pyramid import PyramidBlock
from recsys.ug_sep.ranker import CandidatePass, RequestPass, UserPass
from recsys.ug_sep.sides import allot, heads_of, pair, tokens_of_ratio
from recsys.ug_sep.user_aggregation import SharedUsersLoss, distinct_users, share
from tests.recsys.layers.test_blocks import gelu, layer_norm, made, mix, rms_norm, swiglu, values

LAYOUT, CONFIGS, BATCH, WIDTH = TokenLayout(), Path("configs/recsys"), 5, 24
MOE = {"experts": 4, "active": 2}
# Blocks: name -> (model, settings, U and G tokens, heads or tokens after).
TML = {"figure": {}, "inner": {"inner_residual": True}, "prenorm": {"block_variant": "equation_prenorm"},
       "postnorm": {"block_variant": "equation_postnorm"}, "experts": {"moe": MOE},
       "prenorm_low_rank": {"block_variant": "equation_prenorm", "ug_sep": {"compensation": "low_rank"}},
       "postnorm_experts_mean": {"block_variant": "equation_postnorm", "moe": MOE, "ug_sep": {"compensation": "mean"}},
       "low_rank": {"ug_sep": {"compensation": "low_rank"}},
       "token_mixing": {"ug_sep": {"compensation": "token_mixing"}}, "mean": {"ug_sep": {"compensation": "mean"}}}
RANKMIXER = {"post": {}, "experts": {"moe": {"experts": 4}}, "bare": {"norm": False, "residual": False},
             "bare_experts_low_rank": {"norm": False, "residual": False, "moe": {"experts": 4},
                                       "ug_sep": {"compensation": "low_rank"}},
             "low_rank": {"ug_sep": {"compensation": "low_rank"}},
             "token_mixing": {"ug_sep": {"compensation": "token_mixing"}}, "mean": {"ug_sep": {"compensation": "mean"}}}
CASES = ([("tml", name, (2, 4), (3, 5)) for name in TML] + [("tml", "figure", (4, 2), (2, 1)), ("tml", "figure", (1, 1),
                                                                                                (1, 5))]
         + [("rankmixer", name, (4, 2), None) for name in RANKMIXER]
         + [("tml_pyramid", name, (4, 2), (2, 4)) for name in ("figure", "experts", "mean")]
         + [("rankmixer_pyramid", name, (2, 4), (1, 2)) for name in ("post", "experts", "low_rank")]
         # residual: attention where a layer keeps its tokens
         + [("tml_pyramid", "token_mixing", (2, 4), (2, 4)), ("rankmixer_pyramid", "mean", (4, 2), (4, 2))])


pytestmark = pytest.mark.usefixtures("pynative")


def block(model, name, counts, other, **masks):
    """A block with parameters that all matter."""
    own = dict((TML if model.startswith("tml") else RANKMIXER)[name])
    own["ug_sep"] = {**own.get("ug_sep", {}), **masks}
    if model.startswith("tml"):
        settings = TokenMixerLargeSettings(width=WIDTH, ratio=2, down_gain=1.0, **own)
        if model == "tml":
            return made(separated_block(settings, counts, other, LAYOUT, ms.float32))
        kind = {"norm": RMSNorm, "network": tokenmixer_large.network, "inner": 2.0, "prenorm": True}
    else:
        settings = RankMixerSettings(tokens=6, width=WIDTH, ffn_ratio=2, **own)
        if model == "rankmixer":
            return made(separated_rankmixer.SeparatedBlock(settings, counts, LAYOUT, ms.float32))
        kind = {"norm": LayerNorm, "network": separated_rankmixer.network, "inner": 2.0, "prenorm": False}
    return made(PyramidBlock(settings, counts, other, LAYOUT, ms.float32, **kind))


def tokens(count, seed, batch=BATCH):
    return np.random.default_rng(seed).standard_normal((count, batch, WIDTH)).astype(np.float32)


def masked(cell, user, group):
    x, _ = cell.masked(Tensor(np.concatenate([user, group])))
    return x.asnumpy().copy()


def leak(cell, counts, after):
    """How far U tokens and G tokens move when the G tokens change."""
    user = tokens(counts[0], 1)
    one, other = (masked(cell, user, tokens(counts[1], seed)) for seed in (2, 3))
    moved = np.abs(one - other)
    return moved[:after].max(), moved[after:].max()


def after(model, counts, other):
    return other[0] if model.endswith("pyramid") else counts[0]


@pytest.mark.parametrize(("model", "name", "counts", "other"), CASES)
def test_user_tokens_do_not_move_with_the_candidate(model, name, counts, other):
    cell = block(model, name, counts, other)
    user, group = leak(cell, counts, after(model, counts, other))
    assert user == 0.0 and group > 1e-2


MASKS = ([("tml", name, mask) for name in TML for mask in ("mixing_mask", "reverting_mask")]
         + [("rankmixer", name, "mixing_mask") for name in RANKMIXER]
         + [(model, name, mask) for model, names in (("tml_pyramid", ("figure", "experts", "mean")),
                                                     ("rankmixer_pyramid", ("post", "experts", "low_rank")))
            for name in names for mask in ("mixing_mask", "residual_mask")])


@pytest.mark.parametrize(("model", "name", "mask"), MASKS)
def test_each_single_mask_is_needed(model, name, mask):
    counts, other = (4, 2), (2, 4) if model.endswith("pyramid") else (4, 2)
    cell = block(model, name, counts, other, **{mask: False})
    user, _ = leak(cell, counts, after(model, counts, other))
    assert user > 1e-3


@pytest.mark.parametrize(("model", "name", "counts", "other"), CASES)
def test_two_passes_are_the_block_with_masks(model, name, counts, other):
    """Slices for every sample, and a state of three users for eleven candidates."""
    cell = block(model, name, counts, other)
    users, group = tokens(counts[0], 1, 3), tokens(counts[1], 2, 11)
    index = np.array([0, 2, 1, 1, 0, 2, 2, 2, 0, 1, 0], np.int32)
    wanted = masked(cell, users[:, index], group)
    x_user, components, _ = cell.user(Tensor(users))
    assert [(component.shape[0], component.shape[2]) for component in components] == list(cell.components)
    x_candidate, _ = cell.candidate(Tensor(group), components, Tensor(index))
    got = np.concatenate([x_user.asnumpy()[:, index], x_candidate.asnumpy()])
    assert np.abs(got - wanted).max() <= 2e-6 * max(1.0, np.abs(wanted).max())
    one = tuple(Tensor(component.asnumpy()[:, 1:2]) for component in components)
    alone, _ = cell.candidate(Tensor(group), one, Tensor(np.zeros(11, np.int32)))
    wanted = masked(cell, users[:, np.ones(11, np.int32)], group)[after(model, counts, other):]
    assert np.abs(alone.asnumpy() - wanted).max() <= 1e-6 * max(1.0, np.abs(wanted).max())


def dead(weight, rows=None, columns=None, before=False):
    """A matrix [T, I, O] filled up with random rows or columns, which masks must make unreadable."""
    shape = list(weight.shape)
    shape[1], shape[2] = rows or shape[1], columns or shape[2]
    full = np.random.default_rng(7).standard_normal(shape)
    if before:
        full[:, :, -weight.shape[2]:] = weight
    else:
        full[:, :weight.shape[1], :weight.shape[2]] = weight
    return full


def test_tokenmixer_block_equals_numpy_with_full_matrices():
    """The definition, written with whole tensors, masks and matrices of full size whose dead parts are random."""
    (c_u, c_g), (h_u, h_g) = (2, 4), (3, 5)
    cell = block("tml", "low_rank", (c_u, c_g), (h_u, h_g))
    p, d = values(cell), WIDTH // (h_u + h_g)
    wide, x = (c_u + c_g) * d, np.concatenate([tokens(c_u, 1), tokens(c_g, 2)]).astype(np.float64)
    mask = np.ones((h_u + h_g, 1, wide))
    mask[:h_u, :, c_u * d:] = 0
    h = mix(rms_norm(x, p, "norm1"), h_u + h_g) * mask
    first = {name: np.concatenate([dead(p[f"first_user.{name}.weight"], rows=wide), np.concatenate(
        [p[f"first_group.{name}_{side}.weight"] for side in ("user", "group")], axis=1)]) for name in ("gate", "up")}
    first["down"] = np.concatenate([p["first_user.down.weight"],
                                    dead(p["first_group.down.weight"], columns=wide, before=True)])
    y = mix(swiglu(h, {f"{name}.weight": w for name, w in first.items()}), c_u + c_g)
    y[:c_u, :, h_u * d:] = 0
    flat = h[:h_u, :, :c_u * d].transpose(1, 0, 2).reshape(BATCH, -1)
    low = flat @ p["compensation.project.weight"][0]
    x2 = x + y
    x2[c_u:] += np.stack([low @ p["compensation.spread.weight"][g] for g in range(c_g)])
    n = rms_norm(x2, p, "norm2")
    wanted = x2 + np.concatenate([swiglu(n[:c_u], p, "second_user."), swiglu(n[c_u:], p, "second_group.")])
    assert np.abs(masked(cell, x[:c_u].astype(np.float32), x[c_u:].astype(np.float32)) - wanted).max() < 1e-5


def test_rankmixer_block_equals_numpy():
    cell = block("rankmixer", "token_mixing", (4, 2), None)
    p, d = values(cell), WIDTH // 6
    x = np.concatenate([tokens(4, 1), tokens(2, 2)]).astype(np.float64)
    h = mix(x, 6)
    h[:4, :, 4 * d:] = 0
    s = h + x
    projected = h[:4, :, :4 * d] @ p["compensation.project.weight"][0]
    s[4:] += np.einsum("gu,ubd->gbd", p["compensation.weight"], projected)
    s = layer_norm(s, p, "norm1")
    v = np.stack([gelu(s[t] @ p[f"network_{side}.mapping.weight"][i] + p[f"network_{side}.mapping.bias"][i])
                  @ p[f"network_{side}.projection.weight"][i] + p[f"network_{side}.projection.bias"][i]
                  for t, (side, i) in enumerate([("user", i) for i in range(4)] + [("group", i) for i in range(2)])])
    wanted = layer_norm(v + s, p, "norm2")
    assert np.abs(masked(cell, x[:4].astype(np.float32), x[4:].astype(np.float32)) - wanted).max() < 1e-5


# -- whole models -----------------------------------------------------------------------------------------------------

MODELS = {"tml": ("tokenmixer_large_ug_sep", "model.layers=3", "model.width=24"),
          "tml_experts": ("tokenmixer_large_ug_sep", "model.width=24", "model.ratio=2",
                          "model.moe={experts: 4, active: 2}", "model.ug_sep.global_token=per_side",
                          "model.tokenizer_hidden=5", "model.ug_sep.ratio=2:1"),
          "tml_pyramid": ("tokenmixer_large_ug_sep", "model.width=24", 'model.ug_sep.layers=["4:4", "2:2"]',
                          "model.global_token=false", "model.ug_sep.compensation=mean"),
          "tml_heads": ("tokenmixer_large_ug_sep", "model.width=24", "model.ug_sep.user_heads=2"),
          "rankmixer": ("rankmixer_ug_sep", "model.width=24", "model.ug_sep.ratio=3:1", "model.shared_projection=true"),
          "rankmixer_experts": ("rankmixer_ug_sep", "model.width=24", "model.moe={experts: 4, penalty: 0.1}",
                                "model.tokenization=groups", "model.group_tokens={user: 2}",
                                "model.ug_sep.compensation=low_rank")}


@pytest.fixture(scope="module")
def tasks():
    """Models by name, made once."""
    kept = {}

    def get(name, *more):
        if (name, more) not in kept:
            config, *words = MODELS[name]
            _, settings = load_run(CONFIGS / f"{config}.yaml", ["train.global_batch_size=12", *words, *more,
                                                                "data.synthetic.users=20", "data.synthetic.items=20"])
            task = build(settings, ParallelConfig())
            made(task.network.model)
            kept[name, more] = task
        kept[name, more].network.set_train(False)
        return kept[name, more]

    return get


def scores(model, ids, numbers, masks=False):
    """Logits of the plain call; with `masks` by whole tensors times masks, nothing computed once or left out."""
    model.in_slices = not masks
    try:
        return model(Tensor(ids), Tensor(numbers)).asnumpy().copy()
    finally:
        model.in_slices = True


@pytest.mark.parametrize("name", MODELS)
def test_a_state_of_several_users_serves_all_candidates(name, tasks):
    task = tasks(name)
    model, (ids, numbers, _) = task.network.model, task.sample(0)
    index = np.array([0, 1, 2, 1, 0, 2, 2, 1, 0, 0, 0, 2], np.int32)
    (users, user_numbers), (candidates, candidate_numbers) = model.sides.split(ids, numbers)
    ids[:, list(model.sides.user.ids)], numbers[:, list(model.sides.user.numbers)] = users[index], user_numbers[index]
    wanted = scores(model, ids, numbers, masks=True)
    assert np.abs(scores(model, ids, numbers) - wanted).max() <= 1e-6
    state = model.user_pass(Tensor(users[:3]), Tensor(user_numbers[:3]))
    assert state.shape == (3, model.state_size)
    got = model.candidate_pass(state, Tensor(index), Tensor(candidates), Tensor(candidate_numbers)).asnumpy()
    assert np.abs(got - wanted).max() <= 1e-6 and np.ptp(wanted) > 1e-3
    # Candidates do not see each other, nor do requests.
    order = np.random.default_rng(1).permutation(12)[:5]
    some = model.candidate_pass(state, Tensor(index[order]), Tensor(candidates[order]),
                                Tensor(candidate_numbers[order])).asnumpy()
    assert np.abs(some - wanted[order]).max() <= 1e-6
    alone = model.user_pass(Tensor(users[1:2]), Tensor(user_numbers[1:2])).asnumpy()
    assert np.abs(alone - state.asnumpy()[1:2]).max() <= 1e-5
    # Both passes at once, for the candidates of one user.
    own = index == 1
    one, found = (made.asnumpy() for made in model.request_pass(Tensor(ids[own]), Tensor(numbers[own])))
    assert np.array_equal(one, alone) and np.abs(found - wanted[own]).max() <= 1e-6


def some(*kept):
    """All models, but by default those of `kept`: the others have the same law, shown by these for both families."""
    return [pytest.param(name, marks=() if name in kept else pytest.mark.slow) for name in MODELS]


@pytest.mark.parametrize("name", some("tml", "rankmixer_experts"))
@pytest.mark.parametrize(("candidates", "requests"), [(1, 1), (2, 1), (1000, 1), (1000, 5)])
def test_up_to_a_thousand_candidates_of_one_user_and_of_several(name, candidates, requests, tasks):
    task = tasks(name)
    model = task.network.model
    rows = [task.sample(seed) for seed in range(-(-candidates // 12))]
    ids, numbers = (np.concatenate([row[i] for row in rows])[:candidates] for i in (0, 1))
    (users, user_numbers), group = model.sides.split(ids, numbers)
    index = np.sort(np.arange(candidates) % requests).astype(np.int32)
    ids[:, list(model.sides.user.ids)], numbers[:, list(model.sides.user.numbers)] = users[index], user_numbers[index]
    state = model.user_pass(Tensor(users[:requests]), Tensor(user_numbers[:requests]))
    got = model.candidate_pass(state, Tensor(index), *map(Tensor, group)).asnumpy()
    wanted = scores(model, ids, numbers, masks=True)
    assert np.abs(got - wanted).max() <= 2e-6 * max(1.0, np.abs(wanted).max())


def test_the_same_in_compiled_graphs(tasks):
    task = tasks("tml")
    model, (ids, numbers, _) = task.network.model, task.sample(0)
    wanted = scores(model, ids, numbers)
    user, group = model.sides.split(ids, numbers)
    ms.set_context(mode=ms.GRAPH_MODE)
    state = UserPass(model)(*map(Tensor, user))
    got = CandidatePass(model)(state, Tensor(np.arange(12, dtype=np.int32)), *map(Tensor, group)).asnumpy()
    assert np.abs(got - wanted).max() <= 1e-6
    _, one = RequestPass(model)(Tensor(ids), Tensor(numbers))
    own, own_numbers = ids.copy(), numbers.copy()
    own[:, list(model.sides.user.ids)] = ids[:1, list(model.sides.user.ids)]
    own_numbers[:, list(model.sides.user.numbers)] = numbers[:1, list(model.sides.user.numbers)]
    assert np.abs(one.asnumpy() - scores(model, own, own_numbers)).max() <= 1e-6


def loss_and_gradients(network, batch, tables=False):
    """Tables only where asked for: op by op on the CPU MindSpore 2.9 gets the gradient of a lookup with equal ids
    wrong."""
    weights = ms.ParameterTuple([p for p in network.trainable_params() if tables or not p.name.endswith(".table")])
    network.set_train()
    for item in network.get_parameters():
        if item.name.endswith("factor"):
            item.set_data(Tensor(0.1, ms.float32))
    loss, gradients = ops.value_and_grad(network, None, weights)(*map(Tensor, batch))
    return float(loss), {p.name: g.asnumpy().copy() for p, g in zip(weights, gradients, strict=True)}


def same(one, other, tolerance=1e-6):
    """Losses and gradients of two ways to compute the same."""
    assert abs(one[0] - other[0]) <= tolerance * max(1.0, abs(other[0]))
    for name, gradient in other[1].items():
        assert np.abs(one[1][name] - gradient).max() <= tolerance * 2 * max(1.0, np.abs(gradient).max()), name


def batch_of_few_users(task):
    """A batch with three samples of each of four users."""
    batch, sides = task.sample(4), task.network.model.sides
    index = np.arange(12) % 4
    for array, columns in zip(batch, (list(sides.user.ids), list(sides.user.numbers)), strict=False):
        array[:, columns] = array[index][:, columns]
    shared = share(sides, *batch)
    assert len(shared[-1]) == 5 and shared[3].max() == 3
    return batch, shared


@pytest.mark.parametrize("name", some("tml_experts", "tml_pyramid", "rankmixer_experts"))
def test_loss_and_gradients_by_slices_masks_and_shared_users(name, tasks):
    task = tasks(name)
    model, (batch, shared) = task.network.model, batch_of_few_users(task)
    plain = loss_and_gradients(task.network, batch)
    assert all(np.abs(gradient).max() > 0 for gradient in plain[1].values())
    model.in_slices = False
    try:
        same(loss_and_gradients(task.network, batch), plain)
    finally:
        model.in_slices = True
    same(loss_and_gradients(SharedUsersLoss(model), shared), plain)


def test_shared_users_train_the_tables_alike(tasks):
    task = tasks("rankmixer", "model.layers=1")
    batch, shared = batch_of_few_users(task)
    ms.set_context(mode=ms.GRAPH_MODE)
    plain = loss_and_gradients(task.network, batch, True)
    assert any(name.endswith(".table") for name in plain[1])
    same(loss_and_gradients(SharedUsersLoss(task.network.model), shared, True), plain)


@pytest.mark.parametrize("form", ["low_rank", "token_mixing", "mean"])
@pytest.mark.parametrize("model", ["tml", "rankmixer", "tml_pyramid"])
def test_compensation_starts_as_none(model, form):
    plain = "post" if model == "rankmixer" else "figure"
    without, with_it = (block(model, name, (4, 2), (2, 4)) for name in (plain, form))
    for cell in (without, with_it):
        initialize(cell, 3)
    user, group = tokens(4, 1), tokens(2, 2)
    assert np.array_equal(masked(without, user, group), masked(with_it, user, group))
    weights = ms.ParameterTuple([p for p in with_it.trainable_params() if "compensation" in p.name])
    x = Tensor(np.concatenate([user, group]))
    gradients = ops.grad(lambda x: ops.square(with_it.masked(x)[0]).sum(), None, weights)(x)
    assert max(np.abs(gradient.asnumpy()).max() for gradient in gradients) > 0


def user_tokens(model, ids_BM, numbers_BN):
    """[c_u, B, D]: what the U tokens are in the end, computed with all others."""
    x_TBD, _, _ = model.masked_layers(*model.embedding(ids_BM, numbers_BN))
    return x_TBD[:model.token_counts[-1][0]]


def test_a_lower_layers_residual_and_heads_do_not_leak(tasks):
    task = tasks("tml", "model.layers=5")
    model, (ids, numbers, _) = task.network.model, task.sample(0)
    assert model.sources == (2,) and model.auxiliary_layers == (1, 3)
    before = user_tokens(model, Tensor(ids), Tensor(numbers)).asnumpy().copy()
    other, more, _ = task.sample(1)
    columns = list(model.sides.user.ids)
    other[:, columns], more[:, list(model.sides.user.numbers)] = ids[:, columns], numbers[:, list(
        model.sides.user.numbers)]
    assert np.array_equal(user_tokens(model, Tensor(other), Tensor(more)).asnumpy(), before)
    assert np.abs(scores(model, other, more) - scores(model, ids, numbers)).max() > 1e-3


# -- sides, tokens, shared users --------------------------------------------------------------------------------------

def test_only_the_users_own_groups_are_user_side(tasks):
    sides = tasks("tml").network.model.sides
    assert {f.name for f in sides.user.spec.ordered} == {"user_id", "age", "gender", "city", "budget", "interests"}
    assert "history" in sides.candidate.spec.slots
    whole_row = sorted([*sides.user.ids, *sides.candidate.ids])
    assert whole_row == list(range(len(whole_row)))


@pytest.mark.parametrize(("ratio", "counts"), [("1:2", (4, 8)), ("1:1", (6, 6)), ("2:1", (8, 4)), ("3:1", (9, 3)),
                                               ("5:1", (10, 2))])
def test_ratios_of_the_paper(ratio, counts):
    assert tokens_of_ratio(ratio, 12) == counts
    _, settings = load_run(CONFIGS / "tokenmixer_large_ug_sep.yaml", [f"model.ug_sep.ratio={ratio}"])
    assert settings.model.ug_sep.ratio == ratio
    assert build(settings, ParallelConfig()).network.model.token_counts[0] == counts


def test_tokens_are_given_out_over_groups():
    assert allot(["a", "b"], 5, {}) == [(("a",), 3), (("b",), 2)]
    assert allot(["a", "b"], 3, {"b": 2}) == [(("a",), 1), (("b",), 2)]
    assert allot(["a", "b", "c"], 2, {}) == [(("a", "b"), 1), (("c",), 1)]
    assert [heads_of(2, 8, 16), heads_of(1, 100, 8), heads_of(99, 100, 8)] == [4, 1, 7]
    assert pair("3:1", "here") == (3, 1)


@pytest.mark.parametrize(("words", "message"), [
    (["model.ug_sep.ratio=1-1"], "two whole numbers"), (["model.ug_sep.ratio=3:2"], "do not divide 3:2"),
    (['model.ug_sep.layers=["4:4"]'], "there are 2 layers"), (["model.ug_sep.ratio=11:1"], "no tokens"),
    (["model.ug_sep.user_heads=12"], "one must be G"), (["model.ug_sep.user_heads=0"], "greater than"),
    (["model.ug_sep.compensatoin=mean"], "did you mean 'compensation'"),
    (['model.ug_sep.layers=["4:3", "2:2"]'], "must divide width")])
def test_mistakes_are_named(words, message):
    with pytest.raises(UserError, match=message):
        _, settings = load_run(CONFIGS / "tokenmixer_large_ug_sep.yaml", words)
        build(settings, ParallelConfig())


def test_without_a_mask_there_is_no_state(tasks):
    model = tasks("rankmixer", "model.ug_sep.mixing_mask=false").network.model
    for cell in (UserPass, CandidatePass, RequestPass):
        with pytest.raises(UserError, match="depends on the candidate"):
            cell(model)


def test_users_are_distinguished_by_what_the_model_sees():
    ids = np.array([[1, 2], [1, 2], [3, 4], [1, 2]], np.int32)
    numbers = np.array([[0.5], [0.5], [0.5], [0.25]], np.float32)
    distinct, distinct_numbers, index = distinct_users(ids, numbers)
    assert len(distinct) == 3
    assert np.array_equal(distinct[index], ids) and np.array_equal(distinct_numbers[index], numbers)


def test_an_order_with_users_together_is_an_order():
    from recsys.data.batches import Batches
    from recsys.data.encode import Encoded

    users = np.random.default_rng(0).integers(0, 40, 1000)
    rows = Encoded(np.arange(1000, dtype=np.int32)[:, None], np.zeros((1000, 1), np.float32),
                   np.zeros((1000, 1), np.float32), users)
    plain, together = (Batches(rows, 50, 3, together=count) for count in (1, 8))
    seen = {}
    for name, source in (("plain", plain), ("together", together)):
        batches = source.batches(0)
        seen[name] = np.stack([next(batches)[0][:, 0] for _ in range(20)])
        assert np.array_equal(np.sort(seen[name].reshape(-1)), np.arange(1000))
    distinct = {name: np.mean([len(set(users[batch])) for batch in batches]) for name, batches in seen.items()}
    assert distinct["together"] < 13 < 25 < distinct["plain"]
    later = together.batches(7)
    assert np.array_equal(next(later)[0][:, 0], seen["together"][7])
