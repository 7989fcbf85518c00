"""Reads streams without a model: batches, and going on from the state of a step."""

from __future__ import annotations

import itertools
import json

import numpy as np

from parallel.common.settings import load_settings
from recsys.data.readers import reader
from recsys.data.streams.source import StreamSource
from recsys.settings import Run
from recsys.training.stream import reading_of
from tests.recsys.data.streams.events import SMALL


def make_source(folder, *words: str, **options) -> StreamSource:
    """A source as `train` makes it, for a run in `folder`."""
    words = [*SMALL, f"output.directory={folder}", *words]
    settings = load_settings(Run.for_file(None, words), None, words)
    data = settings.data
    return StreamSource(reader(data.reader).stream(data), data.stream, reading_of(settings), data.on_bad_row,
                        settings.train.global_batch_size, folder, **options)


def read(source: StreamSource, steps: int, start: int = 0, state: dict | None = None) -> tuple[list, dict]:
    """(batches start + 1 .. start + steps, the state after each, by step, as a checkpoint would hold it)."""
    if state is not None:
        source.restore(json.loads(json.dumps(state)))
    states, batches = {}, []
    stream = source.batches(start)
    for number, batch in enumerate(itertools.islice(stream, steps), start + 1):
        batches.append(batch)
        states[number] = json.loads(json.dumps(source.state(number)))
    stream.close()
    return batches, states


def same(one: list, other: list) -> bool:
    """Whether batches are equal to the bit."""
    return len(one) == len(other) and all(
        np.array_equal(a, b) for first, second in zip(one, other, strict=True)
        for a, b in zip(first, second, strict=True))
