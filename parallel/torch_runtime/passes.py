"""Passes that make a graph fast: patterns of nodes replaced by fused ones. What each fused node computes is in `fused`.

The numbers of a fused graph differ from the exact mode's by rounding only: in float32 by about 1e-6 relative, in
bfloat16 and float16 by the rounding of the types that are no longer stored in between.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from parallel.torch_runtime.program import Graph, Kind, Literal, Node
from parallel.torch_runtime.rewrite import Editor

SPANS = "all"
"""Which attention tells documents apart by their numbers in place of a bias [B, 1, S, S]: "dropout", that with dropout;
"all", and that in half precision without; "none"."""


def optimized(graph: Graph, *, causal: bool = False, early: bool = True, attention: bool = True,
              free: frozenset[tuple[int, ...]] = frozenset()) -> Graph:
    """The graph with all patterns fused.

    Args:
        graph: a training or loss graph.
        causal: attention's mask is known to be causal: documents are not separated (`documents_input`).
        early: see `Editor.graph`.
        attention: whether attention is fused at all.
        free: see `Editor.graph`.
    """
    editor = Editor(graph)
    plain_items(editor)
    if attention:
        fuse_attention(editor, causal)
    fuse_cross_entropy(editor)
    fuse_layer_norm(editor)
    fuse_squares(editor)
    fuse_norm(editor)
    fuse_adam(editor)
    fuse_accumulation(editor)
    fuse_linear(editor)
    return editor.graph(early=early, free=free)


def plain_items(editor: Editor) -> None:
    """TupleGetItem becomes Item, whose index is an attribute."""
    for node in list(editor.nodes.values()):
        if node.op == "TupleGetItem":
            index = editor.constant(node.inputs[1])
            if isinstance(index, int):
                editor.change(node, "Item", node.inputs[:1], {"index": index})


# -- attention --------------------------------------------------------------------------------------------------------


def fuse_attention(editor: Editor, causal: bool) -> int:
    """softmax(q k^T + bias) v and its gradients, dropout on the probabilities included; how many were found."""
    found, casts = 0, {}
    for node in list(editor.nodes.values()):
        if node.op == "Softmax" and node.number in editor.nodes:
            pattern = _attention(editor, node)
            if pattern is not None:
                numbers = documents_of(editor, pattern["bias"])
                wanted = SPANS != "none" if pattern["dropout"] else SPANS == "all" and _fits_spans(editor, pattern)
                apart = numbers is not None and numbers[1] >= 0 and not causal and wanted
                _replace_attention(editor, pattern, causal and numbers is not None, numbers[1] if apart else None,
                                   casts)
                found += 1
    return found


def _fits_spans(editor: Editor, pattern: dict) -> bool:
    kind = editor.kind(pattern["q"])
    return kind.dtype in ("bfloat16", "float16") and kind.shape[-1] in (16, 32, 64, 128)


def _flags(editor: Editor, node: Node) -> tuple[bool, bool]:
    return tuple(bool(editor.constant(item)) for item in (*node.inputs[2:4], *[-1] * (4 - len(node.inputs))))[:2]


def _attention(editor: Editor, softmax: Node) -> dict[str, Any] | None:
    """The nodes around a softmax, if they are those of attention and nothing else reads what is between."""
    add = editor.maker(softmax.inputs[0], "Add")
    if add is None or len(editor.users(add.number)) != 1 or len(softmax.outputs[0].shape) != 4:
        return None
    found = [(product, bias) for scores, bias in (add.inputs, add.inputs[::-1])
             if (product := editor.maker(editor.through(scores, "Cast"), "BatchMatMul")) is not None
             and _flags(editor, product) == (False, True)]
    if len(found) != 1:
        return None
    product, bias = found[0]
    p = softmax.number
    casted = [user.number for user in editor.users(p) if user.op == "Cast"]
    weights = {p, *casted}
    dropout = _dropout(editor, weights)
    dropped = {node.number for node in dropout["products"]} if dropout else weights
    outs, dvs = [], []
    for number in dropped:
        for user in editor.users(number):
            if user.op == "BatchMatMul" and user.inputs[0] == number:
                (outs if _flags(editor, user) == (False, False) else dvs).append(user)
            elif user.op != "SoftmaxBackward" and (number not in weights or user.number not in (*casted, *dropped)):
                return None
    backward = [user for user in editor.users(p) if user.op == "SoftmaxBackward" and user.inputs[1] == p]
    if len(outs) > 1 or len(dvs) > 1 or len(backward) > 1 or not (outs or backward):
        return None
    pattern = {"q": product.inputs[0], "k": product.inputs[1], "bias": bias, "softmax": softmax, "out": outs,
               "dropout": dropout, "backward": None}
    if outs:
        pattern["v"] = outs[0].inputs[1]
    if backward:
        gradient = _attention_gradient(editor, pattern, backward[0], dvs)
        if gradient is None:
            return None
        pattern["backward"], pattern["v"] = gradient, gradient["v"]
    elif dvs:
        return None
    return pattern


def _dropout(editor: Editor, weights: set[int]) -> dict[str, Any] | None:
    """Products of the probabilities with a mask of the project's own hash: hash >= threshold, grown."""
    products = []
    parts = None
    for number in weights:
        for user in editor.users(number):
            if user.op != "Mul":
                continue
            mask = user.inputs[1] if user.inputs[0] == number else user.inputs[0]
            read = _hash_mask(editor, mask)
            if read is None or (parts is not None and read["mask"] != parts["mask"]):
                return None
            parts = read
            products.append(user)
    return {**parts, "products": products} if parts is not None else None


def _hash_mask(editor: Editor, number: int) -> dict[str, Any] | None:
    grow = editor.maker(number, "Mul")
    if grow is None:
        return None
    keep = editor.maker(editor.through(grow.inputs[0], "Cast"), "GreaterEqual")
    scale = editor.constant(grow.inputs[1])
    total = editor.maker(keep.inputs[0], "Add") if keep is not None else None
    product = editor.maker(total.inputs[0], "Mul") if total is not None else None
    if product is None or not isinstance(scale, Literal):
        return None
    threshold, columns = editor.constant(keep.inputs[1]), editor.constant(product.inputs[1])
    if not isinstance(threshold, Literal) or not isinstance(columns, Literal):
        return None
    return {"mask": number, "rows": product.inputs[0], "sums": total.inputs[1], "columns": product.inputs[1],
            "threshold": int(threshold.array().item()), "scale": float(scale.array().item())}


def _attention_gradient(editor: Editor, pattern: dict, backward: Node, dvs: list[Node]) -> dict[str, Any] | None:
    """What the softmax's gradient reads and what reads it."""
    number = editor.through(backward.inputs[0], "Cast")
    if pattern["dropout"]:
        masked = editor.maker(number, "Mul")
        if masked is None or pattern["dropout"]["mask"] not in masked.inputs:
            return None
        number = masked.inputs[0] if masked.inputs[1] == pattern["dropout"]["mask"] else masked.inputs[1]
    product = editor.maker(number, "BatchMatMul")
    if product is None or _flags(editor, product) != (False, True) or len(dvs) != 1:
        return None
    dout, v = product.inputs[:2]
    if dvs[0].inputs[1] != dout or _flags(editor, dvs[0]) != (True, False):
        return None
    readers = list(editor.users(backward.number))
    scores = [backward.number]
    if len(readers) == 1 and readers[0].op == "Cast":
        scores = [readers[0].number]
        readers = editor.users(readers[0].number)
    dq = [user for user in readers if user.op == "BatchMatMul" and user.inputs[:2] == [scores[0], pattern["k"]]
          and _flags(editor, user) == (False, False)]
    dk = [user for user in readers if user.op == "BatchMatMul" and user.inputs[:2] == [scores[0], pattern["q"]]
          and _flags(editor, user) == (True, False)]
    if len(dq) != 1 or len(dk) != 1 or len(readers) != 2:
        return None
    return {"dout": dout, "v": v, "dq": dq[0], "dk": dk[0], "dv": dvs[0]}


def _replace_attention(editor: Editor, pattern: dict, causal: bool, documents: int | None, casts: dict) -> None:
    first = pattern["out"][0] if pattern["out"] else pattern["softmax"]
    q, dropout = editor.kind(pattern["q"]), pattern["dropout"]
    bias, spans = pattern["bias"], []
    if documents is not None:
        if documents not in casts:
            made, kind = editor.add("DocumentSpans", [documents], [], first), editor.kind(bias)
            spread = Kind((kind.shape[0], kind.shape[-1]), "int32")
            casts[documents] = [editor.item(made, place, spread, first) for place in range(3)]
        spans = casts[documents]
    elif not causal:
        if (bias, q.dtype) not in casts:
            kind = Kind(editor.kind(bias).shape, q.dtype)
            casts[bias, q.dtype] = editor.add("Cast", [bias], [kind], editor.nodes.get(bias, first))
        bias = casts[bias, q.dtype]
    inputs, attributes = [pattern["q"], pattern["k"], pattern["v"]], {"causal": causal, "dropout": bool(dropout)}
    if documents is not None:
        inputs += spans
        attributes["documents"] = True
    elif not causal:
        inputs.append(bias)
    extra = []
    if dropout:
        extra = [dropout["rows"], dropout["sums"], dropout["columns"]]
        attributes |= {"threshold": dropout["threshold"], "scale": dropout["scale"]}
    forward = editor.add("FusedAttention", [*inputs, *extra], [], first, **attributes)
    out = editor.item(forward, 0, Kind((*q.shape[:-1], editor.kind(pattern["v"]).shape[-1]), q.dtype), first)
    if pattern["out"]:
        editor.replace(pattern["out"][0].number, out)
    gradient = pattern["backward"]
    if gradient is not None:
        like = gradient["dq"]
        back = editor.add("FusedAttentionGrad", [gradient["dout"], forward, *inputs, *extra], [], like, **attributes)
        for index, name in enumerate(("dq", "dk", "dv")):
            node = gradient[name]
            editor.replace(node.number, editor.item(back, index, node.outputs[0], like))


def documents_of(editor: Editor, bias: int) -> tuple[int, int] | None:
    """(the graph's input that numbers the documents, the value [B, S] that is compared with itself), if `bias` hides
    what is after a position or in another document: where all of a row is one document the mask is causal. None for
    any other mask."""
    weigh = editor.maker(editor.through(bias, "Cast", "Depend"), "Mul")
    invert = editor.maker(weigh.inputs[0], "Sub") if weigh is not None else None
    if invert is None:
        return None
    both = editor.maker(editor.through(invert.inputs[1], "ExpandDims", "Cast", "Depend"), "LogicalAnd")
    if both is None:
        return None
    triangle = editor.constant(both.inputs[1])
    same = editor.maker(both.inputs[0], "Equal")
    if same is None or not isinstance(triangle, Literal) or triangle.data is None:
        return None
    if not np.array_equal(triangle.array(), np.tri(triangle.kind.shape[-1], dtype=bool)[None]):
        return None
    compared = {_compared(editor, item) for item in same.inputs}
    sources = {editor.through(item, "ExpandDims", "Reshape", "StridedSlice", "Depend", "Load") for item in same.inputs}
    if len(sources) != 1 or (source := sources.pop()) >= editor.original.first_parameter:
        return None
    square = same.outputs[0].shape[1:2] == same.outputs[0].shape[2:]
    return source, compared.pop() if len(compared) == 1 and square else -1


def _compared(editor: Editor, number: int) -> int:
    """What an ExpandDims to three dims reads, [B, S]; -1 for anything else."""
    spread = editor.maker(editor.through(number, "Depend", "Load"), "ExpandDims")
    if spread is None or len(spread.outputs[0].shape) != 3:
        return -1
    return editor.through(spread.inputs[0], "Depend", "Load")


def documents_input(graph: Graph) -> int | None:
    """The index among a graph's inputs of the documents' numbers on which all its attention masks depend; None where a
    mask is of another kind, or there is none."""
    editor = Editor(graph)
    plain_items(editor)
    found = set()
    for node in list(editor.nodes.values()):
        if node.op == "Softmax":
            pattern = _attention(editor, node)
            if pattern is None:
                return None
            numbers = documents_of(editor, pattern["bias"])
            found.add(numbers[0] if numbers is not None else None)
    return found.pop() if len(found) == 1 else None


# -- cross entropy ----------------------------------------------------------------------------------------------------


def fuse_cross_entropy(editor: Editor) -> int:
    """sum exp(x - max) and x[label] - max of every row of logits, and the gradient, without keeping [N, V] in float32.

    The pattern is that of `parallel.layers.loss.CrossEntropy`, sharded over the vocabulary or not: what is reduced over
    ranks is between the nodes that are fused here.
    """
    found = 0
    for shift in list(editor.nodes.values()):
        if shift.op != "Sub" or len(shift.outputs[0].shape) != 2 or shift.number not in editor.nodes:
            continue
        pattern = _cross_entropy(editor, shift)
        if pattern is not None:
            _replace_cross_entropy(editor, shift, pattern)
            found += 1
    return found


def _cross_entropy(editor: Editor, shift: Node) -> dict[str, Any] | None:
    users = editor.users(shift.number)
    exps, selects = [user for user in users if user.op == "Exp"], [user for user in users if user.op == "Mul"]
    if len(exps) != 1 or len(selects) != 1 or len(users) != 2 or editor.kind(shift.inputs[1]).shape[-1] != 1:
        return None
    exp, select = exps[0], selects[0]
    other = select.inputs[1] if select.inputs[0] == shift.number else select.inputs[0]
    one_hot = editor.maker(other, "OneHot")
    if one_hot is None:
        return None
    total = [user for user in editor.users(exp.number) if user.op == "ReduceSum"]
    chosen = [user for user in editor.users(select.number) if user.op == "ReduceSum"]
    if len(total) != 1 or len(chosen) != 1 or len(editor.users(select.number)) != 1:
        return None
    pattern = {"exp": exp, "one_hot": one_hot, "total": total[0], "chosen": chosen[0], "gradient": None}
    by_exp = [user for user in editor.users(exp.number) if user.op == "Mul"]
    by_label = [user for user in editor.users(one_hot.number) if user.op == "Mul" and user is not select]
    if not by_exp and not by_label:
        return pattern
    if len(by_exp) != 1 or len(by_label) != 1 or len(editor.users(exp.number)) != 2:
        return None
    joined = _joined(editor, by_exp[0], by_label[0])
    rows = [_per_row(editor, one, exp.number if one is by_exp[0] else one_hot.number) for one in (by_exp[0],
                                                                                                  by_label[0])]
    if joined is None or None in rows:
        return None
    pattern["gradient"] = {"sum": joined, "by_total": rows[0], "by_chosen": rows[1]}
    return pattern


def _joined(editor: Editor, one: Node, other: Node) -> Node | None:
    """The node that adds two values, and nothing else reads them."""
    users = {user.number: user for item in (one, other) for user in editor.users(item.number)}
    if len(users) != 1:
        return None
    user = next(iter(users.values()))
    if user.op == "MakeTuple":
        after = editor.users(user.number)
        return after[0] if len(after) == 1 and after[0].op == "AddN" and len(user.inputs) == 2 else None
    return user if user.op == "Add" else None


def _per_row(editor: Editor, product: Node, wide: int) -> int | None:
    """The value [N] (or [N, 1]) that a product spreads over the columns."""
    other = product.inputs[1] if product.inputs[0] == wide else product.inputs[0]
    tile = editor.maker(other, "Tile", "BroadcastTo")
    if tile is None:
        kind = editor.kind(other)
        return other if kind is not None and kind.shape[-1:] == (1,) else None
    return tile.inputs[0]


def _replace_cross_entropy(editor: Editor, shift: Node, pattern: dict) -> None:
    wide, largest, labels = shift.inputs[0], shift.inputs[1], pattern["one_hot"].inputs[0]
    logits = editor.through(wide, "Cast")
    kind, rows = editor.kind(logits), pattern["total"].outputs[0]
    for user in editor.users(wide):
        if user.op == "ReduceMax" and logits != wide:
            # The largest of the rounded logits is one of them: exact before the cast, too.
            editor.change(user, user.op, [logits, *user.inputs[1:]], user.attributes)
    sums = editor.add("RowSums", [logits, largest, labels], [], pattern["exp"])
    editor.replace(pattern["total"].number, editor.item(sums, 0, rows, pattern["total"]))
    editor.replace(pattern["chosen"].number, editor.item(sums, 1, pattern["chosen"].outputs[0], pattern["chosen"]))
    gradient = pattern["gradient"]
    if gradient is None:
        return
    last, users = gradient["sum"], editor.users(gradient["sum"].number)
    dtype = last.outputs[0].dtype
    if len(users) == 1 and users[0].op == "Cast":
        last, dtype = users[0], users[0].outputs[0].dtype
    made = editor.add("RowSumsGrad", [logits, largest, labels, gradient["by_total"], gradient["by_chosen"]],
                      [Kind(kind.shape, dtype)], last)
    editor.replace(last.number, made)


# -- layer norm, norms, Adam, matmuls ---------------------------------------------------------------------------------


def fuse_layer_norm(editor: Editor) -> int:
    """LayerNorm over the last dim gives the inverse deviation in place of the variance that only its gradient reads."""
    found = 0
    for node in list(editor.nodes.values()):
        if node.op != "LayerNorm":
            continue
        items = editor.users(node.number)
        gamma, x = editor.kind(node.inputs[1]), editor.kind(node.inputs[0])
        if gamma is None or x is None or len(gamma.shape) != 1 or any(item.op != "Item" for item in items):
            continue
        readers = [user for item in items if item.attributes["index"] == 2 for user in editor.users(item.number)]
        if any(user.op != "LayerNormGrad" or user.inputs[0] != node.inputs[0] for user in readers):
            continue
        editor.change(node, "FusedLayerNorm", node.inputs[:3], {"epsilon": _number(editor.constant(node.inputs[5]))})
        for user in readers:
            editor.change(user, "FusedLayerNormGrad", user.inputs[:5])
        found += 1
    return found


def _number(value: Any) -> float:
    return float(value.array().item() if isinstance(value, Literal) else value)


def fuse_squares(editor: Editor) -> int:
    """Sum of the squares of all elements in one node."""
    found = 0
    for node in list(editor.nodes.values()):
        if node.op != "Square":
            continue
        last, users = node, editor.users(node.number)
        while len(users) == 1 and users[0].op in ("ReduceSum", "SumExt"):
            last, users = users[0], editor.users(users[0].number)
        if last is not node and last.outputs[0].shape == ():
            editor.replace(last.number, editor.add("SumOfSquares", node.inputs[:1], last.outputs, last))
            found += 1
    return found


def fuse_norm(editor: Editor) -> int:
    """A sum of the squares of many tensors, each over how many ranks hold the same, in one node: SumsOfSquares."""
    found = 0
    for node in list(editor.nodes.values()):
        listed = editor.maker(node.inputs[0], "MakeTuple") if node.op == "AddN" else None
        if listed is None:
            continue
        terms = [(item, _share_of_squares(editor, item)) for item in listed.inputs]
        fused = [term for _, term in terms if term is not None]
        if len(fused) < 2:
            continue
        made = editor.add("SumsOfSquares", [number for number, _ in fused], node.outputs, node,
                          weights=[weight for _, weight in fused])
        rest = [item for item, term in terms if term is None]
        if rest:
            tupled = editor.add("MakeTuple", [*rest, made], [], node)
            made = editor.add("AddN", [tupled], node.outputs, node)
        editor.replace(node.number, made)
        found += 1
    return found


def _share_of_squares(editor: Editor, number: int) -> tuple[int, float] | None:
    """(tensor, weight) if a value is weight x the sum of a tensor's squares, which nothing else reads; what was only
    widened is taken narrow."""
    weight = 1.0
    while (node := editor.nodes.get(number)) is not None and len(editor.users(number)) == 1:
        if node.op == "SumOfSquares":
            cast = editor.maker(node.inputs[0], "Cast")
            kind = editor.kind(cast.inputs[0]) if cast is not None else None
            wide = kind is None or kind.dtype not in ("bfloat16", "float16") or cast.outputs[0].dtype != "float32"
            return (node.inputs[0] if wide else cast.inputs[0]), weight
        divisor = editor.constant(node.inputs[1]) if node.op in ("RealDiv", "Div") else None
        if isinstance(divisor, Literal) and divisor.kind.shape == ():
            weight /= _number(divisor)
        elif node.op not in ("ExpandDims", "Reshape"):
            return None
        number = node.inputs[0]
    return None


def fuse_accumulation(editor: Editor) -> int:
    """What is only widened to be added to a parameter is widened in passing."""
    found = 0
    for node in list(editor.nodes.values()):
        cast = editor.maker(node.inputs[1], "Cast") if node.op == "AssignAdd" else None
        kind = editor.kind(cast.inputs[0]) if cast is not None else None
        if kind is not None and kind.dtype in ("bfloat16", "float16") and cast.outputs[0].dtype == "float32":
            editor.change(node, "AssignAdd", [node.inputs[0], cast.inputs[0], *node.inputs[2:]], node.attributes)
            found += 1
    return found


def fuse_adam(editor: Editor) -> int:
    """Scaling, holding back and AdamW of a parameter in one node: FusedAdam(parameter, m, v, scalars, gradient) with
    scalars = [rate, beta1, beta2, epsilon, decay, factor, skipped], made once for all parameters that share them."""
    scalars: dict[tuple, int] = {}
    found = 0
    for node in list(editor.nodes.values()):
        if node.op != "AdamWeightDecay":
            continue
        gradient, factor, skipped = node.inputs[8], None, None
        fill = editor.maker(gradient, "MaskedFill")
        scaled = editor.maker(fill.inputs[0], "Mul") if fill is not None else None
        if scaled is not None and len(editor.users(scaled.number)) == len(editor.users(fill.number)) == 1:
            by = editor.kind(scaled.inputs[1])
            if by is not None and by.shape == ():
                gradient, factor, skipped = scaled.inputs[0], scaled.inputs[1], fill.inputs[1]
        cast = editor.maker(gradient, "Cast")
        if cast is not None and editor.kind(cast.inputs[0]) is not None and cast.outputs[0].dtype == "float32":
            gradient = cast.inputs[0]  # widened in passing
        listed = [number for number in (*node.inputs[3:8], factor, skipped) if number is not None]
        key = tuple(str(editor.constant(number) or number) for number in listed)
        if key not in scalars:
            scalars[key] = editor.add("AdamScalars", listed, [Kind((7,), "float32")], node)
        editor.change(node, "FusedAdam", [*node.inputs[:3], scalars[key], gradient, *node.inputs[9:]])
        found += 1
    return found


def fuse_linear(editor: Editor) -> int:
    """x W^T + b as one matrix product that begins from the bias."""
    found = 0
    for node in list(editor.nodes.values()):
        if node.op != "Add" or node.number not in editor.nodes:
            continue
        for number, other in (node.inputs, node.inputs[::-1]):
            product, bias = editor.maker(number, "MatMul"), editor.kind(other)
            if (product is not None and bias is not None and len(bias.shape) == 1
                and len(editor.users(number)) == 1 and product.outputs[0] == node.outputs[0]
                and bias.dtype == product.outputs[0].dtype):
                editor.replace(node.number, editor.add("Linear", [*product.inputs[:4], other], node.outputs, node))
                found += 1
                break
    return found
