"""A network's forward pass as an ONNX model, out of the graphs that MindSpore compiled for it.

    compiled for a few numbers of rows --> one graph with free sizes (`sizes`) --> one rule per primitive (`onnx_rules`)

Weights keep their names. Models above 1 GB put them into a file of their own beside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parallel.common.errors import UserError
from parallel.interchange.ports import Port
from parallel.interchange.sizes import FreeSizes
from parallel.torch_runtime.graph import Graph

Reader = Callable[[str, tuple[int, ...]], np.ndarray]
_INLINE_BYTES = 1 << 30
_EXTERNAL_BYTES = 1024


def check_installed() -> None:
    """Raises a `UserError` unless the packages of the extra are there."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError(f"the package {error.name} is not installed", where="export",
                        hint='pip install -e ".[export]"') from None


def write(path: Path, graphs: Sequence[Graph], free: Sequence[str], inputs: Sequence[Port], output: Port,
          read: Reader, about: dict[str, str]) -> dict[str, Any]:
    """Writes and checks a model.

    Args:
        path: the file.
        graphs: the network's, compiled for `sizes.variants(free)`.
        free: names of its free sizes.
        inputs, output: what is fed and returned.
        read: gives a weight by its name and shape.
        about: kept in the model's metadata.

    Returns:
        {"nodes", "bytes", "weights"}

    Raises:
        UserError: a primitive without a rule.
    """
    import onnx
    from onnx import helper

    from parallel.interchange.onnx_graph import OPSET

    made = _converted(FreeSizes(free, graphs), inputs, output, read)
    graph = helper.make_graph(made.nodes, path.stem, made.inputs, made.outputs, list(made.constants.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="pangu-rankers")
    model.ir_version = 8
    helper.set_model_props(model, about)
    size = sum(len(item.raw_data) for item in made.constants.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".weights")
    beside.unlink(missing_ok=True)
    onnx.save_model(model, str(path), save_as_external_data=size > _INLINE_BYTES, location=beside.name,
                    size_threshold=_EXTERNAL_BYTES)
    onnx.checker.check_model(str(path), full_check=True)
    return {"nodes": len(made.nodes), "bytes": sum(file.stat().st_size for file in (path, beside) if file.is_file()),
            "weights": len(made.weights)}


def _converted(sizes: FreeSizes, inputs: Sequence[Port], output: Port, read: Reader) -> Any:
    from parallel.interchange.onnx_graph import OnnxGraph
    from parallel.interchange.onnx_rules import At, apply

    graph, g = sizes.graph, OnnxGraph(sizes.names)
    values: dict[int, Any] = {number: g.feed(port.name, port.dtype, port.shape) for number, port in enumerate(inputs)}
    used = {number for node in graph.nodes for number in node.inputs}
    for number, (name, kind) in enumerate(graph.parameters, graph.first_parameter):
        if number in used:
            array = read(name, kind.shape)
            if array.shape != kind.shape:
                raise UserError(f"'{name}' has shape {list(array.shape)} and the network's is {list(kind.shape)}",
                                where="checkpoint")
            values[number] = g.parameter(name, array)
    for place in range(len(graph.constants)):
        values[graph.first_constant + place] = sizes.constant(place)
    for place, node in enumerate(graph.nodes):
        declared = node.outputs[0] if len(node.outputs) == 1 else None
        at = At(node, declared and declared.dtype, declared and sizes.shape(place))
        values[node.number] = apply(g, at, [values[number] for number in node.inputs])
    g.give(g.tensor(values[graph.result], output.dtype), output.name, output.shape)
    return g


class Session:
    """A model run by onnxruntime on the CPU.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [item.name for item in self.session.get_inputs()]

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        """The model's result for its inputs, in order."""
        return self.session.run(None, dict(zip(self.names, arrays, strict=True)))[0]
