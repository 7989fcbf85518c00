"""Verb `refresh`: admits new values into open vocabularies (or dynamic tables), evicts stale ones, and resets their
rows."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.checkpoint.folder import resolve_checkpoint
from parallel.checkpoint.full import load_checkpoint, save_checkpoint
from parallel.common.errors import UserError
from parallel.common.progress import info, table
from parallel.layers.parameter import start_value
from parallel.training.device import start_device
from parallel.training.optimizers.row_gradients import row_tables
from parallel.training.optimizers.run import run_optimizer
from recsys.build import labels_of, loss_network
from recsys.data.columns import features_of
from recsys.data.features import Feature, FeatureSpec, assign_columns
from recsys.data.log import count_values
from recsys.data.vocabulary import VOCABULARY, Vocabulary
from recsys.tables.names import ACCUMULATOR, is_sparse
from recsys.tables.refresh import refresh_run

if TYPE_CHECKING:
    from recsys.settings import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb `refresh`."""
    parser.add_argument("--run", metavar="DIR", required=True, help="folder of the run whose vocabulary is refreshed")
    parser.add_argument("--output", metavar="DIR", required=True,
                        help="folder for the new vocabulary.json and checkpoint; train goes on from there with "
                        "output.directory=DIR data.vocabulary=DIR/vocabulary.json")
    parser.add_argument("--decay", type=float, default=0.5, metavar="X", help="factor of the old counts (default 0.5)")
    parser.add_argument("--minimum-count", type=float, metavar="N",
                        help="decayed count below which a value is evicted (none: each feature's minimum_count)")


def run(settings: Run, arguments: argparse.Namespace) -> dict:
    """Counts the training rows of `data`, refreshes the vocabulary, and saves the run's newest checkpoint with the rows
    of newcomers at their start values and without optimizer history."""
    if not 0.0 <= arguments.decay <= 1.0:
        raise UserError("the decay must be between 0 and 1", where="--decay", value=arguments.decay)
    start_device()
    out = Path(arguments.output)
    if (out / "checkpoints").exists():
        raise UserError("there are checkpoints already", where="--output", value=str(out), hint="choose another folder")
    if settings.data.tables.place == "host":
        return refresh_run(settings, Path(arguments.run), out, decay=arguments.decay, least=arguments.minimum_count)
    vocabulary = Vocabulary.load(Path(arguments.run) / VOCABULARY)
    features = [feature for feature in features_of(settings.data) if feature.name in vocabulary.values]
    spec = assign_columns(features_of(settings.data), settings.model.embedding_size, vocabulary.sizes())
    counted = count_values(settings.data)
    rows, figures = {}, []
    for feature in features:
        rows[feature.name] = refresh_feature(feature, vocabulary, counted.get(feature.name, {}), arguments, figures)
    path = move_checkpoint(settings, spec, rows, Path(arguments.run), out)
    vocabulary.save(out / VOCABULARY)
    table("Refreshed", ["feature", "known before", "known now", "rows started anew"], figures)
    return {"checkpoint": str(path), "vocabulary": str(out / VOCABULARY),
            "reset": {name: len(own) for name, own in rows.items()}}


def refresh_feature(feature: Feature, vocabulary: Vocabulary, counts: dict[str, float], arguments: argparse.Namespace,
                    figures: list) -> list[int]:
    """Rows to start anew of one feature; adds a line to `figures`."""
    before = sum(not value.startswith("\x00") for value in vocabulary.values[feature.name])
    if feature.rows is None:
        info(f"{feature.name}: left as it is, since its table has no free rows (give it rows in data.features)")
        return []
    least = feature.minimum_count if arguments.minimum_count is None else arguments.minimum_count
    reset = vocabulary.refresh(feature.name, counts, feature.rows, decay=arguments.decay, minimum_count=least)
    after = sum(not value.startswith("\x00") for value in vocabulary.values[feature.name])
    figures.append([feature.name, before, after, len(reset)])
    return reset


def move_checkpoint(settings: Run, spec: FeatureSpec, rows: dict[str, list[int]], source: Path, out: Path) -> Path:
    """The newest checkpoint of `source` with some rows of the tables, and what the optimizer knows of them, reset."""
    network = loss_network(settings, spec, len(labels_of(settings)))
    states = run_optimizer(network.trainable_params(), settings.train, is_sparse, row_tables(network)).states()
    fresh = {state.name: _first(state) for state in states}
    path = resolve_checkpoint(source)
    state = load_checkpoint(path, list(network.get_parameters()), states)
    by_width: dict[int, list[int]] = {}
    for name, own in rows.items():
        slot = spec.slots[name]
        by_width.setdefault(slot.width, []).extend(slot.offset + row for row in own)
    for parameter, width in zip(network.model.embedding.tables, spec.tables, strict=True):
        chosen = np.array(by_width.get(width, []), np.int64)
        item = parameter.table
        _replace(item, chosen, start_value(item.name, item.shape, item.start, settings.train.seed)[chosen])
        for moment in states:
            if moment.name.endswith(f".{item.name}"):
                _replace(moment, chosen, fresh[moment.name])
        for own in network.get_parameters():
            if own.name == f"{item.name}{ACCUMULATOR}":
                _replace(own, chosen, own.start[1])
    return save_checkpoint(out / "checkpoints", int(state["step"]), list(network.get_parameters()), states,
                           {key: value for key, value in state.items() if key not in ("format", "version", "step")})


def _first(state: Any) -> np.ndarray:
    """Start value of a moment: the same everywhere."""
    return state.asnumpy().reshape(-1)[:1].copy()


def _replace(parameter: Any, rows: np.ndarray, values: np.ndarray) -> None:
    import mindspore as ms

    array = parameter.asnumpy().copy()
    array[rows] = values
    parameter.set_data(ms.Tensor(array, parameter.dtype))
