"""Verb `export`: a trained ranker for serving programs that know nothing of this code.

    DIR/ranker.json       passes with their inputs, outputs and columns; features, tasks
    DIR/scores.onnx       a ranker's whole forward pass, or
    DIR/user.onnx, candidates.onnx      both passes of a separated one
    DIR/vocabulary.json   values of vocabulary features: value i is row i + 2 of its feature
    DIR/keys/FEATURE.npy  keys of dynamic ids, rising: the i-th is row i + 2 of its feature

With `--format mindir` the passes are MindIR, which MindSpore loads, in fixed numbers of rows.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from parallel.checkpoint.folder import resolve_checkpoint
from parallel.common.errors import UserError
from parallel.common.files import write_json
from parallel.common.progress import info, table
from parallel.interchange.ports import Port
from parallel.interchange.sizes import variants
from recsys.build import sample_batch
from recsys.data.features import FeatureSpec
from recsys.data.vocabulary import VOCABULARY
from recsys.network import labels_of
from recsys.passes.tasks import KINDS, arguments_of, cell_of, kinds_of, whole_spec
from recsys.passes.weights import Weights
from recsys.saved_model import vocabulary_of
from recsys.ug_sep.sides import UserCandidateSplit

if TYPE_CHECKING:
    from recsys.settings import Run

CHECKED_ROWS, CHECKED_USERS = 37, 5
TOLERANCE = 1e-5
_FREE = {"scores": ("rows",), "user": ("users",), "candidates": ("users", "candidates")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the exported ranker")
    parser.add_argument("--checkpoint", metavar="DIR", help="checkpoint to export (none: the newest of "
                                                            "output.directory)")
    parser.add_argument("--format", choices=["onnx", "mindir"], default="onnx", help="of the passes (default onnx)")


def run(settings: Run, arguments: argparse.Namespace) -> dict[str, Any]:
    """Verb `export`.

    Raises:
        UserError: no checkpoint, a package that is missing, a network that cannot be exported, or scores that differ
            from those of this code.
    """
    path = resolve_checkpoint(arguments.checkpoint or settings.output.directory)
    ranker = Exported(settings, path, Path(arguments.output))
    figures = ranker.mindir() if arguments.format == "mindir" else ranker.onnx()
    table("Exported", ["figure", "value"], figures.items())
    return figures


class Exported:
    """A ranker on its way out.

    Args:
        settings: of the run.
        checkpoint: its values.
        folder: where it goes.
    """

    def __init__(self, settings: Run, checkpoint: Path, folder: Path) -> None:
        # The passes are those of one device, whatever the run was sharded by.
        one = type(settings.parallel)()
        self.settings = settings.model_copy(update={"parallel": one}, deep=True)
        self.checkpoint, self.folder = checkpoint, folder
        self.vocabulary = vocabulary_of(checkpoint, settings)
        self.weights = Weights(checkpoint, settings)
        self.keys = self.weights.keys()
        self.sizes = {**self.vocabulary.sizes(), **{name: max(1, len(keys)) for name, keys in self.keys.items()}}
        self.spec = whole_spec(self.settings, self.sizes)
        self.kinds = kinds_of(self.settings)

    def onnx(self) -> dict[str, Any]:
        """Writes and checks the ONNX passes; the verb's figures."""
        from parallel.interchange.compiled import graphs_of
        from parallel.interchange.onnx_model import Session, check_installed, write
        from parallel.proof.compile.rank_compiler import Compilers

        check_installed()
        written = {"nodes": 0, "bytes": 0, "weights": 0}
        with Compilers(1) as compilers:
            for kind in self.kinds:
                info(f"compiling the pass {kind}")
                graphs = graphs_of("recsys.passes.tasks:built", [self._arguments(kind, sizes)
                                                                 for sizes in variants(_FREE[kind])], compilers)
                own = write(self.folder / f"{kind}.onnx", graphs, _FREE[kind], *self.ports(kind),
                            lambda name, shape: self.weights.read(self.spec, name, shape), self._about(kind))
                written = {name: written[name] + own[name] for name in written}
        return self._finished("onnx", Session, written)

    def mindir(self) -> dict[str, Any]:
        """Writes and checks the MindIR passes; the verb's figures."""
        from parallel.interchange.mindir import Loaded, plain_operations, write

        self.settings.model.keep_all_rows()
        with plain_operations():
            self.fill()
            written = {"bytes": 0}
            for kind in self.kinds:
                cell = cell_of(kind, self.model)
                cell.set_train(False)
                written["bytes"] += write(self.folder / f"{kind}.mindir", cell, self.ports(kind)[0])
            return self._finished("mindir", Loaded, written)

    def _finished(self, form: str, opened: Any, written: dict[str, int]) -> dict[str, Any]:
        """Describes and checks what was written; the verb's figures."""
        files = {kind: f"{kind}.{form}" for kind in self.kinds}
        self._describe(files)
        difference = self.check({kind: opened(self.folder / file) for kind, file in files.items()})
        return {"format": form, "passes": list(self.kinds), **written, "max_difference": difference,
                "checkpoint": str(self.checkpoint), "output": str(self.folder)}

    def _arguments(self, kind: str, sizes: dict[str, int]) -> dict[str, Any]:
        rows = sizes[_FREE[kind][-1]]
        return arguments_of(self.settings, self.sizes, kind, rows, sizes.get("users", 1))

    def ports(self, kind: str) -> tuple[list[Port], Port]:
        """Inputs and output of a pass."""
        rows, tasks = _FREE[kind][-1], len(labels_of(self.settings))
        ids, numbers = self.columns(kind)
        inputs = [Port("ids", "int32", (rows, len(ids))), Port("numbers", "float32", (rows, len(numbers)))]
        if kind == "user":
            return inputs, Port("state", "float32", ("users", self.state_size))
        if kind == "candidates":
            inputs = [Port("state", "float32", ("users", self.state_size)), Port("index", "int32", (rows,)), *inputs]
        return inputs, Port("scores", "float32", (rows, tasks))

    def columns(self, kind: str) -> tuple[list[int], list[int]]:
        """Columns of ids and of numbers that a pass takes of whole rows."""
        if kind == "scores":
            return list(range(self.spec.id_columns)), list(range(self.spec.numeric_columns))
        split = UserCandidateSplit.of(self.spec)
        side = split.user if kind == "user" else split.candidate
        return list(side.ids), list(side.numbers)

    @property
    def state_size(self) -> int:
        """Numbers of a user's state."""
        return self.model.state_size

    @property
    def model(self) -> Any:
        """The network of this code, without values."""
        from parallel.training.device import start_device
        from recsys.build import loss_network

        if not hasattr(self, "_model"):
            start_device()
            self._model = loss_network(self.settings, self.spec, len(labels_of(self.settings))).model
        return self._model

    def _about(self, kind: str) -> dict[str, str]:
        return {"pass": kind, "model": self.settings.model.name, "checkpoint": self.checkpoint.name,
                "mindspore": importlib.metadata.version("mindspore")}

    def _describe(self, files: dict[str, str]) -> None:
        """Writes what a serving program has to know."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.vocabulary.save(self.folder / VOCABULARY)
        for name, keys in self.keys.items():
            place = self.folder / "keys" / f"{quote(name, safe='')}.npy"
            place.parent.mkdir(exist_ok=True)
            np.save(place, keys, allow_pickle=False)
        passes = {}
        for kind, file in files.items():
            inputs, output = self.ports(kind)
            passes[kind] = {"file": file, "inputs": [port.described() for port in inputs], "output": output.described()}
        columns = {kind: dict(zip(("ids", "numbers"), self.columns(kind), strict=True)) for kind in self.kinds}
        write_json(self.folder / "ranker.json", {
            "model": self.settings.model.name, "passes": passes, "columns": columns, "features": _features(self.spec),
            "dynamic": list(self.keys), "tasks": labels_of(self.settings),
            "checkpoint": self.checkpoint.name}, sealed=False)

    # -- the check ----------------------------------------------------------------------------------------------------

    def check(self, passes: dict[str, Any]) -> float:
        """The largest difference between the exported passes' scores of random rows and this code's.

        Raises:
            UserError: they differ.
        """
        ids, numbers, _ = sample_batch(self.spec, CHECKED_ROWS, 1, 1)
        users = np.arange(CHECKED_ROWS) % CHECKED_USERS
        if "user" in passes:  # candidates of one user have that user's columns
            own_ids, own_numbers = self.columns("user")
            ids[:, own_ids], numbers[:, own_numbers] = ids[users][:, own_ids], numbers[users][:, own_numbers]
        found, wanted = run_passes(self, passes, ids, numbers, users), self.scores(ids, numbers)
        difference = float(np.abs(found - wanted).max())
        if not difference <= TOLERANCE * max(1.0, float(np.abs(wanted).max())):
            raise UserError("the exported ranker does not score as the checkpoint does", where="export",
                            value=difference)
        return difference

    def scores(self, ids: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Probabilities by this code: the whole forward pass."""
        from mindspore import Tensor

        from recsys.ranker import Scores

        self.fill()
        cell = Scores(self.model)
        cell.set_train(False)
        return cell(Tensor(ids), Tensor(numbers)).asnumpy()

    def fill(self) -> None:
        """Gives the network of this code the checkpoint's values."""
        from mindspore import Tensor

        for parameter in self.model.get_parameters():
            parameter.set_data(Tensor(self.weights.read(self.spec, parameter.name, tuple(parameter.shape))))


def run_passes(ranker: Exported, passes: dict[str, Any], ids: np.ndarray, numbers: np.ndarray,
               users: np.ndarray) -> np.ndarray:
    """Scores of encoded rows by exported passes.

    Args:
        ranker: says which columns are whose.
        passes: by kind, what is called with a pass's inputs.
        ids, numbers: whole rows.
        users: which user each row belongs to, 0 to the number of users less one.
    """
    if "scores" in passes:
        return passes["scores"](ids, numbers)
    first = np.unique(users, return_index=True)[1]
    parts = {kind: (ids[:, own[0]], numbers[:, own[1]]) for kind in KINDS[1:] if (own := ranker.columns(kind))}
    state = passes["user"](*(np.ascontiguousarray(array[first]) for array in parts["user"]))
    return passes["candidates"](state, users.astype(np.int32),
                                *(np.ascontiguousarray(array) for array in parts["candidates"]))


def _features(spec: FeatureSpec) -> list[dict[str, Any]]:
    """Every feature's columns of whole rows, and where its rows begin."""
    ids = [{"name": name, "column": slot.feature.source, "side": slot.feature.side, "type": slot.feature.type,
            "values": slot.feature.values, "ids": [slot.start, slot.start + slot.length], "first_row": slot.offset,
            "rows": slot.rows} for name, slot in spec.slots.items()]
    return ids + [{"name": name, "column": slot.feature.source, "side": slot.feature.side, "type": "numeric",
                   "transform": slot.feature.transform, "number": slot.column} for name, slot in spec.numeric.items()]
