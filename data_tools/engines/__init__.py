"""Where the steps run: this machine's processes, or Spark."""

from __future__ import annotations

from data_tools.engines.base import Engine, EngineSettings


def open_engine(settings: EngineSettings) -> Engine:
    """The engine that the settings name; use it as a context."""
    if settings.name == "spark":
        from data_tools.engines.spark import SparkEngine

        return SparkEngine(settings)
    from data_tools.engines.local import LocalEngine

    return LocalEngine(settings.workers)
