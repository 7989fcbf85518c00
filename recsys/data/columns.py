"""Which columns and features a run reads, from its settings and its reader."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parallel.common.errors import UserError
from recsys.data.encode import Columns
from recsys.data.features import Feature, FeatureSpec, assign_columns, expand
from recsys.data.readers import Reader, reader

if TYPE_CHECKING:
    from recsys.settings import DataSettings


def columns_of(data: DataSettings, source: Reader) -> Columns:
    """Label and bookkeeping columns, the reader's where the file names none."""
    labels = data.labels or source.labels
    for key, names in (("number_labels", data.number_labels), ("label_weights", list(data.label_weights))):
        if unknown := set(names) - set(labels):
            raise UserError("is no label", where=f"data.{key}", value=sorted(unknown)[0],
                            hint=f"labels: {', '.join(labels)}")
    return Columns(labels, data.user or source.user, data.time or source.time, tuple(data.number_labels),
                   data.missing_labels, tuple(dict.fromkeys(data.label_weights.values())))


def features_of(data: DataSettings) -> list:
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


def spec_without_data(data: DataSettings, embedding_size: int) -> FeatureSpec | None:
    """The columns of the features if they are known without reading the log, else None."""
    features = features_of(data)
    if any(f.rows is None and f.values == "vocabulary" and f.type != "numeric" and f.target is None for f in features):
        return None
    return assign_columns(features, embedding_size)
