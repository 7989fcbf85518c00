"""The Triton kernels in Triton's interpreter (on the CPU) against their plain forms; needs `pip install triton`."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are made
pytest.importorskip("triton")

from parallel.torch_runtime.attention import dropout_attention, flash  # noqa: E402
from parallel.torch_runtime.fusion import fused, kernels, swiglu, target_attention  # noqa: E402
from parallel.torch_runtime.graph import Kind, Node  # noqa: E402


def near(got, wanted, tolerance: float = 1e-5) -> None:
    """Checks that tensors agree."""
    for one, other in zip(got, wanted, strict=True):
        assert float((one - other).abs().max()) <= tolerance * max(1.0, float(other.abs().max()))


def test_rows_of_a_cross_entropy_and_their_gradient():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3000).half(), torch.randint(-2, 3003, (5,), dtype=torch.int32)
    largest = logits.float().amax(-1, keepdim=True)
    near(kernels.row_sums(None, logits, largest, labels), fused._row_sums(None, logits, largest, labels))
    node, spread = Node("RowSumsGrad", [], [Kind((5, 3000), "float32")]), [torch.randn(5), torch.randn(5)]
    near([kernels.row_sums_grad(node, logits, largest, labels, *spread)],
         [fused._row_sums_grad(node, logits, largest, labels, *spread)])


@pytest.mark.parametrize("skipped", [0.0, 1.0])
def test_adam(skipped):
    torch.manual_seed(0)
    *given, gradient = (torch.rand(1000, 7) for _ in range(4))
    scalars = torch.tensor([1e-3, 0.9, 0.95, 1e-8, 0.1, 0.5, skipped])
    ours, theirs = ([item.clone() for item in given] for _ in range(2))
    kernels.adam(None, *ours, scalars, gradient)
    fused._adam(None, *theirs, scalars, gradient)
    near(ours, theirs)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("mask", ["causal", "bias", "documents"])
def test_attention(mask, dropout):
    torch.manual_seed(0)
    size = (2, 2, 200, 16)
    q, k, v, gradient = (torch.randn(size) for _ in range(4))
    q = (q / 4).transpose(1, 2).contiguous().transpose(1, 2)
    documents = torch.arange(200)[None].expand(2, -1) // (200 if mask == "causal" else 70)
    if mask == "documents":  # numbers in no order, and one that comes again
        documents = torch.tensor([5, 3, 5])[documents]
    bias = torch.where((documents[:, :, None] == documents[:, None, :]).tril(), 0.0, -10000.0)[:, None]
    node = Node("FusedAttention", [], [], {"causal": mask == "causal", "dropout": dropout, "scale": 1.0})
    parts, kept = (), torch.ones(())
    if dropout:
        parts = (*(torch.randint(-2**31, 2**31 - 1, (2, 1, 200, 1)).int() for _ in range(2)),
                 torch.randint(-2**31, 2**31 - 1, (1, 2, 1, 200)).int())
        node.attributes |= {"scale": 1 / 0.9, "threshold": int(-(2**31) + 0.1 * 2**32)}
        kept = fused.kept_mask(*parts, node.attributes["threshold"]) * node.attributes["scale"]
        assert 0.85 < float((kept > 0).float().mean()) < 0.95
    leaves = [item.clone().requires_grad_() for item in (q, k, v)]
    wanted = (torch.softmax(leaves[0] @ leaves[1].transpose(-1, -2) + bias, -1) * kept) @ leaves[2]
    wanted.backward(gradient)
    given = bias if mask == "bias" else None
    spans = fused._document_spans(None, documents) if mask == "documents" else ()
    found = dropout_attention.forward(node, q, k, v, given, parts, spans)
    near([found[0]], [wanted.detach()])
    near(dropout_attention.backward(node, gradient, found, q, k, v, given, parts, spans),
         [leaf.grad for leaf in leaves])


def test_documents_one_after_the_other(monkeypatch):
    """FlashAttentionScore and its gradient by the kernels, against the written-out rule."""
    torch.manual_seed(0)
    q, k, v, gradient = (torch.randn(150, 2, 16) for _ in range(4))
    mask, node = torch.ones(8, 8).triu(1).byte(), Node("FlashAttentionScore", [], [])
    rest = (None, ends := torch.tensor([1, 70, 70, 130, 150]), ends, 2, 1.0, 0.25, 99, 0, 0, 4, 2)

    def both() -> tuple:
        largest, total, unused, out = flash.forward(node, q, k, v, None, None, None, mask, *rest)
        assert largest.shape == total.shape == (150, 2, 8)
        return out, *flash.backward(node, q, k, v, gradient, None, None, None, mask, largest, total, unused, out,
                                    *rest)[:3]

    wanted = both()
    monkeypatch.setattr(flash, "_has_kernel", lambda q: True)
    monkeypatch.setattr(flash, "_sequences", None)  # not by this way
    near(both(), wanted)


@pytest.mark.parametrize("skipped", [0.0, 1.0])
def test_adagrad(skipped):
    torch.manual_seed(0)
    *given, gradient = (torch.rand(1000, 7) for _ in range(3))
    scalars = torch.tensor([1e-2, 1e-8, 0.5, skipped])
    ours, theirs = ([item.clone() for item in given] for _ in range(2))
    kernels.adagrad(None, *ours, scalars, gradient)
    fused._adagrad(None, *theirs, scalars, gradient)
    near(ours, theirs)


def test_the_gate_of_a_swiglu():
    torch.manual_seed(0)
    gradient, g, u = (torch.randn(3, 50, 30) for _ in range(3))
    near([kernels.swish(None, g, u)], [swiglu.forward(None, g, u)])
    near(kernels.swish_grad(None, gradient, g, u), swiglu.backward(None, gradient, g, u))
    g.requires_grad_(), u.requires_grad_()
    (g * torch.sigmoid(g) * u).backward(gradient)
    near(kernels.swish_grad(None, gradient, g.detach(), u.detach()), [g.grad, u.grad])


@pytest.mark.parametrize("turned", [False, True])
def test_target_attention(monkeypatch, turned):
    """Values and gradients by the kernels against the plain form in float32; rows lie apart as a lookup's slices do."""
    from parallel.torch_runtime.attention import target_attention as own

    torch.manual_seed(0)
    monkeypatch.setattr(own, "_SHARE", 2)
    monkeypatch.setattr(own, "TILES", own.TILES | {"columns": ((64, 64, 4, turned),)})
    monkeypatch.setattr(own, "_chosen", {})
    samples, length, width, hidden = 3, 150, 32, 150
    k = torch.randn(samples, length + 3, width)[:, 2:-1]
    q, dout, present = torch.randn(samples, width), torch.randn(samples, 1, width), torch.rand(samples, length) > 0.2
    w1, b1 = torch.randn(hidden, 4 * width) / 12, torch.randn(hidden) / 4
    inputs = (q, k, present[..., None].float(), w1, b1, torch.randn(1, hidden) / 8, torch.randn(1))
    node = Node("FusedTargetAttention", [], [], {"dtype": "float32"})
    wanted = target_attention.forward(node, *inputs)
    gradients = target_attention.backward(node, dout, wanted[1], *inputs)
    monkeypatch.setattr(target_attention, "_own_kernels", lambda k, dtype: True)
    found = target_attention.forward(node, *inputs)
    near(found, wanted)
    near(target_attention.backward(node, dout, found[1], *inputs), gradients)
