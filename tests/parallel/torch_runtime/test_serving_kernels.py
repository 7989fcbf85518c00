"""The Triton kernels of serving, in Triton's interpreter on the CPU, against plain torch; needs Triton installed."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are made
pytest.importorskip("triton")

import torch.nn.functional as nnf  # noqa: E402

from parallel.torch_runtime.attention.slot_attention import attend  # noqa: E402
from parallel.torch_runtime.fusion import product_kernels, tiles  # noqa: E402
from parallel.torch_runtime.fusion.product_kernels import Tile, normed, product  # noqa: E402
from parallel.torch_runtime.fusion.served import widened  # noqa: E402
from parallel.torch_runtime.inference.weights import quantized  # noqa: E402

TILES = [Tile(16, 64, 2, 4, 2), Tile(32, 128, 3, 4, 2), Tile(16, 64, 2, 2, 3, matrix=True)]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("kind", ["float", "int8", "groups"])
@pytest.mark.parametrize(("tokens", "rows", "inputs", "outputs"), [(2, 1, 200, 33), (2, 17, 200, 20)])
def test_products_and_what_follows_them(tokens, rows, inputs, outputs, kind, tile):
    torch.manual_seed(0)
    x, w, scale = torch.randn(tokens, rows, inputs).half(), torch.randn(tokens, outputs, inputs).half(), None
    wide = w.double()
    if kind != "float":
        w, scale = quantized(w, 128 if kind == "groups" else None)
        wide = widened(w, scale).double()
    bias, extra = torch.randn(tokens, outputs).half(), torch.randn(tokens, rows, outputs).half()
    plain = x.double() @ wide.transpose(1, 2)
    wanted = nnf.gelu(plain + bias[:, None].double(), approximate="tanh") + extra.double()
    for found, right in ((product(x, w, scale, bias, extra, True, tile), wanted),
                         (product(x, w, scale, tile=tile), plain)):
        assert float((found.double() - right).norm() / right.norm()) < 2e-3
    assert not product_kernels.counts_on(x.device).any()


def test_layer_norm():
    torch.manual_seed(0)
    x, gamma, beta = torch.randn(3, 200), torch.randn(200), torch.randn(200)
    wanted = nnf.layer_norm(x, (200,), gamma, beta, 1e-5)
    assert float((normed(x, gamma, beta, 1e-5, torch.float32) - wanted).abs().max()) < 1e-5


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize(("groups", "width"), [(1, 32), (3, 24)])
def test_attention_over_slots(groups, width, splits):
    """With a slot that one group writes and another sees, and one group that sees no block but its first."""
    torch.manual_seed(0)
    heads, seen, slots = 2, 80, 300
    keys, values = torch.randn(slots, heads, width), torch.randn(slots, heads, width)
    q, k, v = (torch.randn(groups, heads * width) for _ in range(3))
    read = torch.stack([torch.randperm(slots)[:seen] for _ in range(groups)]).int()
    visible = torch.stack([torch.arange(seen) < (5 if group else 70) for group in range(groups)]).to(torch.int8)
    write = read[:, 1].clone()
    read[-1, 2] = write[0]
    tables = [table.clone() for table in (keys, values)]
    for table, new in zip(tables, (k, v), strict=True):
        table[write.long()] = new.view(groups, heads, width)
    of_slots = [table[read.long()].transpose(1, 2) for table in tables]
    scores = (0.3 * q.view(groups, heads, 1, width)) @ of_slots[0].transpose(-1, -2)
    hidden = visible.view(groups, 1, 1, seen) == 0
    wanted = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ of_slots[1]).view(groups, -1)
    found = attend(keys, values, q, k, v, write, read, visible, 0.3, splits)
    assert float((found - wanted).abs().max()) < 1e-5
    assert torch.equal(keys, tables[0])
    assert torch.equal(values, tables[1])


def test_the_fastest_tile_is_kept_for_a_shape(monkeypatch):
    monkeypatch.setattr(tiles, "_COLD_BYTES", 1)
    monkeypatch.setattr(tiles, "CHOSEN", {})
    slow, fast = Tile(4, 64), Tile(8, 64)
    monkeypatch.setattr(tiles, "CANDIDATES", {(True, 1): [slow, fast]})
    monkeypatch.setattr(tiles, "seconds", lambda calls, device: calls[0]().sum() * 0 + times.pop(0))
    times = [2.0, 1.0]
    w, scale = quantized(torch.randn(1, 16, 64))
    for _ in range(2):
        tiles.choose(torch.randn(1, 1, 64), w, scale)
    assert tiles.CHOSEN[True, 1, 1, 16, 64] == fast
