"""A ranker under its loss, by the settings of a run. MindSpore is imported when one is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.common.errors import UserError
from recsys.data.features import FeatureSpec
from recsys.data.readers import reader
from recsys.models import module_of

if TYPE_CHECKING:
    from recsys.settings import Run


def loss_network(settings: Run, spec: FeatureSpec, tasks: int, compute_dtype: str = "float32") -> Any:
    """The model under its loss, without parameter values."""
    from mindspore import dtype as mstype
    from mindspore.nn.utils import no_init_parameters

    from recsys.ranker import TrainingLoss

    if spec.is_dynamic and settings.data.tables.place != "host":
        name = next(name for name, slot in spec.slots.items() if slot.feature.is_dynamic)
        raise UserError("values: dynamic needs tables on the host", where=f"features.{name}.values",
                        hint="set data.tables.place: host")
    with no_init_parameters():
        model = module_of(settings.model.name).MODEL(settings.model, spec, tasks, getattr(mstype, compute_dtype))
        return TrainingLoss(model, label_weights(settings) if settings.data.label_weights else None)


def label_weights(settings: Run) -> np.ndarray:
    """bool [K, W]: which of the columns of weights each label's samples have."""
    names, own = labels_of(settings), settings.data.label_weights
    columns = list(dict.fromkeys(own.values()))
    return np.array([[own.get(name) == column for column in columns] for name in names])


def labels_of(settings: Run) -> list[str]:
    """Label columns of the run."""
    return settings.data.labels or reader(settings.data.reader).labels
