"""PanGu-alpha against a forward pass written in NumPy from the paper and the released code's choices, and its sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest

WIDTH, HEADS, LAYERS, VOCABULARY, LENGTH, BATCH = 24, 4, 3, 50, 14, 2
COUNTS = {"350m": 345_368_576, "2_6b": 2_625_295_360, "13b": 12_800_870_400, "200b": 206_861_008_896}


# ---------------------------------------------------------------- the forward pass, float64

def norm(x, gamma, beta):
    mean = x.mean(-1, keepdims=True)
    deviation = x - mean
    return deviation / np.sqrt((deviation**2).mean(-1, keepdims=True) + 1e-5) * gamma + beta


def gelu(x, kind):
    if kind == "tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if kind == "fast":
        return x / (1 + np.exp(-1.702 * np.abs(x))) * np.exp(0.851 * (x - np.abs(x)))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attention(query_input, memory, mask, weights, prefix):
    def project(x, name):
        return x @ weights[f"{prefix}.attention.{name}.weight"].T + weights[f"{prefix}.attention.{name}.bias"]

    query, key, value = project(query_input, "query"), project(memory, "key"), project(memory, "value")
    size, mixed = WIDTH // HEADS, np.empty_like(query)
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        score = query[..., part] @ key[..., part].swapaxes(-1, -2) / math.sqrt(size) + (1 - mask) * -10000.0
        share = np.exp(score - score.max(-1, keepdims=True))
        mixed[..., part] = share / share.sum(-1, keepdims=True) @ value[..., part]
    return project(mixed, "output")


def layer(hidden, mask, weights, prefix, kind, query=None):
    def vector(name):
        return weights[f"{prefix}.{name}"]

    normed = norm(hidden, vector("norm1.gamma"), vector("norm1.beta"))
    hidden = hidden + attention(normed if query is None else query, normed, mask, weights, prefix)
    inner = norm(hidden, vector("norm2.gamma"), vector("norm2.beta"))
    inner = gelu(inner @ vector("feed_forward.mapping.weight").T + vector("feed_forward.mapping.bias"), kind)
    return hidden + inner @ vector("feed_forward.projection.weight").T + vector("feed_forward.projection.bias")


def forward(ids, positions, mask, weights, kind, final_norm):
    """Logits [B, S, V]."""
    hidden = weights["embedding.word.table"][ids] + weights["embedding.position.table"][positions]
    for index in range(LAYERS - 1):
        hidden = layer(hidden, mask, weights, f"layers.{index}", kind)
    if final_norm == "before_query":
        hidden = norm(hidden, weights["norm.gamma"], weights["norm.beta"])
    hidden = layer(hidden, mask, weights, "query_layer", kind, weights["query_embedding.table"][positions])
    if final_norm == "after_query":
        hidden = norm(hidden, weights["norm.gamma"], weights["norm.beta"])
    return hidden @ weights["embedding.word.table"].T


# ---------------------------------------------------------------- the model against it

def build(**choices):
    import mindspore as ms
    from mindspore import Tensor
    from mindspore.nn.utils import no_init_parameters

    from pangu.config import ModelConfig
    from pangu.model import PanGuAlpha

    ms.set_context(mode=ms.GRAPH_MODE)
    with no_init_parameters():
        model = PanGuAlpha(ModelConfig(layers=LAYERS, hidden_size=WIDTH, heads=HEADS, vocabulary_size=VOCABULARY,
                                       sequence_length=LENGTH, **choices))
    generator = np.random.default_rng(5)
    for item in model.get_parameters():
        # Far above the start values, gammas around 1: gates and attention are well off their linear parts.
        values = generator.normal(1.0 if item.name.endswith("gamma") else 0.0, 0.15, item.shape)
        item.set_data(Tensor(values.astype(np.float32)))
    return model.set_train(False)


@pytest.fixture(scope="module")
def batch():
    """ids, positions and mask with a document end in the first row."""
    generator = np.random.default_rng(3)
    ids = generator.integers(0, VOCABULARY, (BATCH, LENGTH)).astype(np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
    mask = np.tile(np.tril(np.ones((LENGTH, LENGTH), np.float32)), (BATCH, 1, 1))
    positions[0, 6:] -= 6
    mask[0, 6:, :6] = 0
    return ids, positions, mask


@pytest.mark.parametrize(("kind", "final_norm"), [("tanh", "before_query"), ("fast", "after_query"),
                                                  ("erf", "before_query"), ("tanh", "after_query")])
def test_logits_equal_the_numpy_forward_pass(batch, kind, final_norm):
    from mindspore import Tensor

    ids, positions, mask = batch
    model = build(gelu=kind, final_norm=final_norm)
    weights = {item.name: item.asnumpy().astype(np.float64) for item in model.get_parameters()}
    logits = model(Tensor(ids), Tensor(positions), Tensor(mask)).asnumpy().reshape(BATCH, LENGTH, VOCABULARY)
    expected = forward(ids, positions, mask, weights, kind, final_norm)
    assert np.abs(expected).max() > 1.0
    assert np.abs(logits - expected).max() <= 1e-5


def test_the_choices_are_different_functions(batch):
    ids, positions, mask = batch
    model = build()
    weights = {item.name: item.asnumpy().astype(np.float64) for item in model.get_parameters()}
    reference = forward(ids, positions, mask, weights, "tanh", "before_query")
    for kind, final_norm in [("fast", "before_query"), ("erf", "before_query"), ("tanh", "after_query")]:
        other = forward(ids, positions, mask, weights, kind, final_norm)
        assert np.abs(other - reference).max() > 1e-4, (kind, final_norm)


def test_loss_ignores_padding_inputs_and_counts_document_borders(batch):
    from mindspore import Tensor

    from pangu.model import TrainingLoss

    ids, positions, mask = batch
    model = build()
    records = np.concatenate([ids, ids[:, :1]], axis=1)
    records[1, 9:] = model.config.pad_id
    loss = TrainingLoss(model)(Tensor(records), Tensor(positions), Tensor(mask))
    weights = {item.name: item.asnumpy().astype(np.float64) for item in model.get_parameters()}
    logits = forward(records[:, :-1], positions, mask, weights, "tanh", "before_query")
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, records[:, 1:, None], axis=2)[..., 0]
    counted = records[:, :-1] != model.config.pad_id
    expected = (nll * counted).sum() / (counted.sum() + 1e-5)
    assert float(loss.asnumpy()) == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- sizes

@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_of_the_papers_sizes(root, name):
    from mindspore.nn.utils import no_init_parameters

    from pangu.model import PanGuAlpha
    from pangu.settings import Run
    from parallel.common.settings import load_settings

    config = load_settings(Run, root / "configs" / "pangu" / f"{name}.yaml").model
    with no_init_parameters():
        model = PanGuAlpha(config)
    assert sum(math.prod(item.shape) for item in model.get_parameters()) == COUNTS[name]
    layers, width = config.layers, config.hidden_size
    assert COUNTS[name] == (layers * (12 * width**2 + 13 * width) + config.vocabulary_size * width
                            + 2 * config.sequence_length * width + 2 * width)
