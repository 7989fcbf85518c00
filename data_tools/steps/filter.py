"""The filters after the rules (PanGu-alpha paper, section 3.1.1): sensitive words, spam, quality."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pydantic

from data_tools.classifier.hashed_ngrams import LinearClassifier
from data_tools.parts import Drop, PartFigures, Step, digest_of
from data_tools.records import Document, Split
from data_tools.rules._aho_corasick import KeywordFinder, read_word_list
from parallel.common.settings import Settings


class SensitiveSettings(Settings):
    """Sensitive words; off without a list, which is the user's own (the paper's 724 words are not published)."""

    words_file: str | None = None
    """File with one word a line; null = off."""
    allowed: int = 3
    """Documents with more hits than this are removed (three in the paper)."""
    distinct: bool = False
    """Count different words instead of all hits; the paper does not say which."""


class ClassifierSettings(Settings):
    """A classifier made by `train-classifier`, and what to do with its score; off without a model."""

    model: str | None = None
    """File of the classifier; null = off."""
    keep: Literal["threshold", "pareto"] = "threshold"
    """`threshold`: keep scores of at least `threshold`. `pareto`: keep if Pareto(alpha) > 1 - score (GPT-3, appendix
    A), which lets some low-scored documents through."""
    threshold: float = pydantic.Field(0.5, ge=0, le=1)
    """Smallest score kept."""
    alpha: float = pydantic.Field(9.0, gt=0)
    """Shape of the Pareto distribution (9 in GPT-3)."""
    seed: int = 1
    """Of the Pareto numbers; a document's number depends on the seed, its id and its text only."""


class QualityFilterSettings(ClassifierSettings):
    """A classifier whose score decides by GPT-3's rule unless set otherwise."""

    keep: Literal["threshold", "pareto"] = "pareto"
    """As in `spam`, with another default."""


class FilterSettings(Settings):
    """The three filters; each is off until it has its file."""

    sensitive: SensitiveSettings = SensitiveSettings()
    """Sensitive words."""
    spam: ClassifierSettings = ClassifierSettings()
    """Spam classifier: positives are good documents, negatives junk. (The paper uses fastText.)"""
    quality: QualityFilterSettings = QualityFilterSettings()
    """Quality classifier, after GPT-3."""

    def active(self) -> bool:
        """Whether any filter has its file."""
        return any((self.sensitive.words_file, self.spam.model, self.quality.model))


class FilterStep(Step):
    """Runs the filters that have their files."""

    name = "filter"

    def __init__(self, settings: FilterSettings) -> None:
        self.settings = settings
        # Read here once, so that a wrong file is reported before any work.
        if settings.sensitive.words_file is not None:
            read_word_list(settings.sensitive.words_file)
        for classifier in (settings.spam, settings.quality):
            if classifier.model is not None:
                LinearClassifier.load(classifier.model)

    def digest_source(self, split: Split) -> Any:
        files = [self.settings.sensitive.words_file, self.settings.spam.model, self.settings.quality.model]
        contents = [file_digest(path) for path in files if path is not None]
        return [self.settings.model_dump(mode="json"), contents]

    def process(self, document: Document, row: int, figures: PartFigures) -> Iterator[Document]:
        self._sensitive(document)
        self._classifier("spam", self.settings.spam, document)
        self._classifier("quality", self.settings.quality, document)
        yield document

    def _sensitive(self, document: Document) -> None:
        settings = self.settings.sensitive
        if settings.words_file is None:
            return
        hits, words = KeywordFinder.of(settings.words_file, [], []).count(document.text)
        count = len(words) if settings.distinct else hits
        if count > settings.allowed:
            raise Drop("sensitive_words", f"{count} hits: {', '.join(sorted(words)[:10])}")

    @staticmethod
    def _classifier(name: str, settings: ClassifierSettings, document: Document) -> None:
        if settings.model is None:
            return
        score = _classifier(settings.model, Path(settings.model).stat().st_mtime_ns).score(document.text)
        if settings.keep == "threshold":
            if score < settings.threshold:
                raise Drop(name, f"score {score:.4f} < {settings.threshold}", score=score)
        elif not keep_by_pareto(score, settings.alpha, settings.seed, document):
            raise Drop(name, f"score {score:.4f}, below 1 - Pareto({settings.alpha:g})", score=score)


def keep_by_pareto(score: float, alpha: float, seed: int, document: Document) -> bool:
    """GPT-3's rule: keep if a number from the Pareto (Lomax) distribution exceeds 1 - score."""
    return lomax(uniform(seed, document.id, document.text), alpha) > 1.0 - score


def lomax(share: float, alpha: float) -> float:
    """Quantile of the distribution that `numpy.random.pareto(alpha)` draws from."""
    return math.expm1(-math.log1p(-share) / alpha)


def uniform(seed: int, *parts: str) -> float:
    """A number in [0, 1) that depends on the seed and the parts only."""
    digest = hashlib.blake2b("\x1f".join([str(seed), *parts]).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


@functools.lru_cache(maxsize=8)
def _classifier(path: str, changed: int) -> LinearClassifier:
    return LinearClassifier.load(path)


def file_digest(path: str) -> str:
    """Digest of the content of a file (word list, classifier, index)."""
    with open(path, "rb") as file:
        return digest_of(hashlib.file_digest(file, "blake2b").hexdigest()) if hasattr(hashlib, "file_digest") \
            else digest_of(hashlib.blake2b(file.read()).hexdigest())
