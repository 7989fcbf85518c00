"""Encoded rows on disk and the batches made of them.

A log is read up to three times (to count rows where a split needs it, to collect the vocabulary of the training rows,
to encode) and its rows are then numbers in flat files that are mapped, not loaded: memory stays bounded however long
the log is, batch i is a function of (seed, i), and a run can resume at any step.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parallel.common.digests import CheckedRows
from parallel.common.errors import UserError
from parallel.common.files import explain_os_error, matching, read_json
from parallel.common.folders import put_in_place, sweep, temporary_name
from parallel.common.progress import info
from recsys.data.encode import Columns, Encoded, Encoder
from recsys.data.features import UNSEEN, Feature, FeatureSpec, expand, place
from recsys.data.passes import PARTS, Passes, write_log
from recsys.data.readers import Reader, reader
from recsys.data.spark_passes import SparkPasses
from recsys.data.turns import one_at_a_time
from recsys.data.vocabulary import Statistics, Vocabulary
from recsys.tables.keys import MISSING_KEY, UNSEEN_KEY

VOCABULARY = "vocabulary.json"
"""Name of the vocabulary's file beside encoded rows and beside checkpoints."""
_FORMAT = 5
_WINDOW = 1 << 22


@dataclass
class Log:
    """Encoded parts of a log, mapped from disk, with what is needed to read new rows the same way."""

    parts: dict[str, Encoded]
    spec: FeatureSpec
    vocabulary: Vocabulary
    labels: list[str]
    report: dict
    directory: Path

def columns_of(data: Any, source: Reader) -> Columns:
    """Label and bookkeeping columns, the reader's where the file names none."""
    labels = data.labels or source.labels
    for key, names in (("number_labels", data.number_labels), ("label_weights", list(data.label_weights))):
        if unknown := set(names) - set(labels):
            raise UserError("is no label", where=f"data.{key}", value=sorted(unknown)[0],
                            hint=f"labels: {', '.join(labels)}")
    return Columns(labels, data.user or source.user, data.time or source.time, tuple(data.number_labels),
                   data.missing_labels, tuple(dict.fromkeys(data.label_weights.values())))


def features_of(data: Any) -> list:
    """The features of a run with `repeat` written out."""
    source = reader(data.reader)
    asked = next((name for name in ("history", "passed", "like_rate") if getattr(data, name)), None)
    if asked is not None and not source.histories:
        raise UserError(f"reader {data.reader} makes no histories", where=f"data.{asked}", value=getattr(data, asked),
                        hint="leave it out, and list the log's own columns in data.features")
    features = expand(source.features(data) if data.features is None else data.features)
    if unknown := set(data.pooling) - {feature.name for feature in features}:
        raise UserError("no such feature", where="data.pooling", value=sorted(unknown)[0])
    return [Feature.model_validate({**feature.model_dump(), "pooling": data.pooling[feature.name]})
            if feature.name in data.pooling else feature for feature in features]


def spec_without_data(data: Any, embedding_size: int) -> FeatureSpec | None:
    """The places of the features if they can be told without reading the log, else None."""
    features = features_of(data)
    if any(f.rows is None and f.values == "vocabulary" and f.type != "numeric" and f.target is None for f in features):
        return None
    return place(features, embedding_size)


def prepare(data: Any, embedding_size: int, vocabulary: Path | None = None) -> Log:
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


def _digest(data: Any, vocabulary: Path | None) -> str:
    """Name of the encoded log: of its settings, features, and the sizes and times of its files."""
    tree = data.model_dump(mode="json", exclude={"cache", "shuffle", "pooling", "vocabulary", "tables", "stream",
                                                 "engine", "spark"})
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


def _encode_to(directory: Path, data: Any, source: Reader, given: Path | None) -> None:
    features = features_of(data)
    encoder = Encoder(features, columns_of(data, source), data.on_bad_row)
    passes = Passes(data, source, encoder) if data.engine == "local" else SparkPasses(data, source, encoder)
    vocabulary = Vocabulary.load(given) if given is not None else Vocabulary()
    if given is None and Statistics.needed(features):
        vocabulary = passes.statistics(features).vocabulary()
    # The widths do not matter here: ids are encoded with the rows of one table each, and moved when mapped.
    spec = place([f.model_copy(update={"width": None}) for f in features], 1, vocabulary.sizes())
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


def count_values(data: Any) -> dict[str, dict[str, float]]:
    """How often each value of each vocabulary feature stands in the training rows of a log."""
    features, source = features_of(data), reader(data.reader)
    if source.needs_path and not data.path:
        raise UserError(f"reader {data.reader} needs a path", where="data.path", hint="set data.path=...")
    encoder = Encoder(features, columns_of(data, source), data.on_bad_row)
    statistics = Passes(data, source, encoder).statistics(features)
    return {name: dict(counter) for name, counter in statistics.counters.items()}


def _map(directory: Path, data: Any, embedding_size: int) -> Log:
    hint = f"delete {directory}"
    header = read_json(directory / "log.json", sealed=True, hint=hint)
    if skipped := header["report"]["skipped"]:
        # Told by every run, not only by the one that encoded the log.
        info("rows skipped: " + ", ".join(f"{count} ({what})" for what, count in skipped.items()))
    vocabulary = Vocabulary.load(directory / "vocabulary.json")
    features = features_of(data)
    sizes = vocabulary.sizes()
    spec = place(features, embedding_size, sizes)
    flat = place([f.model_copy(update={"width": None}) for f in features], 1, sizes)
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
        parts[part] = Encoded(**arrays)
        parts[part].shift = shift
    return Log(parts, spec, vocabulary, header["labels"], header["report"], directory)


def _row_shift(flat: FeatureSpec, spec: FeatureSpec) -> np.ndarray | None:
    """What to add to each column of ids encoded for one common table when features have tables of several widths."""
    shift = np.zeros(spec.id_columns, np.int32)
    for name, slot in spec.slots.items():
        if not slot.feature.is_dynamic:
            shift[slot.start:slot.start + slot.length] = slot.offset - flat.slots[name].offset
    return shift if shift.any() else None


class Batches:
    """Batches of encoded rows for the trainer: (ids, numbers, labels). See `parallel.training.data_source.DataSource`.

    Args:
        rows: a part of a log.
        batch: samples of one global batch.
        seed: of the order; None keeps the rows' order.
        rank, ranks: this data-parallel process's share of every batch.
        spec: places of the features, for those with an unseen_rate.
        together: up to so many samples of a user stand one after the other in a drawn order.
        groups: whether the labels end in a column that says which samples are of one user.
    """

    columns = ("ids", "numbers", "labels")

    def __init__(self, rows: Encoded, batch: int, seed: int | None, rank: int = 0, ranks: int = 1,
                 spec: FeatureSpec | None = None, together: int = 1, groups: bool = False) -> None:
        if len(rows) < batch:
            raise UserError(f"there are only {len(rows)} rows for a batch", where="train.global_batch_size",
                            value=batch, hint="make it smaller")
        self.rows, self.batch, self.seed, self.together, self.groups = rows, batch, seed, together, groups
        self.hidden = [slot for slot in spec.slots.values() if slot.feature.unseen_rate] if spec is not None else []
        self.steps_per_epoch = len(rows) // batch
        share = batch // ranks
        self.mine = slice(rank * share, (rank + 1) * share)

    def batches(self, start_step: int) -> Iterator[tuple[np.ndarray, ...]]:
        """Batches start_step, start_step + 1, ... without end."""
        epoch, first = divmod(start_step, self.steps_per_epoch)
        step = start_step
        while True:
            for index in self._order(epoch, first):
                ids, numbers_, labels = gather(self.rows, index[self.mine])
                self._hide(ids, step)
                if self.groups:
                    # Numbers that float32 holds exactly.
                    users = np.asarray(self.rows.users[index[self.mine]]) & (2**24 - 1)
                    labels = np.concatenate([labels, users[:, None].astype(np.float32)], 1)
                yield ids, numbers_, labels
                step += 1
            epoch, first = epoch + 1, 0

    def _hide(self, ids: np.ndarray, step: int) -> None:
        """Shows some values as unseen; which ones depends on (seed, step, row in the global batch)."""
        for number, slot in enumerate(self.hidden):
            generator = np.random.default_rng((self.seed or 0, 1, step, number))
            chosen = generator.random(self.batch)[self.mine] < slot.feature.unseen_rate
            missing, unseen = ((MISSING_KEY, UNSEEN_KEY) if slot.feature.is_dynamic
                               else (slot.offset, slot.offset + UNSEEN))
            ids[chosen & (ids[:, slot.start] != missing), slot.start] = unseen

    def _order(self, epoch: int, first: int) -> Iterator[np.ndarray]:
        """Row numbers of each batch of an epoch from batch `first` on.

        The rows are permuted within windows of 4M rows, and the windows among themselves, so that the order of a long
        log costs little memory.
        """
        usable = self.steps_per_epoch * self.batch
        window = max(self.batch, _WINDOW // self.batch * self.batch)
        starts = np.arange(0, usable, window)
        if self.seed is not None:
            starts = np.random.default_rng((self.seed, epoch)).permutation(starts)
        # The remainder of rows that fill no batch moves on from epoch to epoch.
        turn = 0 if self.seed is None else (epoch * self.batch) % max(1, len(self.rows))
        for start in starts:
            size = min(window, usable - start)
            steps = size // self.batch
            if first >= steps:
                first -= steps
                continue
            order = np.arange(size)
            if self.seed is not None:
                generator = np.random.default_rng((self.seed, epoch, int(start)))
                order = generator.permutation(size)
                if self.together > 1:
                    users = np.asarray(self.rows.users)[(order + start + turn) % len(self.rows)]
                    order = order[_together(users, self.together, generator)]
            for step in range(first, steps):
                yield (order[step * self.batch:(step + 1) * self.batch] + start + turn) % len(self.rows)
            first = 0


def _together(users: np.ndarray, most: int, generator: np.random.Generator) -> np.ndarray:
    """An order of shuffled samples in which each user's stand together in runs of up to `most`, the runs shuffled."""
    order = np.argsort(users, kind="stable")
    sorted_ = users[order]
    begin = np.flatnonzero(np.r_[True, sorted_[1:] != sorted_[:-1]])
    number = np.arange(len(users)) - np.repeat(begin, np.diff(np.r_[begin, len(users)]))
    run = np.cumsum(number % most == 0) - 1
    return order[np.argsort(generator.permutation(run[-1] + 1)[run], kind="stable")]


def gather(rows: Encoded, index: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, numbers, labels) of chosen rows, as arrays of their own."""
    ids = np.asarray(rows.ids[index])
    shift = getattr(rows, "shift", None)
    if shift is not None:
        ids = ids + shift
    return np.ascontiguousarray(ids), np.asarray(rows.numbers[index]).copy(), np.asarray(rows.labels[index]).copy()


def in_order(rows: Encoded, batch: int) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray, int]]:
    """Every row once, in order: ((ids, numbers, labels) filled up to `batch` rows, users, how many are real)."""
    for begin in range(0, len(rows), batch):
        yield filled_batch(rows, begin, batch)


def filled_batch(rows: Encoded, begin: int, batch: int) -> tuple[tuple[np.ndarray, ...], np.ndarray, int]:
    """The batch that begins at a row; see `in_order`."""
    part = slice(begin, min(begin + batch, len(rows)))
    real = part.stop - begin
    arrays = gather(rows, part)
    if real < batch:
        arrays = tuple(np.concatenate([array, np.repeat(array[-1:], batch - real, 0)]) for array in arrays)
    return arrays, np.asarray(rows.users[part]), real
