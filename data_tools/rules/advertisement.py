"""Rule 6: documents that contain advertisements, recognised by keywords, are removed."""

from __future__ import annotations

from typing import ClassVar

from data_tools.rules import Removal, Rule
from data_tools.rules._aho_corasick import KeywordFinder

_KEYWORDS = [
    "加微信", "加我微信", "微信号：", "微信号:", "加QQ群", "加qq群", "扫码关注", "扫描二维码", "长按二维码",
    "关注公众号",
    "关注我们的公众号", "点击购买", "立即购买", "立即抢购", "马上抢购", "限时抢购", "限时特价", "限时优惠",
    "全场包邮",
    "货到付款", "点击领取", "免费领取", "立即领取", "免费试听", "优惠券", "代开发票", "代办证件", "刻章办证",
    "代写论文",
    "招商加盟", "加盟热线", "加盟费", "订购热线", "咨询热线", "客服热线", "联系电话：", "联系电话:", "在线咨询",
    "点击进入官网",
    "广告合作", "商务合作", "网赚", "日赚", "月入过万", "贷款秒批", "无抵押贷款", "信用卡套现", "时时彩", "六合彩",
    "真人娱乐",
    "博彩", "线上赌场", "私服发布", "游戏代练", "减肥药", "补肾壮阳", "祛斑", "包治", "成人用品", "同城约会",
]


class Advertisement(Rule):
    """Removes documents that contain advertisement keywords."""

    order: ClassVar[int] = 50

    keywords: list[str] = []
    """Further keywords; case does not matter."""
    keywords_file: str | None = None
    """A file with one keyword a line, used instead of the built-in list."""
    hits: int = 1
    """Remove a document with this many different keywords; the paper removes documents that contain any."""

    def word_lists(self) -> list[str]:
        """See `Rule`."""
        return [self.keywords_file] if self.keywords_file else []

    def apply(self, text: str, title: str) -> str:
        finder = KeywordFinder.of(self.keywords_file, _KEYWORDS, self.keywords)
        found = finder.distinct(text, enough=self.hits)
        if len(found) >= self.hits:
            raise Removal(f"{len(found)} keyword(s): {', '.join(sorted(found))}")
        return text
