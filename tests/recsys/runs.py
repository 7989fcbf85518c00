"""Runs that were never trained, for tests of what comes after training: start values, a vocabulary, a checkpoint; what
is asked of them."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from mindspore import Tensor

from parallel.checkpoint.full import save_checkpoint
from parallel.layers.parameter import initialize
from parallel.task import load_run
from recsys.build import loss_network
from recsys.data.log import Log, prepare

DATA = ["data.synthetic.samples=600", "data.synthetic.users=40", "data.synthetic.items=30"]


def make_run(folder: Path, config: str, *overrides: str, seeds: tuple[int, ...] = (1,)) -> tuple[object, Log]:
    """A run's folder with a checkpoint for each seed, as steps 1, 2, ...; its settings and its log."""
    words = [*DATA, f"output.directory={folder}", f"data.cache={folder.parent / 'data'}",
             "train.global_batch_size=64", *overrides]
    _, settings = load_run(f"configs/recsys/{config}.yaml", words)
    log = prepare(settings.data, settings.model.embedding_size)
    for step, seed in enumerate(seeds, 1):
        add_checkpoint(folder, settings, log, step, seed)
    log.vocabulary.save(folder / "vocabulary.json")
    return settings, log


def add_checkpoint(folder: Path, settings: object, log: Log, step: int, seed: int) -> Path:
    """One more checkpoint of start values; weights are scaled up so that scores differ."""
    model = loss_network(settings, log.spec, len(log.labels)).model
    initialize(model, seed)
    for item in model.get_parameters():
        if item.name.endswith(".table"):
            item.set_data(type(item.data)(item.asnumpy() * np.float32(100)))
    return save_checkpoint(folder / "checkpoints", step, list(model.get_parameters()), (),
                           {"run": settings.model_dump(mode="json")})


def plain(model, ids: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Probabilities by the whole forward pass of the model, always of 40 rows: one graph for all."""
    filled = [Tensor(np.concatenate([array, np.repeat(array[-1:], 40 - len(array), 0)])) for array in (ids, numbers)]
    return 1.0 / (1.0 + np.exp(-model(*filled).asnumpy()[:len(ids)].astype(np.float64)))


def body_of(trained, log, seed: int, candidates: int) -> dict:
    """A request in JSON, of values that the features know."""
    generator = random.Random(seed)

    def value(feature):
        if feature.type == "numeric":
            return generator.random()
        rows = (feature.rows or 10) - 1
        return [generator.randint(0, rows) for _ in range(3)] if feature.is_list else generator.randint(0, rows)

    user = {f.source: value(f) for f in trained.features if f.side != "item"}
    items = [{f.source: value(f) for f in trained.features if f.side == "item"} for _ in range(candidates)]
    return {"user": user, "candidates": items, "top_k": 3}
