"""Text out of an HTML page: blocks become lines, menus and other furniture are left out."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

from data_tools.readers._charsets import CHINESE, likeliest, strict
from parallel.common.errors import UserError
from parallel.common.files import by_mark

_MARK = "\x1e"  # stands for a line break until the white space of the source is collapsed
_FURNITURE = ("script,style,noscript,template,nav,header,footer,aside,form,iframe,svg,canvas,button,select,textarea,"
              "object")
_BLOCKS = ("p,div,br,li,ul,ol,dl,dt,dd,tr,td,th,table,h1,h2,h3,h4,h5,h6,section,article,blockquote,pre,hr,main,figure,"
           "figcaption,address")
_LIST_TAGS = frozenset(["ul", "ol", "dl", "table", "div", "p", "td"])
_DEEPEST = 512
_FEW_TAGS = 4096
_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]{0,20})\b[^<>]{0,4000}>")
# Without content, or ended by the next of their kind.
_WITHOUT_DEPTH = frozenset((
    "area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr", "p",
    "li", "dt", "dd", "tr", "td", "th", "thead", "tbody", "tfoot", "option", "optgroup", "html", "head", "body",
    "colgroup", "rp", "rt"))
_CHINESE_BREAK = re.compile("(?<=[\u2e80-\u9fff\uf900-\uffef])[ \t\r]*\n\\s*(?=[\u2e80-\u9fff\uf900-\uffef])")
_CHARSET = re.compile(rb"""charset\s*=\s*["']?\s*([A-Za-z0-9_.:-]{2,24})""", re.I)
# A page that says gb2312 or gbk uses characters of its superset more often than not.
_SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "gb_2312-80": "gb18030", "x-gbk": "gb18030", "big5": "big5hkscs"}
_REFUTED = frozenset(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-7"])


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
            link text (rule 8 of the PanGu-alpha paper, section 3.1.1; the criterion was chosen here).
        links: see `link_share`.
    """
    try:
        from selectolax.lexbor import LexborHTMLParser
    except ImportError:
        raise UserError("the package selectolax is not installed", hint="pip install the extra 'data'") from None
    source, recoded = decode_html(data, content_type)
    tree = LexborHTMLParser(_shallow(source))
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


def _shallow(source: str) -> str:
    """`source` without the tags that open deeper than `_DEEPEST`, as browsers build it.

    The parser's time grows with the square of the depth.
    """
    if source.count("<") <= _FEW_TAGS:
        return source
    depth = 0

    def keep(match: re.Match) -> str:
        nonlocal depth
        closing, name = match[1], match[2].lower()
        if name in _WITHOUT_DEPTH or match[0].endswith("/>"):
            return match[0]
        if not closing:
            depth += 1
            return match[0] if depth <= _DEEPEST else ""
        depth = max(0, depth - 1)
        return match[0] if depth < _DEEPEST else ""

    return _TAG.sub(keep, source)


def _drop_link_lists(body: object, link_share: float, links: int) -> None:
    """Takes out lists and blocks whose text is mostly that of links; each node is looked at once, however nested."""
    if len(body.css("a")) < links:
        return
    nodes = list(body.traverse(include_text=True))  # parents before children
    place = {node.mem_id: index for index, node in enumerate(nodes)}
    parents = [place.get(node.parent.mem_id, -1) if index else -1 for index, node in enumerate(nodes)]
    inside = [False] * len(nodes)  # of a link
    for index, node in enumerate(nodes):
        inside[index] = node.tag == "a" or (parents[index] >= 0 and inside[parents[index]])
    total, linked, anchors = [0] * len(nodes), [0] * len(nodes), [0] * len(nodes)
    for index in range(len(nodes) - 1, 0, -1):
        node, parent = nodes[index], parents[index]
        if node.tag == "-text":
            total[index] = len("".join((node.text(deep=False) or "").split()))
            linked[index] = total[index] if inside[index] else 0
        total[parent] += total[index]
        linked[parent] += linked[index]
        anchors[parent] += anchors[index] + (node.tag == "a")
    gone = [False] * len(nodes)
    for index, node in enumerate(nodes):
        gone[index] = parents[index] >= 0 and gone[parents[index]]
        if (not gone[index] and node.tag in _LIST_TAGS and anchors[index] >= links and total[index]
            and linked[index] >= link_share * total[index]):
            gone[index] = True
            node.decompose()


def decode_html(data: bytes, content_type: str = "") -> tuple[str, str]:
    """(text, what was repaired): by BOM or valid UTF-8, else the declared charsets that the bytes do not refute (header
    before meta), else GB18030, else with U+FFFD.

    Between GB18030 and Big5 the characters that come out decide, whatever is declared. Charsets of one byte a character
    (iso-8859-1, windows-1252) fit any bytes, so they are believed only where the bytes are not those of Chinese text or
    of another charset that the page names.
    """
    if mark := by_mark(data):
        return data.decode(mark, "replace"), ""
    if (text := strict(data, "utf-8")) is not None:
        return text, ""
    repaired = data.decode("utf-8", "replace")
    # A few broken bytes in UTF-8 leave most characters whole; other charsets read as UTF-8 leave hardly any.
    if repaired.count("\ufffd") <= sum(byte >= 0xC0 for byte in data) // 8:
        return repaired, "broken_utf8"
    declared = _declared(data, content_type)
    for name in sorted(declared, key=_is_one_byte):
        if name not in CHINESE and not _is_one_byte(name) and (text := strict(data, name)) is not None:
            return text, _recoded(name, declared)
    chinese, western = likeliest(data), [name for name in declared if _is_one_byte(name)]
    if chinese is not None and not (western and not _surely_chinese(chinese[1])):
        return chinese[1], _recoded(chinese[0], declared)
    for name in (*western, *declared, *([] if western else ["gb18030"])):
        if (text := strict(data, name)) is not None:
            return text, _recoded(name, declared)
    return _least_broken(data, repaired, declared)


def _recoded(name: str, declared: list[str]) -> str:
    return "" if declared and name == declared[0] else name


def _declared(data: bytes, content_type: str) -> list[str]:
    """Charsets named by the header and by the page, supersets for sets that are used for more than they hold."""
    found = (_CHARSET.search(content_type.encode("ascii", "ignore")), _CHARSET.search(data[:4096]))
    names = [match.group(1).decode("ascii").lower() for match in found if match]
    known = []
    for name in dict.fromkeys(_SUPERSETS.get(name, name) for name in names):
        try:
            # UTF-16 has no ASCII in it, so a page that says so in ASCII is none.
            if codecs.lookup(name).name not in _REFUTED and codecs.lookup(name)._is_text_encoding:
                known.append(name)
        except LookupError:
            continue
    return known


def _is_one_byte(name: str) -> bool:
    return codecs.lookup(name).name.startswith(("iso8859", "cp125", "latin", "ascii", "koi8", "cp437", "mac"))


def _surely_chinese(text: str) -> bool:
    """Whether nearly all characters beyond ASCII are those of everyday simplified text (GB2312), or many are Chinese:
    a few letters with accents read as GB18030 give rare characters, or one or two common ones."""
    beyond = [character for character in text if character > "\x7f"]
    known = "".join(beyond).encode("gb2312", "replace").count(b"?")
    return bool(beyond) and (known <= len(beyond) // 20 or len(beyond) >= 16)


def _least_broken(data: bytes, repaired: str, declared: list[str]) -> tuple[str, str]:
    texts = [(repaired, "broken_utf8"), *((data.decode(name, "replace"), "broken_text")
                                          for name in (*declared, "gb18030") if not _is_one_byte(name))]
    return min(texts, key=lambda pair: pair[0].count("\ufffd") / max(1, len(pair[0])))
