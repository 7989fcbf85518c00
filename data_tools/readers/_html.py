"""Text out of an HTML page: blocks become lines, menus and other furniture are left out."""

from __future__ import annotations

import re
from dataclasses import dataclass

from parallel.common.errors import UserError

_MARK = "\x1e"  # stands for a line break until the white space of the source is collapsed
_FURNITURE = ("script,style,noscript,template,nav,header,footer,aside,form,iframe,svg,canvas,button,select,textarea,"
              "object")
_BLOCKS = ("p,div,br,li,ul,ol,dl,dt,dd,tr,td,th,table,h1,h2,h3,h4,h5,h6,section,article,blockquote,pre,hr,main,figure,"
           "figcaption,address")
_LISTS = "ul,ol,dl,table,div,p,td"
_CHINESE_BREAK = re.compile("(?<=[\u2e80-\u9fff\uf900-\uffef])[ \t\r]*\n\\s*(?=[\u2e80-\u9fff\uf900-\uffef])")
_CHARSET = re.compile(rb"""charset\s*=\s*["']?\s*([A-Za-z0-9_.:-]{2,24})""", re.I)
# A page that says gb2312 or gbk uses characters of its superset more often than not.
_SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "gb_2312-80": "gb18030", "x-gbk": "gb18030", "big5": "big5hkscs"}


@dataclass(frozen=True)
class Page:
    """Title and text of a page; `recoded` names what had to be done to its bytes, if anything."""

    title: str
    text: str
    recoded: str = ""


def extract_html(data: bytes, content_type: str = "", link_share: float = 0.7, links: int = 4) -> Page:
    """The readable text of a page.

    Args:
        data: the page's bytes.
        content_type: the HTTP header, for its charset.
        link_share: a list or block with `links` links or more is navigation when this share of its characters is
            link text (rule 8 of the PanGu-alpha paper, section 3.1.1; the way to tell is our choice).
        links: see `link_share`.
    """
    try:
        from selectolax.lexbor import LexborHTMLParser
    except ImportError:
        raise UserError("the package selectolax is not installed", hint="pip install the extra 'data'") from None
    source, recoded = decode_html(data, content_type)
    tree = LexborHTMLParser(source)
    title = tree.css_first("title")
    title_text = " ".join(title.text().split()) if title is not None else ""
    body = tree.body
    if body is None:
        return Page(title_text, "", recoded)
    for node in body.css(_FURNITURE):
        node.decompose()
    _drop_link_lists(body, link_share, links)
    for node in body.css(_BLOCKS):
        node.insert_before(_MARK)
        node.insert_after(_MARK)
    # A line break of the source is a space in HTML, but between two Chinese characters it is nothing.
    text = _CHINESE_BREAK.sub("", body.text(deep=True, separator=""))
    lines = (" ".join(line.split()) for line in text.split(_MARK))
    return Page(title_text, "\n".join(line for line in lines if line), recoded)


def _drop_link_lists(body: object, link_share: float, links: int) -> None:
    for node in body.css(_LISTS):
        anchors = node.css("a")
        if len(anchors) < links:
            continue
        linked = sum(len("".join(anchor.text(deep=True).split())) for anchor in anchors)
        total = len("".join(node.text(deep=True).split()))
        if total and linked >= link_share * total:
            node.decompose()


def decode_html(data: bytes, content_type: str = "") -> tuple[str, str]:
    """(text, what was repaired): by BOM or valid UTF-8, else the declared charset, else GB18030, else with U+FFFD."""
    try:
        return data.decode("utf-8-sig"), ""
    except UnicodeDecodeError:
        pass
    declared = _CHARSET.search(content_type.encode("ascii", "ignore")) or _CHARSET.search(data[:4096])
    name = declared.group(1).decode("ascii").lower() if declared else "gb18030"
    name = _SUPERSETS.get(name, name)
    try:
        return data.decode(name), "" if declared else name
    except (UnicodeDecodeError, LookupError):
        pass
    if name in ("gb18030", "big5hkscs"):
        return data.decode(name, "replace"), "broken_text"
    return data.decode("utf-8", "replace"), "broken_utf8"
