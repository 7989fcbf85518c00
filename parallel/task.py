"""From a config file to a network, without this package knowing any model.

A package of models has a module `build` with PACKAGE, its `ModelPackage`, and is found by the names of its models, so
the proofs (dry run, replay, estimate) take config files of every model alike.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from parallel.common.errors import UserError
from parallel.common.settings import Settings, apply_override, read_yaml_tree, validate
from parallel.sharding.config import ParallelConfig
from parallel.training.backend import SlicedBackend
from parallel.training.data_source import SAMPLE_NUMBERS, sample_numbers
from parallel.training.settings import RunSettings

MODEL_PACKAGES = ("pangu", "recsys")


@dataclass(frozen=True)
class Input:
    """One input of a network: its name, shape for the *global* batch of one micro-batch set, element type name, and
    what random values mean something (`high` exclusive for integers)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    high: int = 2


@dataclass
class Task:
    """A network to be trained, and what is fed to it.

    Args:
        network: a cell from the inputs to a scalar loss, not wrapped, not sharded, without parameter values.
        inputs: in the order of the network's construct.
        sample: `sample(seed) -> tuple of numpy arrays`, a meaningful global batch.
        tokens: tokens (or samples, for rankers) in one global batch.
        figures: anything that reports want to show (sizes and names).
        is_sparse: by name, the parameters that `train.sparse_optimizer` owns; None = there are none.
        most_rows: samples that the network takes at once on one device at most; None = any number.
        given: the parameters that `is_sparse` are given to every step from outside, which leaves their gradients in
            their place instead of moving them; they do not count in the norm.
        scores: for a ranker, `scores(network)` -> the `Layer` from the first `inputs` (its attribute) of the inputs to
            probabilities [rows, tasks], with the parameters of `network`, itself not sharded; None for others.
    """

    network: Any
    inputs: list[Input]
    sample: Callable[[int], tuple[np.ndarray, ...]]
    tokens: int
    figures: dict[str, Any] = field(default_factory=dict)
    is_sparse: Callable[[str], bool] | None = None
    scores: Callable[[Any], Any] | None = None
    most_rows: int | None = None
    given: bool = False


def with_sample_numbers(task: Task, dropout: float) -> Task:
    """`task` with the numbers of the samples as its last input, which a network with dropout takes
    (`parallel.layers.dropout`)."""
    if dropout == 0.0:
        return task
    batch, sample = task.inputs[0].shape[0], task.sample

    def numbered(seed: int) -> tuple[np.ndarray, ...]:
        return *sample(seed), sample_numbers(seed, batch)

    inputs = [*task.inputs, Input(SAMPLE_NUMBERS, (batch,), "int32", 1 << 30)]
    return replace(task, inputs=inputs, sample=numbered)


RunT = TypeVar("RunT", bound=RunSettings)


class ModelPackage(ABC, Generic[RunT]):
    """What a package of models gives to the trainer and the proofs.

    Attributes:
        name: of the package: `python -m NAME VERB`.
        models: names that `model.name` may take in its config files.
        training_verbs: those that are `train_on`.
        inference_verbs: those that run graphs of inference -> whether MindSpore's processes share the work where
            nothing is sharded.
        has_scores: whether tasks have `Task.scores`.
    """

    name: ClassVar[str]
    models: ClassVar[frozenset[str]]
    training_verbs: ClassVar[frozenset[str]] = frozenset({"train"})
    inference_verbs: ClassVar[Mapping[str, bool]] = MappingProxyType({})
    has_scores: ClassVar[bool] = False

    @abstractmethod
    def settings_class(self, name: str) -> type[Settings]:
        """The settings of a run of model `name`; a `RunSettings`."""

    def stored_settings_class(self, name: str) -> type[Settings]:
        """The same for settings that were checked before they were stored, importing no framework."""
        return self.settings_class(name)

    # -- training -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def build(self, settings: RunT, parallel: ParallelConfig, compute_dtype: str = "float32") -> Task:
        """The training loss for one global batch, checked against the layout.

        Args:
            settings: of the run.
            parallel: resolved.
            compute_dtype: element type of the matrix products.

        Raises:
            UserError: an axis does not divide what it shards.
        """

    @abstractmethod
    def train_on(self, settings: RunT, backend: SlicedBackend, figures: dict[str, Any]) -> dict[str, Any]:
        """Trains on any backend and returns the run's figures. Imports no framework.

        Args:
            settings: of the run.
            backend: this process.
            figures: `Task.figures`.
        """

    def check_training(self, settings: RunT, verb: str) -> None:
        """Raises a `UserError` where a training verb asks for more than the settings say."""
        return

    def written_out(self, settings: RunT) -> list[str]:
        """Overrides under which the graphs call no kernels that Ascend alone has, but compute the same by plain
        primitives: what a replay compares with."""
        return []

    def replay_overrides(self, settings: RunT) -> list[str]:
        """Overrides without which a layout would not compute what one device does."""
        return []

    # -- inference ----------------------------------------------------------------------------------------------------

    def inference_kinds(self, settings: RunT, verb: str | None = None) -> tuple[str, ...]:
        """The graphs that a trained model is used by ("decode", say): those that a verb needs; None = all."""
        return ()

    def inference(self, settings: RunT, parallel: ParallelConfig, compute_dtype: str, kind: str) -> Task:
        """The network of such a graph; see `build`."""
        raise self._no_inference(settings)

    def check_inference(self, settings: RunT) -> None:
        """Raises a `UserError` unless the model is used under its layout."""
        raise self._no_inference(settings)

    def shapes_inference(self, tree: dict[str, Any]) -> dict[str, Any]:
        """The part of a run's settings, as JSON, that shapes the graphs."""
        return tree

    def inference_overrides(self, settings: RunT, verb: str) -> list[str]:
        """Overrides that give the graphs of a verb the shapes that it works in."""
        return []

    def inference_sample(self, settings: RunT, kind: str, seed: int) -> list[np.ndarray]:
        """Inputs of a graph that mean something, for its replay.

        Raises:
            UserError: the graphs are not replayed.
        """
        raise UserError("this model's graphs of inference are not replayed", where="--graph", value=kind)

    def decoder_sizes(self, settings: RunT) -> dict[str, Any]:
        """Arguments of `parallel.planning.serving.Decoder`.

        Raises:
            UserError: the model does not generate.
        """
        raise UserError("this model does not generate", where="model.name", value=settings.model.name)

    def _no_inference(self, settings: RunT) -> UserError:
        return UserError("this model has no graphs of inference", where="model.name", value=settings.model.name)


def package_of(name: str) -> ModelPackage:
    """The package whose models include `name`.

    Raises:
        UserError: no package knows the name; the nearest known one is named.
    """
    if not isinstance(name, str):
        raise UserError("must be the name of a model", where="model.name", value=name)
    known: list[str] = []
    for folder in MODEL_PACKAGES:
        if importlib.util.find_spec(folder) is None or importlib.util.find_spec(f"{folder}.build") is None:
            continue
        package: ModelPackage = importlib.import_module(f"{folder}.build").PACKAGE
        if name in package.models:
            return package
        known += sorted(package.models)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    raise UserError("no such model", where="model.name", value=name,
                    hint=f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}")


def load_run(path: str | Path, overrides: list[str] | None = None) -> tuple[ModelPackage, RunSettings]:
    """Reads a config file of any model: its package and the validated settings."""
    tree = read_yaml_tree(path)
    for override in overrides or []:
        apply_override(tree, override)
    model = tree.get("model")
    if not isinstance(model, dict) or "name" not in model:
        raise UserError("the config file does not say model.name", where=path, hint="add model: {name: ...}")
    package = package_of(model["name"])
    return package, validate(package.settings_class(model["name"]), tree, where=str(path))


def build_task(path: str | Path, overrides: list[str] | None = None, devices: int | None = None,
               compute_dtype: str = "float32") -> tuple[Task, RunSettings, ParallelConfig]:
    """`load_run` and the network itself, with the parallel block resolved for `devices`."""
    package, settings = load_run(path, overrides)
    config = settings.parallel.resolve(devices)
    return package.build(settings, config, compute_dtype), settings, config
