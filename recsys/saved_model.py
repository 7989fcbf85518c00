"""A trained ranker found again by its checkpoint: settings, features, vocabulary and network, without its log."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.checkpoint.folder import resolve_checkpoint
from parallel.checkpoint.full import Checkpoint
from parallel.common.errors import UserError
from parallel.common.renamed import current_keys
from parallel.common.settings import load_settings, validate
from recsys.data.columns import columns_of, features_of
from recsys.data.encode import Columns
from recsys.data.features import Feature, FeatureSpec, assign_columns
from recsys.data.readers import reader
from recsys.data.vocabulary import VOCABULARY, Vocabulary

if TYPE_CHECKING:
    from recsys.settings import Run


@dataclass
class Trained:
    """What serving needs of a run.

    Args:
        path: the checkpoint.
        settings: `recsys.settings.Run`.
        features, columns: of the log.
        vocabulary, spec: how values become rows of the tables.
        model: the network with its values, in inference mode; None where only the rest was asked for.
        tables: `recsys.tables.host.HostTables`, where they are on the host.
    """

    path: Path
    settings: Run
    features: list[Feature]
    columns: Columns
    vocabulary: Vocabulary
    spec: FeatureSpec
    model: Any = None
    tables: Any = None

    def encodes_as(self, other: Trained) -> bool:
        """Whether a request becomes the same numbers by both."""
        def encoding_version(one: Trained) -> tuple:
            known = one.vocabulary
            return one.features, one.columns, one.spec, known.values, known.boundaries, known.moments

        return encoding_version(self) == encoding_version(other)


def settings_of(checkpoint: Path, config: str | None = None, stored: bool = False) -> Any:
    """The run's settings: those of a file, or those that the trainer kept in the checkpoint.

    Args:
        checkpoint: where they are kept.
        config: the file.
        stored: take the model's block as it was kept, without importing the model.

    Raises:
        UserError: neither is there.
    """
    from recsys.settings import Run, StoredRun, run_class

    if config is not None:
        return load_settings(Run.for_file(config, []), config, [])
    kept = Checkpoint(checkpoint).state.get("run")
    model = (kept or {}).get("model")
    if not isinstance(model, dict) or not isinstance(model.get("name", ""), str):
        raise UserError("the checkpoint does not say which settings it was trained with", where=checkpoint,
                        hint="name them with --config")
    kind = StoredRun if stored else run_class(model.get("name", ""))
    return validate(kind, current_keys(kept), where=str(checkpoint / "state.json"))


def vocabulary_of(checkpoint: Path, settings: Run) -> Vocabulary:
    """The vocabulary beside a checkpoint or above it, or in the run's folder.

    Raises:
        UserError: there is none, and the features need one.
    """
    places = [checkpoint, *list(checkpoint.resolve().parents)[:2], Path(settings.output.directory)]
    found = next((folder / VOCABULARY for folder in places if (folder / VOCABULARY).is_file()), None)
    if found is not None:
        return Vocabulary.load(found)
    if any(f.values == "vocabulary" and f.target is None for f in features_of(settings.data)):
        raise UserError(f"there is no {VOCABULARY} with the checkpoint", where=checkpoint,
                        hint="copy the one of the run's folder beside it")
    return Vocabulary()


def describe(checkpoint: str | Path, config: str | None = None, stored: bool = False) -> Trained:
    """Everything of a trained ranker but its network; see `settings_of`.

    Raises:
        UserError: no checkpoint, settings or vocabulary there.
    """
    path = resolve_checkpoint(checkpoint)
    settings = settings_of(path, config, stored)
    features = features_of(settings.data)
    vocabulary = vocabulary_of(path, settings)
    spec = assign_columns(features, settings.model.embedding_size, vocabulary.sizes())
    return Trained(path, settings, features, columns_of(settings.data, reader(settings.data.reader)), vocabulary, spec)


def load(checkpoint: str | Path, config: str | None = None, rows: int = 1024) -> Trained:
    """A trained ranker with its network; a quantized checkpoint gives a quantized one.

    Args:
        checkpoint: or a folder of such.
        config: the run's settings; None = those kept in the checkpoint.
        rows: samples of one call at most, where the tables are on the host.

    Raises:
        UserError: see `describe` and `parallel.checkpoint.full.load_parameters`.
    """
    from recsys.network import loss_network
    from recsys.quantization import layers as quantization

    trained = describe(checkpoint, config)
    if trained.settings.data.tables.place == "host":
        from recsys.tables.loaded import load_hosted

        trained.model, hosted = load_hosted(trained.settings, trained.spec, len(trained.columns.labels), trained.path,
                                            rows)
        trained.tables = hosted.tables
        return trained
    model = loss_network(trained.settings, trained.spec, len(trained.columns.labels)).model
    quantization.load(trained.path, model)
    model.set_train(False)
    trained.model = model
    return trained
