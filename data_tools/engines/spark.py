"""The engine on Spark: the same functions on the same parts, on the workers of a cluster or of a local session."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from data_tools.engines.base import Engine, EngineSettings
from parallel.common.errors import UserError
from parallel.common.progress import Bar
from parallel.common.spark.session import explain, in_this_process, start_session

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_ROOT = Path(__file__).resolve().parents[2]


class SparkEngine(Engine):
    """A Spark session, taken if there is one, else started.

    Raises:
        UserError: pyspark or a fitting Java is missing, or the master cannot be reached.
    """

    name = "spark"

    def __init__(self, settings: EngineSettings) -> None:
        try:
            from pyspark.sql import SparkSession
        except ImportError:
            raise UserError("the package pyspark is not installed", where="engine.name: spark",
                            hint="pip install the extra 'data'") from None
        running = SparkSession.getActiveSession()
        self._owned = running is None
        self.session = running or _start(settings)
        self.context = self.session.sparkContext

    def map(self, function: Callable[[_Item], _Result], items: list[_Item], description: str) -> Iterator[_Result]:
        if not items:
            return
        with Bar(len(items), description) as bar:
            try:
                results = self.context.parallelize(items, len(items)).map(function).collect()
            except Exception as error:
                raise explain(error) from error
            bar.advance(len(items))
        yield from results

    def close(self) -> None:
        if self._owned:
            self.session.stop()


def _start(settings: EngineSettings) -> Any:
    session = start_session("data_tools", settings.master, settings.driver_memory, settings.options)
    if not in_this_process(settings.master):
        session.sparkContext.addPyFile(_packed_sources())
    return session


def _packed_sources() -> str:
    """The two packages that workers need, as a zip for `addPyFile`."""
    path = Path(tempfile.mkdtemp(prefix="data_tools_")) / "data_tools.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for package in ("data_tools", "parallel"):
            for file in sorted((_ROOT / package).rglob("*.py")):
                archive.write(file, file.relative_to(_ROOT).as_posix())
    return str(path)
