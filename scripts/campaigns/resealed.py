"""JSON of trained models that is well-formed, carries the right digest and says something else: typed by hand, written
by another program, or by an attacker. Every reader takes it or refuses it in one line."""

from __future__ import annotations

import contextlib
import io
import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from campaigns.base import Campaign
from campaigns.damage import train_vocabulary
from campaigns.mutations import mutated_tree

SHORT = 1
_TINY = ["model.layers=2", "model.hidden_size=16", "model.heads=2", "model.sequence_length=16",
         "model.vocabulary_size=950", "train.global_batch_size=4", "train.steps=2", "train.validate_every=null"]
_RANKER = ["train.steps=2", "train.global_batch_size=64", "data.synthetic.samples=1000", "train.validate_every=null"]


@dataclass
class Kind:
    """One kind of file.

    Args:
        name: for the counts.
        file: the JSON.
        read: what reads it as a user's command would.
    """

    name: str
    file: Path
    read: Callable[[], Any]


def run(campaign: Campaign) -> None:
    """Trains a model of each family, then changes what their files say over and over."""
    folder = campaign.folder / "resealed"
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [*language_model(folder), *ranker(folder)]
    rng, done = campaign.part("resealed"), 0
    while campaign.more(done, SHORT * len(kinds)):
        trial(campaign, kinds[done % len(kinds)], rng)
        done += 1


def trial(campaign: Campaign, kind: Kind, rng: random.Random) -> None:
    """A file says one thing otherwise, is read, and is put back."""
    from parallel.common.files import json_with_digest, read_json

    before, tree = kind.file.read_text(), read_json(kind.file)
    after = json_with_digest(_writable(mutated_tree(tree, rng)))
    try:
        kind.file.write_text(after)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            campaign.attempt(f"resealed {kind.name}", lambda _: kind.read(), after.encode(), shrink=False)
    finally:
        kind.file.write_text(before)


def _writable(value: Any) -> Any:
    """A tree without what no JSON file can hold."""
    return json.loads(json.dumps(value, default=str).encode("utf-8", "replace"))


def command(package: str, *words: object) -> None:
    """Runs a command of the project, which must succeed."""
    done = subprocess.run([sys.executable, "-m", package, *map(str, words)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])


def language_model(folder: Path) -> list[Kind]:
    """A tiny PanGu, in float and in int8."""
    from pangu.generation.backend import load_backend
    from pangu.settings import Run
    from parallel.common.settings import load_settings

    vocabulary, home = folder / "vocabulary.model", folder / "pangu"
    words = [*_TINY, f"data.corpus={folder / 'world.jsonl'}", f"data.tokenizer={vocabulary}",
             f"data.directory={folder / 'records'}", f"output.directory={home}"]
    if not home.exists():
        train_vocabulary(folder, vocabulary)
        command("pangu", "pack", *words)
        command("pangu", "train", *words)
        command("pangu", "quantize", *words, "--checkpoint", home, "--output", folder / "int8", "--records", 0)
    settings = load_settings(Run, None, words)
    found = []
    for name, place in (("pangu", home), ("int8 pangu", folder / "int8")):
        step = next((place / "checkpoints").glob("step_*"))
        found += [Kind(f"{name} {file.name}", file, lambda step=step: load_backend(settings, step))
                  for file in sorted(step.glob("*.json"))]
    step = next((home / "checkpoints").glob("step_*"))
    found.append(Kind("pangu resume", step / "state.json", lambda: resumed("pangu", "train", *words)))
    found.append(Kind("records index.json", folder / "records" / "index.json",
                      lambda: resumed("pangu", "train", *words)))
    return found


def resumed(package: str, verb: str, *words: str) -> None:
    """A run that is finished, begun again: everything is read, nothing trained. In this process."""
    import importlib

    from parallel.common import command as door
    from parallel.common.errors import UserError

    verbs = importlib.import_module(f"{package}.__main__").VERBS
    code = door.main(package, verbs, [verb, *words])
    if code not in (0, 2):
        raise RuntimeError(f"exit code {code}")
    if code == 2:
        raise UserError("refused")


def ranker(folder: Path) -> list[Kind]:
    """A small ranker, in float and in W8A16."""
    from recsys.saved_model import load

    root = Path(__file__).resolve().parents[2]
    config, home = root / "configs" / "recsys" / "rankmixer_ug_sep.yaml", folder / "ranker"
    words = ["--config", str(config), *_RANKER, f"data.cache={folder / 'cache'}", f"output.directory={home}"]
    if not home.exists():
        command("recsys", "train", *words)
        command("recsys", "quantize", "--checkpoint", home, "--output", folder / "w8a16")
    found = []
    for name, place in (("ranker", home), ("w8a16 ranker", folder / "w8a16")):
        step = next((place / "checkpoints").glob("step_*"))
        words_of = next(file for file in (step / "vocabulary.json", place / "vocabulary.json") if file.exists())
        found += [Kind(f"{name} {file.name}", file, lambda step=step: load(step))
                  for file in sorted({*step.glob("*.json"), words_of})]
    step = next((home / "checkpoints").glob("step_*"))
    found.append(Kind("ranker resume", step / "state.json", lambda: resumed("recsys", "train", *words)))
    return found
