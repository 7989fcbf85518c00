"""Corpora in, training text out: what the recorded 350M run on GPUs is trained on, and what it has never seen.

    python scripts/bench/gpu/corpora.py --classics classics_modern_zh.jsonl.xz --poems poems_zh.jsonl.xz --output DIR

Writes `text.jsonl`: translated classics as they are; poems in simplified characters in the words of the recipe for
poems (`pangu/prompts/poem.yaml`); and the second and third couplet of regulated verse, which are parallel, in the words
of the recipe for couplets. What is kept back of each (`--unseen-share`) is in `unseen_classics.jsonl`,
`unseen_poems.jsonl` and `unseen_couplets.jsonl` in the same words, and `unseen.jsonl` holds the poems' titles and
lines. Ends in one JSON line of counts. The two files' licence is MIT; any jsonl with `text` (and `title`) will do.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from data_tools.rules.traditional import Traditional
from parallel.common.files import open_text


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classics", type=Path, required=True)
    parser.add_argument("--poems", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--most-poems", type=int, default=1 << 30)
    parser.add_argument("--most-classics", type=int, default=1 << 30)
    parser.add_argument("--one-classic-of", type=int, default=1, help="train on one classic of so many (default 1)")
    parser.add_argument("--unseen-share", type=int, default=150, help="one text of so many is kept back (default 150)")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    counts: Counter = Counter()
    names = ("text", "unseen", "unseen_classics", "unseen_poems", "unseen_couplets")
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(arguments.output / f"{name}.jsonl", "w", encoding="utf-8"))
                 for name in names}

        def put(kind: str, text: str, unseen: bool) -> None:
            write(files[f"unseen_{kind}" if unseen else "text"], {"text": text})
            counts[f"unseen_{kind}" if unseen else kind] += 1

        for number, row in enumerate(islice(rows(arguments.classics), arguments.most_classics)):
            unseen = kept_back(row["text"], arguments.unseen_share)
            if unseen or number % arguments.one_classic_of == 0:
                put("classics", row["text"], unseen)
        for title, lines in islice(poems(arguments.poems), arguments.most_poems):
            unseen = kept_back("".join(lines), arguments.unseen_share)
            if unseen:
                write(files["unseen"], {"title": title, "lines": lines})
            put("poems", f"古诗一首\n题目：{title}\n" + "\n".join(lines), unseen)
            for upper, lower in couplets(lines):
                put("couplets", f"上联：{upper}\n下联：{lower}", unseen)
    print(json.dumps(counts))


def kept_back(text: str, share: int) -> bool:
    """Whether a text is one of those that the model never sees."""
    return zlib.crc32(text.encode()) % share == 0


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
