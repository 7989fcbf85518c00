"""Lines of progress where stderr is no terminal."""

import pytest

from parallel.common import progress
from parallel.common.progress import Bar, duration


@pytest.mark.parametrize("seconds, text", [
    (0.4, "0 s"), (119, "119 s"), (125, "2 min 5 s"), (7199, "119 min 59 s"), (7265, "2 h 1 min"),
    (3 * 86400 + 7200, "3 d 2 h")])
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def lines_of(monkeypatch, capsys, total):
    now = iter(range(0, 10_000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    with Bar(total, "train") as bar:
        bar.advance(1, loss="2.31")
    return capsys.readouterr().err.splitlines()


def test_a_line_says_how_long_is_left_unless_there_is_no_end(monkeypatch, capsys):
    first, *_ = lines_of(monkeypatch, capsys, 10)
    assert first == "train 1/10  40 s  eta 6 min 0 s  loss 2.31"
    for total in (10**9, None):
        first, *_ = lines_of(monkeypatch, capsys, total)
        assert "eta" not in first and "loss 2.31" in first
