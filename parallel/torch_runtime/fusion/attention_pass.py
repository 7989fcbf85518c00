"""The pass that fuses attention: its pattern, with dropout and masks of documents, and that of its gradients."""

from __future__ import annotations

from typing import Any

import numpy as np

from parallel.torch_runtime.fusion.rewrite import Editor, plain_items
from parallel.torch_runtime.graph import Graph, Kind, Literal, Node

SPANS = "all"
"""Which attention tells documents apart by their numbers in place of a bias [B, 1, S, S]: "dropout", that with dropout;
"all", and that in half precision without; "none"."""


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
