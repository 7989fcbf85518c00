"""Text to ids on one core: `pangu.data.tokenizer.Tokenizer` against jieba + SentencePiece called as its release does.

    python scripts/bench/tokenizer.py [--megabytes 6] [--rounds 3]

Both sides encode the same documents with the same model, in turns of a few documents, in one process held to one core;
the ids must be equal. Uses the published model and the real corpus in ../shared beside the checkout where they exist,
else text made here of jieba's dictionary words and a vocabulary trained on it. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import lzma
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pangu.data.tokenizer import Tokenizer  # noqa: E402 - the checkout must be on the path first
from pangu.data.train_vocabulary import train_vocabulary  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"
MODEL = SHARED / "tokenizer" / "pangu_alpha_vocab.model"
CORPUS = SHARED / "corpus" / "classics_modern_zh.jsonl.xz"
TURN_BYTES = 100_000


def main() -> None:
    """Runs both sides in turns and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=6.0, help="size of the text, in MB of UTF-8")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side encodes the text")
    arguments = parser.parse_args()
    core = hold_to_one_core()
    with tempfile.TemporaryDirectory() as folder:
        documents, model_file, source = material(int(arguments.megabytes * 1e6), Path(folder))
        tokenizer = Tokenizer(model_file)
        plain = plain_encoder(model_file)
        seconds = measure(documents, {"fast": tokenizer.encode, "plain": plain}, arguments.rounds)
    megabytes = sum(len(text.encode()) for text in documents) / 1e6 * arguments.rounds
    ours, peer = megabytes / seconds["fast"], megabytes / seconds["plain"]
    print(f"text: {source}, {len(documents)} documents, {megabytes / arguments.rounds:.1f} MB, "
          f"{arguments.rounds} rounds")
    print(f"one thread, core {core}, Python {platform.python_version()}, malloc settings "
          f"{ {key: value for key, value in os.environ.items() if key.startswith('MALLOC_')} or 'default'}")
    print(f"jieba {version('jieba')} + sentencepiece {version('sentencepiece')}: {peer:.2f} MB/s")
    print(f"Tokenizer ({tokenizer.engine} + sentencepiece): {ours:.2f} MB/s, same ids; per round "
          + " ".join(f"{ratio:.2f}" for ratio in seconds["ratios"]))
    print(json.dumps({"ratio": round(ours / peer, 2), "ours": round(ours, 2), "peer": round(peer, 2), "unit": "MB/s",
                      "engine": tokenizer.engine, "text": source}))


def hold_to_one_core() -> str:
    """Holds this process to one core where the system can; says which."""
    if not hasattr(os, "sched_setaffinity"):
        return "not held"
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return str(core)


def plain_encoder(model_file: Path) -> Callable[[str], list[int]]:
    """The release's way: every word of jieba's translated, joined, encoded."""
    import jieba
    import sentencepiece

    jieba.setLogLevel(logging.WARNING)
    jieba.initialize()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    marks = str.maketrans(" \n", "\u2582\u2583")

    def encode(text: str) -> list[int]:
        return processor.encode(" ".join([word.translate(marks) for word in jieba.cut(text, cut_all=False)]))

    return encode


def measure(documents: list[str], sides: dict[str, Callable], rounds: int) -> dict:
    """Seconds of each side over all rounds, in turns of about 100 kB, and the ratio round by round."""
    turns: list[list[str]] = [[]]
    for text in documents:
        if sum(len(other.encode()) for other in turns[-1]) >= TURN_BYTES:
            turns.append([])
        turns[-1].append(text)
    for encode in sides.values():
        encode(turns[0][0])  # dictionaries are loaded outside the clock
    total = dict.fromkeys(sides, 0.0)
    ratios = []
    for number in range(rounds):
        this_round = dict.fromkeys(sides, 0.0)
        for turn in turns:
            ids = {}
            for side in sorted(sides, reverse=bool(number % 2)):
                started = time.perf_counter()
                ids[side] = [sides[side](text) for text in turn]
                this_round[side] += time.perf_counter() - started
            assert ids["fast"] == ids["plain"], "the ids differ"
        ratios.append(this_round["plain"] / this_round["fast"])
        for side, spent in this_round.items():
            total[side] += spent
    return {**total, "ratios": ratios}


def material(size: int, folder: Path) -> tuple[list[str], Path, str]:
    """Documents of about `size` bytes, a model file, and where they come from."""
    if MODEL.is_file() and CORPUS.is_file():
        with lzma.open(CORPUS, "rt", encoding="utf-8") as file:
            every = [json.loads(line)["text"] for line in file]
        random.Random(0).shuffle(every)
        return up_to(every, size), MODEL, CORPUS.name
    documents = up_to(made_up(), size)
    train_vocabulary(documents[: len(documents) // 2 or 1], folder / "small.model", size=12000, character_coverage=0.98,
                     shrink=True)
    return documents, folder / "small.model", "made-up text"


def up_to(documents, size: int) -> list[str]:
    """The first documents that together have `size` bytes."""
    taken, length = [], 0
    for text in documents:
        taken.append(text)
        length += len(text.encode())
        if length >= size:
            break
    return taken


def made_up():
    """Endless documents of jieba's dictionary words, drawn by their frequency, with punctuation and some numbers."""
    import jieba

    draw = random.Random(0)
    with jieba.get_dict_file() as file:
        entries = [line.decode().split(" ") for line in file]
    words, upto = [entry[0] for entry in entries], list(itertools.accumulate(int(entry[1]) for entry in entries))
    while True:
        sentences = []
        for _ in range(draw.randrange(5, 60)):
            chosen = draw.choices(words, cum_weights=upto, k=draw.randrange(4, 24))
            if draw.random() < 0.1:
                chosen.insert(draw.randrange(len(chosen)), str(draw.randrange(10_000)))
            sentences.append("".join(chosen) + draw.choice("\uff0c\u3002\uff01\uff1f\n"))
        yield "".join(sentences)


if __name__ == "__main__":
    main()
