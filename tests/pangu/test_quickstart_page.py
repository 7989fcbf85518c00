"""The page of a quickstart: what it shows, and that it needs nothing else."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

from pangu.quickstart_page import loss_curve, write_page

FIGURES = {
    "pack": {"documents": 7463, "tokens": 512345}, "vocabulary": {"vocabulary_size": 1200},
    "train": {"steps": 300, "tokens_per_second": 9876.5, "validation_perplexity": 5.25},
    "evaluate": {"results": {"arithmetic": {"accuracy": 0.8, "chance": 0.25}}},
    "generate": {"prompts": ["问：<3加4>\n答："], "outputs": ["7 & 8\n"]},
}
RECORDS = [{"step": step, "loss": 8.0 / step} for step in range(1, 2001)] + [
    {"step": 1000, "validation_loss": 1.5}, {"step": 5, "loss": None}, {"step": 6, "loss": float("inf")}]


class Reader(HTMLParser):
    """Text, and what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.fetched = "", []

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attrs):
        self.fetched += [tag] if tag in ("script", "link", "img", "iframe") else []
        self.fetched += [value for name, value in attrs if name in ("src", "href")]


def test_everything_is_on_one_page_that_needs_no_other(tmp_path):
    write_page(tmp_path / "report.html", "A <title>", FIGURES, {"pack": 30.0, "train": 90.0}, RECORDS)
    page = (tmp_path / "report.html").read_text("utf-8")
    reader = Reader()
    reader.feed(page)
    assert not reader.fetched and "http" not in page
    for shown in ("A <title>", "7,463", "512,345", "5.25", "9,876", "arithmetic", "80.0%", "25%", "问：<3加4>\n答：",
                  "7 & 8\n", "Where the 120 seconds went", "90.0"):
        assert shown in reader.text, shown
    assert "width:75.0%" in page  # training's share of the time


def test_own_text_has_no_questions_and_an_empty_log_no_curve(tmp_path):
    figures = {name: value for name, value in FIGURES.items() if name != "evaluate"}
    figures["train"] = {**figures["train"], "validation_perplexity": None}
    write_page(tmp_path / "report.html", "own", figures, {"train": 0.0}, [])
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "Accuracy" not in page and "nothing was logged" in page


def test_curves_are_in_the_picture_and_fall_as_the_loss_falls():
    picture = ElementTree.fromstring(re.search("<svg.*</svg>", loss_curve(RECORDS))[0])
    lines = [[tuple(map(float, point.split(","))) for point in line.get("points").split()]
             for line in picture.iter("polyline")]
    training, validation = lines
    assert len(training) <= 1200 and len(validation) == 1
    assert all(0 <= x <= 720 and 0 <= y <= 260 for line in lines for x, y in line)
    assert [x for x, _ in training] == sorted(x for x, _ in training)
    assert [y for _, y in training] == sorted(y for _, y in training)  # downwards on the page
