"""Passes for graphs that serve, whose weights do not change: products with all that is done to their results, layer
norm with its casts, attention of one new token over slots of a cache. What each fused node computes is in `served`.

A product's node names its weights and biases in place of reading them, so that they can be kept in other forms
(`parallel.torch_runtime.inference.weights`): int8, cast once, several side by side.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from parallel.torch_runtime.fusion.rewrite import Editor, plain_items
from parallel.torch_runtime.fusion.swiglu import fuse_swish
from parallel.torch_runtime.fusion.target_attention import fuse_target_attention
from parallel.torch_runtime.graph import Graph, Kind, Literal, Node
from parallel.torch_runtime.program import CACHE

_PASSED = ("Load", "Cast", "Depend")
_HIDDEN = -1.0e4


def for_serving(graph: Graph, *, eight: Callable[[str, int], bool] = lambda name, rows: False,
                fused: bool = True) -> Graph:
    """The graph with its patterns fused.

    Args:
        graph: of inference.
        eight: whether a product of a parameter with so many rows takes int8 weights.
        fused: whether anything else is fused.
    """
    editor = Editor(graph)
    plain_items(editor)
    if fused:
        fuse_norms(editor)
        fuse_slot_attention(editor)
        fuse_target_attention(editor)
        fuse_swish(editor)
    made = fuse_products(editor, eight, fused)
    if fused:
        join_products(editor, made)
    return editor.graph()


def fuse_norms(editor: Editor) -> int:
    """NormedRows(x, gamma, beta): LayerNorm over the last dim, with the casts around it."""
    found = 0
    for node in list(editor.nodes.values()):
        items = editor.users(node.number) if node.op == "LayerNorm" else []
        gamma, beta = (editor.kind(number) for number in node.inputs[1:3]) if items else (None, None)
        if len(items) != 1 or items[0].op != "Item" or items[0].attributes["index"] != 0:
            continue
        if gamma is None or beta is None or len(gamma.shape) != 1:
            continue
        last, users = items[0], editor.users(items[0].number)
        if len(users) == 1 and users[0].op == "Cast":
            last = users[0]
        x = editor.through(node.inputs[0], "Cast")
        if editor.kind(x) is None or not editor.kind(x).dtype.startswith(("float", "bfloat")):
            x = node.inputs[0]
        epsilon = editor.constant(node.inputs[5])
        epsilon = float(epsilon.array().item() if isinstance(epsilon, Literal) else epsilon)
        editor.replace(last.number, editor.add("NormedRows", [x, *node.inputs[1:3]], last.outputs, last,
                                               epsilon=epsilon))
        found += 1
    return found


# -- attention over slots ---------------------------------------------------------------------------------------------


def fuse_slot_attention(editor: Editor) -> int:
    """SlotAttention(keys, values, q, k, v, write, read, visible): see
    `parallel.torch_runtime.attention.slot_attention.attend`; it writes its first two inputs."""
    found = 0
    for node in list(editor.nodes.values()):
        pattern = _slot_attention(editor, node) if node.op == "Softmax" and node.number in editor.nodes else None
        if pattern is None:
            continue
        last = pattern["last"]
        made = editor.add("SlotAttention", pattern["inputs"], last.outputs, last, scale=pattern["scale"])
        editor.replace(last.number, made)
        for scatter in pattern["scatters"]:
            editor.drop(scatter)
        found += 1
    return found


def _only_user(editor: Editor, number: int, *ops: str) -> Node | None:
    users = editor.users(number)
    return users[0] if len(users) == 1 and users[0].op in ops else None


def _slot_attention(editor: Editor, softmax: Node) -> dict[str, Any] | None:
    add = editor.maker(softmax.inputs[0], "Add")
    if add is None or len(softmax.outputs[0].shape) != 4 or softmax.outputs[0].shape[2] != 1:
        return None
    found = [(product, bias) for scores, bias in (add.inputs, add.inputs[::-1])
             if (product := editor.maker(editor.through(scores, "Cast"), "BatchMatMul")) is not None]
    if len(found) != 1:
        return None
    product, bias = found[0]
    visible, query = _visible(editor, bias), _query(editor, product.inputs[0])
    keys, mixed = _slots(editor, product.inputs[1]), _only_user(editor, softmax.number, "Cast", "BatchMatMul")
    if mixed is not None and mixed.op == "Cast":
        mixed = _only_user(editor, mixed.number, "BatchMatMul")
    if visible is None or query is None or keys is None or mixed is None:
        return None
    values, order = _slots(editor, mixed.inputs[1]), _only_user(editor, mixed.number, "Transpose")
    last = _only_user(editor, order.number, "Reshape") if order is not None else None
    if values is None or last is None or keys["write"] != values["write"] or keys["read"] != values["read"]:
        return None
    inputs = [keys["table"], values["table"], query[0], keys["new"], values["new"], keys["write"], keys["read"],
              visible]
    return {"inputs": inputs, "scale": query[1], "last": last, "scatters": [keys["scatter"], values["scatter"]]}


def _visible(editor: Editor, bias: int) -> int | None:
    """What a bias (1 - visible) x -10000 is made of."""
    weigh = editor.maker(bias, "Mul")
    factor = editor.constant(weigh.inputs[1]) if weigh is not None else None
    invert = editor.maker(weigh.inputs[0], "Sub") if isinstance(factor, Literal) else None
    if invert is None or factor.kind.shape != () or float(factor.array().item()) > _HIDDEN:
        return None
    return editor.through(invert.inputs[1], "ExpandDims", "Cast")


def _query(editor: Editor, number: int) -> tuple[int, float] | None:
    """(q [N, D], scale) of scale x q by heads."""
    scaled = editor.maker(number, "Mul")
    factor = editor.constant(scaled.inputs[1]) if scaled is not None else None
    order = editor.maker(scaled.inputs[0], "Transpose") if isinstance(factor, Literal) else None
    spread = editor.maker(order.inputs[0], "Reshape") if order is not None else None
    if spread is None or factor.kind.shape != ():
        return None
    return spread.inputs[0], float(factor.array().item())


def _slots(editor: Editor, number: int) -> dict[str, Any] | None:
    """The cache behind keys or values that are read from it after new ones were written."""
    order = editor.maker(number, "Transpose")
    read = editor.maker(order.inputs[0], "Gather") if order is not None else None
    scatter = editor.maker(read.inputs[0], "ScatterUpdate") if read is not None else None
    table = editor.through(scatter.inputs[0], "Load", "Depend") if scatter is not None else -1
    spread = editor.maker(scatter.inputs[2], "Reshape") if scatter is not None else None
    if spread is None or not editor.original.is_parameter(table) or len(editor.users(scatter.number)) != 1:
        return None
    return {"table": table, "scatter": scatter, "new": spread.inputs[0], "write": scatter.inputs[1],
            "read": read.inputs[1]}


# -- products ---------------------------------------------------------------------------------------------------------


def fuse_products(editor: Editor, eight: Callable[[str, int], bool], every: bool) -> list[Node]:
    """Product(x, extra): gelu(x W + bias) + extra with a parameter W, in `attributes` what there is of it:

        weights, biases    names of parameters; no biases where there is none
        turned             whether W is kept [O, K] rather than [K, O]
        eight              whether it is int8
        gelu, extra        whether there is one
        rows, dtype        of x

    Args:
        editor: of the graph.
        eight: see `for_serving`.
        every: whether products without int8 weights are fused, too.
    """
    made = []
    for node in list(editor.nodes.values()):
        pattern = _product(editor, node) if node.op in ("MatMul", "BatchMatMul") else None
        if pattern is None or node.number not in editor.nodes:
            continue
        rows = editor.kind(pattern["x"]).shape[-2]
        eights = eight(pattern["name"], rows)
        if not (eights or every):
            continue
        last, attributes, extra = _after(editor, node, pattern["name"])
        inputs = [pattern["x"], *([extra] if extra is not None else [])]
        number = editor.add("Product", inputs, last.outputs, last, weights=[pattern["name"]], turned=pattern["turned"],
                            eight=eights, rows=rows, extra=extra is not None, dtype=node.outputs[0].dtype, **attributes)
        editor.replace(last.number, number)
        made.append(editor.nodes[number])
    return made


def _parameter(editor: Editor, number: int) -> tuple[str, Kind] | None:
    """The parameter that a value is, as it is or cast."""
    number, graph = editor.through(number, *_PASSED), editor.original
    if not graph.is_parameter(number) or graph.parameters[number - graph.first_parameter][0].startswith(CACHE):
        return None
    return graph.parameters[number - graph.first_parameter]


def _product(editor: Editor, node: Node) -> dict[str, Any] | None:
    x, found = editor.kind(node.inputs[0]), _parameter(editor, node.inputs[1])
    left, right = (bool(editor.constant(number)) for number in node.inputs[2:4])
    if x is None or found is None or left or x.dtype not in ("float32", "float16", "bfloat16"):
        return None
    shape = found[1].shape
    if not len(shape) == len(x.shape) == (2 if node.op == "MatMul" else 3) or x.dtype != node.outputs[0].dtype:
        return None
    if right and len(shape) == 3:
        return None
    return {"x": node.inputs[0], "name": found[0], "turned": right}


def _after(editor: Editor, node: Node, name: str) -> tuple[Node, dict[str, Any], int | None]:
    """What follows a product and nothing else reads: the last node of it, the attributes, what is added at the end."""
    attributes: dict[str, Any] = {"biases": [], "gelu": False}
    kind, last = node.outputs[0], node
    bias_shape = kind.shape[-1:] if len(kind.shape) == 2 else (kind.shape[0], 1, kind.shape[2])
    add = _only_user(editor, last.number, "Add")
    if add is not None and add.outputs[0] == kind:
        bias = _parameter(editor, add.inputs[1] if add.inputs[0] == last.number else add.inputs[0])
        if bias is not None and bias[1].shape == bias_shape:
            attributes["biases"], last = [bias[0]], add
    gelu = _only_user(editor, last.number, "GeLU")
    if gelu is not None:
        attributes["gelu"], last = True, gelu
    add = _only_user(editor, last.number, "Add")
    if add is not None and add.outputs[0] == kind and add.inputs[0] != add.inputs[1]:
        other = add.inputs[1] if add.inputs[0] == last.number else add.inputs[0]
        if editor.kind(other) == kind and _parameter(editor, other) is None:
            return add, attributes, other
    return last, attributes, None


def join_products(editor: Editor, made: list[Node]) -> int:
    """Products of the same rows with weights [O, K] of one shape, side by side in one node that gives a tuple."""
    groups: dict[tuple, list[Node]] = defaultdict(list)
    for node in made:
        own = node.attributes
        if own["turned"] and not own["extra"] and node.number in editor.nodes:
            key = (node.inputs[0], node.outputs[0].shape, node.outputs[0].dtype, own["eight"], own["gelu"],
                   len(own["biases"]))
            groups[key].append(node)
    found = 0
    for nodes in groups.values():
        names = [name for node in nodes for name in node.attributes["weights"]]
        if len(nodes) < 2 or len(set(names)) < len(names):
            continue
        first, own = nodes[0], nodes[0].attributes
        attributes = {**own, "weights": names, "biases": [name for node in nodes for name in node.attributes["biases"]]}
        number = editor.add("Product", first.inputs, [], first, **attributes)
        for place, node in enumerate(nodes):
            editor.replace(node.number, editor.item(number, place, node.outputs[0], first))
        found += 1
    return found
