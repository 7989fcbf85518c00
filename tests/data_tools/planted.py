"""Shared by the tests of the data tools: generated Chinese-looking texts, planted duplicates, an oracle for Jaccard."""

from __future__ import annotations

import json
import os
import random
import signal
import unicodedata
from pathlib import Path

# Frequent characters drawn with falling weight: enough that two texts share few 5-grams by chance.
_CHARACTERS = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]
_WEIGHTS = [1.0 / (rank + 20) for rank in range(len(_CHARACTERS))]


def make_text(rng: random.Random, characters: int, paragraphs: int = 4) -> str:
    """Random Han characters with commas and full stops, in paragraphs."""
    body = rng.choices(_CHARACTERS, _WEIGHTS, k=characters)
    for place in range(8, characters, 11):
        body[place] = "，" if rng.random() < 0.6 else "。"
    step = -(-characters // paragraphs)
    return "\n".join("".join(body[start:start + step]) for start in range(0, characters, step))


def edit(rng: random.Random, text: str, share: float) -> str:
    """Replaces this share of the characters."""
    return "".join(rng.choice(_CHARACTERS) if character != "\n" and rng.random() < share else character
                   for character in text)


def write_jsonl(path: Path, documents: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents), "utf-8")
    return path


def read_jsonl(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("part-*.jsonl")) for line in path.open(encoding="utf-8")]


def oracle_set(text: str, n: int = 5) -> set[str]:
    """Character n-grams of the stated normal form, written without the code under test (simplified text only)."""
    folded = "".join(unicodedata.normalize("NFKC", text).lower().split())
    return {folded[start:start + n] for start in range(len(folded) - n + 1)}


def oracle_jaccard(left: str, right: str, n: int = 5) -> float:
    a, b = oracle_set(left, n), oracle_set(right, n)
    return len(a & b) / len(a | b) if a | b else 1.0


def planted_corpus(seed: int, bases: int, texts: list[str] | None = None) -> list[dict]:
    """Base documents (random, or `texts`); of some also copies, edits, moved paragraphs and traditional twins."""
    import opencc

    rng = random.Random(seed)
    to_traditional, to_simplified = opencc.OpenCC("s2t"), opencc.OpenCC("t2s")
    documents = []
    for base in range(bases):
        text = to_simplified.convert(texts[base] if texts else make_text(rng, rng.randint(300, 900)))
        variants = [("base", text)]
        if base % 3 == 0:
            variants += [(f"edit{share}", edit(rng, text, share))
                         for share in (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.10, 0.20, 0.40)]
        if base % 5 == 0:
            paragraphs = text.split("\n")
            rng.shuffle(paragraphs)
            variants += [("copy", text), ("moved", "\n".join(paragraphs)), ("twin", to_traditional.convert(text))]
        documents += [{"id": f"{base}-{kind}", "text": variant, "source": f"source{base % 2}"}
                      for kind, variant in variants]
    documents += [{"id": f"short{number}", "text": text, "source": "short"}
                  for number, text in enumerate(["好", "是", "好", "中国", "人们", "", "。"])]
    rng.shuffle(documents)
    return documents


def kill_self_once(item: tuple[str, int]) -> int:
    """Squares a number; the worker that gets number 2 first kills itself."""
    folder, number = item
    if number == 2:
        try:
            (Path(folder) / "died").touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def divide_by(number: int) -> float:
    return 1 / number


def raw_pages(count: int, seed: int = 1) -> list[dict]:
    """Pages of which some are short, English, advertising, repeated or nearly so."""
    rng = random.Random(seed)
    documents = []
    for number in range(count):
        text = make_text(rng, rng.randint(160, 500))
        kind = number % 10
        if kind == 1:
            text = text[:100]
        elif kind == 2:
            text = "an English page " * 20
        elif kind == 3:
            text += "\n扫码关注，优惠券免费领取"
        elif kind in (4, 5):
            original = documents[number - kind]["text"]
            text = original if kind == 4 else edit(rng, original, 0.004)
        documents.append({"id": f"p{number}", "text": f"首页 | 新闻 | 体育 | 财经\n{text}", "source": "web",
                          "url": f"http://x/{number}"})
    return documents


def path_without_java(folder: Path) -> str:
    """A search path with every command of this one but Java's."""
    folder.mkdir(parents=True)
    for place in filter(os.path.isdir, os.environ["PATH"].split(os.pathsep)):
        for command in os.scandir(place):
            link = folder / command.name
            if command.name not in ("java", "javac") and not os.path.lexists(link):
                link.symlink_to(command.path)
    return str(folder)


def descendants(pid: int) -> dict[int, bytes]:
    """Command lines of the processes below `pid`, by their numbers."""
    found, waiting = {}, [pid]
    while waiting:
        here = waiting.pop()
        for task in Path(f"/proc/{here}/task").glob("*"):
            try:
                children = [int(child) for child in (task / "children").read_text().split()]
                found |= {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
                waiting += children
            except OSError:
                continue  # it ended meanwhile
    return found
