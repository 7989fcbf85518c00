"""Which of several cleaned versions of a corpus trains the better model? (PanGu-alpha paper, section 3.1.3)

From each version a sample of one size is drawn, the same model is trained on each with the same seed, steps and
vocabulary, and their perplexities on one development set are compared; lower is better. The paper trains its 350M model
on 30 GB; the tiny config does it in minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from data_tools.dedup.normalise import normalise
from data_tools.dedup.sign_part import node_digest
from data_tools.documents import RecordWriter, plan_splits, read_split
from data_tools.flags import need
from data_tools.pangu_call import call_pangu
from data_tools.records import Document, ReadLog, ReadSettings
from data_tools.settings import ComparisonSettings, DataSettings
from data_tools.steps.filter import uniform
from parallel.common.errors import UserError
from parallel.common.files import read_json, write_json
from parallel.common.progress import info, progress, table


def run_compare_versions(settings: DataSettings, arguments: argparse.Namespace) -> dict[str, Any]:
    """`compare-versions`: one perplexity a version; a version that is done is not trained again."""
    need(arguments, "versions", "development", "output")
    quality, output = settings.quality, Path(arguments.output).resolve()
    versions = _names(arguments.versions)
    development = _write_development(arguments.development, settings.read, output)
    samples = {name: draw_sample([path], settings.read, quality, _sample_path(output, name), development)
               for name, path in versions.items()}
    common = _common_keys(quality, output)
    if quality.tokenizer is None and not Path(common["data.tokenizer"]).is_file():
        call_pangu("train-vocabulary", quality.pangu_config, {**common, "data.corpus": _all_samples(output, versions)})
    _pack(quality, common, output / "development")
    perplexity = {name: _train(quality, common, output, name) for name in versions}
    best = min(perplexity, key=lambda name: perplexity[name])
    table("perplexity on the development set", ["version", "characters", "perplexity"],
          [[name, samples[name], value] for name, value in perplexity.items()])
    info(f"the better version: {best}")
    return {"perplexity": perplexity, "better": best, "characters": quality.characters, "output": str(output)}


def _sample_path(output: Path, name: str) -> Path:
    return output / name / "sample" / "part-00000.jsonl"


def _names(paths: list[str]) -> dict[str, str]:
    """A name for each version: its folder's, numbered where two are alike."""
    if len(paths) < 2:
        raise UserError("give at least two versions to compare", where="--versions", value=paths)
    names: dict[str, str] = {}
    for path in paths:
        stem = Path(path).resolve().name or "version"
        name = stem if stem not in names and stem != "development" else f"{stem}-{len(names) + 1}"
        names[name] = path
    return names


def _write_development(inputs: list[str], read: ReadSettings, output: Path) -> set[bytes]:
    """Copies the development set; returns the digests of its texts, which no sample may hold."""
    digests = set()
    with RecordWriter(_sample_path(output, "development")) as writer:
        for split in progress(plan_splits(inputs, read), "development set"):
            for document in read_split(split, read, ReadLog()):
                digests.add(node_digest(document.text, normalise(document.text), 1))
                writer.write(document.record())
    return digests


def draw_sample(inputs: list[str], read: ReadSettings, quality: ComparisonSettings, path: Path,
                excluded: set[bytes]) -> int:
    """Writes a random sample of `quality.characters` characters; returns how many it has.

    Each document has a number from the seed and its text; those with the smallest numbers are taken, so that a document
    that is in two versions is in both samples or in neither, as far as their sizes allow.

    Raises:
        UserError: the version is too small.
    """
    found: list[tuple[float, int, int, int]] = []
    splits = plan_splits(inputs, read)
    for split in progress(splits, f"sampling {inputs[0]}"):
        for row, document in enumerate(read_split(split, read, ReadLog())):
            if node_digest(document.text, normalise(document.text), 1) not in excluded:
                found.append((uniform(quality.seed, document.text), split.index, row, len(document.text)))
    chosen, total = set(), 0
    for _, index, row, length in sorted(found):
        if total >= quality.characters:
            break
        chosen.add((index, row))
        total += length
    if total < quality.characters:
        raise UserError("the version has too few characters", where=inputs[0], value=total,
                        hint=f"lower quality.characters (now {quality.characters})")
    with RecordWriter(path) as writer:
        for split in splits:
            for row, document in enumerate(read_split(split, read, ReadLog())):
                if (split.index, row) in chosen:
                    writer.write(_plain(document))
    return total


def _plain(document: Document) -> dict[str, str]:
    return {"id": document.id, "text": document.text, "source": document.source}


def _common_keys(quality: ComparisonSettings, output: Path) -> dict[str, Any]:
    tokenizer = Path(quality.tokenizer).resolve() if quality.tokenizer else output / "vocabulary.model"
    keys = {**quality.pangu, "data.tokenizer": str(tokenizer)}
    if quality.vocabulary_size is not None:
        keys["model.vocabulary_size"] = quality.vocabulary_size
    return keys


def _all_samples(output: Path, versions: dict[str, str]) -> str:
    """A folder with the samples of all versions, for the one vocabulary."""
    folder = output / "samples"
    folder.mkdir(exist_ok=True)
    for name in versions:
        link = folder / f"{name}.jsonl"
        link.unlink(missing_ok=True)
        link.symlink_to(_sample_path(output, name))
    return str(folder)


def _pack(quality: ComparisonSettings, common: dict[str, Any], folder: Path) -> None:
    call_pangu("pack", quality.pangu_config, {
        **common, "data.corpus": str(folder / "sample"), "data.directory": str(folder / "records"),
        "pack.validation_fraction": 0.0, "pack.overwrite": True})


def _train(quality: ComparisonSettings, common: dict[str, Any], output: Path, name: str) -> float:
    """Perplexity of the model trained on one version."""
    folder = output / name
    wanted = {"settings": quality.model_dump(mode="json"),
              "sample": _sample_path(output, name).stat().st_size}
    marker = folder / "perplexity.json"
    if marker.is_file() and (done := read_json(marker))["wanted"] == wanted:
        info(f"{name}: trained already")
        return done["perplexity"]
    _pack(quality, common, folder)
    figures = call_pangu("train", quality.pangu_config, {
        **common, "data.directory": str(folder / "records"),
        "data.validation_directory": str(output / "development" / "records"),
        "output.directory": str(folder / "model"), "output.resume": "auto"})
    perplexity = figures["validation_perplexity"]
    write_json(marker, {"wanted": wanted, "perplexity": perplexity, "figures": figures})
    return perplexity
