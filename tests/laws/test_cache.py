"""Law: with the cache, every logit is the one that recomputing the whole sequence gives; batches equal single ones."""

from __future__ import annotations

import numpy as np
import pytest

VOCABULARY, CONTEXT, CHUNK = 61, 22, 8
LENGTHS = (3, 8, 13, 22)
ROUNDING = 1e-4  # of logits up to 40: float32 sums in another order


@pytest.fixture(scope="module", params=[("before_query", "tanh", True), ("after_query", "erf", True),
                                        ("before_query", "fast", False)],
                ids=["before_query-kernels", "after_query-kernels", "before_query-plain"])
def case(request):
    """A model, whether the C++ kernels are on, and full recomputation."""
    import mindspore as ms
    from mindspore import Tensor
    from mindspore.nn.utils import no_init_parameters

    from pangu.config import ModelConfig
    from pangu.model import PanGuAlpha
    from parallel.layers.parameter import initialize

    final_norm, gelu, kernels = request.param
    ms.set_context(mode=ms.GRAPH_MODE)
    with no_init_parameters():
        model = PanGuAlpha(ModelConfig(
            layers=3, hidden_size=36, heads=3, ffn_size=70, vocabulary_size=VOCABULARY, sequence_length=CONTEXT,
            final_norm=final_norm, gelu=gelu, embedding_std=1.0, linear_std=0.3, ffn_std=0.4))
    initialize(model, 11)
    model.set_train(False)
    positions = Tensor(np.arange(CONTEXT, dtype=np.int32)[None])
    mask = Tensor(np.tril(np.ones((1, CONTEXT, CONTEXT), np.float32)))

    def recompute(ids):
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, :len(ids)] = ids
        return model(Tensor(padded), positions, mask).asnumpy()[:len(ids)]

    return model, kernels, recompute


@pytest.fixture(scope="module")
def decoder(case):
    from pangu.generation.kv_cache import CachedDecoder
    from pangu.native import kernel_library

    model, kernels, _ = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pangu.generation.kv_cache.kernel_library", kernel_library if kernels else lambda: None)
        made = CachedDecoder(model, len(LENGTHS), 24, CHUNK)
    if kernels and not made.fast:
        pytest.skip("no C++ compiler here")
    return made


def test_every_step_equals_recomputation(case, decoder):
    """Prompts of four lengths in one batch, read in chunks, then grown token by token to the end of the context."""
    _, _, recompute = case
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, VOCABULARY, CONTEXT) for _ in LENGTHS]
    expected = [recompute(ids) for ids in texts]
    lengths = np.array(LENGTHS)
    padded = np.full((len(LENGTHS), 24), 6, np.int32)
    for row, length in enumerate(LENGTHS):
        padded[row, :length] = texts[row][:length]
    for part in range(3):
        last = np.clip(lengths - 1 - part * CHUNK, 0, CHUNK - 1).astype(np.int32)
        start = np.full(len(LENGTHS), part * CHUNK, np.int32)
        outputs = decoder.read(padded[:, part * CHUNK:(part + 1) * CHUNK].copy(), start, last)
        logits, best = outputs[0].asnumpy(), outputs[1].asnumpy()
        for row in np.flatnonzero((lengths - 1) // CHUNK == part):
            np.testing.assert_allclose(logits[row], expected[row][lengths[row] - 1], atol=ROUNDING)
            assert best[row] == logits[row].argmax()
    places = lengths.copy()
    while (places < CONTEXT).any():
        ids = np.array([[text[min(place, CONTEXT - 1)]] for text, place in zip(texts, places, strict=True)], np.int32)
        logits = decoder.read(ids, np.minimum(places, CONTEXT - 1).astype(np.int32))[0].asnumpy()
        for row in np.flatnonzero(places < CONTEXT):
            np.testing.assert_allclose(logits[row], expected[row][places[row]], atol=ROUNDING)
        places = np.minimum(places + 1, CONTEXT)


def test_batches_of_different_lengths_equal_single_prompts(case):
    """Greedy text of each prompt: in a batch, alone, and by recomputing everything for every token."""
    from pangu.generation.generate import Generator
    from pangu.generation.settings import GenerateSettings

    model, kernels, recompute = case
    if not kernels:
        pytest.skip("covered with the kernels")
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, VOCABULARY, length).tolist() for length in (2, 9, 15)]
    settings = GenerateSettings(max_new_tokens=7, temperature=0, prefill_chunk=CHUNK, batch_size=4, stop_ids=[])
    generator = Generator(model, None, settings)
    together = [output.ids for output in generator.generate_ids(prompts)]
    alone = [generator.generate_ids([ids])[0].ids for ids in prompts]
    slow = []
    for ids in prompts:
        grown = list(ids)
        for _ in range(7):
            grown.append(int(recompute(grown)[-1].argmax()))
        slow.append(grown[len(ids):])
    assert together == alone == slow
