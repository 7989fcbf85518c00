"""Hashed character n-gram features and the linear classifier on them.

GPT-3 (Brown et al. 2020, appendix A) separates good pages from bad by logistic regression on hashed token features. Its
tokens are words; here they are characters and pairs of characters, which need no segmenter (chosen here).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.dedup.normalise import normalise
from data_tools.dedup.signature import shingle_hashes
from parallel.common.errors import UserError
from parallel.common.files import atomic_write
from parallel.common.structured import parse_object

FORMAT = "data_tools linear classifier 1"
_MAX_BUCKETS = 1 << 24
_MAX_MODEL_BYTES = 1 << 30


def hashed_counts(text: str, buckets: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of a text: (bucket numbers int64 [features], values float64 [features]).

    The value is log(1 + count), scaled so that the features of a text have Euclidean length 1: long texts do not
    weigh more. Characters come in the normal form of `dedup.normalise`.

    Args:
        buckets: number of features.
        longest: n-grams of 1 to this many characters.
    """
    codes = normalise(text)
    hashes = [shingle_hashes(codes, n) + np.uint64(n) for n in range(1, longest + 1)]
    numbers, counts = np.unique(np.concatenate(hashes) % np.uint64(buckets), return_counts=True)
    values = np.log1p(counts.astype(np.float64))
    length = np.sqrt((values**2).sum())
    return numbers.astype(np.int64), values / length if length else values


@dataclass(frozen=True)
class LinearClassifier:
    """Logistic regression over hashed features: `score` is the probability of a good document."""

    weights: np.ndarray
    intercept: float
    longest: int

    @property
    def buckets(self) -> int:
        return len(self.weights)

    def score(self, text: str) -> float:
        """Probability in (0, 1) that the text is of the positive class."""
        numbers, values = hashed_counts(text, self.buckets, self.longest)
        margin = float(self.weights[numbers] @ values) + self.intercept
        return float(1.0 / (1.0 + np.exp(-np.clip(margin, -500.0, 500.0))))

    def save(self, path: str | Path) -> None:
        """Writes an .npz with the weights and a JSON header; no pickle."""
        header = json.dumps({"format": FORMAT, "intercept": self.intercept, "longest": self.longest})
        with atomic_write(path, "wb") as file:
            np.savez_compressed(file, weights=self.weights, header=np.frombuffer(header.encode(), np.uint8))

    @staticmethod
    def load(path: str | Path) -> LinearClassifier:
        """Reads what `save` wrote.

        Raises:
            UserError: missing, damaged, too large or of another format.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError("no such classifier", where=path, hint="train one: python -m data_tools train-classifier")
        if path.stat().st_size > _MAX_MODEL_BYTES:
            raise UserError("classifier file is too large", where=path, value=path.stat().st_size)
        try:
            with np.load(path, allow_pickle=False) as archive:
                weights = archive["weights"].astype(np.float64)
                header: dict[str, Any] = parse_object(archive["header"].tobytes())
            if header["format"] != FORMAT or weights.ndim != 1 or not 0 < len(weights) <= _MAX_BUCKETS:
                raise ValueError("another format")
            return LinearClassifier(weights, float(header["intercept"]), int(header["longest"]))
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise UserError(f"not a classifier of train-classifier: {error}", where=path) from None
        except Exception as error:  # zipfile.BadZipFile and kin
            raise UserError(f"damaged classifier: {error}", where=path) from None
