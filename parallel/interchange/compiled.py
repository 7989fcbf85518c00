"""The graph of a forward pass on one device, compiled by MindSpore for several numbers of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from parallel.proof.compile.graph import read_graph
from parallel.proof.compile.rank_compiler import Compilers, Request
from parallel.proof.export import converted
from parallel.proof.replay.executor import prepare
from parallel.proof.replay.inline import flat
from parallel.torch_runtime.graph import Graph


def graphs_of(builder: str, arguments: Sequence[dict[str, Any]], compilers: Compilers) -> list[Graph]:
    """The flat graphs of a pass, plain operations only.

    Args:
        builder: "module:function" (see `Request`), whose task's `scores` makes the pass.
        arguments: of the builder, one for each graph.
        compilers: what compiles.

    Raises:
        UserError: see `compile_rank`, and a primitive that nothing here knows.
    """
    requests = [Request(1, 0, builder=builder, arguments=own, graph="scores") for own in arguments]
    return [converted(prepare(flat(read_graph(item.graph))), 0) for item in compilers.compile(requests)]
