"""From a config file to a network, without this package knowing any model.

A package that has models holds a module `build` with

    MODELS: the names that `model.name` may take in its config files
    settings_class(name) -> type[Settings], with at least the blocks model, train and parallel
    build(settings, parallel, compute_dtype) -> Task
    train_on(settings, backend, figures) -> dict: trains on any backend; imports no framework
    replay_overrides(settings) -> list[str]: overrides without which a layout would not compute what one device does
    written_out(settings, chosen) -> list[str], if it has layers that call kernels of Ascend alone: overrides under which
        they compute the same by plain primitives; without `chosen` only where the file leaves the choice
    inference(settings, parallel, compute_dtype, kind) -> Task: a graph that a trained model is used by ("decode",
        "prefill", "score" over a cache, say); with `inference_kinds(settings, verb)`: those that a verb needs (none =
        all), `check_inference(settings)`, and `shapes_inference(tree)`: the part of the settings
        as JSON that shapes such graphs; `inference_overrides(settings, verb)` where a verb works in shapes of its own;
        and INFERENCE_VERBS, which run them, each with whether processes of MindSpore
        share its work where nothing is sharded
    TRAINING_VERBS: verbs that are `train_on`, each with `check(settings)`, which raises a UserError where a verb asks
        for more than the settings say
    stored_settings_class(name) -> type[Settings] of settings that were checked before they were stored, if importing
        those of `settings_class` takes a framework

and is found by name, so the proofs (dry run, replay, estimate) take config files of every model alike.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from parallel.common.errors import UserError
from parallel.common.settings import Settings, apply_override, read_yaml_tree, validate
from parallel.sharding.config import ParallelConfig

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


SAMPLE_NUMBERS = "sample_numbers"


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


def sample_numbers(iteration: int, batch: int, part: int = 0, parts: int = 1) -> np.ndarray:
    """Numbers through the whole run of the samples in one global batch, int32 (wraps) [batch / parts].

    Args:
        iteration: number of the batch.
        batch: samples of a global batch.
        part, parts: which consecutive share of them.
    """
    share = batch // parts
    first = iteration * batch + part * share
    return np.arange(first, first + share, dtype=np.int64).astype(np.int32)


def package_of(name: str) -> Any:
    """The `build` module of the package whose models include `name`.

    Raises:
        UserError: no package knows the name; the nearest known one is named.
    """
    if not isinstance(name, str):
        raise UserError("must be the name of a model", where="model.name", value=name)
    known: list[str] = []
    for package in MODEL_PACKAGES:
        if importlib.util.find_spec(package) is None or importlib.util.find_spec(f"{package}.build") is None:
            continue
        module = importlib.import_module(f"{package}.build")
        if name in module.MODELS:
            return module
        known += sorted(module.MODELS)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    raise UserError("no such model", where="model.name", value=name,
                    hint=f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}")


def load_run(path: str | Path, overrides: list[str] | None = None) -> tuple[Any, Settings]:
    """Reads a config file of any model: the package's `build` module and the validated settings."""
    tree = read_yaml_tree(path)
    for override in overrides or []:
        apply_override(tree, override)
    model = tree.get("model")
    if not isinstance(model, dict) or "name" not in model:
        raise UserError("the config file does not say model.name", where=path, hint="add model: {name: ...}")
    module = package_of(model["name"])
    return module, validate(module.settings_class(model["name"]), tree, where=str(path))


def written_out(module: Any, settings: Settings, *, chosen: bool) -> list[str]:
    """Overrides under which a model's graphs have plain primitives only (see the head of this file)."""
    return module.written_out(settings, chosen) if hasattr(module, "written_out") else []


def build_task(path: str | Path, overrides: list[str] | None = None, devices: int | None = None,
               compute_dtype: str = "float32") -> tuple[Task, Settings, ParallelConfig]:
    """`load_run` and the network itself, with the parallel block resolved for `devices`."""
    module, settings = load_run(path, overrides)
    config = settings.parallel.resolve(devices)
    return module.build(settings, config, compute_dtype), settings, config
