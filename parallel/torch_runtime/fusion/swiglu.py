"""The gate of a SwiGLU, swish(g) u, in one node, forward and backward: its pass, and what the nodes compute.

    FusedSwish(g, u) -> swish(g) u
    FusedSwishGrad(gradient, g, u) -> (gradient of g, of u)

Written out it keeps sigmoid(g) and swish(g) for the backward pass; fused, both are computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallel.torch_runtime.fusion.rewrite import Editor
from parallel.torch_runtime.graph import Node


def fuse_swish(editor: Editor) -> int:
    """Replaces every gate; how many were found."""
    found = 0
    for node in list(editor.nodes.values()):
        pattern = _pattern(editor, node) if node.op == "Sigmoid" and node.number in editor.nodes else None
        if pattern is None:
            continue
        out, (g, u), gradient = pattern["out"], pattern["inputs"], pattern["gradient"]
        editor.replace(out.number, editor.add("FusedSwish", [g, u], out.outputs, out))
        if gradient is not None:
            like = gradient["g"]
            made = editor.add("FusedSwishGrad", [gradient["given"], g, u], [], like)
            for index, name in enumerate(("g", "u")):
                old = gradient[name]
                editor.replace(old.number, editor.item(made, index, old.outputs[0], like))
        found += 1
    return found


def _other(node: Node, number: int) -> int:
    return node.inputs[1] if node.inputs[0] == number else node.inputs[0]


def _pattern(editor: Editor, sigmoid: Node) -> dict[str, Any] | None:
    g, kind = sigmoid.inputs[0], sigmoid.outputs[0]
    users = editor.users(sigmoid.number)
    swishes = [user for user in users if user.op == "Mul" and sorted(user.inputs[:2]) == sorted([g, sigmoid.number])]
    if len(swishes) != 1:
        return None
    swish, rest = swishes[0], [user for user in users if user is not swishes[0]]
    products = [user for user in editor.users(swish.number) if user.op == "Mul" and user.outputs[0] == kind]
    if len(products) != len(editor.users(swish.number)) or len(products) != (2 if rest else 1):
        return None
    for out in products:
        u = _other(out, swish.number)
        if editor.kind(u) != kind or u == swish.number:
            continue
        if not rest:
            return {"out": out, "inputs": (g, u), "gradient": None}
        other = next(user for user in products if user is not out)
        gradient = _gradient(editor, sigmoid, rest, u, other, swish.number)
        if gradient is not None:
            return {"out": out, "inputs": (g, u), "gradient": gradient}
    return None


def _gradient(editor: Editor, sigmoid: Node, readers: list[Node], u: int, of_u: Node,
              swish: int) -> dict[str, Any] | None:
    """The gradients by g and u of a gate whose result is swish x u, if `readers` are all that its sigmoid has."""
    given = _other(of_u, swish)
    backward = [user for user in readers if user.op == "SigmoidGrad" and user.inputs[0] == sigmoid.number]
    direct = [user for user in readers if user.op == "Mul"]
    if len(readers) != 2 or len(backward) != 1 or len(direct) != 1:
        return None
    change = _other(direct[0], sigmoid.number)
    made, through = editor.maker(change, "Mul"), editor.maker(backward[0].inputs[1], "Mul")
    if made is None or sorted(made.inputs[:2]) != sorted([u, given]) or through is None:
        return None
    if sorted(through.inputs[:2]) != sorted([sigmoid.inputs[0], change]):
        return None
    joined = _joined(editor, backward[0], direct[0])
    return {"given": given, "g": joined, "u": of_u} if joined is not None else None


def _joined(editor: Editor, one: Node, other: Node) -> Node | None:
    """The sum of two values alone that nothing else reads."""
    users = {user.number: user for item in (one, other) for user in editor.users(item.number)}
    if len(users) != 1:
        return None
    user = next(iter(users.values()))
    if user.op == "MakeTuple" and len(user.inputs) == 2:
        after = editor.users(user.number)
        return after[0] if len(after) == 1 and after[0].op == "AddN" else None
    return user if user.op == "Add" else None


# -- what the nodes compute -------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def forward(node: Node, g: Tensor, u: Tensor) -> Tensor:
    """swish(g) u in the type of g, computed in float32 at least."""
    wide = _wide(g)
    return (wide * torch.sigmoid(wide) * _wide(u)).to(g.dtype)


def backward(node: Node, gradient: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by g and u."""
    wide, given = _wide(g), _wide(gradient)
    sigmoid = torch.sigmoid(wide)
    swish = wide * sigmoid
    return (given * _wide(u) * (sigmoid + swish * (1.0 - sigmoid))).to(g.dtype), (given * swish).to(u.dtype)


RULES = {"FusedSwish": forward, "FusedSwishGrad": backward}
