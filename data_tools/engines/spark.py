"""The engine on Spark: the same functions on the same parts, on the workers of a cluster or of a local session."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from data_tools.engines.base import Engine, EngineSettings
from data_tools.engines.java import find_java
from parallel.common.errors import UserError
from parallel.common.progress import Bar, info

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_ROOT = Path(__file__).resolve().parents[2]
_TRIES = 4  # a part whose worker died is done again; Spark's local mode would give up at once


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
                raise _explain(error) from error
            bar.advance(len(items))
        yield from results

    def close(self) -> None:
        if self._owned:
            self.session.stop()


def _explain(error: Exception) -> Exception:
    """The `UserError` that a worker raised, out of Spark's long message; any other error unchanged."""
    found = re.search(r"parallel\.runtime\.errors\.UserError: (.*)", str(error))
    return UserError(found.group(1).strip()) if found else error


def _start(settings: EngineSettings) -> Any:
    from pyspark.sql import SparkSession

    home, origin = find_java()
    info(f"spark: {origin} ({home}), master {settings.master}")
    os.environ["JAVA_HOME"] = home
    os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    builder = SparkSession.builder.appName("data_tools").master(_master(settings.master))
    for key, value in {**_defaults(settings), **settings.options}.items():
        builder = builder.config(key, value)
    try:
        session = builder.getOrCreate()
    except Exception as error:
        raise UserError(f"Spark did not start: {str(error).splitlines()[0]}", where="engine.master",
                        value=settings.master) from error
    session.sparkContext.setLogLevel("ERROR")
    if not _in_this_process(settings.master):
        session.sparkContext.addPyFile(_packed_sources())
    return session


def _in_this_process(master: str) -> bool:
    """Whether the workers are threads of the driver; local-cluster[...] starts executors as a cluster does."""
    return re.match(r"local(\[|$)", master) is not None


def _master(master: str) -> str:
    return re.sub(r"^local(?:\[([^,\]]+)\])?$", lambda match: f"local[{match.group(1) or 1},{_TRIES}]", master)


def _defaults(settings: EngineSettings) -> dict[str, str]:
    options = {
        "spark.driver.memory": settings.driver_memory,
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.parquet.enableVectorizedReader": "true",
        "spark.sql.adaptive.enabled": "true",
        "spark.sql.adaptive.skewJoin.enabled": "true",
        "spark.task.maxFailures": str(_TRIES),
    }
    if _in_this_process(settings.master):
        options |= {"spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1",
                    "spark.sql.shuffle.partitions": str(max(4, 2 * (os.cpu_count() or 2))),
                    "spark.local.dir": tempfile.gettempdir()}
    return options


def _packed_sources() -> str:
    """The two packages that workers need, as a zip for `addPyFile`."""
    path = Path(tempfile.mkdtemp(prefix="data_tools_")) / "data_tools.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for package in ("data_tools", "parallel"):
            for file in sorted((_ROOT / package).rglob("*.py")):
                archive.write(file, file.relative_to(_ROOT).as_posix())
    return str(path)
