"""Target attention over behaviour lists in one node, forward and backward: its pass, and what the nodes compute.

The pattern is that of `recsys.layers.embedding.TargetAttention`, sum_L a(q, k_l) k_l with a = w2 swish(W1 [q, k,
q - k, q * k] + b1) + b2 where a list holds something. Written out it keeps [B L, 4 W] and several [B L, H]; fused, the
backward pass computes hidden units again. Shapes: B samples, L list length, W embedding width, H hidden units.

    FusedTargetAttention(q_BW, k_BLW, present_BL1, W1 [H, 4 W], b1_H, w2_1H, b2_1) -> (out_BW, scores_BL)
    FusedTargetAttentionGrad(dout, scores_BL, the same inputs) -> gradients of q, k, W1, b1, w2, b2
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallel.torch_runtime.fusion.rewrite import Editor
from parallel.torch_runtime.graph import Kind, Node

_CHUNK = 1 << 27
"""Hidden units that the plain form keeps at once."""
_SUMS = ("ReduceSum", "SumExt")


# -- the pass ---------------------------------------------------------------------------------------------------------


def fuse_target_attention(editor: Editor) -> int:
    """Replaces every target attention; how many were found."""
    found = 0
    for node in list(editor.nodes.values()):
        if node.op == "Concat" and node.number in editor.nodes:
            pattern = _pattern(editor, node)
            if pattern is not None:
                _replace(editor, pattern)
                found += 1
    return found


def _only(editor: Editor, number: int, *ops: str) -> Node | None:
    """The one reader of these kinds that a value has, whatever else reads it."""
    readers = [user for user in editor.users(number) if user.op in ops]
    return readers[0] if len(readers) == 1 else None


def _behind(editor: Editor, number: int, *ops: str) -> int:
    """The value behind readers of `ops`, as long as there is one of them."""
    while (user := _only(editor, number, *ops)) is not None:
        number = user.number
    return number


def _other(node: Node, number: int) -> int:
    return node.inputs[1] if node.inputs[0] == number else node.inputs[0]


def _flags(editor: Editor, node: Node) -> tuple[bool, bool]:
    return tuple(bool(editor.constant(item)) for item in node.inputs[2:4])


def _products(editor: Editor, number: int, flags: tuple[bool, bool], place: int = 0) -> list[Node]:
    return [user for user in editor.users(number) if user.op == "MatMul" and user.inputs[place] == number
            and _flags(editor, user) == flags]


def _pattern(editor: Editor, concat: Node) -> dict[str, Any] | None:
    """The nodes of one target attention that begins with this concatenation."""
    listed = editor.maker(concat.inputs[0], "MakeTuple")
    if listed is None or len(listed.inputs) != 4:
        return None
    tile, k, minus, times = listed.inputs
    spread, difference = editor.maker(tile, "Tile"), editor.maker(minus, "Sub")
    product, kind = editor.maker(times, "Mul"), editor.kind(k)
    expand = editor.maker(spread.inputs[0], "ExpandDims") if spread is not None else None
    if (expand is None or kind is None or len(kind.shape) != 3 or difference is None or product is None
            or difference.inputs[:2] != [tile, k] or sorted(product.inputs[:2]) != sorted([tile, k])):
        return None
    flat = _behind(editor, _behind(editor, concat.number, "Reshape"), "Cast")
    forward = _unit(editor, flat, kind)
    if forward is None:
        return None
    forward |= {"q": expand.inputs[0], "k": k, "flat": flat}
    gradient = _gradient(editor, forward)
    if gradient is None and _products(editor, flat, (True, False), 1):
        return None
    return {**forward, "gradient": gradient}


def _unit(editor: Editor, flat: int, kind: Kind) -> dict[str, Any] | None:
    """The network that weighs, and the weighed sum."""
    first = _products(editor, flat, (False, True))
    add = _only(editor, first[0].number, "Add") if len(first) == 1 else None
    sigmoid = _only(editor, add.number, "Sigmoid") if add is not None else None
    if sigmoid is None:
        return None
    swish = [user for user in editor.users(sigmoid.number) if user.op == "Mul" and add.number in user.inputs]
    second = _products(editor, swish[0].number, (False, True)) if len(swish) == 1 else []
    after = _only(editor, second[0].number, "Add") if len(second) == 1 else None
    if after is None or after.outputs[0].shape[-1] != 1:
        return None
    masked = _only(editor, _behind(editor, _behind(editor, after.number, "Cast"), "Reshape"), "Mul")
    if masked is None:
        return None
    unmasked = _behind(editor, _behind(editor, after.number, "Cast"), "Reshape")
    weighed = [user for user in editor.users(masked.number) if user.op == "Mul" and editor.kind(user.number) == kind]
    sums = [(user, total) for user in weighed for total in editor.users(user.number) if total.op == "ReduceSum"]
    if len(sums) != 1 or sums[0][1].outputs[0].shape != (kind.shape[0], kind.shape[2]):
        return None
    return {"w1": first[0].inputs[1], "b1": _other(add, first[0].number), "w2": second[0].inputs[1],
            "b2": _other(after, second[0].number), "present": _other(masked, unmasked), "swish": swish[0].number,
            "out": sums[0][1], "score": masked.number}


def _gradient(editor: Editor, own: dict[str, Any]) -> dict[str, Any] | None:
    """What reads and makes the gradients of a target attention; None where the graph has none, or others."""
    w1 = _products(editor, own["flat"], (True, False), 1)
    w2 = _products(editor, own["swish"], (True, False), 1)
    if len(w1) != 1 or len(w2) != 1:
        return None
    dh, dscore = w1[0].inputs[0], w2[0].inputs[0]
    dx = [user for user in _products(editor, dh, (False, False)) if user.inputs[1] == own["w1"]]
    b1, b2 = _only(editor, dh, *_SUMS), _only(editor, dscore, *_SUMS)
    if len(dx) != 1 or b1 is None or b2 is None:
        return None
    split = _only(editor, _behind(editor, _behind(editor, dx[0].number, "Cast"), "Reshape"), "SplitWithSize")
    parts = {item.attributes["index"]: item.number for item in editor.users(split.number)
             if item.op == "Item"} if split is not None else {}
    if sorted(parts) != [0, 1, 2, 3]:
        return None
    q, k = _sum_of(editor, parts[0]), _sum_of(editor, parts[1])
    total = _only(editor, _behind(editor, q.number, "Reshape"), *_SUMS) if q is not None else None
    masked = editor.maker(editor.through(dscore, "Cast", "Reshape"), "Mul")
    if k is None or total is None or masked is None:
        return None
    dot = editor.maker(_other(masked, own["present"]), *_SUMS)
    product = editor.maker(dot.inputs[0], "Mul") if dot is not None else None
    tile = editor.maker(_other(product, own["k"]), "Tile") if product is not None else None
    if tile is None:
        return None
    return {"dout": tile.inputs[0], "q": total, "k": k, "w1": w1[0], "b1": b1, "w2": w2[0], "b2": b2}


def _sum_of(editor: Editor, part: int) -> Node | None:
    """The AddN that a part of the split gradient goes into, with three or four terms in all."""
    listed = _only(editor, part, "MakeTuple")
    return _only(editor, listed.number, "AddN") if listed is not None else None


def _replace(editor: Editor, pattern: dict[str, Any]) -> None:
    out, gradient = pattern["out"], pattern["gradient"]
    inputs = [pattern[name] for name in ("q", "k", "present", "w1", "b1", "w2", "b2")]
    samples, length, _ = editor.kind(pattern["k"]).shape
    dtype = editor.kind(pattern["flat"]).dtype
    made = editor.add("FusedTargetAttention", inputs, [], out, dtype=dtype)
    editor.replace(out.number, editor.item(made, 0, out.outputs[0], out))
    if gradient is None:
        return
    scores = editor.item(made, 1, Kind((samples, length), "float32"), out)
    like = gradient["q"]
    back = editor.add("FusedTargetAttentionGrad", [gradient["dout"], scores, *inputs], [], like, dtype=dtype)
    for index, name in enumerate(("q", "k", "w1", "b1", "w2", "b2")):
        node = gradient[name]
        editor.replace(node.number, editor.item(back, index, node.outputs[0], like))


# -- what the nodes compute -------------------------------------------------------------------------------------------


def _prepared(node: Node, q: Tensor, w1: Tensor, b1: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(base_WH = b - c, cross_WH = d, own_BH = q (a + c) + b1, a + c) of W1 = [a, b, c, d]: a row's hidden units are
    k (base + q cross) + own."""
    a, b, c, d = (part.t() for part in w1.float().split(q.shape[-1], 1))
    both = a + c
    return (b - c).contiguous().to(dtype), d.contiguous().to(dtype), torch.addmm(b1.float(), q.float(), both), both


def _filled(q: Tensor, base: Tensor, cross: Tensor, own: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(base + q cross for each sample, own, w2) with as many hidden units as the kernels take."""
    from parallel.torch_runtime.attention.target_attention import effective, filled

    return effective(q, filled(base), filled(cross)), filled(own), filled(w2.reshape(-1).float())


def _hidden(q: Tensor, k: Tensor, base: Tensor, cross: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden units before the swish [b, L, H], what each sample multiplies its rows with [b, W, H])."""
    effective = (base.float() + q.float()[:, :, None] * cross.float()).to(base.dtype)
    return torch.baddbmm(own[:, None].to(base.dtype), k.to(base.dtype), effective), effective


def _chunks(k: Tensor, hidden: int) -> list[slice]:
    size = max(1, _CHUNK // (k.shape[1] * hidden))
    return [slice(begin, begin + size) for begin in range(0, k.shape[0], size)]


def forward(node: Node, q: Tensor, k: Tensor, present: Tensor, w1: Tensor, b1: Tensor, w2: Tensor,
            b2: Tensor) -> tuple[Tensor, Tensor]:
    """(out_BW, scores_BL): the weighed sums, and the weights of the rows."""
    dtype = _type_of(node, k)
    base, cross, own, _ = _prepared(node, q, w1, b1, dtype)
    present = present.reshape(k.shape[:2])
    if _own_kernels(k, dtype):
        from parallel.torch_runtime.attention import target_attention

        effective, own, w2 = _filled(q, base, cross, own, w2)
        return target_attention.forward(k, present.contiguous(), effective, own, w2, b2)
    scores = []
    for part in _chunks(k, base.shape[1]):
        h, _ = _hidden(q[part], k[part], base, cross, own[part])
        scores.append((torch.nn.functional.silu(h) @ w2.reshape(-1).to(dtype)).to(k.dtype))
    score = (torch.cat(scores) + b2.to(k.dtype)) * present
    return torch.bmm(score[:, None], k)[:, 0], score


def backward(node: Node, dout: Tensor, scores: Tensor, q: Tensor, k: Tensor, present: Tensor, w1: Tensor, b1: Tensor,
             w2: Tensor, b2: Tensor) -> tuple[Tensor, ...]:
    """Gradients of q [B, 1, W], k, W1, b1, w2 and b2 in the types that they have in the graph."""
    dtype = _type_of(node, k)
    base, cross, own, both = _prepared(node, q, w1, b1, dtype)
    dout, present = dout.reshape(q.shape), present.reshape(k.shape[:2])
    if _own_kernels(k, dtype):
        from parallel.torch_runtime.attention import target_attention

        effective, whole_own, whole_w2 = _filled(q, base, cross, own, w2)
        dk, dscores, downs, dw2, dq, db, dd = target_attention.backward(
            dout.contiguous(), scores, q.float().contiguous(), k, present.contiguous(), effective, whole_own, whole_w2,
            target_attention.filled(cross))
        downs, dw2, db, dd = (item[..., :base.shape[1]] for item in (downs, dw2, db, dd))
    else:
        dk, dscores, deffective, downs, dw2 = _plain_backward(dout, scores, q, k, present, base, cross, own, w2)
        db, dd = deffective.sum(0), torch.einsum("bw,bwh->wh", q.to(deffective.dtype), deffective)
        dq = (deffective * cross.to(deffective.dtype)).sum(-1)
    da = q.to(downs.dtype).t() @ downs
    dw1 = torch.cat([part.t() for part in (da, db, da - db, dd)], 1)
    dq = torch.addmm(dq, downs, both.to(downs.dtype).t())
    return (dq[:, None].to(q.dtype), dk, dw1.to(w1.dtype), downs.sum(0).to(b1.dtype), dw2.sum(0)[None].to(w2.dtype),
            dscores.sum().reshape(b2.shape).to(b2.dtype))


def _plain_backward(dout: Tensor, scores: Tensor, q: Tensor, k: Tensor, present: Tensor, base: Tensor, cross: Tensor,
                    own: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
    """(dk_BLW, dscores_BL, gradient of what a sample multiplies its rows with [B, W, H], of `own` [B, H], of w2 by
    sample [B, H])."""
    dtype, weight = base.dtype, w2.reshape(-1).to(base.dtype)
    dscores = torch.bmm(k, dout[:, :, None])[..., 0] * present
    dk = scores[..., None] * dout[:, None]
    found: list[list[Tensor]] = [[], [], []]
    for part in _chunks(k, base.shape[1]):
        h, effective = _hidden(q[part], k[part], base, cross, own[part])
        sigmoid, dscore = torch.sigmoid(h), dscores[part].to(dtype)
        found[2].append(torch.bmm(dscore[:, None], h * sigmoid)[:, 0].to(k.dtype))
        dh = dscore[..., None] * weight * sigmoid * (1.0 + h * (1.0 - sigmoid))
        dk[part] += torch.bmm(dh, effective.transpose(1, 2))
        found[0].append(torch.bmm(k[part].to(dtype).transpose(1, 2), dh).to(k.dtype))
        found[1].append(dh.sum(1, dtype=k.dtype))
    return dk, dscores, *(torch.cat(items) for items in found)


def _type_of(node: Node, k: Tensor) -> torch.dtype:
    found = getattr(torch, node.attributes["dtype"])
    return k.dtype if found == torch.float32 else found


def _own_kernels(k: Tensor, dtype: torch.dtype) -> bool:
    if not k.is_cuda:
        return False
    from parallel.torch_runtime.attention import target_attention

    return target_attention.fits(k, dtype)


RULES = {"FusedTargetAttention": forward, "FusedTargetAttentionGrad": backward}
