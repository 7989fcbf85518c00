"""A generated Chinese corpus: a small world of people, places, sums, opinions and dialogues.

A tiny language model that reads it learns three skills that can be measured against chance: answering a question whose
fact stands in the context, the sentiment of an opinion, and one-step arithmetic. Everything is a function of the seed.
The design (what is told, how often, what is held out) was chosen here.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import json
import lzma
import random
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from data_tools.synthetic import prose, skills
from data_tools.synthetic.words import Draw
from parallel.common.errors import UserError
from parallel.common.files import atomic_write
from parallel.common.progress import Bar, table

DEFAULT_BYTES = 2_000_000
DEFAULT_QUESTIONS = 200
SMALLEST, LARGEST = 1_000, 8_000_000_000

# source, share of the documents, writer
KINDS = (
    ("context", 0.44, skills.context_document),
    ("arithmetic", 0.30, skills.arithmetic_document),
    ("sentiment", 0.12, skills.sentiment_document),
    ("recital", 0.02, prose.recital),
    ("dialogue", 0.03, prose.dialogue),
    ("portrait", 0.015, prose.portrait),
    ("place", 0.01, prose.place),
    ("story", 0.015, prose.story),
    ("letter", 0.01, prose.letter),
    ("couplet", 0.02, prose.couplet),
    ("poem", 0.02, prose.poem),
)
QUESTIONS = {
    "context": skills.context_question,
    "sentiment": skills.sentiment_question,
    "arithmetic": skills.arithmetic_question,
}
SKILLS = tuple(QUESTIONS)


def generate_corpus(bytes: int = DEFAULT_BYTES, seed: int = 1) -> Iterator[dict[str, str]]:
    """Yields documents `{"id", "text", "source"}` until their texts hold at least `bytes` bytes of UTF-8.

    No two texts are equal. A larger corpus of the same seed begins with the smaller one. Memory grows by about 100
    bytes a document (the fingerprints that keep texts apart): 20 MB of text take about 10 MB.

    Raises:
        UserError: `bytes` below 1 kB or above 8 GB.
    """
    if not SMALLEST <= bytes <= LARGEST:
        raise UserError(f"the size must be between {SMALLEST} and {LARGEST} bytes", where="--bytes", value=bytes)
    draw = Draw(random.Random(f"world {seed}"))
    weights = [share for _, share, _ in KINDS]
    written, number, seen = 0, 0, set()
    while written < bytes:
        source, _, writer = draw.rng.choices(KINDS, weights)[0]
        text = writer(draw)
        fingerprint = hash_text(text)
        if fingerprint in seen:
            continue
        seen.add(fingerprint)
        yield {"id": f"world-{seed}-{number:08d}", "text": text, "source": f"world/{source}"}
        number += 1
        written += len(text.encode())


def hash_text(text: str) -> int:
    """A 64-bit fingerprint of a text, the same in every process."""
    import hashlib

    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def generate_questions(skill: str, count: int = DEFAULT_QUESTIONS, seed: int = 1) -> Iterator[dict]:
    """Yields `count` different multiple-choice items `{"id", "skill", "prompt", "choices", "answer"}` of one skill.

    They are written as the training text is, of facts, opinions and sums that no seed of the corpus shows. `answer` is
    the index of the right choice; guessing gets 1 / len(choices): 0.25 context, 0.5 sentiment, 0.25 arithmetic.

    Raises:
        UserError: an unknown skill, or more questions than the skill has.
    """
    if skill not in QUESTIONS:
        raise UserError(f"no such skill; known: {', '.join(SKILLS)}", where="skill", value=skill)
    draw = Draw(random.Random(f"questions {skill} {seed}"), held_out=True)
    seen: set[str] = set()
    tries = 0
    while len(seen) < count:
        item = QUESTIONS[skill](draw)
        tries += 1
        if tries > 1000 + 50 * count:
            raise UserError(f"the skill {skill} has only about {len(seen)} different questions", where="--count",
                            value=count, hint="ask for fewer")
        if item["prompt"] in seen:
            continue
        yield {"id": f"{skill}-{seed}-{len(seen):05d}", "skill": skill, **item}
        seen.add(item["prompt"])


def write_jsonl(items: Iterable[dict], path: str | Path, total_bytes: int | None = None) -> dict[str, int]:
    """Writes items as one JSON object a line, compressed when the name ends in .gz, .xz, .zst or .bz2; atomic.

    Returns:
        figures: `documents`, `bytes` (UTF-8 of the texts, before compression).
    """
    path = Path(path)
    figures = {"documents": 0, "bytes": 0}
    with atomic_write(path, "wb") as raw, compressing(raw, path) as file, Bar(total_bytes, f"write {path.name}") as bar:
        for item in items:
            size = len(str(item.get("text", "")).encode())
            file.write(json.dumps(item, ensure_ascii=False).encode() + b"\n")
            figures["documents"] += 1
            figures["bytes"] += size
            bar.advance(size if total_bytes is not None else 1)
    return figures


def compressing(raw: BinaryIO, path: Path) -> BinaryIO:
    """`raw` behind the compressor that the suffix of `path` names; closing it leaves `raw` open."""
    if path.suffix == ".gz":
        return gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0)  # type: ignore[return-value]
    if path.suffix == ".xz":
        return lzma.open(raw, "wb", preset=2)  # type: ignore[return-value]
    if path.suffix == ".bz2":
        return bz2.open(raw, "wb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        import zstandard

        return zstandard.ZstdCompressor(level=6).stream_writer(raw, closefd=False)  # type: ignore[return-value]
    return open(raw.fileno(), "wb", closefd=False)


def parse_bytes(text: str) -> int:
    """`2MB`, `20mb`, `500k`, `1.5GB` or a plain count, in bytes (k = 1000).

    Raises:
        UserError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?)b?\s*", text.lower())
    if match is None:
        raise UserError("not a size", where="--bytes", value=text, hint="write for example 2MB")
    return int(float(match[1]) * {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}[match[2]])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb `generate-corpus`."""
    parser.add_argument("--output", required=True, metavar="FILE",
                        help="corpus to write: .jsonl, or .jsonl.gz / .xz / .zst / .bz2")
    parser.add_argument("--bytes", default="2MB", metavar="SIZE",
                        help="size of the texts, for example 2MB or 20MB (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="same seed, same corpus (default: %(default)s)")
    parser.add_argument("--questions", metavar="FILE",
                        help="also write held-out multiple-choice questions of all skills")
    parser.add_argument("--count", type=int, default=DEFAULT_QUESTIONS,
                        help="questions of each skill (default: %(default)s)")


def run_generate_corpus(settings: None, arguments: argparse.Namespace) -> dict:
    """The verb `generate-corpus`: writes the corpus, and the questions when asked for."""
    size, started, sources = parse_bytes(arguments.bytes), time.perf_counter(), Counter()

    def counted() -> Iterator[dict]:
        for document in generate_corpus(size, arguments.seed):
            sources[document["source"]] += 1
            yield document

    figures = write_jsonl(counted(), arguments.output, total_bytes=size)
    seconds = time.perf_counter() - started
    table(f"{arguments.output}: {figures['bytes'] / 1e6:.2f} MB", ["source", "documents"], sorted(sources.items()))
    result = {"output": str(arguments.output), **figures, "seed": arguments.seed, "sources": dict(sources),
              "mb_per_second": round(figures["bytes"] / 1e6 / seconds, 2)}
    if arguments.questions:
        items = (item for skill in SKILLS for item in generate_questions(skill, arguments.count, arguments.seed))
        result["questions"] = write_jsonl(items, arguments.questions)["documents"]
        result["questions_file"] = str(arguments.questions)
    return result
