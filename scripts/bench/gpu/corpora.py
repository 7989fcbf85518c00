"""Corpora in, training text out: what the recorded 350M run on GPUs is trained on, and what it has never seen.

    python scripts/bench/gpu/corpora.py --classics classics_modern_zh.jsonl.xz --poems poems_zh.jsonl.xz --output DIR

Writes `text.jsonl`: translated classics as they are; poems in simplified characters in the words of the recipe for
poems (`pangu/prompts/poem.yaml`); and the second and third couplet of regulated verse, which are parallel, in the words
of the recipe for couplets. `unseen.jsonl` holds poems that are not in `text.jsonl`. Ends in
one JSON line of counts. The two files' licence is MIT; any jsonl with `text` (and `title`) will do.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from data_tools.rules.traditional import Traditional
from parallel.common.files import open_text

UNSEEN_SHARE = 150  # one in this many poems is kept back


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classics", type=Path, required=True)
    parser.add_argument("--poems", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--most-poems", type=int, default=1 << 30)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    counts = {"classics": 0, "poems": 0, "couplets": 0, "unseen": 0}
    with open(arguments.output / "text.jsonl", "w", encoding="utf-8") as text, \
            open(arguments.output / "unseen.jsonl", "w", encoding="utf-8") as unseen:
        for row in rows(arguments.classics):
            write(text, {"text": row["text"]})
            counts["classics"] += 1
        for number, (title, lines) in enumerate(poems(arguments.poems)):
            if number >= arguments.most_poems:
                break
            if zlib.crc32("".join(lines).encode()) % UNSEEN_SHARE == 0:
                write(unseen, {"title": title, "lines": lines})
                counts["unseen"] += 1
                continue
            write(text, {"text": f"古诗一首\n题目：{title}\n" + "\n".join(lines)})
            counts["poems"] += 1
            for upper, lower in couplets(lines):
                write(text, {"text": f"上联：{upper}\n下联：{lower}"})
                counts["couplets"] += 1
    print(json.dumps(counts))


def rows(path: Path) -> Iterator[dict]:
    """Objects of a jsonl file."""
    with open_text(path) as file:
        for line in file:
            yield json.loads(line)


def poems(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(title, lines) of every poem, in simplified characters; a line ends in its own punctuation."""
    simplify = Traditional().apply
    for row in rows(path):
        lines = [line.strip() for line in simplify(row["text"], "").split("\n") if line.strip()]
        if lines and "□" not in row["text"]:
            yield simplify(row["title"], "").strip(), lines


def couplets(lines: list[str]) -> Iterator[tuple[str, str]]:
    """The parallel couplets of a poem of four lines of two halves of five or seven characters each."""
    if len(lines) != 4:
        return
    for line in lines[1:3]:
        halves = line.rstrip("。！？").split("，")
        if len(halves) == 2 and len(halves[0]) == len(halves[1]) and len(halves[0]) in (5, 7):
            yield halves[0], halves[1]


def write(file, row: dict) -> None:
    """One line."""
    file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
