"""A portable program: the partitioned graphs of all ranks of a layout, in a folder that needs no MindSpore to be read.

    program.json.gz       format, version, digest, world, layout, settings, tensors with their starts, ranks
    graph-0.json.gz       one distinct graph: constants and nodes (ranks that differ in their groups only share it)
    constants-0.npz       its large constants, if it has any

The graphs are those of `parallel.torch_runtime.graph`; the ranks of a graph's groups are in each rank's own table. No
pickle; files are checked against the digests in program.json.gz, which carries its own.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from parallel.checkpoint.owners import Holders, held_alike
from parallel.common.errors import UserError
from parallel.common.files import atomic_write
from parallel.common.settings import without
from parallel.common.start_value import start_value
from parallel.common.structured import parse_json, seal, unseal
from parallel.torch_runtime.graph import Graph, Kind, Literal, Node

FORMAT, VERSION = "parallel-program", 2
FILE = "program.json.gz"
KINDS = ("step", "loss", "scores")
"""Graphs of a program of training. Others are of inference, of one group of data parallelism: a program holds these or
those, and the model's package says what they are called (`ModelPackage.inference_kinds`)."""
INLINE = 64
"""Constants of at most this many elements are written into the JSON."""
CACHE = "cache."
"""How the names of parameters begin that are kept from call to call and are no weights."""
_LARGEST_JSON = 1 << 30
# Settings that shape no graph.
_SHAPELESS = {
    "output": True, "generate": True, "evaluate": True, "serve": True, "pack": True, "vocabulary": True,
    "publish": True, "adapt": {"checkpoint", "pairs", "validation"},
    "train": {"validate_every", "validation_batches", "log_every", "early_stop", "max_skipped", "peak_tflops",
              "data_sink", "keep_best", "profile", "stall_after"},
    "data": {"directory", "validation_directory", "corpus", "tokenizer", "shuffle", "together", "cache", "by_file"},
    "parallel": {"backend", "devices", "execution", "mindspore"},
}  # fmt: skip
Extent = tuple[tuple[int, int], ...]


def shaping(settings: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's settings (as JSON) that shapes its graphs."""
    return without(settings, _SHAPELESS)


@dataclass(frozen=True)
class Tensor:
    """A parameter, state or counter of the run.

    Args:
        name: as in checkpoints.
        kind: "parameter", "state" or "counter".
        shape: the full one.
        dtype: element type.
        start: (distribution, scale) of `start_value`, or ("fill", value).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    start: tuple[str, float]


@dataclass(frozen=True)
class Rank:
    """A rank of the world.

    Args:
        number: its rank.
        stage, data, op: its coordinates.
        graphs: number of the graph file of each kind.
        groups: for each kind, the ranks of every group of its graph.
        extents: which part of each tensor it holds; what is missing is not held (another stage's).
        copies: tensors that another stage owns and sends here at every step; not to be saved.
    """

    number: int
    stage: int
    data: int
    op: int
    graphs: dict[str, int]
    groups: dict[str, list[tuple[int, ...]]]
    extents: dict[str, Extent]
    copies: tuple[str, ...] = ()


class Program:
    """An exported program, opened for reading.

    Args:
        folder: what `write` made.

    Raises:
        UserError: no program there, another version, or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / FILE
        if not path.is_file():
            raise UserError("no exported program", where=path, hint="make one: python -m parallel export --config F "
                            "--output DIR")
        tree = _read_json(path)
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise UserError("not an exported program", where=path)
        if tree.get("version") != VERSION:
            raise UserError("the program is of another version", where=path, value=tree.get("version"),
                            hint=f"export it again: this code reads version {VERSION}")
        self.tree = tree = unseal(tree, path, hint="export it again")
        self._results: dict[tuple[int, str], tuple[int, ...]] = {}
        try:
            self.tensors = [Tensor(*item[:2], tuple(item[2]), item[3], tuple(item[4])) for item in tree["tensors"]]
            self.inputs = [(name, tuple(shape), dtype) for name, shape, dtype in tree["inputs"]]
            self.ranks = [_rank(number, item) for number, item in enumerate(tree["ranks"])]
        except (KeyError, TypeError, ValueError, IndexError):
            raise UserError("the program is damaged", where=path, hint="export it again") from None

    @property
    def digest(self) -> str:
        """Hash of everything that shapes the graphs."""
        return self.tree["digest"]

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def parallel(self) -> dict[str, Any]:
        """The resolved layout (`ParallelConfig` as JSON)."""
        return self.tree["parallel"]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run that was exported."""
        return self.tree["settings"]

    @property
    def seed(self) -> int:
        """Seed of the start values."""
        return int(self.settings["train"]["seed"])

    @cached_property
    def by_name(self) -> dict[str, Tensor]:
        """Tensors by name."""
        return {tensor.name: tensor for tensor in self.tensors}

    @property
    def groups(self) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """All groups of collectives in the world, and all directions of messages (sender, receiver)."""
        return [tuple(item) for item in self.tree["groups"]], [tuple(item) for item in self.tree["messages"]]

    @cached_property
    def free_groups(self) -> frozenset[tuple[int, ...]]:
        """Groups whose ranks have the same graphs but for constants, so that any order of their collectives that is
        made from the graph alone is the same on all of them."""
        known: dict[int, str] = {}
        for rank in self.ranks:
            if rank.graphs["step"] not in known:
                known[rank.graphs["step"]] = structure(self.graph(rank.number))
        structures = [known[rank.graphs["step"]] for rank in self.ranks]
        return frozenset(group for group in self.groups[0] if len({structures[rank] for rank in group}) == 1)

    @cached_property
    def borrowed(self) -> list[tuple[str, int, int]]:
        """(parameter, rank that owns it, rank of a later stage that borrows the same slice), in the same order
        everywhere."""
        found = []
        for rank in self.ranks:
            for name in sorted(rank.copies):
                owner = next((other for other in self.ranks if name not in other.copies
                              and (other.data, other.op) == (rank.data, rank.op) and name in other.extents), None)
                if owner is not None and self.by_name[name].kind == "parameter":
                    found.append((name, owner.number, rank.number))
        return found

    def holders(self, names: Iterable[str]) -> Holders:
        """Who holds which slice of some parameters; copies of another stage's are nobody's."""
        return held_alike(((rank.number, {name: extent for name, extent in rank.extents.items()
                                          if name not in rank.copies}) for rank in self.ranks), names)

    def has(self, kind: str) -> bool:
        """Whether there are graphs of this kind."""
        return kind in self.ranks[0].graphs

    @property
    def inference_kinds(self) -> list[str]:
        """Its graphs that are not of training."""
        return [kind for kind in self.ranks[0].graphs if kind not in KINDS]

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs of a kind of inference graph, by name; a UserError where the program lacks it."""
        if kind not in self.tree["shapes"]:
            raise UserError(f"the program holds no {kind} graph", where=self.folder,
                            value=", ".join(self.tree["shapes"]), hint=f"export it again, with {kind} among --graphs")
        return {name: tuple(shape) for name, shape, _ in self.tree["shapes"][kind]}

    def graph(self, rank: int, kind: str = "step") -> Graph:
        """The graph of a rank.

        Raises:
            UserError: there is none, or its file is damaged.
        """
        own = self.ranks[rank]
        if kind not in own.graphs:
            raise UserError(f"the program holds no {kind} graph", where=self.folder)
        number = own.graphs[kind]
        for name in (f"graph-{number}.json.gz", f"constants-{number}.npz"):
            self._check(name)
        path = self.folder / f"graph-{number}.json.gz"
        try:
            made = _graph(_read_json(path), self.folder / f"constants-{number}.npz")
        except (KeyError, TypeError, ValueError, IndexError):
            raise UserError("the graph is damaged", where=path, hint="export it again") from None
        made.groups = own.groups[kind]
        return made

    def result_shape(self, rank: int, kind: str) -> tuple[int, ...]:
        """Shape of what a rank's graph returns."""
        if (rank, kind) not in self._results:
            graph = self.graph(rank, kind)
            made = next(node for node in graph.nodes if node.number == graph.result)
            self._results[rank, kind] = made.outputs[0].shape
        return self._results[rank, kind]

    def check(self) -> None:
        """Compares every file with its digest.

        Raises:
            UserError: one is missing or damaged.
        """
        for name in self.tree["files"]:
            self._check(name)

    def _check(self, name: str) -> None:
        known, path = self.tree["files"].get(name), self.folder / name
        if known is None:
            return
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != known:
            raise UserError("a file of the program is missing or damaged", where=path, hint="export it again")


def start_of(tensor: Tensor, extent: Extent | None, seed: int) -> np.ndarray:
    """Start value of the part `extent` of a tensor, float32 (or the tensor's integer type)."""
    shape = tensor.shape if extent is None else tuple(stop - start for start, stop in extent)
    distribution, scale = tensor.start
    dtype = tensor.dtype if tensor.dtype.startswith(("int", "uint", "bool")) else "float32"
    if distribution == "fill":
        return np.full(shape, scale, dtype)
    full = start_value(tensor.name, tensor.shape, (distribution, scale), seed)
    return full if extent is None else np.ascontiguousarray(full[tuple(slice(*pair) for pair in extent)])


# -- writing ----------------------------------------------------------------------------------------------------------


class Writer:
    """Writes a program into a folder; equal graphs are written once.

    Args:
        folder: made if it is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, int] = {}
        self.files: dict[str, str] = {}

    def add(self, graph: Graph) -> int:
        """Writes a graph, unless it has been; its number."""
        tree, arrays = _graph_tree(graph)
        text = json.dumps(tree, separators=(",", ":")).encode()
        found = hashlib.sha256(text)
        for name, array in arrays.items():
            found.update(name.encode() + array.tobytes())
        key = found.hexdigest()
        if key not in self.known:
            number = self.known[key] = len(self.known)
            self._write(f"graph-{number}.json.gz", _zipped(text))
            if arrays:
                buffer = io.BytesIO()
                np.savez_compressed(buffer, **arrays)
                self._write(f"constants-{number}.npz", buffer.getvalue())
        return self.known[key]

    def finish(self, *, digest: str, tensors: Sequence[Tensor], inputs: Sequence[tuple], ranks: Sequence[Rank],
               **more: Any) -> None:
        """Writes program.json.gz, last: a folder without it is no program."""
        tree = {
            "format": FORMAT, "version": VERSION, "digest": digest, "files": self.files, **more,
            "tensors": [[item.name, item.kind, item.shape, item.dtype, item.start] for item in tensors],
            "inputs": [list(item) for item in inputs],
            "ranks": [[rank.stage, rank.data, rank.op, rank.graphs, rank.groups, rank.extents, rank.copies]
                      for rank in ranks],
        }  # fmt: skip
        write_program_file(self.folder, tree)

    def _write(self, name: str, data: bytes) -> None:
        with atomic_write(self.folder / name, "wb") as file:
            file.write(data)
        self.files[name] = hashlib.sha256(data).hexdigest()


def write_program_file(folder: Path, tree: dict[str, Any]) -> None:
    """Writes program.json.gz, with the digest of all that is in it."""
    with atomic_write(folder / FILE, "wb") as file:
        file.write(_zipped(json.dumps(seal(tree), separators=(",", ":")).encode()))


def structure(graph: Graph) -> str:
    """Hash of a graph's nodes without the constants: their values and how many of them are equal differ between ranks
    that do the same."""
    def place(number: int) -> Any:
        if number < graph.first_constant:
            return number
        return number - graph.first_node if number >= graph.first_node else "constant"

    nodes = [[node.op, [place(number) for number in node.inputs], [(kind.shape, kind.dtype) for kind in node.outputs],
              node.attributes.get("group")] for node in graph.nodes]
    return hashlib.sha256(json.dumps(nodes).encode()).hexdigest()[:16]


def _zipped(data: bytes) -> bytes:
    return gzip.compress(data, 6, mtime=0)


def _read_json(path: Path) -> Any:
    try:
        with gzip.open(path, "rb") as file:
            data = file.read(_LARGEST_JSON + 1)
        if len(data) > _LARGEST_JSON:
            raise ValueError("too large")
        return parse_json(data, foreign_numbers="keep", max_bytes=_LARGEST_JSON)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"the program is damaged: {error}", where=path, hint="export it again") from None


def _rank(number: int, item: Sequence) -> Rank:
    stage, data, op, graphs, groups, extents, copies = item
    return Rank(number, stage, data, op, graphs,
                {kind: [tuple(group) for group in own] for kind, own in groups.items()},
                {name: tuple((int(a), int(b)) for a, b in extent) for name, extent in extents.items()}, tuple(copies))


def _graph_tree(graph: Graph) -> tuple[dict, dict[str, np.ndarray]]:
    scopes: dict[str, int] = {}
    arrays: dict[str, np.ndarray] = {}
    nodes = [[node.op, node.inputs, [[kind.shape, kind.dtype] for kind in node.outputs], node.attributes,
              scopes.setdefault(node.scope, len(scopes)), node.marks] for node in graph.nodes]
    constants = [_constant_tree(value, arrays) for value in graph.constants]
    tree = {"inputs": [[name, kind.shape, kind.dtype] for name, kind in graph.inputs],
            "parameters": [[name, kind.shape, kind.dtype] for name, kind in graph.parameters],
            "constants": constants, "nodes": nodes, "scopes": list(scopes), "result": graph.result}
    return tree, arrays


def _constant_tree(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return {"tuple": [_constant_tree(item, arrays) for item in value]}
    tree: dict[str, Any] = {"dtype": value.kind.dtype, "shape": value.kind.shape}
    if value.data is None:
        return tree | {"fill": value.fill}
    if value.data.size <= INLINE:
        return tree | {"data": value.data.reshape(-1).tolist()}
    name = f"c{len(arrays)}"
    arrays[name] = value.data
    return tree | {"file": name}


def _graph(tree: dict, constants: Path) -> Graph:
    arrays = np.load(constants, allow_pickle=False) if constants.is_file() else {}
    try:
        values = [_constant(item, arrays) for item in tree["constants"]]
    finally:
        if hasattr(arrays, "close"):
            arrays.close()
    scopes = tree["scopes"]
    graph = Graph([(name, Kind(tuple(shape), dtype)) for name, shape, dtype in tree["inputs"]],
                  [(name, Kind(tuple(shape), dtype)) for name, shape, dtype in tree["parameters"]], values, [],
                  int(tree["result"]))
    first = graph.first_node
    for place, (op, inputs, outputs, attributes, scope, marks) in enumerate(tree["nodes"]):
        kinds = [Kind(tuple(shape), dtype) for shape, dtype in outputs]
        if any(not 0 <= number < first + place for number in inputs):
            raise ValueError("a node reads what is not there yet")
        graph.nodes.append(Node(op, list(inputs), kinds, attributes, scopes[scope], marks, first + place))
    return graph


def _constant(item: Any, arrays: Any) -> Any:
    if not isinstance(item, dict):
        return item
    if "tuple" in item:
        return tuple(_constant(part, arrays) for part in item["tuple"])
    kind = Kind(tuple(item["shape"]), item["dtype"])
    if "fill" in item:
        return Literal(kind, item["fill"])
    dtype = "uint16" if kind.dtype == "bfloat16" else kind.dtype
    data = np.asarray(arrays[item["file"]], dtype) if "file" in item else np.array(item["data"], dtype)
    if data.size != math.prod(kind.shape):
        raise ValueError("a constant of another size")
    return Literal(kind, data=data.reshape(kind.shape))
