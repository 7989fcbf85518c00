"""Requests kept as they came, with their scores, to be scored again: the same features and the same score, or something
is wrong. One JSON object a line; needs no MindSpore but to score.

    {"time": 1.7e9, "checkpoint": ".../step_00000100", "request": {"user": ..., "candidates": ...}, "scores": [[...]]}
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from parallel.common.errors import UserError
from parallel.common.files import explain_os_error
from parallel.common.progress import info
from parallel.common.structured import BadText, parse_json

MAX_LINE = 64 << 20


class RequestLog:
    """Appends requests to a file until it is as long as allowed; then it stops and says so, once.

    Args:
        path: of the file, appended to.
        most: bytes.

    Raises:
        UserError: it cannot be opened.
    """

    def __init__(self, path: str | Path, most: int) -> None:
        self.path, self.most, self.lock, self.full = Path(path), most, threading.Lock(), False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise explain_os_error(error, self.path) from error

    def add(self, raw: bytes, trained: Any, scores_CK: np.ndarray) -> None:
        """One request's body, the model that scored it, and its candidates' scores."""
        line = json.dumps({"time": time.time(), "checkpoint": str(trained.path), "request": parse_json(raw),
                           "scores": scores_CK.tolist()}, ensure_ascii=True) + "\n"
        with self.lock:
            if self.full:
                return
            if self.file.tell() + len(line) > self.most:
                self.full = True
                info(f"{self.path}: full ({self.most >> 20} MB); further requests are not logged")
                return
            self.file.write(line)
            self.file.flush()

    def close(self) -> None:
        """Ends it."""
        self.file.close()


def read_log(path: str | Path) -> list[dict]:
    """The lines of a request log.

    Raises:
        UserError: missing, or a line is none.
    """
    found = []
    try:
        with Path(path).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    entry = parse_json(line) if len(line) <= MAX_LINE else None
                except BadText:
                    entry = None
                if not isinstance(entry, dict) or not {"request", "scores", "checkpoint"} <= set(entry):
                    raise UserError("is no logged request", where=f"{path}, line {number}")
                found.append(entry)
    except OSError as error:
        raise explain_os_error(error, path) from error
    return found


def compare(path: str | Path, checkpoint: str | None, most: float = 1e-5) -> dict[str, Any]:
    """Scores logged requests again by the checkpoint that scored them (or another) and compares.

    Args:
        path: of the log.
        checkpoint: instead of each request's own.
        most: difference of two scores that counts as none.

    Raises:
        UserError: a request cannot be read by the checkpoint, or it cannot be loaded.
    """
    from recsys.saved_model import load
    from recsys.serving.engine import Scorer
    from recsys.serving.requests import read_request
    from recsys.serving.settings import EngineSettings
    from recsys.serving.state_cache import StateCache

    scorers: dict[str, tuple] = {}
    worst, differing, candidates, entries = 0.0, 0, 0, read_log(path)
    for entry in entries:
        name = checkpoint or entry["checkpoint"]
        if name not in scorers:
            trained = load(name)
            scorers[name] = trained, Scorer(trained.model, EngineSettings(candidates=[64, 1024]), StateCache(0),
                                            trained.tables)
        trained, scorer = scorers[name]
        ask = read_request(entry["request"], trained, 1 << 20)
        scores = scorer.score([(ask.ids, ask.numbers)])[0]
        logged = np.asarray(entry["scores"], np.float64)
        if logged.shape != scores.shape:
            raise UserError("has other candidates or tasks than were logged", where=str(path),
                            value=f"{list(scores.shape)} for {list(logged.shape)}")
        gap = float(np.abs(logged - scores).max())
        worst, candidates = max(worst, gap), candidates + len(scores)
        differing += gap > most
    return {"requests": len(entries), "candidates": candidates, "max_score_difference": worst, "differing": differing,
            "checkpoints": sorted(scorers)}
