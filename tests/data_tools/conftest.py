"""Fixtures of the data tools: one Spark session and one pair of worker processes for all tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def two_workers():
    """One local engine of two processes for all tests."""
    from data_tools.engines.local import LocalEngine

    with LocalEngine(2) as engine:
        yield engine


@pytest.fixture(scope="session")
def spark_engine():
    """One small Spark session for all tests."""
    pytest.importorskip("pyspark", reason="pyspark is not installed (extra 'data')")
    from data_tools.engines.base import EngineSettings
    from data_tools.engines.spark import SparkEngine

    # Small plans compiled once: the first-tier compiler alone starts several times faster.
    options = {"spark.sql.shuffle.partitions": "2", "spark.default.parallelism": "2",
               "spark.sql.codegen.wholeStage": "false", "spark.sql.adaptive.enabled": "false",
               "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"}
    with SparkEngine(EngineSettings(name="spark", master="local[2]", driver_memory="700m", options=options)) as engine:
        yield engine
