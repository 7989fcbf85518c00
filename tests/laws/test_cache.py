"""Law: with the cache, every logit is the one that recomputing the full sequence gives; batches equal single ones."""

from __future__ import annotations

import numpy as np
import pytest

from pangu.native import kernel_library

VOCABULARY, CONTEXT, CHUNK = 61, 54, 8
LENGTHS = (3, 16, 29, 54)
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
def runner(case):
    """The C++ kernels, or MindSpore's graph."""
    from pangu.generation.graph_runner import GraphRunner
    from pangu.generation.kernel_runner import KernelRunner
    from pangu.generation.weights import weights_of

    model, kernels, _ = case
    if not kernels:
        return GraphRunner(model, len(LENGTHS) + 1, CHUNK)
    if kernel_library() is None:
        pytest.skip("no C++ compiler here")
    return KernelRunner(weights_of(model), 24, kernel_library())


def test_every_step_equals_recomputation(case, runner):
    """Prompts of four lengths, read in parts beside each other, then grown token by token to the end of the context."""
    from pangu.generation.runner import Span

    _, _, recompute = case
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, VOCABULARY, CONTEXT) for _ in LENGTHS]
    expected = [recompute(ids) for ids in texts]
    blocks = generator.permutation(runner.blocks).tolist()
    tables = [[blocks.pop() for _ in range(-(-CONTEXT // runner.block_size))] for _ in LENGTHS]
    places = [0] * len(LENGTHS)
    while any(place < CONTEXT for place in places):
        spans, members = [], []
        for row, length in enumerate(LENGTHS):
            place = places[row]
            count = min(max(1, length - place), 11) if place < length else 1
            if place < CONTEXT:
                ids = texts[row][place:place + count].tolist()
                spans.append(Span(tables[row], place, ids, 1 + (row * place) % count))
                members.append(row)
        logits, best = runner.run(spans)
        begin = 0
        for row, span in zip(members, spans, strict=True):
            places[row] += len(span.ids)
            found = logits[begin:begin + span.outputs]
            np.testing.assert_allclose(found, expected[row][places[row] - span.outputs:places[row]], atol=ROUNDING)
            assert best[begin:begin + span.outputs].tolist() == found.argmax(-1).tolist()
            begin += span.outputs
    assert begin == len(logits)


def test_batches_of_different_lengths_equal_single_prompts(case, monkeypatch):
    """Greedy text of each prompt: in a batch, alone, and by recomputing everything for every token."""
    from pangu.generation.generate import Generator
    from pangu.generation.settings import GenerateSettings

    model, kernels, recompute = case
    if not kernels:
        monkeypatch.setenv("PANGU_KERNELS", "0")
        kernel_library.cache_clear()
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, VOCABULARY, length).tolist() for length in (2, 19, 40)]
    settings = GenerateSettings(max_new_tokens=7, temperature=0, prefill_chunk=CHUNK, batch_size=2, stop_ids=[])
    generator = Generator(model, None, settings)
    together = [output.ids for output in generator.generate_ids(prompts)]
    alone = [generator.generate_ids([ids])[0].ids for ids in prompts]
    assert generator.backend.runner(1, 8, CHUNK).shares_prefixes == (kernel_library() is not None)
    assert kernels or kernel_library() is None
    kernel_library.cache_clear()
    slow = []
    for ids in prompts:
        grown = list(ids)
        for _ in range(7):
            grown.append(int(recompute(grown)[-1].argmax()))
        slow.append(grown[len(ids):])
    assert together == alone == slow


def test_scores_of_prompts_and_of_tokens_equal_recomputation(case, runner):
    """Through the scheduler, with arrivals while others run: log p of every token and the likeliest ones."""
    from pangu.generation.sampling import SamplingRule
    from pangu.generation.scheduler import Scheduler
    from tests.laws.test_batching import Listed

    _, _, recompute = case
    rng = np.random.default_rng(3)
    scheduler = Scheduler(runner, 3, CHUNK)
    requests = [Listed(rng.integers(0, VOCABULARY, length).tolist(), SamplingRule(0.5), 0, 6, 2, 3, {})
                for length in (30, 1, 17, 45, 17)]
    for request in requests:
        scheduler.add(request)
        scheduler.step()
    while not scheduler.idle:
        scheduler.step()
    for request in requests:
        logits = recompute(request.all_ids).astype(np.float64)
        log_p = logits - logits.max(-1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
        scores = [*request.read_scores[1:], *(score for _, score in request.tokens)]
        for place, (token, score) in enumerate(zip(request.all_ids[1:], scores, strict=True)):
            assert score.id == token and score.logprob == pytest.approx(log_p[place, token], abs=ROUNDING)
            assert [chance for _, chance in score.top] == pytest.approx(
                np.sort(log_p[place])[::-1][:len(score.top)], abs=ROUNDING)
    assert scheduler.pool.used == 0


def test_half_precision_keeps_its_matrices_in_the_type_of_the_products():
    """No cast at each call, and the same logits as with the cast."""
    from mindspore import Tensor
    from mindspore import dtype as mstype
    from mindspore.nn.utils import no_init_parameters

    from pangu.config import ModelConfig
    from pangu.generation.backend import keep_in_compute_dtype
    from pangu.model import PanGuAlpha
    from parallel.layers.parameter import initialize

    with no_init_parameters():
        model = PanGuAlpha(ModelConfig(layers=2, hidden_size=36, heads=3, vocabulary_size=VOCABULARY,
                                       sequence_length=CONTEXT, dropout=0.0), mstype.float16)
    initialize(model, 2)
    model.set_train(False)
    inputs = (Tensor(np.arange(CONTEXT, dtype=np.int32)[None]), Tensor(np.arange(CONTEXT, dtype=np.int32)[None]),
              Tensor(np.zeros((1, CONTEXT), np.int32)))
    before, names = model(*inputs).asnumpy(), [item.name for item in model.get_parameters()]
    keep_in_compute_dtype(model)
    kept = {item.name: item.dtype for item in model.get_parameters()}
    assert list(kept) == names
    assert kept["layers.0.attention.query.weight"] == kept["embedding.word.table"] == mstype.float16
    assert kept["layers.0.norm1.gamma"] == kept["embedding.position.table"] == mstype.float32
    np.testing.assert_allclose(model(*inputs).asnumpy(), before, atol=2e-3 * np.abs(before).max())
