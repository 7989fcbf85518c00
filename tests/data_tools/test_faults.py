"""Real-world input that other tools stumble over: each kind with the right value."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import lzma
import re
import time

import pytest

from data_tools.__main__ import VERBS
from data_tools.dedup.plan import DedupPlan, DedupSettings
from data_tools.dedup.step import RemoveDuplicates, decide
from data_tools.documents import plan_splits, read_split
from data_tools.engines.local import LocalEngine
from data_tools.readers._html import decode_html, extract_html
from data_tools.records import ReadLog, ReadSettings
from data_tools.rules.special_symbols import SpecialSymbols
from data_tools.steps.decontaminate import evaluation_texts
from parallel.common.command import main
from parallel.common.errors import UserError

TEXT = "这是一段足够长的中文网页内容，用来测试各种输入。" * 8


def run(capsys, *words):
    code = main("data_tools", VERBS, [str(word) for word in words])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, json.loads(captured.out.strip().split("\n")[-1]) if code == 0 else captured.err


def lines_of(folder):
    found = []
    for path in sorted(folder.glob("part-*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            if line:
                found.append(json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")))
    return found


def read_all(path, **settings):
    read, log = ReadSettings(**settings), ReadLog()
    documents = [d for split in plan_splits([str(path)], read) for d in read_split(split, read, log)]
    return documents, log


@pytest.mark.parametrize("verb", ["clean", "dedup"])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_values_of_a_typed_source_pass_through(tmp_path, capsys, verb, form):
    import pyarrow as pa
    from pyarrow import parquet as pq

    pq.write_table(pa.table({
        "id": ["a"], "text": [TEXT], "at": pa.array([datetime.datetime(2021, 5, 4, 1, 2)]),
        "ns": pa.array([1_600_000_000_000_000_001], pa.timestamp("ns")), "day": pa.array([datetime.date(2021, 5, 4)]),
        "price": pa.array([decimal.Decimal("1.50")]), "raw": pa.array([b"\xff\x00"]), "word": pa.array(["字".encode()]),
        "nan": pa.array([float("nan")]), "inf": pa.array([float("inf")]), "gone": pa.array([datetime.timedelta(1)]),
        "far": pa.array([10**18], pa.timestamp("s"))}), tmp_path / "ts.parquet")
    code, _ = run(capsys, verb, "--input", tmp_path / "ts.parquet", "--output", tmp_path / "o", "--format", form,
                  *(["--engine", "local"] if verb == "dedup" else []))
    assert code == 0
    if form == "parquet":
        made = json.loads(pq.read_table(next((tmp_path / "o").glob("*.parquet"))).to_pylist()[0]["other"])
    else:
        made = lines_of(tmp_path / "o")[0]
    assert made["at"] == "2021-05-04T01:02:00" and made["day"] == "2021-05-04" and made["price"] == "1.50"
    assert made["nan"] is None and made["inf"] is None and made["word"] == "字"


def test_a_column_of_bytes_is_text(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet as pq

    pq.write_table(pa.table({"id": [b"a", b"b"], "text": [TEXT.encode(), TEXT.encode("gb18030")]}),
                   tmp_path / "b.parquet")
    documents, _ = read_all(tmp_path / "b.parquet")
    assert [(d.id, d.text) for d in documents] == [("a", TEXT), ("b", TEXT)]


@pytest.mark.parametrize("record", [
    {"title": "好\ud83d"}, {"meta": {"author": "名\udc00"}}, {"a": [["x", {"b\ud800": 1}]]}, {"k\udfff": 1}])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_lone_surrogates_anywhere_are_repaired_and_counted(tmp_path, capsys, record, form):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"id": "b1", "text": TEXT, **record}) + "\n")
    code, figures = run(capsys, "clean", "--input", tmp_path / "bad.jsonl", "--output", tmp_path / "o",
                        "--format", form)
    assert code == 0 and figures["documents_out"] == 1 and figures["repaired"] == {"lone_surrogates": 1}
    if form == "jsonl":
        assert "\ufffd" in json.dumps(lines_of(tmp_path / "o")[0], ensure_ascii=False)


def test_numbers_that_json_has_not(tmp_path, capsys):
    line = '{"id": "a", "text": "TEXT", "s": NaN, "t": 1e400, "u": [-Infinity, 1.5]}\n'
    (tmp_path / "n.jsonl").write_text(line.replace("TEXT", TEXT))
    assert run(capsys, "clean", "--input", tmp_path / "n.jsonl", "--output", tmp_path / "o")[0] == 0
    made = lines_of(tmp_path / "o")[0]
    assert (made["s"], made["t"], made["u"]) == (None, None, [None, 1.5])


def archive(pages=4):
    made = []
    for number in range(pages):
        body = f"<html><body><p>{TEXT}第{number}页</p></body></html>".encode()
        http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + body
        made.append((f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:x:{number}>\r\n"
                     f"WARC-Target-URI: http://x.cn/{number}\r\nContent-Type: "
                     f"application/http; msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n").encode()
                    + http + b"\r\n\r\n")
    return made


@pytest.mark.parametrize(("name", "packed"), [
    ("members.warc.gz", lambda records: b"".join(map(gzip.compress, records))),
    ("whole.warc.gz", lambda records: gzip.compress(b"".join(records))),
    ("plain.warc", b"".join), ("x.warc.xz", lambda records: lzma.compress(b"".join(records)))])
def test_archives_in_every_container(tmp_path, name, packed):
    (tmp_path / name).write_bytes(packed(archive()))
    documents, log = read_all(tmp_path / name)
    assert [d.text for d in documents] == [f"{TEXT}第{number}页" for number in range(4)] and not log.damaged_files


def test_every_container_of_lines_is_read_to_its_end(tmp_path):
    import zstandard

    lines = [json.dumps({"id": str(number), "text": TEXT}).encode() + b"\n" for number in range(4)]
    zstd = zstandard.ZstdCompressor().compress
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    made = {"members.jsonl.gz": b"".join(map(gzip.compress, lines)), "zeros.jsonl.gz": gzip.compress(b"".join(lines)) +
            bytes(512), "frames.jsonl.zst": skippable + b"".join(map(zstd, lines)),
            "padded.jsonl.xz": b"".join(lzma.compress(line) + bytes(4) for line in lines),
            "wide.jsonl": b"".join(lines).decode().encode("utf-16")}
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
        documents, log = read_all(tmp_path / name, split_bytes=500)
        assert [d.id for d in documents] == list("0123") and not log.damaged_files and not log.dropped, name
    for name in ("padded.jsonl.xz", "members.jsonl.gz", "frames.jsonl.zst"):
        (tmp_path / name).write_bytes(made[name] + b"more")
        documents, log = read_all(tmp_path / name)
        assert len(documents) == 4 and [entry["kind"] for entry in log.damaged_files] == ["truncated"], name


@pytest.mark.parametrize("charset", ["utf-16", "utf-8-sig", "gb18030", "big5", "utf-32"])
@pytest.mark.parametrize("unit", ["file", "line"])
def test_plain_text_in_every_charset(tmp_path, charset, unit):
    text = "網頁內容測試，這是一個普通的網頁。" * 4
    (tmp_path / "a.txt").write_bytes(text.encode(charset))
    documents, _ = read_all(tmp_path / "a.txt", text_unit=unit)
    assert [d.text for d in documents] == [text]


def test_a_page_of_which_the_crawl_got_a_part_is_left_out(tmp_path):
    page = f"<html><body><p>{TEXT}</p></body></html>".encode()
    packed = gzip.compress(page)
    made = b""
    for number, (body, more) in enumerate([(packed, ""), (packed[:-30], ""), (page, "WARC-Truncated: length\r\n")]):
        encoding = "Content-Encoding: gzip\r\n" if body is not page else ""
        http = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n{encoding}\r\n".encode() + body
        made += ("WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://x.cn\r\n"
                 f"WARC-Record-ID: <urn:{number}>\r\n{more}Content-Type: application/http; msgtype=response\r\n"
                 f"Content-Length: {len(http)}\r\n\r\n").encode()
        made += http + b"\r\n\r\n"
    (tmp_path / "a.warc").write_bytes(made)
    documents, log = read_all(tmp_path / "a.warc")
    assert [d.text for d in documents] == [TEXT] and [e["rule"] for e in log.dropped] == ["read_cut_page"] * 2


@pytest.mark.parametrize(("name", "cuts"), [
    ("a.warc.gz", (20, 40, 60, 80, 100, 120)), ("a.warc", (30, 301, 601))])
def test_an_archive_that_ends_inside_a_record_is_reported_and_its_half_page_left_out(tmp_path, name, cuts):
    whole = b"".join(map(gzip.compress, archive())) if name.endswith("gz") else b"".join(archive())
    for cut in cuts:
        (tmp_path / name).write_bytes(whole[:-cut])
        documents, log = read_all(tmp_path / name)
        assert [entry["kind"] for entry in log.damaged_files] == ["truncated"], cut
        assert all(d.text.endswith(f"{TEXT}第{number}页") for number, d in enumerate(documents)), cut
        assert len(documents) >= 3


def as_record(http, url="http://x.cn"):
    return (f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\nWARC-Record-ID: <urn:1>\r\nContent-Type: "
            f"application/http; msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n").encode() + http + b"\r\n\r\n"


def test_a_body_that_ends_before_its_last_chunk_or_its_length_is_no_page(tmp_path):
    page = f"<html><body><p>{TEXT}</p></body></html>".encode()
    parts = [page[at:at + 200] for at in range(0, len(page), 200)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n"
    chunked = head + b"Transfer-Encoding: Chunked\r\n\r\n"
    ends = (b"0\r\n\r\n", b"0\r\nX: a trailer\r\n\r\n", b"0\r\n")
    whole = [*(chunked + chunks + end for end in ends),
             head + b"Content-Length: %d\r\n\r\n" % len(page) + page, chunked + page,
             head + b"Content-Length: 9\r\n\r\n" + page, head + b"Content-Length: x\r\n\r\n" + page]
    cut = [chunked + chunks, chunked + chunks[:-150], head + b"Content-Length: %d\r\n\r\n" % (len(page) + 9) + page]
    (tmp_path / "a.warc").write_bytes(b"".join(map(as_record, whole + cut)))
    documents, log = read_all(tmp_path / "a.warc")
    assert [d.text for d in documents] == [TEXT] * len(whole) and not log.damaged_files
    assert [entry["rule"] for entry in log.dropped] == ["read_cut_page"] * len(cut)


@pytest.mark.parametrize("before", [b"\r\n\r\n", b"\xef\xbb\xbf", b"\n" * 70_000])
def test_what_is_before_the_first_record_hides_none(tmp_path, before):
    (tmp_path / "a.warc").write_bytes(before + b"".join(archive()))
    assert len(read_all(tmp_path / "a.warc")[0]) == 4


def test_records_whose_length_is_wrong_or_missing_are_no_pages(tmp_path):
    first, second, *_ = archive()
    length = re.compile(rb"Content-Length: \d+\r\n")
    (tmp_path / "a.warc").write_bytes(length.sub(b"Content-Length: 400\r\n", first) + second)
    documents, log = read_all(tmp_path / "a.warc")
    assert [d.text for d in documents] == [f"{TEXT}第1页"] and [e["rule"] for e in log.dropped] == ["read_cut_page"]
    (tmp_path / "a.warc").write_bytes(first + length.sub(b"", second) + first)
    documents, log = read_all(tmp_path / "a.warc")
    assert len(documents) == 1 and [entry["kind"] for entry in log.damaged_files] == ["truncated"]


def test_characters_that_gbk_had_before_their_code_points(tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT.encode("gb18030") + b"\xfe\x59\xfe\xa0")
    assert read_all(tmp_path / "a.txt")[0][0].text == TEXT + "\u9fb4\u9fbb"


@pytest.mark.parametrize("verb", ["clean", "dedup"])
def test_output_that_has_changed_is_made_anew(tmp_path, capsys, verb):
    rows = [json.dumps({"id": str(n), "text": TEXT + str(n)}) + "\n" for n in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    words = [verb, "--input", tmp_path / "a.jsonl", "--output", tmp_path / "o",
             *(["--engine", "local"] if verb == "dedup" else [])]
    run(capsys, *words)
    for path in (next((tmp_path / "o").glob("part-*")), next((tmp_path / "o" / "removed").glob("part-*"))):
        whole = path.read_bytes()
        for damaged in (b"", whole[:-30] + b"x" + whole[-29:]):
            path.write_bytes(damaged)
            assert run(capsys, *words)[0] == 0 and path.read_bytes() == whole
    (tmp_path / "o" / ".state" / "verb").write_bytes(b"\xff\xfe")
    assert run(capsys, *words)[0] == 2


PAGE = "<p>中文网页内容测试，这是一个普通的网页。</p>"


@pytest.mark.parametrize(("header", "meta", "charset"), [
    ("text/html; charset=utf-8", "gb2312", "gbk"), ("text/html; charset=unknown-8bit", "", "gbk"),
    ("", "utf-8", "gbk"), ("text/html; charset=iso-8859-1", "gb2312", "gbk"), ("", "", "gbk"), ("", "", "utf-16"),
    ("text/html; charset=iso-8859-1", "", "gbk"), ("text/html; charset=big5", "", "big5"), ("", "", "utf-8-sig"),
    ("text/html; charset=gbk", "gbk", "utf-8"), ("text/html; charset=zip", "gb2312", "gb18030"),
    ("text/html; charset=utf-16", "", "gbk"), ("", "", "big5"), ("text/html; charset=gb2312", "", "big5"),
    ("text/html; charset=big5", "", "gbk"), ("text/html; charset=iso-8859-1", "", "big5"),
    ("text/html; charset=shift_jis", "", "shift_jis"), ("text/html; charset=euc-kr", "", "euc-kr")])
def test_the_bytes_decide_between_charsets(header, meta, charset):
    page = (f'<meta charset="{meta}">' if meta else "") + PAGE
    if charset == "big5":
        page = page.replace("网页内容测试，这是一个普通的网页", "網頁內容測試，這是一個普通的網頁")
    other = {"shift_jis": "日本語のページです。内容", "euc-kr": "한국어 페이지입니다 내용"}.get(charset)
    page = page.replace("中文网页内容测试，这是一个普通的网页。", other) if other else page
    assert decode_html(page.encode(charset), header)[0] == page


def test_a_western_page_stays_western():
    page = "<p>L'été dernier, à Besançon, le café était déjà fermé.</p>"
    assert decode_html(page.encode("latin-1"), "text/html; charset=iso-8859-1") == (page, "")
    assert decode_html("<p>Müller, Zoë</p>".encode("latin-1"), "charset=windows-1252")[0] == "<p>Müller, Zoë</p>"
    assert decode_html((PAGE * 9).encode()[:-5] + b"\xe4\xb8", "")[1] == "broken_utf8"


@pytest.mark.parametrize("tag", ["div", "font", "ul", "table"])
def test_nested_tags_take_time_that_grows_with_their_number(tag):
    source = (f"<{tag}>" * 20_000 + "<a>链接</a>" * 5 + "正文内容").encode()
    started = time.perf_counter()
    assert "正文内容" in extract_html(source).text or tag in ("ul", "table", "div")
    assert time.perf_counter() - started < 3.0


def test_a_list_of_links_goes_and_its_neighbours_stay():
    page = ("<body><div><ul>" + "<li><a href=x>首页栏目</a></li>" * 6 + f"</ul><div><p>{TEXT}</p></div></div></body>")
    assert extract_html(page.encode()).text == TEXT


def test_symbols_that_stand_for_letters_stay():
    clean = SpecialSymbols().apply
    assert clean("同理，为了⽅便⽤户使⽤⽂件系统", "") == "同理，为了方便用户使用文件系统"
    assert clean("面积100㎡，重5㎏，㈱，二○○八年，𰀀，⺀", "") == "面积100㎡，重5㎏，㈱，二○○八年，𰀀，⺀"
    assert clean("★好◆的\u200b", "") == "好的"


@pytest.mark.parametrize("verb", ["clean", "dedup"])
def test_one_damaged_file_ends_nothing(tmp_path, capsys, verb):
    import zstandard

    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.jsonl").write_text(json.dumps({"id": "good", "text": TEXT}) + "\n")
    line = json.dumps({"id": "z", "text": TEXT}).encode() + b"\n"
    for name in ("cut.jsonl.zst", "cut.txt.zst", "cut.warc.zst"):
        data = b"".join(archive()) if "warc" in name else line * 2000
        (folder / name).write_bytes(zstandard.ZstdCompressor().compress(data)[:-20])
    for name in ("noise.jsonl.zst", "noise.jsonl.xz", "noise.txt.gz", "noise.parquet"):
        (folder / name).write_bytes(b"noise" * 40)
    words = ["engine.workers=1", *(["--engine", "local"] if verb == "dedup" else [])]
    code, figures = run(capsys, verb, "--input", folder, "--output", tmp_path / "o", *words)
    assert code == 0 and figures["damaged_files"] == {"truncated": 7}
    assert "good" in {line["id"] for line in lines_of(tmp_path / "o")}


def test_separators_inside_a_question_do_not_split_it(tmp_path):
    question = "第一行\u2028第二行\u0085第三行\x0c第四行"
    (tmp_path / "q.jsonl").write_text(json.dumps({"q": question}, ensure_ascii=False) + "\n" * 2 + '{"q": "b"}\n')
    assert list(evaluation_texts(tmp_path / "q.jsonl")) == [question, "b"]
    (tmp_path / "q.txt").write_text(question + "\r\nb\n")
    assert list(evaluation_texts(tmp_path / "q.txt")) == [question, "b"]


@pytest.mark.parametrize("verb", ["clean", "dedup"])
def test_names_of_files_that_are_no_utf8(tmp_path, capsys, verb):
    """As archives of other systems leave them: the bytes of a name are any but / and zero."""
    folder = tmp_path / "语料\udcd6\udcd0"
    folder.mkdir()
    for number, name in enumerate(("a\udcff.txt", "b\udcce\udcc4.jsonl")):
        line = TEXT if number else "另一篇与前文无关的文章，讲的是今天的天气与旅行。" * 8
        (folder / name).write_text(line if name.endswith("txt") else json.dumps({"text": line}) + "\n")
    for form in ("jsonl", "parquet"):
        code, figures = run(capsys, verb, "--input", folder, "--output", tmp_path / f"o\udcff{form}", "--format", form,
                            "engine.workers=1", *(["--engine", "local"] if verb == "dedup" else []))
        assert code == 0 and figures["documents_out"] == 2
    assert run(capsys, "report", "--input", tmp_path / "o\udcffjsonl")[0] == 0
    found = lines_of(tmp_path / "o\udcffjsonl")
    assert [line["source"] for line in found] == ["a\\xff", "b\\xce\\xc4"] and len({line["id"] for line in found}) == 2


def test_damage_to_what_dedup_keeps_is_mended_by_its_next_run(tmp_path):
    """Signatures and decisions, as a kill leaves them: what has changed is made anew, not believed."""
    lines = "".join(json.dumps({"id": str(i), "text": TEXT + "。" * (i % 3)}) + "\n" for i in range(6))
    (tmp_path / "in.jsonl").write_text(lines)
    read = ReadSettings()
    plan = DedupPlan(DedupSettings(), read, tuple(plan_splits([str(tmp_path / "in.jsonl")], read)),
                     str(tmp_path / "work"))
    engine = LocalEngine(1)
    wanted = decide(plan, engine)
    path, marker = plan.decision_path(0), tmp_path / "work" / "decisions" / "done.json"
    whole, told = path.read_bytes(), marker.read_bytes()
    assert whole.count(b"_duplicate") == 5
    for file, damaged in ((path, whole.replace(b"1", b"7")), (path, whole[:-9]), (path, b""), (path, b"\xff"),
                          (marker, told.replace(b"1", b"2")), (marker, b"{")):
        path.write_bytes(whole)
        marker.write_bytes(told)
        file.write_bytes(damaged)
        assert decide(plan, engine) == wanted and path.read_bytes() == whole, damaged[:40]
    path.write_bytes(whole[:-1] + b" ")
    with pytest.raises(UserError, match="damaged"):
        RemoveDuplicates(plan, wanted[1]).begin_part(plan.splits[0])
