"""Readers and writers: every format, and input in any state of damage."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import lzma
import uuid
from pathlib import Path

import pytest

from data_tools.documents import plan_splits, read_split
from data_tools.engines.local import LocalEngine
from data_tools.parts import OutputLayout, PartFigures, Step, run_step
from data_tools.records import ReadLog, ReadSettings
from parallel.common.errors import UserError
from tests.data_tools.planted import read_jsonl, write_jsonl


class Pass(Step):
    """Lets every document through."""

    name = "pass"

    def digest_source(self, split):
        return []

    def process(self, document, row, figures):
        yield document


def run_pass(splits, output, format):
    return run_step(Pass(), splits, OutputLayout.under(output, "pass"), LocalEngine(1), format, ReadSettings())


def read_all(paths, **settings) -> tuple[list, ReadLog]:
    read, log, documents = ReadSettings(**settings), ReadLog(), []
    for split in plan_splits([str(path) for path in paths], read):
        documents += read_split(split, read, log)
    return documents, log


DOCUMENTS = [{"id": f"d{number}", "text": f"第{number}篇文章的正文。", "source": "甲", "url": f"http://x/{number}"}
             for number in range(50)]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_written_documents_read_back(tmp_path, suffix):
    path = write_jsonl(tmp_path / "in" / "a.jsonl", DOCUMENTS)
    run_pass(plan_splits([str(path)], ReadSettings()), tmp_path / "out", suffix)
    assert [path.name for path in (tmp_path / "out").glob("part-*")] == [f"part-00000.{suffix}"]
    documents, log = read_all([tmp_path / "out"])
    assert [document.record() for document in documents] == DOCUMENTS
    assert not log.dropped and not log.damaged_files


def test_byte_ranges_give_each_document_once(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    for split_bytes in (1, 37, 100, 1000):
        documents, _ = read_all([path], split_bytes=split_bytes)
        assert [document.id for document in documents] == [document["id"] for document in DOCUMENTS]


def test_xz_and_missing_ids_and_sources(tmp_path):
    with lzma.open(tmp_path / "book.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write('{"text": "一"}\n{"text": "二", "id": 7}\n')
    documents, _ = read_all([tmp_path])
    assert [(d.id, d.source) for d in documents] == [("book.jsonl.xz:0", "book"), ("7", "book")]


def test_plain_text_units(tmp_path):
    (tmp_path / "a.txt").write_bytes("一\n二\n\n三\n".encode())
    for unit, texts in (("file", ["一\n二\n\n三"]), ("line", ["一", "二", "三"]), ("blank_line", ["一\n二", "三"])):
        assert [d.text for d in read_all([tmp_path / "a.txt"], text_unit=unit)[0]] == texts


def test_gb18030_text_is_recognised(tmp_path):
    text = "这是一个旧网站的页面，用国标编码写成。" * 5
    (tmp_path / "old.txt").write_bytes(text.encode("gb18030"))
    documents, log = read_all([tmp_path])
    assert documents[0].text == text and log.repaired["gb18030"] == 1


def warc(compressed: bool) -> bytes:
    """A WARC with a request, an HTML page in GBK, a picture and a WET record."""
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    page = ("<html><head><title>一则新闻</title><meta charset='gbk'></head><body><nav>首页</nav>"
            "<ul><li><a>甲</a><li><a>乙</a>"
            "<li><a>丙</a><li><a>丁</a></ul><p>第一段\n  <b>正文</b>。</p>"
            "<p>第二段<br>正文。</p><script>x()</script></body></html>")
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=compressed)

    def add(kind: str, content_type: str, payload: bytes) -> None:
        headers = StatusAndHeaders("200 OK", [("Content-Type", content_type)], protocol="HTTP/1.1")
        http = headers if kind == "response" else None
        writer.write_record(writer.create_warc_record(
            "http://example.cn/1", kind, payload=io.BytesIO(payload), http_headers=http, length=len(payload),
            warc_content_type=content_type if kind == "conversion" else "",
            # Given, since where a cut falls in the compressed text would else be left to chance.
            warc_headers_dict={"WARC-Record-ID": f"<urn:uuid:{uuid.UUID(int=len(payload))}>",
                               "WARC-Date": "2021-01-15T13:41:01Z"}))

    add("response", "text/html", page.encode("gbk"))
    add("response", "image/png", b"\x89PNG")
    add("conversion", "text/plain", "抽取好的文字。".encode())
    return out.getvalue()


@pytest.mark.parametrize("name", ["crawl.warc", "crawl.warc.gz"])
def test_warc_and_wet_records(tmp_path, name):
    (tmp_path / name).write_bytes(warc(name.endswith("gz")))
    documents, log = read_all([tmp_path])
    assert [d.text for d in documents] == ["第一段正文。\n第二段\n正文。", "抽取好的文字。"]
    assert documents[0].title == "一则新闻" and documents[0].other["url"] == "http://example.cn/1"
    assert documents[0].id.startswith("<urn:uuid:") and not log.damaged_files


CRAWL = "CC-MAIN-20210115134101-20210115164101-00000"


def record(kind: str, number: int, headers: list[tuple[str, str]], block: bytes) -> bytes:
    """A record as Common Crawl writes it, byte for byte by the standard (ISO 28500): a gzip member of its own."""
    fields = [("WARC-Type", kind), ("WARC-Date", "2021-01-15T13:41:01Z"),
              ("WARC-Record-ID", f"<urn:uuid:00000000-0000-0000-0000-{number:012d}>"),
              ("Content-Length", str(len(block))), *headers]
    head = "WARC/1.0\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields) + "\r\n"
    return gzip.compress(head.encode() + block + b"\r\n\r\n")


def common_crawl_warc(body: bytes) -> bytes:
    """An archive of one fetch: warcinfo, request, response, metadata."""
    uri, info = "http://news.example.cn/1.html", b"isPartOf: CC-MAIN-2021-04\r\npublisher: Common Crawl\r\n"
    sha = f"sha1:{base64.b32encode(hashlib.sha1(body).digest()).decode()}"
    http = ("HTTP/1.1 200 OK\r\nServer: nginx\r\nContent-Type: text/html; charset=utf-8\r\n"
            "X-Crawler-Transfer-Encoding: chunked\r\nX-Crawler-Content-Encoding: gzip\r\n"
            f"Content-Length: {len(body)}\r\n\r\n").encode() + body
    common = [("WARC-Warcinfo-ID", "<urn:uuid:00000000-0000-0000-0000-000000000001>"), ("WARC-Target-URI", uri),
              ("WARC-IP-Address", "192.0.2.1")]
    return b"".join([
        record("warcinfo", 1, [("Content-Type", "application/warc-fields"),
                               ("WARC-Filename", f"{CRAWL}.warc.gz")], info),
        record("request", 2, [*common, ("Content-Type", "application/http; msgtype=request")],
               b"GET /1.html HTTP/1.1\r\nUser-Agent: CCBot/2.0\r\nHost: news.example.cn\r\n\r\n"),
        record("response", 3, [*common, ("Content-Type", "application/http; msgtype=response"),
                               ("WARC-Payload-Digest", sha), ("WARC-Identified-Payload-Type", "text/html")], http),
        record("metadata", 4, [*common[:2], ("Content-Type", "application/warc-fields")],
               b'fetchTimeMs: 200\r\nlanguages-cld2: {"languages":[{"code":"zh"}]}\r\n')])


def test_archives_as_common_crawl_publishes_them(tmp_path):
    body = ("<!DOCTYPE html><html><head><title>一则新闻</title></head><body><p>第一段正文。</p>"
            "<p>第二段正文。</p></body></html>").encode()
    (tmp_path / f"{CRAWL}.warc.gz").write_bytes(common_crawl_warc(body))
    texts = ["标题行\n抽取好的第一页。\n末行", "第二页。"]
    wet = record("warcinfo", 1, [("Content-Type", "application/warc-fields"),
                                 ("WARC-Filename", f"{CRAWL}.warc.wet.gz")], b"Software-Info: ia-web-commons\r\n")
    for number, text in enumerate(texts):
        wet += record("conversion", 10 + number, [
            ("WARC-Target-URI", f"http://site.example.cn/{number}"), ("Content-Type", "text/plain"),
            ("WARC-Refers-To", "<urn:uuid:00000000-0000-0000-0000-000000000003>"),
            ("WARC-Identified-Content-Language", "zho")], text.encode())
    (tmp_path / f"{CRAWL}.warc.wet.gz").write_bytes(wet)
    documents, log = read_all([tmp_path])
    assert [d.text for d in documents] == ["第一段正文。\n第二段正文。", *texts]
    assert documents[0].title == "一则新闻" and documents[0].id == "<urn:uuid:00000000-0000-0000-0000-000000000003>"
    assert [d.other["url"] for d in documents] == [
        "http://news.example.cn/1.html", "http://site.example.cn/0", "http://site.example.cn/1"]
    assert documents[1].other["date"] == "2021-01-15T13:41:01Z" and documents[0].source == CRAWL
    assert not log.damaged_files and not log.dropped and not log.repaired
    # The second conversion record is truncated: what stands before it is read.
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "x.warc.wet.gz").write_bytes(wet[:-60])
    documents, log = read_all([tmp_path / "cut"])
    assert documents[0].text == texts[0]
    assert [entry["kind"] for entry in log.damaged_files] == ["truncated"]


@pytest.mark.parametrize("engine", ["two_workers", "spark_engine"])
def test_damaged_input_is_counted_and_the_rest_goes_through(tmp_path, engine, request):
    folder = tmp_path / "in"
    folder.mkdir()
    good = json.dumps({"id": "good", "text": "好文章"}, ensure_ascii=False).encode()
    with (folder / "a.jsonl").open("wb") as file:
        file.write(b'{"id": "broken", "text": "' + "坏".encode() * 10 + b"\xff\xfe" + b'"}\n')
        file.write(b'{"id": "repaired", "text": "' + "字".encode() * 300 + b"\xff" + b'"}\n')
        file.write(b'{"id": "nulls", "text": "\x00a\x00b\\u0000c"}\n')
        file.write(b'{"id": "surrogate", "text": "' + b"x" * 200 + b'\\ud800"}\n')
        file.write(b"\x00" * 1000 + b"\nnot json\n[1]\n{\"id\": \"none\"}\n" + b"[" * 100_000 + b"\n\n")
        file.write(b'{"id": "huge", "text": "' + b"a" * 100_000_000 + b'"}\n')
        file.write(good + b"\n")
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "empty.jsonl.gz").write_bytes(b"")
    (folder / "empty.parquet").write_bytes(b"")
    (folder / "noise.parquet").write_bytes(b"PAR1 this is no parquet")
    (folder / "empty.warc.gz").write_bytes(b"")
    (folder / "noise.warc.gz").write_bytes(b"\x1f\x8b" + b"noise" * 30)
    lines = b"".join(json.dumps({"id": f"z{n}", "text": "文" * 200}).encode() + b"\n" for n in range(3000))
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-2000])
    whole = warc(True)
    (folder / "cut.warc.gz").write_bytes(whole[:-30])

    read = ReadSettings(maximum_document_bytes=1 << 20)
    splits = plan_splits([str(folder)], read)
    figures = run_step(Pass(), splits, OutputLayout.under(tmp_path / "out", "pass"), request.getfixturevalue(engine),
                       "jsonl",
                       read)
    kept = {d["id"]: d["text"] for d in read_jsonl(tmp_path / "out")}
    assert {"good", "repaired", "nulls", "surrogate"} <= set(kept) and kept["nulls"] == "abc"
    assert sum(id.startswith("z") for id in kept) > 0 and any("第一段" in text for text in kept.values())
    assert figures.by_rule == {"read_broken_text": 1, "read_invalid_json": 4, "read_no_text": 1, "read_too_long": 1}
    assert figures.documents_in == figures.documents_out + sum(figures.by_rule.values())
    kinds = sorted((Path(entry["path"]).name, entry["kind"]) for entry in figures.damaged_files)
    assert kinds == [("cut.jsonl.gz", "truncated"), ("cut.warc.gz", "truncated"), ("empty.jsonl", "empty_file"),
                     ("empty.jsonl.gz", "empty_file"), ("empty.parquet", "empty_file"), ("empty.warc.gz", "empty_file"),
                     ("noise.parquet", "truncated"), ("noise.warc.gz", "truncated")]
    removed = {d["rule"]: d for d in read_jsonl(tmp_path / "out" / "removed")}
    assert "100000025" in removed["read_too_long"]["evidence"] or "bytes" in removed["read_too_long"]["evidence"]
    assert all(entry["step"] == "read" for entry in removed.values())


def test_no_input_and_wrong_suffix_and_foreign_output(tmp_path):
    with pytest.raises(UserError, match="no documents"):
        plan_splits([str(tmp_path / "nothing*")], ReadSettings())
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(UserError, match="no reader"):
        plan_splits([str(tmp_path / "a.doc")], ReadSettings())
    path = write_jsonl(tmp_path / "in" / "a.jsonl", DOCUMENTS)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "part-00000.jsonl").write_text("mine")
    with pytest.raises(UserError, match="other files"):
        run_pass(plan_splits([str(path)], ReadSettings()), tmp_path / "taken", "jsonl")
    assert (tmp_path / "taken" / "part-00000.jsonl").read_text() == "mine"


def test_figures_survive_their_json():
    figures = PartFigures(documents_in=3)
    figures.by_rule["length"] = 2
    assert PartFigures.from_json(json.loads(json.dumps(figures.to_json()))) == figures


def test_output_inside_input_is_refused(tmp_path, capsys):
    from data_tools.__main__ import VERBS
    from parallel.common.command import main

    write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    assert main("data_tools", VERBS, ["clean", "--input", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "inside the input" in capsys.readouterr().err
