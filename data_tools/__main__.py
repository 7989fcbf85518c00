"""Command line: `python -m data_tools <verb>`. A new verb is one line in VERBS."""

from __future__ import annotations

import sys

from data_tools import flags
from data_tools.synthetic.generate import add_world_arguments
from parallel.common.command import Verb, main

_SETTINGS = "data_tools.settings:DataSettings"
VERBS = [
    Verb("run", "data_tools.verbs:run_all", "the whole pipeline: clean, filter, dedup, decontaminate, mix, report",
         settings=_SETTINGS, arguments=flags.add_input_output),
    Verb("world", "data_tools.synthetic.generate:run_world",
         "generate a Chinese corpus and its questions from a small world",
         arguments=add_world_arguments),
    Verb("clean", "data_tools.verbs:run_clean", "the eight cleaning rules over raw documents",
         settings=_SETTINGS, arguments=flags.add_input_output),
    Verb("filter", "data_tools.verbs:run_filter", "sensitive words, spam and quality filters",
         settings=_SETTINGS, arguments=flags.add_input_output),
    Verb("train-classifier", "data_tools.classifier.train:run_train_classifier",
         "a spam or quality classifier from good and bad documents",
         settings=_SETTINGS, arguments=flags.add_classifier_arguments),
    Verb("dedup", "data_tools.verbs:run_dedup", "exact and near duplicates across all inputs",
         settings=_SETTINGS, arguments=flags.add_dedup_arguments),
    Verb("paragraphs", "data_tools.verbs:run_paragraphs", "leave a paragraph of several documents in one of them",
         settings=_SETTINGS, arguments=flags.add_input_output),
    Verb("decontaminate", "data_tools.verbs:run_decontaminate", "remove documents that hold evaluation texts",
         settings=_SETTINGS, arguments=flags.add_decontaminate_arguments),
    Verb("mix", "data_tools.verbs:run_mix", "the training mixture by the weights of its categories",
         settings=_SETTINGS, arguments=flags.add_input_output),
    Verb("vocabulary", "data_tools.pangu_call:run_vocabulary", "a vocabulary of the documents (calls pangu vocabulary)",
         arguments=flags.add_pangu_arguments),
    Verb("pack", "data_tools.pangu_call:run_pack", "the documents as training records (calls pangu pack)",
         arguments=flags.add_pangu_arguments),
    Verb("quality-loop", "data_tools.quality_loop:run_quality_loop",
         "compare cleaned versions by the perplexity of models trained on them",
         settings=_SETTINGS, arguments=flags.add_quality_arguments),
    Verb("report", "data_tools.verbs:run_report", "an HTML report of an output folder",
         arguments=flags.add_report_arguments),
]

if __name__ == "__main__":
    sys.exit(main("data_tools", VERBS))
