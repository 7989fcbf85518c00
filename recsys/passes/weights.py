"""What a ranker's whole tables and weights are by a checkpoint, one at a time: int8 weights widened, tables on the host
put together."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.checkpoint.full import Checkpoint
from parallel.checkpoint.safetensors_file import SafetensorsFile
from parallel.common.errors import UserError
from parallel.layers.int8_numbers import SCALE, dequantize
from recsys.data.columns import features_of
from recsys.data.features import FIRST_KNOWN, MISSING, UNSEEN, FeatureSpec
from recsys.tables.columns import KeyColumns
from recsys.tables.dynamic import Entries
from recsys.tables.files import read_entries, table_files
from recsys.tables.keys import MISSING_KEY, UNSEEN_KEY
from recsys.tables.names import is_sparse

if TYPE_CHECKING:
    from recsys.settings import Run

LEFT = frozenset({"embedding", "head", "auxiliary", "router", "infer_router", "train_router"})
"""Names of cells whose weights stay floating: embeddings and heads are small, and a router's choice is not smooth."""

class Weights:
    """Reads parameters by name.

    Args:
        path: the checkpoint.
        settings: of the run.

    Raises:
        UserError: no checkpoint or vocabulary there, or tables are missing.
    """

    def __init__(self, path: Path, settings: Run) -> None:
        self.checkpoint = Checkpoint(path)
        self.path, self.settings = self.checkpoint.path, settings
        self.hosted = settings.data.tables.place == "host"
        self.files = table_files(self.path) if self.hosted else {}

    @property
    def quantized(self) -> bool:
        """Whether weights are int8."""
        return self.checkpoint.state.get("quantization") is not None

    def entries(self, name: str) -> Entries:
        """The admitted rows of a feature's table on the host, in the order of their keys."""
        parts = [read_entries(path) for path in self.files[name]]
        whole = Entries(*(np.concatenate([getattr(part, field) for part in parts]) for field in Entries.NAMES))
        whole = whole.take(whole.rows >= 0)
        return whole.take(np.argsort(whole.keys, kind="stable"))

    def keys(self) -> dict[str, np.ndarray]:
        """Of every feature with dynamic ids on the host the keys that have a row, rising: the i-th has row i + 2."""
        found = {}
        for name, feature in self._owners().items():
            if feature.is_dynamic:
                files = [SafetensorsFile(path) for path in self.files[name]]  # values are not needed, and long
                keys = np.sort(np.concatenate([file.read("keys")[file.read("rows") >= 0] for file in files]))
                found[name] = keys[_known(keys)]
        return found

    def read(self, spec: FeatureSpec, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A parameter of the network.

        Args:
            spec: places of the features in a network with whole tables (`recsys.passes.tasks.whole_spec`).
            name: of the parameter.
            shape: that it has there.
        """
        if self.hosted and is_sparse(name):
            return self._table(spec, list(spec.tables)[_number(name)])
        value = self.checkpoint.read(name)
        if value.dtype == np.int8:
            value = dequantize(value, self.checkpoint.read(name + SCALE)).astype(np.float32)
            # The weight [O, K] of a linear layer is kept as [1, K, O].
            return value if value.shape == shape else value.reshape(value.shape[-2:]).T
        return value

    def _owners(self) -> dict[str, Any]:
        """Features with a table of their own on the host."""
        return {feature.name: feature for feature in features_of(self.settings.data) if feature.name in self.files}

    def _table(self, spec: FeatureSpec, width: int) -> np.ndarray:
        """float32 [rows, W] of all features of one width; an id without a row has that for unseen values."""
        whole = np.zeros((spec.tables[width], width), np.float32)
        for name, feature in self._owners().items():
            slot = spec.slots[name]
            if slot.width == width:
                entries = self.entries(name)
                own, known = whole[slot.offset:slot.offset + slot.rows], _known(entries.keys)
                own[:] = entries.values[entries.keys == UNSEEN_KEY]
                own[MISSING] = entries.values[entries.keys == MISSING_KEY]
                keys = np.arange(known.sum()) if feature.is_dynamic else entries.keys[known]
                own[FIRST_KNOWN + keys] = entries.values[known]
        return whole


def is_eight(name: str) -> bool:
    """Whether a parameter may have int8 weights: what is not in the embedding, a head or a router."""
    return not LEFT.intersection(name.split("."))


def rows_of(ids_BM: np.ndarray, spec: FeatureSpec, whole: FeatureSpec, keys: dict[str, np.ndarray]) -> np.ndarray:
    """int32 [B, M] rows of the whole tables for encoded ids.

    Args:
        ids_BM: as `Encoder` gives them for `spec`: rows, or keys where a feature is dynamic.
        spec: places of the features in the log.
        whole: places of the features in a network with whole tables.
        keys: of dynamic features (`Weights.keys`).
    """
    if not keys:
        return ids_BM.astype(np.int32)
    wanted = KeyColumns(spec).keys(ids_BM, slice(None))
    rows = np.empty(ids_BM.shape, np.int32)
    for name, slot in whole.slots.items():
        own, columns = wanted[:, slot.start:slot.start + slot.length], slice(slot.start, slot.start + slot.length)
        known = keys.get(slot.feature.target or name)
        found = own + FIRST_KNOWN
        if known is not None:
            place = np.minimum(np.searchsorted(known, own), max(0, len(known) - 1))
            met = known[place] == own if len(known) else np.zeros(own.shape, bool)
            found = np.where(met, place + FIRST_KNOWN, UNSEEN)
        found = np.where(own == UNSEEN_KEY, UNSEEN, found)
        rows[:, columns] = slot.offset + np.where(own == MISSING_KEY, MISSING, found)
    return rows


class WholeRows:
    """Rows of the whole tables, for ids as requests and logs have them.

    Args:
        spec: places of the features in the log.
        whole: places of the features in a network with whole tables.
        keys: of dynamic features (`Weights.keys`).

    Raises:
        UserError: a feature has more keys than its table has rows.
    """

    def __init__(self, spec: FeatureSpec, whole: FeatureSpec, keys: dict[str, np.ndarray]) -> None:
        self.spec, self.whole, self.known = spec, whole, keys
        for name, own in keys.items():
            if len(own) > whole.slots[name].rows - FIRST_KNOWN:
                raise UserError(f"the table of '{name}' has more rows than the passes were compiled for",
                                where="checkpoint", value=len(own), hint="start or export them again: they are for the "
                                "newest checkpoint of output.directory, and some more rows")

    def rows(self, ids_Bm: np.ndarray, columns: Sequence[int] | None = None) -> np.ndarray:
        """int32 [B, m] rows for ids of some columns of the log (None: of all)."""
        if columns is None or not self.known:
            return rows_of(ids_Bm, self.spec, self.whole, self.known)
        ids_BM = np.zeros((len(ids_Bm), self.spec.id_columns), np.int64)
        ids_BM[:, columns] = ids_Bm
        return rows_of(ids_BM, self.spec, self.whole, self.known)[:, columns]


@functools.lru_cache(maxsize=4)  # asked for by every pass, and a checkpoint stays as it is
def rooms(checkpoint: Path) -> dict[str, int]:
    """Rows that passes with whole tables have for each feature with a table on the host: those that it has, and an
    eighth to a quarter more, so that a later checkpoint fits, too."""
    found = {}
    for name, paths in table_files(checkpoint).items():
        rows = sum(int((SafetensorsFile(path).read("rows") >= 0).sum()) for path in paths)
        grain = 1 << max(4, rows.bit_length() - 3)
        found[name] = (rows + rows // 8) // grain * grain + grain
    return found


def _known(keys: np.ndarray) -> np.ndarray:
    return (keys != MISSING_KEY) & (keys != UNSEEN_KEY)


def _number(name: str) -> int:
    """Which of the tables a parameter is: `embedding.tables.<number>.table`."""
    return next(int(part) for part in reversed(name.split(".")) if part.isdigit())
