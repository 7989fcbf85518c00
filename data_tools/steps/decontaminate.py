"""Removes documents that share long n-grams with the evaluation sets, so that a test is not in the training data.

GPT-3 (Brown et al. 2020, appendix C) looks for n-grams of 8 to 13 words; here they are of characters in the normal form
of `dedup.normalise`, 24 by default, about 13 Chinese words (chosen here; the PanGu-alpha paper does not decontaminate).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from data_tools.dedup.normalise import normalise
from data_tools.dedup.signature import shingle_hashes
from data_tools.parts import Drop, PartFigures, Step
from data_tools.readers._lines import decode
from data_tools.records import Document, Split
from data_tools.steps.filter import file_digest
from parallel.common.digests import load_array, save_array
from parallel.common.errors import UserError
from parallel.common.files import COMPRESSED_SUFFIXES, open_binary
from parallel.common.lines import split_lines
from parallel.common.progress import info, progress
from parallel.common.settings import Settings
from parallel.common.structured import BadText, parse_json

_SUFFIXES = (".json", ".jsonl", ".txt", ".csv", ".tsv")
_MAX_FILE_BYTES = 1 << 30
_FILTER_BITS = 24


class DecontaminateSettings(Settings):
    """Decontamination against evaluation sets; off without any."""

    evaluation: list[str] = []
    """Files and folders of the evaluation sets: .json, .jsonl (every text in them), .txt, .csv, .tsv (every line)."""
    ngram: int = pydantic.Field(24, ge=1, le=1000)
    """Characters in an n-gram; evaluation texts that are shorter cannot be found."""
    hits: int = pydantic.Field(1, ge=1)
    """Different n-grams that a document must share with the evaluation sets to be removed."""


def build_index(settings: DecontaminateSettings, path: Path) -> int:
    """Writes the distinct n-gram hashes of all evaluation sets to `path` (.npy, sorted uint64); returns how many.

    Raises:
        UserError: an evaluation set is missing, or none holds a text as long as the n-gram.
    """
    found = [np.empty(0, dtype=np.uint64)]
    for file in progress(_files(settings.evaluation), "decontaminate: evaluation sets"):
        found += [shingle_hashes(normalise(text), settings.ngram) for text in evaluation_texts(file)]
        found = [np.unique(np.concatenate(found))]
    if len(found[0]) == 0:
        raise UserError("no text as long as the n-gram in the evaluation sets", where="decontaminate.evaluation",
                        value=settings.ngram, hint="lower decontaminate.ngram")
    save_array(path, found[0])
    info(f"decontaminate: {len(found[0]):,} n-grams of {settings.ngram} characters")
    return len(found[0])


def _files(inputs: list[str]) -> list[Path]:
    files: list[Path] = []
    for text in inputs:
        path = Path(text)
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            files += [file for file in sorted(path.rglob("*")) if file.is_file() and _known(file)]
        else:
            raise UserError("no such evaluation set", where="decontaminate.evaluation", value=text)
    return files


def _known(path: Path) -> bool:
    return any(path.name.lower().removesuffix(ending).endswith(_SUFFIXES) for ending in ("", *COMPRESSED_SUFFIXES))


def evaluation_texts(path: Path) -> Iterator[str]:
    """Every text in a file: all strings of its JSON (one value, or one a line), else its lines."""
    from data_tools.records import ReadLog

    with open_binary(path) as file:
        data = file.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise UserError("evaluation file is too large", where=path, value=_MAX_FILE_BYTES)
    text = decode(data, ReadLog())
    if ".json" not in path.name.lower():
        yield from split_lines(text)
        return
    try:
        yield from _strings(parse_json(text, strict=False, foreign_numbers="null"))
    except BadText:
        for line in filter(str.strip, split_lines(text)):
            try:
                yield from _strings(parse_json(line, strict=False, foreign_numbers="null"))
            except BadText:
                yield line


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


class DecontaminateStep(Step):
    """Drops documents that share `hits` n-grams or more with the index."""

    name = "decontaminate"

    def __init__(self, settings: DecontaminateSettings, index: Path) -> None:
        self.settings, self.index = settings, str(index)

    def digest_source(self, split: Split) -> Any:
        return [self.settings.ngram, self.settings.hits, file_digest(self.index)]

    def process(self, document: Document, row: int, figures: PartFigures) -> Iterator[Document]:
        n = self.settings.ngram
        codes = normalise(document.text)
        hashes = shingle_hashes(codes, n)
        shared = _shared(hashes, self.index, Path(self.index).stat().st_mtime_ns)
        count = len(np.unique(hashes[shared]))
        if count >= self.settings.hits:
            place = int(shared[0])
            sample = codes[place:place + n].astype("<u4").tobytes().decode("utf-32-le", "replace")
            raise Drop("evaluation_overlap", f"{count} n-grams of an evaluation set, such as: {sample}")
        yield document


def _shared(hashes: np.ndarray, path: str, changed: int) -> np.ndarray:
    """Positions of the n-grams that are in the index."""
    index, bits = _index(path, changed)
    likely = np.flatnonzero(bits[hashes >> np.uint64(64 - _FILTER_BITS)])
    places = np.minimum(np.searchsorted(index, hashes[likely]), len(index) - 1)
    return likely[index[places] == hashes[likely]]


@functools.lru_cache(maxsize=2)
def _index(path: str, changed: int) -> tuple[np.ndarray, np.ndarray]:
    """(sorted hashes, one flag for each value of their first 24 bits: most n-grams are ruled out by it)."""
    index = load_array(path)
    bits = np.zeros(1 << _FILTER_BITS, dtype=bool)
    bits[index >> np.uint64(64 - _FILTER_BITS)] = True
    return index, bits
