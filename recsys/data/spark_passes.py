"""The passes over a log on Spark, a task for each of its files (see `recsys.data.unit_passes`). The log and the folder
`data.cache` must be visible to all workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from parallel.common.errors import UserError
from parallel.common.spark.session import explain, start_session
from recsys.data.encode import Encoder
from recsys.data.readers import Reader
from recsys.data.unit_passes import Task, UnitPasses

if TYPE_CHECKING:
    from recsys.settings import DataSettings


class SparkPasses(UnitPasses):
    """See `UnitPasses`."""

    def __init__(self, data: DataSettings, source: Reader, encoder: Encoder) -> None:
        self.session = _session(data)
        super().__init__(data, source, encoder)

    def collect(self, task: Task) -> list[Any]:
        """See `UnitPasses`."""
        try:
            return self.session.sparkContext.parallelize(self.units, len(self.units)).map(task).collect()
        except Exception as error:
            raise explain(error) from error


def _session(data: DataSettings) -> Any:
    from importlib.util import find_spec

    if find_spec("pyspark") is None:
        raise UserError("the package pyspark is not installed", where="data.engine: spark",
                        hint='pip install -e ".[data]"')
    from pyspark.sql import SparkSession

    running = SparkSession.getActiveSession()
    return running or start_session("recsys", data.spark.master, data.spark.driver_memory, data.spark.options,
                                    "data.engine")
