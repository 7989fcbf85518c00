"""Generated raw pages: the pipeline removes, mends and keeps what each page's kind says."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import pytest

from data_tools.__main__ import VERBS
from data_tools.synthetic.pages import KINDS, generate_pages
from parallel.common.command import main

REMOVED = {"advertisement": "advertisement", "title_only": "title_only", "foreign": "chinese_share", "short": "length"}
PAGES = 600
CHANGED = {"navigation", "special_symbols", "traditional", "duplicate_paragraphs"}


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    pages, out = str(folder / "pages.jsonl"), str(folder / "out")
    assert main("data_tools", VERBS, ["generate-pages", "--output", pages, "--pages", str(PAGES)]) == 0
    assert main("data_tools", VERBS, ["run", "--config", "configs/data/pangu_alpha.yaml", "--input", pages,
                                      "--output", out, "--workers", "1"]) == 0
    return folder


def read(paths) -> list[dict]:
    return [json.loads(line) for path in paths for line in path.read_text("utf-8").splitlines()]


def test_every_kind_of_page_meets_its_rule_and_articles_stay(cleaned):
    kept = Counter(page["source"] for page in read(cleaned.glob("out/part-*.jsonl")))
    removed = defaultdict(Counter)
    for page in read(cleaned.rglob("removed/**/part-*.jsonl")):
        removed[page["source"]][page["rule"]] += 1
    written = Counter(kind for kind, _ in generate_pages(PAGES))
    for kind, rule in REMOVED.items():
        assert removed[f"web/{kind}"] == {rule: written[kind]} and not kept[f"web/{kind}"]
    for kind in ("navigation", "symbols", "traditional", "repeated"):
        assert not removed[f"web/{kind}"] and kept[f"web/{kind}"] == written[kind]
    # One of an article and its copies stays; the longest, then the smallest id, so it may be a copy.
    copies = ("article", "exact_copy", "near_copy")
    assert all(set(removed[f"web/{kind}"]) <= {"exact_duplicate", "near_duplicate"} for kind in copies)
    assert sum(kept[f"web/{kind}"] for kind in copies) == written["article"]


def test_what_is_repaired_reads_as_an_article_does(cleaned):
    pages = read(cleaned.glob("out/part-*.jsonl"))
    text = "".join(page["text"] for page in pages)
    assert not set(text) & set("★◆■\u200b\ufeff\ue000\ufffd") and "首页" not in text and "版权所有" not in text
    assert not set(text) & set("們時說這個") and "！！！！！！！" not in text
    report = json.loads((cleaned / "out" / ".state" / "run.json").read_text("utf-8"))["steps"][0]
    assert set(report["figures"]["changed_by_rule"]) >= CHANGED
    assert report["figures"]["repaired"].keys() == {"broken_utf8", "gb18030"}


def test_a_function_of_the_seed_and_longer_runs_begin_with_shorter_ones():
    some = list(generate_pages(50, seed=3))
    assert some == list(generate_pages(80, seed=3))[:50] and some != list(generate_pages(50, seed=4))
    assert {kind for kind, _ in generate_pages(PAGES)} == {name for name, _, _ in KINDS}
    assert abs(sum(share for _, share, _ in KINDS) - 1) < 1e-9


def test_no_pages_is_an_error(tmp_path, capsys):
    assert main("data_tools", VERBS, ["generate-pages", "--output", str(tmp_path / "p.jsonl"), "--pages", "0"]) == 2
    assert "--pages: must lie between" in capsys.readouterr().err
