"""The training mixture: each category drawn by its number of epochs, shuffled, the same for a seed.

Weights are those of Table 4 of the PanGu-alpha paper. The quantities in that table do not all agree with its weights,
so the weights, normalised, are taken as the sampling ratios (as understood here).
"""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic

from data_tools.documents import OutputFormat, RecordWriter, read_split
from data_tools.engines.base import Engine
from data_tools.parts import OutputLayout, PartFigures, clear_stale, digest_of, histogram_bin, split_identity
from data_tools.records import Document, ReadLog, ReadSettings, Split
from data_tools.steps.filter import uniform
from parallel.common.digests import file_crc32, load_array, save_array
from parallel.common.errors import UserError
from parallel.common.files import atomic_write, read_json, write_json
from parallel.common.json_text import dump_json
from parallel.common.progress import info, table
from parallel.common.settings import Settings
from parallel.common.structured import parse_object

# Table 4, column "weight", in percent.
PRESETS = {
    "pangu_alpha_200b": {"public": 10.23, "ebooks": 12.23, "common_crawl": 62.81, "news": 7.83, "encyclopedia": 6.9},
    "pangu_alpha_2.6b_13b": {"public": 27.99, "ebooks": 18.0, "common_crawl": 10.0, "news": 22.0, "encyclopedia": 23.0},
}
_COUNTED = ("characters", "bytes", "documents", "unknown", "bins")


class MixSettings(Settings):
    """How much of each category goes into the mixture; off without weights."""

    preset: Literal["pangu_alpha_200b", "pangu_alpha_2.6b_13b"] | None = None
    """Weights of Table 4: for 200B, or for 2.6B and 13B."""
    weights: dict[str, float] = {}
    """Weight of each category, instead of a preset's; any scale."""
    categories: dict[str, list[str]] = {}
    """Which sources belong to a category, as patterns (`news*`); one not named here is the source of that name."""
    characters: float | None = pydantic.Field(None, gt=0)
    """Characters of the mixture; null = the most that `maximum_epochs` allows."""
    maximum_epochs: float = pydantic.Field(4.0, gt=0)
    """Most often that a category may be repeated (the paper's own go up to 3.65)."""
    allow_missing: bool = False
    """Leave categories without a document out, their weight going to the others; otherwise that is an error."""
    seed: int = 1
    """Decides what is drawn and in which order."""
    shard_characters: float = pydantic.Field(2e7, ge=1)
    """Characters in an output file, about."""

    def active_weights(self) -> dict[str, float]:
        return dict(self.weights or (PRESETS[self.preset] if self.preset else {}))


def category_of(source: str, settings: MixSettings) -> str | None:
    """The category of a source, None if it has none."""
    for category in settings.active_weights():
        if any(fnmatch.fnmatchcase(source, pattern) for pattern in settings.categories.get(category, [category])):
            return category
    return None


@dataclass(frozen=True)
class _CountTask:
    """Characters and documents of each category in one part."""

    settings: MixSettings
    read: ReadSettings
    split: Split

    def __call__(self) -> dict[str, Counter]:
        counts = {name: Counter() for name in _COUNTED}
        for document in read_split(self.split, self.read, ReadLog()):
            category = category_of(document.source, self.settings)
            if category is None:
                counts["unknown"][document.source] += 1
                continue
            counts["characters"][category] += len(document.text)
            counts["bytes"][category] += len(document.text.encode())
            counts["documents"][category] += 1
            counts["bins"][histogram_bin(len(document.text))] += 1
        return counts


@dataclass(frozen=True)
class MixPlan:
    """Epochs of each category, and the number of output files."""

    settings: MixSettings
    read: ReadSettings
    epochs: dict[str, float]
    shards: int
    work: str

    def drawn_path(self, part: int) -> Path:
        """The copies drawn from a part, as JSON lines; `.npy` beside it: int64 [copies, 3], shard, offset, bytes."""
        return Path(self.work) / f"part-{part:05d}.jsonl"


def plan_epochs(settings: MixSettings, characters: dict[str, int]) -> dict[str, float]:
    """Passes over each category: characters wanted of it / characters there are.

    Raises:
        UserError: a category with a weight has no document, or more epochs are wanted than allowed.
    """
    weights = settings.active_weights()
    missing = [name for name, weight in weights.items() if weight > 0 and not characters.get(name)]
    if missing and not settings.allow_missing:
        raise UserError(f"no documents in the categories {', '.join(missing)}", where="mix.weights",
                        hint="name their sources under mix.categories, or set mix.allow_missing=true")
    weights = {name: weight for name, weight in weights.items() if name not in missing and weight > 0}
    if not weights:
        raise UserError("no category has both a weight and documents", where="mix.weights")
    whole = sum(weights.values())
    per_character = {name: weight / whole / characters[name] for name, weight in weights.items()}
    total = settings.characters or settings.maximum_epochs / max(per_character.values())
    epochs = {name: total * share for name, share in per_character.items()}
    worst = max(epochs, key=lambda name: epochs[name])
    if epochs[worst] > settings.maximum_epochs * (1 + 1e-9):
        raise UserError(f"category {worst} would be repeated {epochs[worst]:.2f} times", where="mix.characters",
                        value=settings.characters, hint="ask for fewer characters or raise mix.maximum_epochs")
    return epochs


def copies_of(document: Document, epochs: float, seed: int) -> int:
    """How often the document occurs in the mixture: epochs rounded down, and once more with the chance left over."""
    whole = int(epochs)
    return whole + (uniform(seed, "draw", document.id, document.text) < epochs - whole)


@dataclass(frozen=True)
class _DrawTask:
    """Writes the copies of each document of a part, and the shard, position in the file and checksum of each."""

    plan: MixPlan
    split: Split

    def __call__(self) -> None:
        path, index, offset = self.plan.drawn_path(self.split.index), [], 0
        with atomic_write(path, "wb") as file:
            for document in read_split(self.split, self.plan.read, ReadLog()):
                category = category_of(document.source, self.plan.settings)
                epochs = self.plan.epochs.get(category, 0.0)
                for copy in range(copies_of(document, epochs, self.plan.settings.seed)):
                    place = _sort_key(self.plan.settings.seed, document, copy)
                    record = document.record()
                    record["id"] = document.id if copy == 0 else f"{document.id}#{copy + 1}"
                    record["category"], record["_place"] = category, place
                    line = dump_json(record).encode() + b"\n"
                    index.append((int(place[:12], 16) % self.plan.shards, offset, len(line), zlib.crc32(line)))
                    offset += file.write(line)
        save_array(path.with_suffix(".npy"), np.array(index, dtype=np.int64).reshape(-1, 4))


def _sort_key(seed: int, document: Document, copy: int) -> str:
    """Sorting by this shuffles: it depends on the seed, the document and the number of the copy."""
    source = "\x1f".join([str(seed), str(copy), document.id, document.text])
    return hashlib.blake2b(source.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class _SortTask:
    """One output file: the copies of its shard out of all parts, in shuffled order."""

    plan: MixPlan
    shard: int
    parts: tuple[int, ...]
    layout: OutputLayout
    format: OutputFormat

    def __call__(self) -> PartFigures:
        figures, records = PartFigures(), []
        for part in self.parts:
            path = self.plan.drawn_path(part)
            index = load_array(path.with_suffix(".npy"))
            with path.open("rb") as file:
                for _, offset, length, crc32 in index[index[:, 0] == self.shard].tolist():
                    file.seek(offset)
                    if zlib.crc32(line := file.read(length)) != crc32:
                        raise UserError("file is damaged: it has changed since it was written", where=path,
                                        hint="make it anew")
                    records.append(parse_object(line))
        records.sort(key=lambda record: (record["_place"], record["id"]))
        with RecordWriter(Path(self.layout.documents) / f"part-{self.shard:05d}.{self.format}") as out:
            for record in records:
                del record["_place"]
                figures.documents_out += 1
                figures.bytes_out += len(record["text"].encode())
                figures.characters_out[histogram_bin(len(record["text"]))] += 1
                figures.by_source[record["category"]] += len(record["text"])
                figures.copies_by_category[record["category"]] += 1
                out.write(record)
        return figures


def run_mix(settings: MixSettings, read: ReadSettings, splits: list[Split], layout: OutputLayout, work: str | Path,
            engine: Engine, format: OutputFormat) -> tuple[PartFigures, dict[str, Any]]:
    """Counts, draws, shuffles; returns the figures and, for each category, epochs, characters and share.

    Raises:
        UserError: no weights; a source without a category; see `plan_epochs`.
    """
    if not settings.active_weights():
        raise UserError("no weights to mix by", where="mix", hint="set mix.preset or mix.weights")
    counts = _count(settings, read, splits, engine)
    epochs = plan_epochs(settings, counts["characters"])
    total = sum(epochs[name] * counts["characters"][name] for name in epochs)
    plan = MixPlan(settings, read, epochs, max(1, round(total / settings.shard_characters)), str(work))
    clear_stale(layout, {f"part-{shard:05d}.{format}" for shard in range(plan.shards)})
    digest = digest_of([settings.model_dump(mode="json"), read.model_dump(mode="json"), format,
                        [split_identity(split) for split in splits]])
    figures = _draw_and_sort(plan, splits, layout, engine, format, digest)
    figures.documents_in = sum(counts["documents"].values())
    figures.bytes_in = sum(counts["bytes"].values())
    figures.characters_in = counts["bins"]
    return figures, _category_figures(counts, epochs, figures)


def _count(settings: MixSettings, read: ReadSettings, splits: list[Split], engine: Engine) -> dict[str, Counter]:
    totals = {name: Counter() for name in _COUNTED}
    for counts in engine.map(_call, [_CountTask(settings, read, split) for split in splits], "mix: counting"):
        for name, counter in counts.items():
            totals[name].update(counter)
    if totals["unknown"]:
        names = ", ".join(name for name, _ in totals["unknown"].most_common(5))
        raise UserError(f"{sum(totals['unknown'].values())} documents are of no category, of the sources {names}",
                        where="mix.categories", hint="give their sources a category, or remove them before")
    return totals


def _draw_and_sort(plan: MixPlan, splits: list[Split], layout: OutputLayout, engine: Engine, format: OutputFormat,
                   digest: str) -> PartFigures:
    marker = Path(layout.state) / "done.json"
    outputs = [Path(layout.documents) / f"part-{shard:05d}.{format}" for shard in range(plan.shards)]
    if all(path.is_file() for path in outputs):
        done = _read_marker(marker)
        if done.get("digest") == digest and done.get("crc32") == sorted(engine.map(_sum_of, outputs, "mix: compare")):
            info("mix: the mixture was made already")
            return PartFigures.from_json(done["figures"])
    list(engine.map(_call, [_DrawTask(plan, split) for split in splits], "mix: drawing"))
    parts, total = tuple(split.index for split in splits), PartFigures()
    tasks = [_SortTask(plan, shard, parts, layout, format) for shard in range(plan.shards)]
    for figures in engine.map(_call, tasks, "mix: shuffling"):
        total.add(figures)
    write_json(marker, {"digest": digest, "figures": total.to_json(),
                        "crc32": sorted(engine.map(_sum_of, outputs, "mix: checksums"))})
    shutil.rmtree(plan.work, ignore_errors=True)
    return total


def _read_marker(path: Path) -> dict[str, Any]:
    """What stands there; {} where nothing does or it is damaged: the mixture is made anew."""
    try:
        return read_json(path, dict, sealed=True) if path.is_file() else {}
    except UserError:
        return {}


def _sum_of(path: Path) -> list[Any]:
    return [path.name, file_crc32(path)]


def _category_figures(counts: dict[str, Counter], epochs: dict[str, float], figures: PartFigures) -> dict[str, Any]:
    """Per category what went in and came out; a low mean length biases a model to short texts (paper, section 3.2)."""
    whole = sum(figures.by_source.values()) or 1
    found = {}
    for name, passes in epochs.items():
        documents, out, copies = counts["documents"][name], figures.by_source[name], figures.copies_by_category[name]
        found[name] = {
            "documents_in": documents, "characters_in": counts["characters"][name],
            "mean_characters_in": round(counts["characters"][name] / max(1, documents), 1), "epochs": round(passes, 4),
            "documents_out": copies, "characters_out": out, "mean_characters_out": round(out / max(1, copies), 1),
            "share": round(out / whole, 6)}
    table("mix", ["category", *(key.replace("_", " ") for key in next(iter(found.values())))],
          [[name, *values.values()] for name, values in found.items()])
    return found


def _call(task: Any) -> Any:
    return task()
