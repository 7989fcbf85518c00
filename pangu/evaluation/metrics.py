"""Scores of generated answers in Chinese, and how sure a mean is.

Everything is compared after NFKC normalisation of both sides: the tokenizer turns full-width punctuation and letters
into ASCII, so a right answer would differ from its reference by that alone.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from parallel.common.errors import UserError

RESAMPLES = 1000
_AT_ONCE = 4_000_000


def normalize(text: str) -> str:
    """NFKC, lower case, without leading and trailing space."""
    return unicodedata.normalize("NFKC", text).lower().strip()


def segment(text: str) -> list[str]:
    """Mixed segmentation: every Chinese character is a token, a run of other letters and digits is one; punctuation
    and spaces part tokens and are none (rule of the CMRC2018 task, https://github.com/ymcui/cmrc2018)."""
    tokens, run = [], ""
    for char in normalize(text):
        if _is_han(char) or not char.isalnum():
            if run:
                tokens.append(run)
            run = ""
            if _is_han(char):
                tokens.append(char)
        else:
            run += char
    return [*tokens, run] if run else tokens


def _is_han(char: str) -> bool:
    code = ord(char)
    return 0x3400 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or 0x20000 <= code <= 0x3FFFF


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 when the prediction equals a reference but for punctuation and spaces."""
    return float(any(strip_punctuation(prediction) == strip_punctuation(text) for text in references))


def begins_with(prediction: str, references: Sequence[str]) -> float:
    """1 when the prediction, punctuation removed, begins with a reference: how cloze answers of free length count."""
    bare = strip_punctuation(prediction)
    return float(any((wanted := strip_punctuation(text)) and bare.startswith(wanted) for text in references))


def strip_punctuation(text: str) -> str:
    """The normalized text without punctuation, symbols, spaces and control characters."""
    return "".join(char for char in normalize(text) if unicodedata.category(char)[0] not in "PSZC")


def f1(prediction: str, references: Sequence[str]) -> float:
    """Best F1 over the references of the longest common substring of tokens (CMRC2018 counts it so, not a bag)."""
    return max((_f1(segment(prediction), segment(text)) for text in references), default=0.0)


def _f1(prediction: list[str], reference: list[str]) -> float:
    common = _longest_common_run(prediction, reference)
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def _longest_common_run(first: list[str], second: list[str]) -> int:
    lengths, best = [0] * (len(second) + 1), 0
    for token in first:
        previous = 0
        for index, other in enumerate(second, start=1):
            previous, lengths[index] = lengths[index], previous + 1 if token == other else 0
            best = max(best, lengths[index])
    return best


def rouge(prediction: str, references: Sequence[str], kind: str) -> float:
    """Best Rouge F over the references, on jieba words (package rouge-chinese).

    Args:
        prediction: generated text; an empty one scores 0.
        references: accepted answers.
        kind: "rouge-1" or "rouge-l".

    Raises:
        UserError: the package is not installed.
    """
    words = _words(prediction)
    if not words:
        return 0.0
    scores = [_rouge().get_scores(words, wanted)[0][kind]["f"] for text in references if (wanted := _words(text))]
    return max(scores, default=0.0)


def _words(text: str) -> str:
    return " ".join(word for word in _segmenter().cut(normalize(text)) if word.strip())


@cache
def _segmenter() -> Any:
    from pangu.data.segmentation import Segmenter

    return Segmenter("auto")


@cache
def _rouge() -> Any:
    try:
        from rouge_chinese import Rouge
    except ImportError:
        raise UserError("Rouge needs the package rouge-chinese", hint="pip install 'pangu-rankers[evaluate]'") from None
    return Rouge(metrics=["rouge-1", "rouge-l"])


def assign(costs: np.ndarray) -> np.ndarray:
    """The choice of each blank that makes the sum of costs [blanks, choices] least, no choice taken twice.

    Raises:
        UserError: more blanks than choices, or scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise UserError("filling several blanks needs the package scipy",
                        hint="pip install 'pangu-rankers[evaluate]'") from None
    if costs.shape[0] > costs.shape[1]:
        raise UserError("a passage has more blanks than choices", value=list(costs.shape))
    _, columns = linear_sum_assignment(costs)
    return columns


def bootstrap(values: Sequence[float], statistic: Callable[[np.ndarray], np.ndarray] | None = None,
              groups: Sequence[object] | None = None, resamples: int = RESAMPLES, seed: int = 1) -> float:
    """Standard error of the mean (or of `statistic` of the mean) by resampling instances with replacement.

    Args:
        values: one per instance.
        statistic: applied to the means, for example `numpy.exp`.
        groups: instances of one group (questions on one passage) are drawn together.
        resamples: how many samples are drawn.
        seed: of the draws.
    """
    values = np.asarray(values, np.float64)
    _, member = np.unique([str(group) for group in groups], return_inverse=True) if groups is not None else (
        None, np.arange(len(values)))
    sums, counts = np.bincount(member, values), np.bincount(member)
    if len(sums) < 2:
        return 0.0
    rng, means = np.random.default_rng(seed), []
    for begin in range(0, resamples, step := max(1, _AT_ONCE // len(sums))):
        drawn = rng.integers(0, len(sums), (min(step, resamples - begin), len(sums)))
        means.append(sums[drawn].sum(-1) / counts[drawn].sum(-1))
    means = np.concatenate(means)
    return float((statistic(means) if statistic is not None else means).std(ddof=1))
