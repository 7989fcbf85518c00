"""Documents to MindRecord: ids of all documents in a row, split into records of sequence_length + 1.

Every document goes to exactly one shard, and a shard depends only on its documents: the same corpus, settings and shard
count give the same records however many processes write them.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pangu.data import corpus
from pangu.data.flat import FlatFile
from pangu.data.mind_records import RecordChecks
from pangu.data.packing_shards import PackTokenizer, Shard, WriterPool
from parallel.common.errors import UserError
from parallel.common.files import explain_os_error, read_json, write_json
from parallel.common.folders import put_in_place, sweep, temporary_name
from parallel.common.progress import Bar, table
from parallel.common.settings import Settings, validate

INDEX_FILE = "index.json"
INDEX_FORMAT, INDEX_VERSION = "pangu packed records", 1
SPLITS = ("train", "validation")

_BLOCK_CHARACTERS = 64 << 10  # texts travel to the writers in blocks of about this size
_COMPRESSION = 4  # a guess of how much larger a compressed corpus is when read; only chooses the number of shards


class PackOptions(Settings):
    """How documents become records."""

    validation_fraction: float = Field(0.01, ge=0.0, lt=1.0)
    """Share of the documents held out for validation, chosen by a hash of their text."""
    last_chunk: Literal["pad", "drop"] = "pad"
    """The last, short record of a shard: filled with <pad> (6, without loss) or left out. The published code drops it,
    the SDK pads; padding is the default here because it loses no text."""
    text_key: str = "text"
    """Key of the text in a JSON line."""
    whole_file: bool = False
    """A text file is one document; otherwise blank lines part its documents."""
    shards: int = Field(0, ge=0, le=1000)
    """Training files to write; 0 takes one for every 8 MB of corpus, up to 16, and then one for every GB."""
    workers: int = Field(0, ge=0, le=256)
    """Processes that tokenize and write; 0 takes the processors, at most one a shard. Changes no record."""
    flat: bool = True
    """Write the records a second time as flat files that are mapped from the disk, which training reads first and
    which need no MindSpore; false leaves them to `python -m pangu flatten`."""
    overwrite: bool = False
    """Replace an earlier packing in the same folder."""


class PackSettings(PackOptions):
    """What is packed, and how."""

    corpus: str = "corpus.jsonl"
    """Corpus to pack: .txt, .jsonl, .xz/.gz/.zst of them, or a folder of such files."""
    tokenizer: str = "tokenizer.model"
    """SentencePiece model file of the tokenizer."""
    output: str = "output/packed"
    """Folder to make for the records and their index."""
    sequence_length: int = Field(1024, ge=1, le=1 << 20)
    """Tokens the model sees at once; a record holds one more, so that every input has its label."""


class PackedFile(Settings):
    """A MindRecord file in the index."""

    file: str
    """Name inside the folder."""
    documents: int = Field(ge=0)
    """Documents in it."""
    tokens: int = Field(ge=0)
    """Ids in it, ends of documents included, padding not."""
    records: int = Field(ge=0)
    """Rows of sequence_length + 1 ids."""
    bytes: int = Field(ge=0)
    """Size of the file, to notice a copy that was truncated."""
    flat: FlatFile | None = None
    """The same records as flat files, if there are any."""
    checks: RecordChecks | None = None
    """Checksums; null = written without."""


class PackedSplit(Settings):
    """Training or validation records: totals and files."""

    documents: int = Field(ge=0)
    """Documents."""
    tokens: int = Field(ge=0)
    """Ids, ends of documents included, padding not."""
    records: int = Field(ge=0)
    """Rows of sequence_length + 1 ids."""
    files: list[PackedFile]
    """The files in the order in which they are read; empty when there is no record."""


class PackIndex(Settings):
    """What index.json says about the records beside it."""

    format: Literal["pangu packed records"] = INDEX_FORMAT
    """Always this."""
    version: Literal[1] = INDEX_VERSION
    """Version of this list of keys."""
    sequence_length: int = Field(ge=1)
    """A record holds one id more."""
    vocabulary_size: int = Field(ge=1)
    """All ids are below."""
    eot_id: int
    """Ends every document."""
    pad_id: int
    """Fills the last record."""
    tokenizer_sha256: str
    """Of the model file that made the ids."""
    last_chunk: Literal["pad", "drop"]
    """As in PackOptions."""
    validation_fraction: float
    """As in PackOptions."""
    train: PackedSplit
    """Records to train on."""
    validation: PackedSplit
    """Records held out."""


def read_index(directory: str | Path) -> PackIndex:
    """The index of a folder of packed records.

    Raises:
        UserError: none there, damaged, or of another version.
    """
    path = Path(directory) / INDEX_FILE
    if not path.is_file():
        raise UserError("no packed records here", where=directory, hint="make them with `python -m pangu pack`")
    tree = read_json(path)
    if not isinstance(tree, dict):
        raise UserError("index is damaged", where=path, hint="pack the corpus again")
    return validate(PackIndex, tree, where=str(path))


# ---------------------------------------------------------------- the whole run

def run_pack(settings: PackSettings, arguments: Any = None) -> dict:
    """Packs `settings.corpus` with `settings.tokenizer` into the folder `settings.output`.

    Returns:
        figures: output, documents, tokens, records, validation_documents, validation_records, shards, workers,
        corpus_mb (UTF-8), seconds, mb_per_second.
    Raises:
        UserError: corpus or tokenizer missing or damaged, output there already, no space on the disk.
    """
    texts = corpus.documents(settings.corpus, text_key=settings.text_key, whole_file=settings.whole_file)
    factory = functools.partial(_load_tokenizer, settings.tokenizer)
    figures = pack(texts, factory, settings, output=settings.output, sequence_length=settings.sequence_length,
                   corpus_bytes=_text_bytes(settings.corpus))
    table(f"packed into {settings.output}", ["figure", "value"], figures.items())
    return figures


def _load_tokenizer(path: str) -> PackTokenizer:
    from pangu.data.tokenizer import Tokenizer

    return Tokenizer(path)


def _text_bytes(path: str | Path) -> int:
    """About how many bytes of text the corpus holds."""
    return sum(file.stat().st_size * (_COMPRESSION if file.suffix in corpus.COMPRESSED_SUFFIXES else 1)
               for file in corpus.corpus_files(path))


def pack(texts: Iterable[str], tokenizer_factory: Callable[[], PackTokenizer], settings: PackOptions, *,
         output: str | Path, sequence_length: int, corpus_bytes: int = 0) -> dict:
    """Packs a stream of documents into the folder `output`; see `run_pack`.

    Args:
        texts: the documents; read once, in order, never held all at once.
        tokenizer_factory: makes the tokenizer, in every process anew, so it must be picklable if there are several.
        settings: `text_key` and `whole_file` are not looked at here.
        corpus_bytes: about the size of the text, to choose the number of shards.
    """
    output, started = Path(output), time.perf_counter()
    _refuse_occupied(output, settings.overwrite)
    tokenizer = tokenizer_factory()
    shards = settings.shards or default_shards(corpus_bytes)
    workers = min(settings.workers or len(os.sched_getaffinity(0)), shards)
    partial = temporary_name(output)
    try:
        partial.mkdir(parents=True)
        sweep(partial.parent)
        counter = _Counter(texts)
        plans = _plan(partial, shards, settings, sequence_length, tokenizer)
        blocks = _deal(counter, shards, settings.validation_fraction)
        parts = _write_all(plans, blocks, workers, tokenizer_factory, tokenizer)
        index = _index(parts, settings, sequence_length, tokenizer)
        write_json(partial / INDEX_FILE, index.model_dump())
        put_in_place(partial, output)
    except OSError as error:
        raise explain_os_error(error, output) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    seconds = time.perf_counter() - started
    train, validation = index.train, index.validation
    return {
        "output": str(output), "documents": train.documents + validation.documents,
        "tokens": train.tokens + validation.tokens, "records": train.records,
        "validation_documents": validation.documents, "validation_records": validation.records,
        "shards": len(train.files), "workers": workers, "corpus_mb": round(counter.bytes / 1e6, 3),
        "seconds": round(seconds, 2), "mb_per_second": round(counter.bytes / 1e6 / seconds, 3),
    }


def default_shards(corpus_bytes: int) -> int:
    """Training files for a corpus of this size: a function of the corpus alone, so that machines agree."""
    small, large = -(-corpus_bytes // (8 << 20)), -(-corpus_bytes // (1 << 30))
    return min(1000, max(1, min(16, small), large))


class _Counter:
    """Passes documents on under a progress bar and counts their bytes."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.bytes = texts, 0

    def __iter__(self) -> Iterator[str]:
        with Bar(None, "pack documents") as bar:
            for text in self.texts:
                self.bytes += len(text.encode())
                yield text
                bar.advance(1, MB=f"{self.bytes / 1e6:.1f}")


def _deal(texts: Iterable[str], shards: int, validation_fraction: float) -> Iterator[tuple[int, list[str]]]:
    """Blocks of documents in their order, each with the number of its shard; validation is shard number `shards`."""
    blocks: dict[str, list[str]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    turn = itertools.cycle(range(shards))
    for text in texts:
        split = SPLITS[corpus.in_validation(text, validation_fraction)]
        blocks[split].append(text)
        sizes[split] += len(text)
        if sizes[split] >= _BLOCK_CHARACTERS:
            yield (shards if split == "validation" else next(turn)), blocks[split]
            blocks[split], sizes[split] = [], 0
    for split, block in blocks.items():
        if block:
            yield (shards if split == "validation" else next(turn)), block


def _plan(folder: Path, shards: int, settings: PackOptions, sequence_length: int,
          tokenizer: PackTokenizer) -> list[dict]:
    """Arguments of every `Shard`: the training shards, then the one for validation."""
    names = [("train", f"train-{number:05d}-of-{shards:05d}") for number in range(shards)]
    names.append(("validation", "validation-00000-of-00001"))
    return [{"split": split, "path": str(folder / f"{name}.mindrecord"), "record_length": sequence_length + 1,
             "eot_id": tokenizer.eot_id, "pad_id": tokenizer.pad_id, "pad": settings.last_chunk == "pad",
             "flat": settings.flat, "vocabulary_size": tokenizer.vocabulary_size} for split, name in names]


def _index(parts: list[dict], settings: PackOptions, sequence_length: int, tokenizer: PackTokenizer) -> PackIndex:
    """The index of what was written; raises when there is nothing to train on."""
    splits = {}
    for split in SPLITS:
        files = [PackedFile(**{key: value for key, value in part.items() if key != "split"})
                 for part in parts if part["split"] == split]
        totals = {key: sum(getattr(file, key) for file in files) for key in ("documents", "tokens", "records")}
        splits[split] = PackedSplit(**totals, files=[file for file in files if file.records])
    if not splits["train"].records:
        raise UserError("the corpus does not fill a single training record", where="pack",
                        value=f"{splits['train'].tokens} tokens",
                        hint="give more text, a smaller sequence_length, or last_chunk=pad")
    return PackIndex(
        sequence_length=sequence_length, vocabulary_size=tokenizer.vocabulary_size, eot_id=tokenizer.eot_id,
        pad_id=tokenizer.pad_id, tokenizer_sha256=tokenizer.fingerprint, last_chunk=settings.last_chunk,
        validation_fraction=settings.validation_fraction, **splits,
    )


def _refuse_occupied(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / INDEX_FILE).is_file():
        raise UserError("something else is there already", where=output, hint="choose another output folder")
    if not overwrite:
        raise UserError("packed records are there already", where=output,
                        hint="set overwrite=true or choose another folder")


# ---------------------------------------------------------------- one shard


# ---------------------------------------------------------------- processes

def _write_all(plans: list[dict], blocks: Iterator[tuple[int, list[str]]], workers: int,
               tokenizer_factory: Callable[[], PackTokenizer], tokenizer: PackTokenizer) -> list[dict]:
    """Sends every block to its shard and returns the index entries in the order of `plans`."""
    if workers <= 1:
        shards = [Shard(tokenizer.encode, **plan) for plan in plans]
        for number, block in blocks:
            shards[number].add(block)
        return [shard.finish() for shard in shards]
    with WriterPool(plans, workers, tokenizer_factory) as pool:
        for number, block in blocks:
            pool.send(number, block)
        return pool.finish()
