"""A trained ranker whose tables are on the host, read from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.checkpoint.full import load_parameters
from parallel.layers.parameter import initialize
from recsys.data.features import FeatureSpec
from recsys.network import loss_network
from recsys.tables.host import HostTables
from recsys.tables.step import Hosted, dense_parameters

if TYPE_CHECKING:
    from recsys.settings import Run


def load_hosted(settings: Run, spec: FeatureSpec, tasks: int, path: Path, batch: int,
                cell_of: Callable[[Any], Any] = lambda model: model) -> tuple[Any, Hosted]:
    """A trained model with its tables read from a checkpoint, for reading only.

    Args:
        settings: of the run.
        spec: columns of the features in the log.
        tasks: K.
        path: the checkpoint.
        batch: samples of one call at most.
        cell_of: makes what is called from the model.
    """
    tables = HostTables(settings.model_copy(update={"data": _in_memory(settings.data)}), spec, batch)
    network = loss_network(settings, tables.window, tasks)
    initialize(network.model, 0)
    load_parameters(path, dense_parameters(network))
    tables.restore_files(path)
    network.set_train(False)
    return network.model, Hosted(cell_of(network.model), network.model, tables)


def _in_memory(data: Any) -> Any:
    """Settings under which a reader does not touch the files of a run that trains."""
    own = data.tables.model_copy(update={"folder": None, "window": None, "hot_rows": None})
    return data.model_copy(update={"tables": own})
