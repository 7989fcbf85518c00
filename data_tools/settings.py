"""All settings of the data tools: one YAML for the whole pipeline, of which each verb uses its blocks."""

from __future__ import annotations

from typing import Any, Literal

import pydantic

from data_tools import rules
from data_tools.classifier.settings import TrainClassifierSettings
from data_tools.dedup.plan import DedupSettings
from data_tools.documents import OutputFormat
from data_tools.engines.base import EngineSettings
from data_tools.records import ReadSettings
from data_tools.steps.decontaminate import DecontaminateSettings
from data_tools.steps.filter import FilterSettings
from data_tools.steps.mix import MixSettings
from data_tools.steps.paragraphs import ParagraphSettings
from parallel.common.settings import Settings

RulesSettings = rules.settings_class()


class RunSettings(Settings):
    """All steps of the pipeline."""

    steps: list[Literal["clean", "filter", "dedup", "paragraphs", "decontaminate", "mix"]] = [
        "clean", "filter", "dedup", "paragraphs", "decontaminate", "mix"]
    """Steps in their order; one that has nothing to do (no word list, no weights, ...) is left out."""
    keep_intermediate: bool = False
    """Keep the documents after every step (under .work), not of the last one only."""


class ComparisonSettings(Settings):
    """The comparison of cleaned versions."""

    pangu_config: str = "configs/pangu/tiny.yaml"
    """Config of the model: configs/pangu/350m.yaml as in the paper, or tiny.yaml."""
    pangu: dict[str, Any] = {}
    """Further keys of that config, such as {train.steps: 1000}; the same for all versions."""
    characters: int = pydantic.Field(2_000_000, ge=1)
    """Characters sampled from each version; a version with fewer is an error, so that sizes stay equal."""
    vocabulary_size: int | None = None
    """Pieces of the vocabulary trained on all samples together; null = what the config says."""
    tokenizer: str | None = None
    """A finished vocabulary to use instead of one trained on the samples."""
    seed: int = 1
    """Of the samples."""


class DataSettings(Settings):
    """From raw pages to a training mixture."""

    read: ReadSettings = ReadSettings()
    """How inputs are read."""
    rules: RulesSettings = RulesSettings()
    """The cleaning rules, one block each; they run in the order given here."""
    filter: FilterSettings = FilterSettings()
    """Sensitive words, spam and quality."""
    classifier: TrainClassifierSettings = TrainClassifierSettings()
    """How `train-classifier` trains."""
    paragraphs: ParagraphSettings = ParagraphSettings()
    """Paragraphs that occur in several documents."""
    decontaminate: DecontaminateSettings = DecontaminateSettings()
    """Documents that hold texts of the evaluation sets."""
    mix: MixSettings = MixSettings()
    """The training mixture."""
    quality: ComparisonSettings = ComparisonSettings()
    """The comparison of cleaned versions by training."""
    run: RunSettings = RunSettings()
    """Which steps `run` runs."""
    dedup: DedupSettings = DedupSettings()
    """Exact and near duplicates."""
    engine: EngineSettings = EngineSettings()
    """Where the work runs."""
    format: OutputFormat = "jsonl"
    """Format of the documents written."""
