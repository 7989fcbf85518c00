"""All settings of the data tools: one YAML for the whole pipeline, of which each verb uses its blocks."""

from __future__ import annotations

from typing import Literal

from data_tools import rules
from data_tools.classifier.train import TrainClassifierSettings
from data_tools.compare_versions import ComparisonSettings
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
    """The pipeline as a whole."""

    steps: list[Literal["clean", "filter", "dedup", "paragraphs", "decontaminate", "mix"]] = [
        "clean", "filter", "dedup", "paragraphs", "decontaminate", "mix"]
    """Steps in their order; one that has nothing to do (no word list, no weights, ...) is left out."""
    keep_intermediate: bool = False
    """Keep the documents after every step (under .work), not of the last one only."""


class DataSettings(Settings):
    """From raw pages to a training mixture."""

    read: ReadSettings = ReadSettings()
    """How inputs are read."""
    rules: RulesSettings = RulesSettings()
    """The cleaning rules, one block each; they run in the order in which they stand here."""
    filter: FilterSettings = FilterSettings()
    """Sensitive words, spam and quality."""
    classifier: TrainClassifierSettings = TrainClassifierSettings()
    """How `train-classifier` trains."""
    paragraphs: ParagraphSettings = ParagraphSettings()
    """Paragraphs that stand in several documents."""
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
