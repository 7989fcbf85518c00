"""Starts Spark with a Java that fits, for whoever runs functions on it; imports pyspark only then."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError
from parallel.common.progress import info
from parallel.common.spark.java import find_java

_ROOT = Path(__file__).resolve().parents[3]
_TRIES = 4  # a part whose worker died is done again; Spark's local mode would give up at once


def explain(error: Exception) -> Exception:
    """The `UserError` that a worker raised, out of Spark's long message; any other error unchanged."""
    found = re.search(r"parallel\.common\.errors\.UserError: (.*)", str(error))
    return UserError(found.group(1).strip()) if found else error


def start_session(app: str, master: str, driver_memory: str, options: dict[str, Any], where: str = "engine") -> Any:
    """A `SparkSession`.

    Args:
        app: name that Spark shows.
        master: local[*], spark://host:7077, yarn, ...
        driver_memory: as "2g".
        options: further options of Spark, which override these.
        where: the block of settings, for errors.

    Raises:
        UserError: pyspark or a fitting Java is missing, or the master cannot be reached.
    """
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        raise UserError("the package pyspark is not installed", where=f"{where}: spark",
                        hint="pip install the extra 'data'") from None
    home, origin = find_java()
    info(f"spark: {origin} ({home}), master {master}")
    os.environ["JAVA_HOME"] = home
    os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    builder = SparkSession.builder.appName(app).master(_master(master))
    for key, value in {**_defaults(master, driver_memory), **options}.items():
        builder = builder.config(key, value)
    try:
        session = builder.getOrCreate()
    except Exception as error:
        raise UserError(f"Spark did not start: {str(error).splitlines()[0]}", where=f"{where}.master",
                        value=master) from error
    session.sparkContext.setLogLevel("ERROR")
    return session


def in_this_process(master: str) -> bool:
    """Whether the workers are threads of the driver; local-cluster[...] starts executors as a cluster does."""
    return re.match(r"local(\[|$)", master) is not None


def _master(master: str) -> str:
    return re.sub(r"^local(?:\[([^,\]]+)\])?$", lambda match: f"local[{match.group(1) or 1},{_TRIES}]", master)


def _defaults(master: str, driver_memory: str) -> dict[str, str]:
    options = {
        "spark.driver.memory": driver_memory,
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.parquet.enableVectorizedReader": "true",
        "spark.sql.adaptive.enabled": "true",
        "spark.sql.adaptive.skewJoin.enabled": "true",
        "spark.task.maxFailures": str(_TRIES),
    }
    if in_this_process(master):
        options |= {"spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1",
                    "spark.sql.shuffle.partitions": str(max(4, 2 * (os.cpu_count() or 2))),
                    "spark.local.dir": tempfile.gettempdir()}
    return options
