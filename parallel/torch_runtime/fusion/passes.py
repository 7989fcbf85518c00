"""Passes that make a graph fast: patterns of nodes replaced by fused ones. What each fused node computes is in `fused`.

The numbers of a fused graph differ from the exact mode's by rounding only: in float32 by about 1e-6 relative, in
bfloat16 and float16 by the rounding of the types that are no longer stored in between.
"""

from __future__ import annotations

from typing import Any

from parallel.torch_runtime.fusion.attention_pass import fuse_attention
from parallel.torch_runtime.fusion.rewrite import Editor, plain_items
from parallel.torch_runtime.fusion.swiglu import fuse_swish
from parallel.torch_runtime.fusion.target_attention import fuse_target_attention
from parallel.torch_runtime.graph import Graph, Kind, Literal, Node


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
        fuse_target_attention(editor)
    fuse_swish(editor)
    fuse_cross_entropy(editor)
    fuse_layer_norm(editor)
    fuse_squares(editor)
    fuse_norm(editor)
    fuse_adam(editor)
    fuse_adagrad(editor)
    fuse_accumulation(editor)
    fuse_linear(editor)
    return editor.graph(early=early, free=free)


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


def fuse_adam(editor: Editor) -> int:
    """Scaling, holding back and AdamW of a parameter in one node: FusedAdam(parameter, m, v, scalars, gradient) with
    scalars = [rate, beta1, beta2, epsilon, decay, factor, skipped], made once for all parameters that share them."""
    scalars: dict[tuple, int] = {}
    found = 0
    for node in list(editor.nodes.values()):
        if node.op != "AdamWeightDecay":
            continue
        gradient, factor, skipped = _unscaled(editor, node.inputs[8])
        made = _scalars(editor, scalars, "AdamScalars", 7, [*node.inputs[3:8], factor, skipped], node)
        editor.change(node, "FusedAdam", [*node.inputs[:3], made, gradient, *node.inputs[9:]])
        found += 1
    return found


def _unscaled(editor: Editor, gradient: int) -> tuple[int, int | None, int | None]:
    """(gradient, factor, skipped): what an update reads before it is scaled and held back, as narrow as it is."""
    factor, skipped = None, None
    fill = editor.maker(gradient, "MaskedFill")
    scaled = editor.maker(fill.inputs[0], "Mul") if fill is not None else None
    if scaled is not None and len(editor.users(scaled.number)) == 1:
        by = editor.kind(scaled.inputs[1])
        if by is not None and by.shape == ():
            gradient, factor, skipped = scaled.inputs[0], scaled.inputs[1], fill.inputs[1]
    cast = editor.maker(gradient, "Cast")
    if cast is not None and editor.kind(cast.inputs[0]) is not None and cast.outputs[0].dtype == "float32":
        gradient = cast.inputs[0]  # widened in passing
    return gradient, factor, skipped


def _scalars(editor: Editor, known: dict[tuple, int], op: str, size: int, values: list[int | None], like: Node) -> int:
    """The node that joins an update's scalars, one for all that share them."""
    listed = [number for number in values if number is not None]
    key = tuple(str(editor.constant(number) or number) for number in listed)
    if key not in known:
        known[key] = editor.add(op, listed, [Kind((size,), "float32")], like)
    return known[key]


def fuse_adagrad(editor: Editor) -> int:
    """Scaling, holding back and Adagrad of a parameter in one node: FusedAdagrad(parameter, sum of squares, scalars,
    gradient) with scalars = [rate, epsilon, factor, skipped]."""
    scalars: dict[tuple, int] = {}
    found = 0
    for node in list(editor.nodes.values()):
        pattern = _adagrad(editor, node) if node.op == "Assign" else None
        if pattern is None:
            continue
        total, gradient, rate, epsilon = pattern
        gradient, factor, skipped = _unscaled(editor, gradient)
        made = _scalars(editor, scalars, "AdagradScalars", 4, [rate, epsilon, factor, skipped], node)
        editor.change(node, "FusedAdagrad", [node.inputs[0], total.inputs[0], made, gradient])
        editor.replace(total.number, node.number)
        editor.change(total, "Depend", [node.number])
        found += 1
    return found


def _adagrad(editor: Editor, node: Node) -> tuple[Node, int, int, int] | None:
    """(the Assign of the sum of squares, gradient, rate, epsilon) if a node assigns p - rate g / (sqrt(a + g^2) +
    epsilon) to the parameter p."""
    minus = editor.maker(node.inputs[1], "Sub")
    step = editor.maker(minus.inputs[1], "Div", "RealDiv") if minus is not None else None
    scaled = editor.maker(step.inputs[0], "Mul") if step is not None else None
    below = editor.maker(step.inputs[1], "Add") if step is not None else None
    root = editor.maker(below.inputs[0], "Sqrt") if below is not None else None
    total = editor.maker(root.inputs[0], "Add") if root is not None else None
    square = editor.maker(total.inputs[1], "Square") if total is not None else None
    if square is None or scaled is None or editor.through(minus.inputs[0], "Load", "Depend") != node.inputs[0]:
        return None
    sums = [user for user in editor.users(total.number) if user.op == "Assign"
            and editor.through(total.inputs[0], "Load", "Depend") == user.inputs[0]]
    gradient = square.inputs[0]
    if len(sums) != 1 or scaled.inputs[1] != gradient or (kind := editor.kind(scaled.inputs[0])) is None or kind.shape:
        return None
    return sums[0], gradient, scaled.inputs[0], below.inputs[1]


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
