"""Runs that were never trained, for tests of what comes after training: start values, a vocabulary, a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from parallel.layers.parameter import initialize
from parallel.runtime.builder import load_run
from parallel.runtime.checkpoint import save_checkpoint
from recsys.build import loss_network
from recsys.dataset import Log, prepare

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
