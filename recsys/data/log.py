"""Encoded rows on disk: a log is read up to three times, and its rows are then numbers in flat files.

The passes count rows where a split needs it, collect the vocabulary of the training rows, and encode. The files are
mapped, not loaded: memory stays bounded however long the log is.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from parallel.common.digests import CheckedRows
from parallel.common.errors import UserError
from parallel.common.files import explain_os_error, matching, read_json
from parallel.common.folders import put_in_place, sweep, temporary_name
from parallel.common.progress import info
from recsys.data.columns import columns_of, features_of
from recsys.data.encode import Encoded, Encoder
from recsys.data.features import FeatureSpec, assign_columns
from recsys.data.passes import PARTS, Passes, write_log
from recsys.data.readers import Reader, reader
from recsys.data.spark_passes import SparkPasses
from recsys.data.turns import one_at_a_time
from recsys.data.unit_passes import PoolPasses
from recsys.data.vocabulary import Statistics, Vocabulary

if TYPE_CHECKING:
    from recsys.settings import DataSettings

_FORMAT = 5


@dataclass
class Log:
    """Encoded parts of a log, mapped from disk, with what is needed to read new rows the same way."""

    parts: dict[str, Encoded]
    spec: FeatureSpec
    vocabulary: Vocabulary
    labels: list[str]
    report: dict
    directory: Path


def prepare(data: DataSettings, embedding_size: int, vocabulary: Path | None = None) -> Log:
    """Encodes the log, or maps what an earlier run encoded.

    Args:
        data: `recsys.settings.DataSettings`.
        embedding_size: the model's default width.
        vocabulary: file of a vocabulary to read the values with; None = `data.vocabulary`, or made from the training
            rows.

    Raises:
        UserError: anything wrong with the log; nothing is left half-written.
    """
    source = reader(data.reader)
    if source.needs_path and not data.path:
        raise UserError(f"reader {data.reader} needs a path", where="data.path", hint="set data.path=...")
    if vocabulary is None and data.vocabulary is not None:
        vocabulary = Path(data.vocabulary)
        if not vocabulary.is_file():
            raise UserError("there is no such file", where="data.vocabulary", value=str(vocabulary))
    directory = Path(data.cache) / _digest(data, None)
    if vocabulary is not None and not _same(vocabulary, directory / "vocabulary.json"):
        directory = Path(data.cache) / _digest(data, vocabulary)
    if not (directory / "log.json").is_file():
        with one_at_a_time(directory):
            if not (directory / "log.json").is_file():
                _encode_to(directory, data, source, vocabulary)
    return _map(directory, data, embedding_size)


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _digest(data: DataSettings, vocabulary: Path | None) -> str:
    """Name of the encoded log: of its settings, features, and the sizes and times of its files."""
    tree = data.model_dump(mode="json", exclude={"cache", "shuffle", "pooling", "vocabulary", "tables", "stream",
                                                 "engine", "spark", "shards", "workers", "together"})
    tree["features"] = [feature.model_dump(mode="json", exclude={"width", "pooling", "attention_size",
                                                                 "unseen_rate", "admission_share",
                                                                 "expire_after", "expire_unit",
                                                                 "expire_below", "count_decay"})
                        for feature in features_of(data)]
    if data.reader != "synthetic":
        tree.pop("synthetic")
    tree["format"] = _FORMAT
    if vocabulary is not None:
        tree["vocabulary"] = hashlib.sha256(vocabulary.read_bytes()).hexdigest()
    paths = [path for path in (data.path, data.split.validation_path, data.split.test_path) if path]
    files = [file for path in paths for file in _files_of(path)]
    tree["files"] = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)
                     if file.is_file()]
    return f"{data.reader}-{hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]}"


def _files_of(path: str) -> Iterator[Path]:
    """All that a file, a folder or a glob pattern stands for."""
    for found in matching(path):
        yield from found.rglob("*") if found.is_dir() else [found]


def _encode_to(directory: Path, data: DataSettings, source: Reader, given: Path | None) -> None:
    features = features_of(data)
    encoder = Encoder(features, columns_of(data, source), data.on_bad_row)
    kind = SparkPasses if data.engine == "spark" else PoolPasses if data.workers > 1 else Passes
    passes = kind(data, source, encoder)
    vocabulary = Vocabulary.load(given) if given is not None else Vocabulary()
    if given is None and Statistics.needed(features):
        vocabulary = passes.statistics(features).vocabulary()
    # The widths do not matter here: ids are encoded with the rows of one table each, and moved when mapped.
    spec = assign_columns([f.model_copy(update={"width": None}) for f in features], 1, vocabulary.sizes())
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        sweep(directory.parent)
        temporary = temporary_name(directory)
        temporary.mkdir()
    except OSError as error:
        raise explain_os_error(error, directory) from error
    try:
        write_log(temporary, passes.write(temporary, spec, vocabulary), passes, spec, vocabulary)
        put_in_place(temporary, directory)
    except OSError as error:
        raise explain_os_error(error, directory) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def count_values(data: DataSettings) -> dict[str, dict[str, float]]:
    """How often each value of each vocabulary feature occurs in the training rows of a log."""
    features, source = features_of(data), reader(data.reader)
    if source.needs_path and not data.path:
        raise UserError(f"reader {data.reader} needs a path", where="data.path", hint="set data.path=...")
    encoder = Encoder(features, columns_of(data, source), data.on_bad_row)
    statistics = Passes(data, source, encoder).statistics(features)
    return {name: dict(counter) for name, counter in statistics.counters.items()}


def _map(directory: Path, data: DataSettings, embedding_size: int) -> Log:
    hint = f"delete {directory}"
    header = read_json(directory / "log.json", sealed=True, hint=hint)
    if skipped := header["report"]["skipped"]:
        # Reported by every run, not only by the one that encoded the log.
        info("rows skipped: " + ", ".join(f"{count} ({what})" for what, count in skipped.items()))
    vocabulary = Vocabulary.load(directory / "vocabulary.json")
    features = features_of(data)
    sizes = vocabulary.sizes()
    spec = assign_columns(features, embedding_size, sizes)
    flat = assign_columns([f.model_copy(update={"width": None}) for f in features], 1, sizes)
    shift = _row_shift(flat, spec)
    shapes = {"ids": (np.dtype(header["id_type"]), header["id_columns"]),
              "numbers": (np.float32, header["numeric_columns"]),
              "labels": (np.float32, header["label_columns"]), "users": (np.int64, None)}
    parts = {}
    for part in PARTS:
        arrays = {}
        for field, (dtype, width) in shapes.items():
            shape = (header["rows"][part],) if width is None else (header["rows"][part], width)
            path = directory / f"{part}.{field}"
            if not path.is_file() or path.stat().st_size != math.prod(shape) * np.dtype(dtype).itemsize:
                raise UserError("encoded log is damaged", where=path, hint=hint)
            arrays[field] = np.zeros(shape, dtype) if not math.prod(shape) else CheckedRows(
                np.memmap(path, dtype, "r", shape=shape), header["blocks"][path.name], path, hint)
        parts[part] = Encoded(**arrays, shift=shift)
    return Log(parts, spec, vocabulary, header["labels"], header["report"], directory)


def _row_shift(flat: FeatureSpec, spec: FeatureSpec) -> np.ndarray | None:
    """What to add to each column of ids encoded for one common table when features have tables of several widths."""
    shift = np.zeros(spec.id_columns, np.int32)
    for name, slot in spec.slots.items():
        if not slot.feature.is_dynamic:
            shift[slot.start:slot.start + slot.length] = slot.offset - flat.slots[name].offset
    return shift if shift.any() else None
