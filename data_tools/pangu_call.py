"""Calls the language model's command line: `vocabulary`, `pack` and `train` live there, in another package."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from data_tools.documents import find_files
from parallel.common.errors import UserError
from parallel.common.lines import split_lines
from parallel.common.progress import note
from parallel.common.structured import BadText, parse_object
from parallel.common.yaml_core import dump_yaml

_ROOT = Path(__file__).resolve().parent.parent


def call_pangu(verb: str, config: str | None, overrides: dict[str, Any]) -> dict[str, Any]:
    """Runs `python -m pangu <verb>` with `key=value` for every override; returns its JSON line.

    Its progress goes to our stderr.

    Raises:
        UserError: the command failed; its own message stands above.
    """
    words = [sys.executable, "-m", "pangu", verb, *(["--config", config] if config else [])]
    words += [f"{key}={dump_yaml(value, flow=True)}" for key, value in overrides.items()]
    note(f"pangu {verb} ...")
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, encoding="utf-8", cwd=_ROOT, check=False)
    if done.returncode != 0:
        raise UserError(f"python -m pangu {verb} failed", value=f"exit code {done.returncode}",
                        hint="its message stands above")
    try:
        return parse_object(split_lines(done.stdout.strip())[-1])
    except (IndexError, BadText):
        raise UserError(f"python -m pangu {verb} printed no figures", value=done.stdout[-200:]) from None


def link_documents(inputs: list[str], folder: Path) -> Path:
    """A folder with links to exactly the input files, numbered in their order; what the language model then reads.

    Raises:
        UserError: an input is of a format that the language model does not read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for number, (path, _) in enumerate(find_files(inputs)):
        if not any(suffix in (".jsonl", ".txt") for suffix in path.suffixes):
            raise UserError("the language model reads jsonl and text", where=path,
                            hint="write the documents with --format jsonl")
        (folder / f"{number:06d}{''.join(path.suffixes[-2:])}").symlink_to(path.resolve())
    return folder


def run_vocabulary(settings: None, arguments: argparse.Namespace) -> dict[str, Any]:
    """`vocabulary`: a SentencePiece vocabulary of the documents."""
    return _call_on_documents("vocabulary", "data.tokenizer", arguments)


def run_pack(settings: None, arguments: argparse.Namespace) -> dict[str, Any]:
    """`pack`: the documents as records of token ids for training."""
    return _call_on_documents("pack", "data.directory", arguments)


def _call_on_documents(verb: str, output_key: str, arguments: argparse.Namespace) -> dict[str, Any]:
    output = Path(arguments.output).resolve()
    corpus = link_documents(arguments.input, output.parent / f".{output.name}.corpus")
    overrides: dict[str, Any] = {"data.corpus": str(corpus), output_key: str(output)}
    if verb == "pack" and arguments.tokenizer is not None:
        overrides["data.tokenizer"] = str(Path(arguments.tokenizer).resolve())
    if arguments.size is not None:
        overrides["model.vocabulary_size"] = arguments.size
    try:
        return call_pangu(verb, arguments.pangu_config, overrides)
    finally:
        _unlink(corpus)


def _unlink(folder: Path) -> None:
    for link in folder.iterdir():
        link.unlink()
    folder.rmdir()
