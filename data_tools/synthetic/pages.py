"""Generated raw pages: what a crawl brings, with every fault that the cleaning rules and the deduplication look for.

Articles are the prose of the generated world (`prose.py`), long enough to be kept. Each page's `source` says what was
done to it: `web/article` stays as it is, the others are changed or removed by one rule or step. Everything is a
function of the seed. The kinds, their shares and their wording are ours.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_tools.synthetic import prose
from data_tools.synthetic.generate import compressing
from data_tools.synthetic.words import Draw
from parallel.common.errors import UserError
from parallel.common.files import atomic_write
from parallel.common.progress import Bar, table

DEFAULT_PAGES = 2000
LARGEST = 10_000_000
_LONG = 260  # characters of an article: well above the 150 of the paper's rule
_RECENT = 200  # pages that a copy is taken from, so that memory does not grow
_CHANGED = 3  # characters that differ in a near copy

_MENU = ("首页", "新闻", "财经", "体育", "娱乐", "汽车", "房产", "教育", "旅游", "论坛", "博客", "视频")
_FOOTERS = ("关于我们 | 联系我们 | 网站地图 | 版权所有", "上一篇 下一篇 返回列表 返回顶部",
            "设为首页 | 加入收藏 | 免责声明 | 意见反馈")
_ADVERTISEMENTS = ("全场包邮，限时抢购，点击购买还有优惠券。", "想了解更多请扫描二维码，关注公众号。",
                   "招商加盟，加盟热线全天开通，欢迎在线咨询。", "日赚五百不是梦，加微信免费领取资料。")
_SYMBOLS = "★☆◆◇■□●▲▼♥♪\u200b\ufeff\ue000"
_FOREIGN = ("the weather report of the harbour", "terms and conditions apply", "page not found",
            "click here to continue", "all rights reserved", "version 2.14 of the manual",
            "item no. 4711 / size XL / EUR 19.90")


class Pages:
    """Draws pages.

    Args:
        seed: the pages are a function of it.
    """

    def __init__(self, seed: int) -> None:
        self.draw = Draw(random.Random(f"pages {seed}"))
        self.rng, self.recent = self.draw.rng, []

    def article(self) -> str:
        """Paragraphs of prose, at least `_LONG` characters."""
        paragraphs: list[str] = []
        while sum(map(len, paragraphs)) < _LONG:
            writer = self.rng.choice((prose.portrait, prose.place, prose.story, prose.letter, prose.dialogue))
            paragraphs.append(writer(self.draw))
        return "\n".join(paragraphs)

    def navigation(self) -> str:
        """An article between the bars of its site."""
        bar = self.rng.choice((" | ", " > ", " · ")).join(self.rng.sample(_MENU, self.rng.randint(5, 9)))
        return f"{bar}\n{self.article()}\n{self.rng.choice(_FOOTERS)}"

    def symbols(self) -> str:
        """An article with decorations, invisible characters and long runs of one mark."""
        lines = [self.rng.choice(_SYMBOLS) + line for line in self.article().split("\n")]
        return "\n".join(lines) + self.rng.choice(("！" * 12, "~" * 20))

    def traditional(self) -> str:
        """An article in traditional characters."""
        return _converter().convert(self.article())

    def repeated(self) -> str:
        """An article that has one of its paragraphs twice."""
        paragraphs = self.article().split("\n")
        long = [paragraph for paragraph in paragraphs if len(paragraph) >= 20] or paragraphs
        return "\n".join([*paragraphs, self.rng.choice(long)])

    def advertisement(self) -> str:
        """An article with an advertisement in it."""
        paragraphs = self.article().split("\n")
        paragraphs.insert(self.rng.randint(0, len(paragraphs)), self.rng.choice(_ADVERTISEMENTS))
        return "\n".join(paragraphs)

    def title_only(self) -> str:
        """A page of which only the title was found."""
        return self.title()

    def foreign(self) -> str:
        """A page that is mostly not Chinese."""
        lines = [self.rng.choice(_FOREIGN) for _ in range(12)]
        lines.insert(self.rng.randint(0, 12), prose.poem(self.draw))
        return "\n".join(lines)

    def short(self) -> str:
        """A poem or a couplet, whose length is below the rule's."""
        return self.rng.choice((prose.poem, prose.couplet))(self.draw) + "\n这是一首短诗，写在墙上。"

    def exact_copy(self) -> str:
        """A page met again, with other white space."""
        return self._earlier().replace("\n", "\n\n")

    def near_copy(self) -> str:
        """A page met again with a few characters changed."""
        text = list(self._earlier())
        for place in self.rng.sample(range(len(text)), _CHANGED):
            text[place] = self.rng.choice("春夏秋冬")
        return "".join(text)

    def title(self) -> str:
        """A headline."""
        return f"{self.draw.names(1)[0]}的{self.draw.one('poem', 'titles')}"

    def _earlier(self) -> str:
        return self.rng.choice(self.recent)

    def remember(self, text: str) -> None:
        """Keeps an article for copies."""
        self.recent = [*self.recent[-_RECENT + 1:], text]


# name, share of the pages, writer
KINDS: tuple[tuple[str, float, Callable[[Pages], str]], ...] = (
    ("article", 0.40, Pages.article),
    ("navigation", 0.10, Pages.navigation),
    ("symbols", 0.06, Pages.symbols),
    ("traditional", 0.06, Pages.traditional),
    ("repeated", 0.05, Pages.repeated),
    ("advertisement", 0.07, Pages.advertisement),
    ("title_only", 0.05, Pages.title_only),
    ("foreign", 0.05, Pages.foreign),
    ("short", 0.05, Pages.short),
    ("exact_copy", 0.05, Pages.exact_copy),
    ("near_copy", 0.04, Pages.near_copy),
    ("broken", 0.02, Pages.article),
)


def generate_pages(count: int = DEFAULT_PAGES, seed: int = 1) -> Iterator[tuple[str, bytes]]:
    """Yields (kind, line): a JSON object `{"id", "title", "text", "source"}` in UTF-8, or what a broken page has.

    Raises:
        UserError: `count` below 1 or above ten million; OpenCC, which writes the traditional pages, is missing.
    """
    if not 1 <= count <= LARGEST:
        raise UserError(f"must lie between 1 and {LARGEST}", where="--pages", value=count)
    pages = Pages(seed)
    weights = [share for _, share, _ in KINDS]
    for number in range(count):
        # The first page is one that copies can be taken of.
        kind, _, writer = pages.rng.choices(KINDS, weights)[0] if number else KINDS[0]
        text = writer(pages)
        if kind == "article":
            pages.remember(text)
        title = text if kind == "title_only" else pages.title()
        page = {"id": f"page-{seed}-{number:08d}", "title": title, "text": text, "source": f"web/{kind}"}
        line = json.dumps(page, ensure_ascii=False).encode()
        yield kind, _break(line, pages.rng) if kind == "broken" else line


def _break(line: bytes, rng: random.Random) -> bytes:
    """Damage of a kind that is repaired (a bad byte, GB18030) or that costs the page (half a line, no text)."""
    damage = rng.randrange(4)
    if damage == 0:
        return line[: len(line) // 2]
    if damage == 1:
        return line.replace(b'"text"', b'"body"')
    if damage == 2:
        return line.decode().encode("gb18030")
    place = line.index("。".encode()) + 3
    return line[:place] + b"\xff" + line[place:]


@functools.lru_cache(maxsize=1)
def _converter() -> Any:
    try:
        from opencc import OpenCC
    except ImportError:
        raise UserError("the package opencc is not installed", hint="pip install the extra 'data'") from None
    return OpenCC("s2t")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb `generate-pages`."""
    parser.add_argument("--output", required=True, metavar="FILE",
                        help="pages to write: .jsonl, or .jsonl.gz / .xz / .zst / .bz2")
    parser.add_argument("--pages", type=int, default=DEFAULT_PAGES, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="same seed, same pages (default: %(default)s)")


def run_generate_pages(settings: None, arguments: argparse.Namespace) -> dict:
    """The verb `generate-pages`: writes the pages and says how many there are of each kind."""
    started, kinds, path = time.perf_counter(), Counter(), Path(arguments.output)
    pages = generate_pages(arguments.pages, arguments.seed)
    bar = Bar(arguments.pages, f"write {path.name}")
    with atomic_write(path, "wb") as raw, compressing(raw, path) as file, bar:
        for kind, line in pages:
            file.write(line + b"\n")
            kinds[kind] += 1
            bar.advance(1)
    table(f"{path}: {arguments.pages:,} pages", ["kind", "pages"], sorted(kinds.items()))
    return {"output": str(path), "pages": arguments.pages, "seed": arguments.seed, "kinds": dict(sorted(kinds.items())),
            "seconds": round(time.perf_counter() - started, 2)}
