"""The executor: what runs the same functions on the same parts by processes of this machine or by Spark."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

from parallel.common.settings import Settings

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class EngineSettings(Settings):
    """Where the work runs."""

    name: Literal["local", "spark"] = "local"
    """`local`: processes of this machine. `spark`: a Spark master, by default one inside this process."""
    workers: int | None = None
    """Processes of the local engine; null = one a core (never more than there are parts)."""
    master: str = "local[*]"
    """Spark master: local[*], spark://host:7077, yarn, ... Input and output must be visible to all its workers."""
    driver_memory: str = "2g"
    """Memory of the Spark driver (with a local master: of everything in the JVM)."""
    options: dict[str, bool | int | float | str] = {}
    """Further Spark options, such as spark.executor.memory."""


class Engine(abc.ABC):
    """Runs functions over parts."""

    name: str

    @abc.abstractmethod
    def map(self, function: Callable[[_Item], _Result], items: list[_Item], description: str) -> Iterator[_Result]:
        """Results of `function` for all items, in any order. A worker that dies is replaced and its item done again."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027 - an engine that holds nothing has nothing to give back
        """Gives workers back."""
