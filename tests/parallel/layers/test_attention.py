"""Ascend's flash attention against the written-out form: what it is told, its dropout, its NumPy rules."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from parallel.common.errors import UserError
from parallel.layers.attention import AttentionBias, AttentionCore, DocumentEnds, HiddenPositions, form_of
from parallel.layers.dropout import Dropout, DropoutBits, DropoutKeys
from parallel.proof.compile.graph import Node
from parallel.proof.replay.numpy_ops import BNSD, RULES, TND
from parallel.sharding.config import ParallelConfig
from parallel.sharding.layout import Axes

BATCH, HEADS, LENGTH, WIDTH, MOST, RATE = 4, 2, 16, 16, 5, 0.25
SCALE = WIDTH**-0.5
DOCUMENTS = np.array([[0] * 16, [0] * 3 + [1] * 13, [0] + [1] * 2 + [2] * 8 + [3] * 1 + [4] * 4, [0] * 15 + [1]],
                     np.int32)


@pytest.fixture(scope="module")
def tensors():
    """Queries, keys, values and a gradient, float32 [B, H, S, K]."""
    generator = np.random.default_rng(3)
    return [generator.standard_normal((BATCH, HEADS, LENGTH, WIDTH)).astype(np.float32) for _ in range(4)]


def written_out(tensors, dropout: float = 0.0, keys=None, salt: int = 1):
    """Result and gradients of the written-out form, by MindSpore."""
    core = AttentionCore(WIDTH, dropout=dropout).set_train(dropout > 0)
    core.dropout.salt = salt
    bias = AttentionBias()(Tensor(DOCUMENTS))
    ms.set_context(mode=ms.PYNATIVE_MODE)  # commands that other tests run leave graph mode, which compiles no lambda
    q, k, v, gradient = map(Tensor, tensors)
    found = ops.GradOperation(get_all=True, sens_param=True)(lambda q, k, v: core(q, k, v, bias, keys))(q, k, v,
                                                                                                        gradient)
    return [item.asnumpy() for item in (core(q, k, v, bias, keys), *found[:3])]


def by_rules(tensors, layout: int, mask, bits=None, keep: float = 1.0, ends=None):
    """The same by the replay's rules of FlashAttentionScore and its gradient."""
    q, k, v, gradient = tensors
    rest = (None, ends, ends, HEADS, keep, SCALE, 2**31 - 1, 2**31 - 1, 0, layout, 2 if layout == TND else 0)
    largest, total, unused, out = RULES["FlashAttentionScore"](
        Node("x", "FlashAttentionScore", [], []), q, k, v, None, bits, None, mask, *rest)
    found = RULES["FlashAttentionScoreGrad"](
        Node("y", "FlashAttentionScoreGrad", [], []), q, k, v, gradient, None, bits, None, mask, largest, total, unused,
        out, *rest)
    return [out, *found[:3]]


def packed(x):
    """[B, H, S, K] -> [B S, H, K]."""
    return x.transpose(0, 2, 1, 3).reshape(-1, HEADS, WIDTH)


def test_documents_one_after_the_other_give_what_the_written_out_form_gives(tensors):
    ends = tuple(DocumentEnds(MOST)(Tensor(DOCUMENTS)).asnumpy().tolist())
    assert len(ends) == BATCH * MOST and ends[-1] == BATCH * LENGTH
    mask = np.triu(np.ones((32, 32), np.uint8), 1)
    for got, wanted in zip(by_rules([packed(x) for x in tensors], TND, mask, ends=ends), written_out(tensors),
                           strict=True):
        np.testing.assert_allclose(got, packed(wanted), atol=1e-5)


def test_a_mask_and_the_bits_of_dropout_give_what_the_written_out_form_gives(tensors):
    keys, bits = DropoutKeys(), DropoutBits(RATE, HEADS)
    bits.salt = salt = 12345
    rows = keys(Tensor(np.arange(BATCH, dtype=np.int32) + 7), LENGTH)
    mask, packed_bits = (item.asnumpy() for item in (HiddenPositions()(Tensor(DOCUMENTS)), bits(rows, BATCH, LENGTH)))
    assert mask.dtype == packed_bits.dtype == np.uint8 and packed_bits.shape == (BATCH, HEADS, LENGTH, LENGTH // 8)
    made = by_rules(tensors, BNSD, mask, packed_bits, 1.0 - RATE)
    for got, wanted in zip(made, written_out(tensors, RATE, rows, salt), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    undropped = by_rules(tensors, BNSD, mask)
    assert np.abs(undropped[0] - made[0]).max() > 0.1
    np.testing.assert_allclose(undropped[0], written_out(tensors)[0], atol=1e-5)


def test_bits_are_the_mask_of_dropout():
    dropout, bits = Dropout(RATE, ("batch", "heads", None, None)).set_train(), DropoutBits(RATE, HEADS)
    keys = DropoutKeys()
    dropout.salt = bits.salt = 99
    rows = keys(Tensor(np.arange(BATCH, dtype=np.int32)), LENGTH)
    kept = dropout(ops.ones((BATCH, HEADS, LENGTH, LENGTH), ms.float32), rows).asnumpy() > 0
    got = np.unpackbits(bits(rows, BATCH, LENGTH).asnumpy(), axis=-1, bitorder="little")
    assert (got == kept).all() and 0.6 < kept.mean() < 0.9


def test_ends_count_from_the_first_record_of_a_rank():
    layer = DocumentEnds(MOST)
    layer.apply_sharding(Axes(ParallelConfig(data=2).resolve()))
    first, second = layer(Tensor(DOCUMENTS)).asnumpy().reshape(2, -1)
    assert first.tolist() == [16] * 5 + [19] + [32] * 4
    assert second.tolist() == [1, 3, 11, 12, 16, 31, 32, 32, 32, 32]


def test_form_of_attention(monkeypatch):
    sizes = {"head_width": 128, "length": 1024}
    assert form_of("auto", dropout=0.0, compute_dtype=ms.bfloat16, **sizes) == "written_out"  # a CPU
    with pytest.raises(UserError, match="model.attention: FlashAttentionScore is an operator of Ascend"):
        form_of("flash", dropout=0.0, compute_dtype=ms.float16, **sizes)
    monkeypatch.setattr(ms, "get_context", lambda key: "Ascend")
    assert form_of("auto", dropout=0.0, compute_dtype=ms.bfloat16, **sizes) == "packed"
    assert form_of("auto", dropout=0.1, compute_dtype=ms.bfloat16, **sizes) == "masked"
    assert form_of("auto", dropout=0.1, compute_dtype=ms.float16, **sizes) == "written_out"
    assert form_of("flash", dropout=0.1, compute_dtype=ms.float16, **sizes) == "masked"
    assert form_of("written_out", dropout=0.1, compute_dtype=ms.bfloat16, **sizes) == "written_out"
    assert form_of("auto", dropout=0.0, compute_dtype=ms.bfloat16, head_width=24, length=1024) == "written_out"
    with pytest.raises(UserError, match="multiple of 16"):
        form_of("flash", dropout=0.0, compute_dtype=ms.bfloat16, head_width=24, length=1024)
    with pytest.raises(UserError, match="sequence_length of 1023"):
        form_of("flash", dropout=0.1, compute_dtype=ms.bfloat16, head_width=128, length=1023)
