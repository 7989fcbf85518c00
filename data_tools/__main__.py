"""Command line: `python -m data_tools <verb>`. A new verb is one line in VERBS."""

from __future__ import annotations

import sys

from parallel.common.command import Verb, main

_SETTINGS = "data_tools.settings:DataSettings"
VERBS = [
    Verb("run", "data_tools.verbs:run_all", "all steps: clean, filter, dedup, decontaminate, mix, report",
         settings=_SETTINGS, arguments="data_tools.flags:add_input_output"),
    Verb("generate-corpus", "data_tools.synthetic.generate:run_generate_corpus",
         "generate a small synthetic Chinese corpus and questions about it",
         arguments="data_tools.synthetic.generate:add_arguments"),
    Verb("generate-pages", "data_tools.synthetic.pages:run_generate_pages",
         "generate raw pages with every fault that the pipeline removes or repairs",
         arguments="data_tools.synthetic.pages:add_arguments"),
    Verb("clean", "data_tools.verbs:run_clean", "the eight cleaning rules over raw documents",
         settings=_SETTINGS, arguments="data_tools.flags:add_input_output"),
    Verb("filter", "data_tools.verbs:run_filter", "sensitive words, spam and quality filters",
         settings=_SETTINGS, arguments="data_tools.flags:add_input_output"),
    Verb("train-classifier", "data_tools.classifier.train:run_train_classifier",
         "a spam or quality classifier from good and bad documents",
         settings=_SETTINGS, arguments="data_tools.flags:add_classifier_arguments"),
    Verb("dedup", "data_tools.verbs:run_dedup", "exact and near duplicates across all inputs",
         settings=_SETTINGS, arguments="data_tools.flags:add_dedup_arguments"),
    Verb("dedup-paragraphs", "data_tools.verbs:run_paragraphs",
         "keep a paragraph that several documents share in one of them",
         settings=_SETTINGS, arguments="data_tools.flags:add_input_output"),
    Verb("decontaminate", "data_tools.verbs:run_decontaminate", "remove documents that hold evaluation texts",
         settings=_SETTINGS, arguments="data_tools.flags:add_decontaminate_arguments"),
    Verb("mix", "data_tools.verbs:run_mix", "the training mixture by the weights of its categories",
         settings=_SETTINGS, arguments="data_tools.flags:add_input_output"),
    Verb("compare-versions", "data_tools.compare_versions:run_compare_versions",
         "compare cleaned versions by the perplexity of models trained on them",
         settings=_SETTINGS, arguments="data_tools.flags:add_comparison_arguments"),
    Verb("report", "data_tools.verbs:run_report", "an HTML report of an output folder",
         arguments="data_tools.flags:add_report_arguments"),
]

if __name__ == "__main__":
    sys.exit(main("data_tools", VERBS))
